"""The Triton kernels of block-sparse linear layers against a dense float64 weight.

They run on a GPU, or anywhere in Triton's interpreter: without a GPU one test reruns this file there.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from sparsekit.kernels import reference
from sparsekit.kernels.blocks import layout

sys.path.append(str(Path(__file__).parent))
import interpreter  # noqa: E402
from interpreter import DEVICE, runs_kernels  # noqa: E402

TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    from sparsekit.kernels.bsr import common
    from sparsekit.kernels.bsr import linear as bsr

    interpreter.patch()

needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")
BLOCKS = [(8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (128, 16), (16, 128), (64, 32)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ACTIVATIONS = ["none", "relu", "gelu", "silu"]


if not interpreter.ACTIVE:

    @needs_triton
    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")
    def test_in_the_interpreter():
        interpreter.rerun(__file__, least=120)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN, so an element that no kernel wrote shows."""
    interpreter.poison(monkeypatch)


class Case:
    """A random block-sparse weight, its index tensors and its dense float64 twin; the second block row is empty."""

    def __init__(self, block, out=None, inputs=None, tokens=19, density=0.5, dtype=torch.float32):
        r, c = block
        out, inputs = out or 2 * r + r // 2 + 1, inputs or 3 * c - 3  # ragged, with rows of no alignment at all
        alive = torch.rand(-(-out // r), -(-inputs // c)) < density
        if density < 1:
            alive[0, 0] = density > 0
            alive[1:2] = False
        mask = alive.repeat_interleave(r, 0).repeat_interleave(c, 1)[:out, :inputs].contiguous()
        self.block, self.out, self.inputs, self.dtype = block, out, inputs, dtype
        weight = (torch.randn(out, inputs) * mask).to(dtype)
        index = layout.index(mask, block)
        grid = layout.grid(mask.shape, block)
        index |= layout.transposed(index["crow_indices"], index["col_indices"], grid)
        self.values = layout.gather(weight, index["crow_indices"], index["col_indices"], block, 1).to(DEVICE)
        self.index = {name: tensor.to(DEVICE) for name, tensor in index.items()}
        self.alive, self.weight = alive, weight.double().to(DEVICE)
        self.x, self.dy = self.random(tokens, inputs), self.random(tokens, out)
        self.bias = self.random(out)

    def random(self, *shape):
        return torch.randn(*shape).to(self.dtype).to(DEVICE)

    def pick(self, names):
        return [self.index[name] for name in names.split()]

    def linear(self, x=None, bias=None, activation="none", config=None):
        index = self.pick("crow_indices col_indices row_order")
        x = self.x if x is None else x
        return bsr.linear(x, self.values, *index, bias, self.out, activation, config=config)

    def linear_t(self, dy=None, config=None):
        index = self.pick("t_crow t_row t_perm t_order")
        return bsr.linear_t(self.dy if dy is None else dy, self.values, *index, self.inputs, config=config)

    def sddmm(self, dy=None, x=None, config=None):
        index = self.pick("crow_indices col_indices runs")
        dy, x = self.dy if dy is None else dy, self.x if x is None else x
        return bsr.sddmm(dy, x, *index, list(self.block), config=config)

    def backward(self, needs):
        index = self.pick("crow_indices col_indices runs t_crow t_row t_perm t_order")
        return bsr.linear_backward(self.dy, self.x, self.values, *index, *needs)

    def blocks_of(self, dense):
        return layout.gather(dense, self.index["crow_indices"], self.index["col_indices"], self.block, 1)

    def check_linear(self, y, x=None, bias=None, activation="none"):
        expected = (self.x if x is None else x).double() @ self.weight.T
        expected = expected if bias is None else expected + bias.double()
        self.close(y, reference.activate(expected, activation))

    def check_linear_t(self, dx):
        self.close(dx, self.dy.double() @ self.weight)

    def check_sddmm(self, dvalues):
        self.close(dvalues, self.blocks_of(self.dy.double().T @ self.x.double()))

    def close(self, got, expected):
        assert got.dtype == self.dtype and got.shape == expected.shape and got.is_contiguous()
        error = (got.double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= TOLERANCE[self.dtype], float(error)


@runs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_products(block, dtype):
    case = Case(block, dtype=dtype)
    case.check_linear(case.linear(bias=case.bias), bias=case.bias)
    case.check_linear_t(case.linear_t())
    case.check_sddmm(case.sddmm())


@runs_kernels
@pytest.mark.parametrize("extents", [(96, 64), (88, 56), (100, 60), (34, 30), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignments_of_rows(extents, dtype):
    case = Case((32, 32), *extents, dtype=dtype)
    case.check_linear(case.linear())
    case.check_linear_t(case.linear_t())
    case.check_sddmm(case.sddmm())


@runs_kernels
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_extremes(density, tokens):
    case = Case((16, 16), tokens=tokens, density=density)
    for activation, bias in itertools.product(["none", "silu"], [None, case.bias]):
        case.check_linear(case.linear(bias=bias, activation=activation), bias=bias, activation=activation)
    case.check_linear_t(case.linear_t())
    case.check_sddmm(case.sddmm())
    for got in case.backward((True, True, True)):
        assert not got.isnan().any()


@runs_kernels
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, with_bias, split):
    case = Case((32, 16))
    bias = case.bias if with_bias else None
    y = case.linear(bias=bias, activation=activation, config=product(16, 16, split))
    case.check_linear(y, bias=bias, activation=activation)


@runs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_of_values_out_of_the_ordinary(activation):
    case = Case((16, 16), 16, 16, density=1.0)
    case.values.zero_()
    inf, nan = float("inf"), float("nan")
    bias = torch.tensor([inf, nan, -30, -5, -1e-3, -0.0, 0.0, 1e-3, 5, 30, 1e30, -2, 2, -1, 1, -1e30], device=DEVICE)
    y = case.linear(bias=bias, activation=activation)
    expected = reference.activate(bias.double(), activation).float().expand(y.shape)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=5e-7, equal_nan=True)


def product(tile, depth, split=1):
    return {"BM": tile, "BK": depth, "SPLIT": split, "num_warps": 4, "num_stages": 2}


def gradient(j, depth, split=1):
    return {"J": j, "BT": depth, "SPLIT": split, "num_warps": 4, "num_stages": 2}


@runs_kernels
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    ("block", "depth"), [((8, 8), 64), ((16, 16), 64), ((32, 64), 64), ((64, 32), 16), ((128, 128), 64)], ids=str
)
def test_depth_of_products(block, depth, split):
    case = Case(block, tokens=35)
    config = product(16, depth, split)
    case.check_linear(case.linear(config=config))
    case.check_linear_t(case.linear_t(config=config))


@runs_kernels
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    ("block", "j"), [((8, 8), 4), ((16, 16), 1), ((16, 16), 16), ((64, 64), 4), ((128, 64), 2), ((8, 128), 2)], ids=str
)
def test_gradient_of_several_blocks_and_slices_of_tokens(block, j, split):
    case = Case(block, inputs=5 * block[1] - 3, tokens=37, density=0.8)
    case.check_sddmm(case.sddmm(config=gradient(j, 16, split)))


@runs_kernels
def test_more_splits_than_work():
    case = Case((16, 16), tokens=5)
    case.check_linear(case.linear(config=product(16, 16, 8)))
    case.check_linear_t(case.linear_t(config=product(16, 16, 8)))
    case.check_sddmm(case.sddmm(config=gradient(2, 16, 8)))


@runs_kernels
@pytest.mark.parametrize("split", [1, 3])
def test_equal_inputs_give_equal_bits(split):
    case = Case((16, 16), tokens=40, dtype=torch.float16)
    for run in (
        lambda: case.linear(bias=case.bias, activation="gelu", config=product(32, 32, split)),
        lambda: case.linear_t(config=product(32, 32, split)),
        lambda: case.sddmm(config=gradient(4, 16, split)),
    ):
        assert torch.equal(run(), run())


@runs_kernels
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("block", [(8, 8), (16, 16), (32, 32), (64, 64), (128, 16)], ids=str)
def test_what_sticks_out_has_no_gradient(block, split):
    case = Case(block, density=1.0)
    case.x[3], case.dy[5] = float("inf"), float("nan")
    case.x[7, 1], case.dy[2, 0] = float("nan"), -float("inf")
    dvalues = case.sddmm(config=gradient(max(1, 32 // block[1]), 16, split))
    inside = case.blocks_of(torch.ones(case.out, case.inputs, device=DEVICE)) > 0
    assert not inside.all() and (dvalues[~inside] == 0).all()
    assert not dvalues[inside].isfinite().any()  # each sum holds the NaN of token 5


@runs_kernels
@pytest.mark.parametrize("block", [(8, 8), (16, 16), (64, 64), (128, 16)], ids=str)
@pytest.mark.parametrize("depth", [16, 64])
def test_nothing_but_the_blocks_is_multiplied(block, depth):
    """Inf and NaN reach exactly the outputs that depend on them, whatever tile a product loads."""
    case = Case(block, tokens=20)
    x, dy = case.x.clone(), case.dy.clone()
    x[4], dy[4] = float("nan"), float("inf")  # one token
    x[:, -1], dy[:, -1] = float("inf"), float("nan")  # the last column, beside what sticks out
    y, dx = case.linear(x, config=product(16, depth)), case.linear_t(dy, config=product(16, depth))
    for got, given, weight in ((y, x, case.weight.T), (dx, dy, case.weight)):
        meets = (weight != 0).double()
        reached = ((~given.isfinite()).double() @ meets) > 0
        assert reached.any() and not reached.all()
        assert not got[reached].isfinite().any()
        expected = torch.where(given.isfinite(), given, 0.0).double() @ weight
        assert torch.allclose(got[~reached].double(), expected[~reached], rtol=1e-5, atol=1e-5)


@runs_kernels
def test_strided_inputs():
    case = Case((16, 16), tokens=21)
    wide = torch.zeros(21, 2 * case.inputs, device=DEVICE)
    wide[:, ::2] = case.x
    turned = case.dy.T.contiguous().T
    case.check_linear(case.linear(wide[:, ::2]))
    case.check_sddmm(case.sddmm(turned, wide[:, ::2]))
    case.check_linear_t(case.linear_t(turned))
    biases = torch.stack([case.bias, case.bias], 1)
    case.values = torch.stack([case.values, case.values], 3)[..., 0]
    case.check_linear(case.linear(bias=biases[:, 1]), bias=case.bias)
    case.check_linear_t(case.linear_t())
    case.dy = case.random(1, case.out).expand(21, case.out)  # the gradient of a sum
    case.check_linear_t(case.linear_t())


@runs_kernels
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_backward_runs_what_is_needed(needs, monkeypatch):
    case = Case((16, 16))
    for needed, name in zip(needs, ("linear_t", "sddmm"), strict=False):
        if not needed:
            monkeypatch.setattr(bsr, name, None)
    got = case.backward(needs)
    checks = (case.check_linear_t, case.check_sddmm, lambda dbias: case.close(dbias, case.dy.double().sum(0)))
    for tensor, needed, check in zip(got, needs, checks, strict=True):
        if needed:
            check(tensor)
        else:
            assert tensor.shape == (0,)


@runs_kernels
def test_arguments_that_cannot_be():
    case = Case((16, 16))
    with pytest.raises(ValueError, match="Expected an activation of none, relu, gelu, silu, got 'tanh'"):
        case.linear(activation="tanh")
    with pytest.raises(ValueError, match="Expected tensors of one dtype and device, got torch.float16 on"):
        case.linear(case.x.half())
    with pytest.raises(ValueError, match="Expected tensors of one dtype and device, got torch.float32 on"):
        case.sddmm(case.dy, case.x.half())


@needs_triton
def test_rows_without_alignment_are_copied_beside_zeros():
    for dtype, width, copied in ((torch.bfloat16, 30, 32), (torch.float32, 33, 48), (torch.bfloat16, 36, 36)):
        x = torch.randn(4, width).to(dtype)
        got = common.aligned(x)
        assert torch.equal(got[:, :width], x) and got.shape == (4, copied) and not got[:, width:].any()
        assert (got.data_ptr() == x.data_ptr()) == (width == copied)


@needs_triton
@pytest.mark.parametrize("kind", ["sm_90", "sm_80", "tf32", "ieee", "interpreter"])
def test_every_choice_is_one_the_kernels_take(kind):
    sides = (8, 16, 32, 64, 128)
    choices = (sides, sides, (None, 1, 60, 300, 9999), (1, 64, 9000), (1, 132))
    for r, c, tokens, nnzb, processors in itertools.product(*choices):
        rows = -(-1000 // r)
        configs = bsr._product_configs(kind, c, r, tokens, rows, nnzb, 1000, processors)
        assert len({str(config) for config in configs}) == len(configs) <= 6
        for config in configs:
            assert config["BM"] >= 16 and config["BK"] >= 16 and config["SPLIT"] in (1, 2, 4, 8)
            assert tokens is None or tokens > 64 or config["BM"] < max(tokens * 2, 17)
        runs, run = nnzb // 2 + 1, max(1, 256 // c)
        configs = bsr._sddmm_configs(kind, (r, c), tokens, rows, nnzb, runs, processors)
        assert len({str(config) for config in configs}) == len(configs) <= 6
        for config in configs:
            assert run % config["J"] == 0 and config["J"] * c >= 16 and config["SPLIT"] in (1, 2, 4, 8, 16)
            assert r >= 64 or kind == "ieee" or config["J"] * c >= 64


@needs_triton
def test_an_open_number_of_tokens_gets_a_middle_tile():
    for kind, across in itertools.product(("sm_90", "sm_80"), (128, 64, 16)):
        config = bsr._product_configs(kind, 64, across, None, 64, 1000, 4096, 132)[0]
        assert config["BM"] == 128 and config["SPLIT"] == 1
