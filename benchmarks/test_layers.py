"""Cases of ``sparsekit bench`` under pytest-benchmark: ``pytest benchmarks/``.

Sparse and dense stand in one group; compare them inside one run only.
"""

import pytest

from sparsekit.bench import SUITES, set_up


@pytest.mark.parametrize("who", ["dense", "dense channels_last", "torch.sparse csr", "sparse"])
@pytest.mark.parametrize("case", SUITES["quick"] + SUITES["overhead"], ids=lambda case: case.name)
def test_layer(benchmark, case, who):
    setup = set_up(case)
    if who not in setup.thunks:
        pytest.skip(setup.notes.get(who.split()[0], f"no {who} for this layer"))
    benchmark.group = case.name
    benchmark(setup.thunks[who])
