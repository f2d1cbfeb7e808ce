"""The cases of ``sparsekit bench`` under pytest-benchmark: the same problems, checks, rivals and rows, its statistics.

    python -m pytest benchmarks/ --suite layers --level quick -k linear --benchmark-json=out.json --rows results

``extra_info`` of a benchmark is the row that ``sparsekit bench`` would print, measured interleaved with its rivals;
``--rows`` writes the file that its ``--json`` does. pytest-benchmark's own statistics are of ours alone.
"""

from dataclasses import asdict

import pytest

from sparsekit.bench.cases import select
from sparsekit.bench.facts import environment, pinned
from sparsekit.bench.models import Unavailable
from sparsekit.bench.results import Results
from sparsekit.bench.runner import Session, begin, prepare, run_case


@pytest.fixture(scope="session")
def running(pytestconfig, cases):
    """The session and the file of rows, as ``sparsekit bench`` would make them."""
    option = pytestconfig.getoption
    facts = environment(option("device"))
    with pinned(option("threads")) as threads:
        session = Session(option("device"), option("level"), graphs=option("graphs"))
        results = Results(option("rows"), facts, threads, again=True)
        begin(cases, session, results, facts, print)
        yield session, results
        results.save()


@pytest.fixture(scope="session")
def cases(pytestconfig):
    return select(*map(pytestconfig.getoption, ("suite", "level")), where=pytestconfig.getoption("device"))


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    chosen = select(option("suite"), option("level"), where=option("device"))
    metafunc.parametrize("case", chosen, ids=lambda case: f"{case.suite}/{case.name}")


def test_case(case, running, benchmark):
    session, results = running
    try:
        if case.work == "memory":
            row = benchmark.pedantic(run_case, (case, session))
        else:
            ready = prepare(case, session)  # checks the result first
            row = ready.row()
            benchmark(ready.thunks["sparse"])
    except Unavailable as reason:
        pytest.skip(str(reason))
    except Exception as error:
        results.fail(case, str(error))
        raise
    kept = asdict(row)
    results.keep(kept)
    benchmark.extra_info.update(kept)
