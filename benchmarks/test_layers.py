"""Every case of ``sparsekit bench`` under pytest-benchmark: ``pytest benchmarks/ --benchmark-group-by=group``.

Sparse and dense stand in one group; compare them inside one run only.
"""

import pytest
import torch
from torch import nn

from sparsekit import SparseConv2d, SparseLinear
from sparsekit.bench import _LAYERS, SUITES, _error, _rivals, _thunk


@pytest.mark.parametrize("who", ["dense", "dense channels_last", "torch.sparse csr", "sparse"])
@pytest.mark.parametrize("case", SUITES["quick"] + SUITES["overhead"], ids=lambda case: case.name)
def test_layer(benchmark, case, who):
    generator = torch.Generator().manual_seed(0)
    dense = _LAYERS[case.layer][0]()
    mask = torch.rand(dense.weight.shape, generator=generator) < case.density
    with torch.no_grad():
        dense.weight.mul_(mask)
    x = torch.randn(case.input, generator=generator)
    kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
    sparse = kind.from_dense(dense, mask, "csr")
    assert _error(sparse, dense, x) < 1e-4
    thunks, notes = _rivals(dense, x, case.work)
    thunks["sparse"] = _thunk(sparse, x, case.work)
    if who not in thunks:
        pytest.skip(notes.get(who.split()[0], f"no {who} for this layer"))
    benchmark.group = case.name
    benchmark(thunks[who])
