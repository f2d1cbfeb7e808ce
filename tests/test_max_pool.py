"""The pooling kernel: torch's own numbers to the bit, NaN included, for any window, size and number of threads."""

import pytest
import torch
import torch.nn.functional as F
from checks import poison, randn

ops = torch.ops.sparsekit
WINDOWS = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), ((2, 3), (1, 2), (1, 0)), ((1, 4), (2, 1), (0, 2)), (1, 1, 0)]


def pairs(window):
    return [[n, n] if isinstance(n, int) else list(n) for n in window]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_numbers_are_those_of_torch(window, dtype):
    for size in ((1, 5, 5), (3, 7, 112), (2, 33, 34), (16, 40, 16), (5, 64, 65)):
        x = randn(2, *size, dtype=dtype)
        x[0, 0, 2, 3], x[-1, -1, -1, -1], x[1, 0] = float("nan"), float("inf"), -float("inf")
        expected = F.max_pool2d(x, *pairs(window))
        poison(expected)
        got = ops.max_pool2d(x, *pairs(window))
        assert got.is_contiguous()
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_threads_change_nothing():
    x, before = randn(3, 50, 60, 61), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = ops.max_pool2d(x, *pairs((3, 2, 1)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, F.max_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize(
    ("x", "window", "message"),
    [
        (torch.zeros(1, 2, 8, 8).bfloat16(), (2, 2, 0), "float32 or float64"),
        (torch.zeros(1, 2, 8, 9).mT, (2, 2, 0), "Expected a contiguous x"),
        (torch.zeros(2, 8, 8), (2, 2, 0), "Expected a contiguous x"),
        (torch.zeros(1, 2, 8, 8), (2, 2, 2), "Expected padding of at most half"),
        (torch.zeros(1, 2, 8, 8), (9, 2, 0), "Expected an input at least as large"),
        (torch.zeros(1, 2, 8, 8), (2, 0, 0), "Expected stride"),
    ],
)
def test_bad_arguments_are_named(x, window, message):
    with pytest.raises(RuntimeError, match="max_pool2d: .*" + message):
        ops.max_pool2d(x, *pairs(window))
