"""The cases of ``sparsekit bench`` under pytest-benchmark: the same problems, checks and rivals, its statistics.

    python -m pytest benchmarks/ --suite layers --level quick -k linear --benchmark-json=out.json

``extra_info`` of a benchmark is the row that ``sparsekit bench`` would print, measured interleaved with its rivals.
"""

from dataclasses import asdict

import pytest

from sparsekit.bench.cases import select
from sparsekit.bench.problem import pose, sparse_thunk
from sparsekit.bench.runner import Session, run_case
from sparsekit.bench.timing import probe


@pytest.fixture(scope="session")
def session(pytestconfig):
    return Session(level=pytestconfig.getoption("level"), rates=probe())


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    timed = [c for c in select(option("suite"), option("level")) if c.work != "memory" and c.suite != "models"]
    metafunc.parametrize("case", timed, ids=lambda case: f"{case.suite}/{case.name}")


def test_case(case, session, benchmark):
    pytest.importorskip("pytest_benchmark")
    benchmark.extra_info.update(asdict(run_case(case, session)))  # checks the result first
    _, thunk = sparse_thunk(pose(case))
    benchmark(thunk)
