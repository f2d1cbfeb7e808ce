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
    for size in ((1, 5, 5), (3, 7, 112), (2, 33, 34), (16, 40, 16), (5, 64, 65), (9, 6, 14), (1, 4, 4)):
        x = randn(2, *size, dtype=dtype)
        x[0, 0, 2, 3], x[-1, -1, -1, -1], x[1, 0] = float("nan"), float("inf"), -float("inf")
        expected = F.max_pool2d(x, *pairs(window))
        poison(expected)
        got = ops.max_pool2d(x, *pairs(window))
        assert got.is_contiguous()
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_windows_of_two_by_two(dtype):
    for height, width in ((2, 2), (4, 4), (2, 6), (8, 8), (6, 14), (4, 16), (2, 20), (4, 32), (2, 58), (2, 64)):
        x = randn(3, 13, height, width, dtype=dtype)
        x[0, 0, 1, 1], x[-1, -1, -1, -1], x[1, 0] = float("nan"), float("nan"), -float("inf")
        expected = F.max_pool2d(x, 2)
        poison(expected)
        got = ops.max_pool2d(x, *pairs((2, 2, 0)))
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0)], ids=str)
def test_threads_change_nothing(window):
    x, before = randn(3, 50, 60, 60), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = ops.max_pool2d(x, *pairs(window))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, F.max_pool2d(x, *window))


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
