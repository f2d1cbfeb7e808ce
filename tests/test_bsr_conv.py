"""Triton kernels of the block-sparse convolution, on a GPU or, in a process of its own, in the interpreter."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from sparsekit.kernels.blocks import layout  # noqa: E402
from sparsekit.kernels.bsr import conv  # noqa: E402
from sparsekit.kernels.reference import activate  # noqa: E402

from . import interpreter  # noqa: E402
from .interpreter import ACTIVE, DEVICE, runs_kernels  # noqa: E402

interpreter.patch()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TILE = {"padded": False, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    interpreter.poison(monkeypatch)
    with torch.backends.cudnn.flags(enabled=True, deterministic=False, benchmark=False, allow_tf32=False):
        yield


class Layer(NamedTuple):
    """A block-sparse convolution with its index tensors, and what the dense one computes in float64."""

    weight: Tensor
    values: Tensor
    block: tuple[int, int]
    index: tuple[Tensor, ...]  # crow_indices, col_indices
    row_order: Tensor
    runs: Tensor
    transposed: tuple[Tensor, ...]
    conv: tuple  # stride, padding, dilation, groups

    def y(self, x, bias=None, activation="none", config=None):
        args = (*self.index, self.row_order, bias, self.weight.shape[0], self.weight.shape[2:], *self.conv)
        return conv.conv2d(x, self.values, *args, activation, config=config)

    def dx(self, dy, x, config=None):
        args = (*self.transposed, x.shape[1], x.shape[2:], self.weight.shape[2:], *self.conv)
        return conv.conv2d_t(dy, self.values, *args, config=config)

    def dvalues(self, dy, x, config=None):
        args = (*self.index, self.runs, self.block, self.weight.shape[2:], *self.conv)
        return conv.conv2d_sddmm(dy, x, *args, config=config)

    def dense_y(self, x, bias=None, activation="none"):
        bias = None if bias is None else bias.double()
        return activate(F.conv2d(x.double(), self.weight.double(), bias, *self.conv), activation)

    def dense_dx(self, dy, x):
        return torch.nn.grad.conv2d_input(x.shape, self.weight.double(), dy.double(), *self.conv)

    def dense_dvalues(self, dy, x):
        grad = torch.nn.grad.conv2d_weight(x.double(), self.weight.shape, dy.double(), *self.conv)
        return layout.gather(grad, *self.index, self.block, self.conv[3])


def make(shape, block, stride=1, padding=0, dilation=1, groups=1, density=0.5, dtype=torch.float32, dead=()):
    """A random layer of a weight of ``shape``; ``dead`` are rows of blocks without survivors."""
    grid = layout.grid(torch.Size(shape), block, groups)
    alive = torch.rand(grid.groups * grid.rows, grid.taps * grid.cols) < density
    alive[list(dead)] = False
    tiles = alive[:, :, None, None].expand(*alive.shape, *block).contiguous()
    return of(layout.unblocks(tiles, torch.Size(shape), groups), block, stride, padding, dilation, groups, dtype)


def of(mask, block, stride=1, padding=0, dilation=1, groups=1, dtype=torch.float32):
    """A random layer with these survivors."""
    mask = mask.to(DEVICE)
    weight = torch.randn(mask.shape, device=DEVICE).to(dtype) * mask
    index = layout.index(mask, block, groups)
    lists = (index["crow_indices"], index["col_indices"])
    values = layout.gather(weight, *lists, block, groups)
    transposed = tuple(layout.transposed(*lists, layout.grid(mask.shape, block, groups)).values())
    pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    return Layer(weight, values, block, lists, index["row_order"], index["runs"], transposed, (*pairs, groups))


def image(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def batch(layer, n, *size):
    """An input, and a gradient of the output, in the layer's dtype."""
    x = image(n, layer.weight.shape[1] * layer.conv[3], *size, dtype=layer.values.dtype)
    return x, image(*layer.dense_y(x).shape, dtype=x.dtype)


def close(got, expected):
    assert got.shape == expected.shape
    assert not got.isnan().any()
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[got.dtype], f"Expected {TOLERANCE[got.dtype]} at most, got {error}"


def agrees(layer, n, *size):
    """All three products of a layer against the dense ones, on images of ``size``."""
    x, dy = batch(layer, n, *size)
    y, dx = layer.y(x), layer.dx(dy, x)
    close(y, layer.dense_y(x))
    close(dx, layer.dense_dx(dy, x))
    close(layer.dvalues(dy, x), layer.dense_dvalues(dy, x))
    for made in (y, dx):
        assert made.dtype == x.dtype and made.is_contiguous(memory_format=torch.channels_last)


@runs_kernels
@pytest.mark.parametrize(
    "shape, block, size, how",
    [
        ((32, 32, 3, 3), (16, 16), (6, 5), {"padding": 1}),
        ((64, 64, 3, 3), (64, 64), (4, 5), {"padding": 1}),
        ((96, 80, 3, 3), (64, 64), (5, 4), {}),
        ((40, 36, 1, 1), (32, 16), (5, 6), {"stride": 2}),
        ((40, 36, 1, 1), (32, 16), (5, 6), {"padding": 1}),
        ((40, 24, 3, 3), (16, 32), (7, 8), {"stride": (1, 2), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
        ((40, 20, 3, 2), (32, 8), (7, 8), {"stride": 2, "padding": (2, 1), "dilation": (2, 1), "groups": 2}),
        ((140, 24, 5, 5), (128, 16), (4, 4), {"padding": 2, "density": 0.2}),
        ((128, 128, 1, 1), (128, 128), (5, 4), {"stride": (1, 2), "density": 1.0}),
        ((8, 16, 7, 7), (8, 8), (6, 5), {"stride": 2, "padding": 3, "density": 0.2}),
        ((8, 8, 9, 9), (8, 8), (6, 7), {"padding": 4, "density": 0.2}),
        ((8, 8, 9, 9), (8, 8), (7, 6), {"stride": (3, 2), "padding": 4, "density": 0.2}),
        ((12, 3, 3, 3), (8, 8), (6, 6), {"stride": (4, 3), "padding": 1, "density": 1.0}),
        ((12, 1, 3, 3), (8, 8), (4, 5), {"padding": 1, "groups": 12, "density": 1.0}),
        ((8, 8, 3, 3), (8, 8), (1, 1), {"stride": 3, "padding": 1, "density": 1.0}),
        ((8, 8, 9, 9), (8, 8), (1, 2), {"stride": 4, "padding": 4, "density": 1.0}),
    ],
)
def test_matches_dense(shape, block, size, how):
    agrees(make(shape, block, **how), 2, *size)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [(32, 32), (16, 64)])
def test_half_precisions(dtype, block):
    agrees(make((48, 40, 3, 3), block, padding=1, dtype=dtype), 2, 5, 4)


@runs_kernels
def test_the_linear_kernel_runs_plain_1x1():
    agrees(make((40, 36, 1, 1), (16, 16)), 2, 5, 6)


@runs_kernels
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("deep", [16, 32, 64, 128])
@pytest.mark.parametrize("stride", [1, 2])
def test_tiles_of_products(padded, deep, stride):
    layer = make((40, 24, 3, 3), (32, 32), stride, padding=(1, 2))
    x, dy = batch(layer, 2, 4, 3)
    config = TILE | {"BM": 16 if deep > 32 else 64, "BK": deep, "padded": padded}
    close(layer.y(x, config=config), layer.dense_y(x))
    close(layer.dx(dy, x, config=config), layer.dense_dx(dy, x))


@runs_kernels
@pytest.mark.parametrize("joined, splits", [(1, 1), (1, 3), (2, 16), (8, 1), (8, 3), (16, 2)])
def test_tiles_and_splits_of_the_weight_gradient(joined, splits):
    layer = make((40, 24, 3, 3), (32, 16), padding=1)
    x, dy = batch(layer, 3, 4, 3)
    config = TILE | {"J": joined, "BP": 16, "splits": splits}
    close(layer.dvalues(dy, x, config), layer.dense_dvalues(dy, x))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(128, 64), (16, 32)])
def test_every_offered_configuration_agrees(dtype, block):
    layer = make((24, 40, 3, 2), block, padding=1, dtype=dtype)
    x, dy = batch(layer, 1, 5, 3)
    for config in conv._configs(block[0], 20, 2, (3, 3), True, "ieee", x):
        close(layer.y(x, config=config), layer.dense_y(x))
    for config in conv._configs(block[1], 20, 2, (3, 3), True, "ieee", x):
        close(layer.dx(dy, x, config=config), layer.dense_dx(dy, x))
    for config in conv._weight_configs(*block, "ieee", x):
        close(layer.dvalues(dy, x, config), layer.dense_dvalues(dy, x))


@runs_kernels
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_bias_and_activation(activation):
    layer = make((40, 16, 3, 3), (16, 16), padding=1, groups=2, dead=[1])
    x, bias = image(2, 32, 4, 3), torch.randn(40, device=DEVICE)
    close(layer.y(x, bias, activation), layer.dense_y(x, bias, activation))
    close(layer.y(x, None, activation), layer.dense_y(x, None, activation))


@runs_kernels
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("stride", [1, 2])
def test_none_or_all_survive(density, stride):
    layer = make((24, 24, 3, 3), (16, 16), stride, padding=1, density=density)
    agrees(layer, 2, 4, 5)
    bias = torch.randn(24, device=DEVICE)
    x = image(2, 24, 4, 5)
    close(layer.y(x, bias), layer.dense_y(x, bias))


@runs_kernels
@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_batch(kernel):
    layer = make((24, 24, kernel, kernel), (16, 16), padding=kernel // 2)
    x = image(0, 24, 4, 5)
    dy = image(0, 24, 4, 5)
    assert layer.y(x).shape == (0, 24, 4, 5) and layer.dx(dy, x).shape == x.shape
    assert torch.equal(layer.dvalues(dy, x), torch.zeros_like(layer.values))


@runs_kernels
def test_empty_output():
    layer = make((24, 24, 3, 3), (16, 16))
    x, dy = image(2, 24, 2, 4), image(2, 24, 0, 2)
    assert layer.y(x).shape == dy.shape
    assert torch.equal(layer.dx(dy, x), torch.zeros_like(x))
    assert torch.equal(layer.dvalues(dy, x), torch.zeros_like(layer.values))


@runs_kernels
def test_memory_formats_give_equal_bits():
    layer = make((24, 24, 3, 3), (32, 16), padding=1)
    x, dy = batch(layer, 2, 3, 4)
    expected = layer.y(x), layer.dx(dy, x), layer.dvalues(dy, x)
    wide = torch.randn(2, 30, 3, 8, device=DEVICE)
    wide[:, 3:27, :, ::2] = x
    slices = wide[:, 3:27, :, ::2]
    assert not slices.is_contiguous()
    for other_x, other_dy in ((x.contiguous(), dy.contiguous()), (slices, dy.transpose(2, 3).contiguous().mT)):
        got = layer.y(other_x), layer.dx(other_dy, other_x), layer.dvalues(other_dy, other_x)
        assert all(map(torch.equal, got, expected))


@runs_kernels
def test_runs_agree_bit_for_bit():
    layer = make((24, 24, 3, 3), (32, 16), padding=1)
    x, dy = batch(layer, 3, 4, 4)
    splits = TILE | {"J": 2, "BP": 16, "splits": 3}
    for run in (lambda: layer.y(x), lambda: layer.dx(dy, x), lambda: layer.dvalues(dy, x, splits)):
        assert torch.equal(run(), run())


@runs_kernels
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_only_what_survives_is_read(value):
    """Groups of 12 channels in blocks of 8: what sticks out overlaps the next group."""
    layer = make((24, 12, 3, 3), (8, 8), padding=1, groups=2)
    x, dy = batch(layer, 2, 4, 5)
    y, dx = layer.y(x), layer.dx(dy, x)
    for group in (slice(0, 12), slice(12, 24)):
        other = slice(12, 24) if group.start == 0 else slice(0, 12)
        x_, dy_ = x.clone(), dy.clone()
        x_[:, other], dy_[:, other] = value, value
        assert torch.equal(layer.y(x_)[:, group], y[:, group])
        assert torch.equal(layer.dx(dy_, x)[:, group], dx[:, group])


@runs_kernels
def test_a_product_that_blocks_do_not_fill_reads_no_others():
    """A block a row and column, four to a product: NaN lies where entry 0 and block 0 would be."""
    mask = torch.zeros(64, 64, 3, 3, dtype=torch.bool)
    mask[16:32, 16:32, 0, 1] = mask[48:, 32:48, 0, 0] = True
    layer = of(mask, (16, 16), padding=1)
    x, dy = batch(layer, 1, 4, 5)
    y, dx, config = layer.dense_y(x), layer.dense_dx(dy, x), TILE | {"BM": 16, "BK": 64}
    x[:, :16], dy[:, :16] = float("nan"), float("nan")
    close(layer.y(x, config=config), y)
    close(layer.dx(dy, x, config), dx)
    layer.values[0] = float("nan")
    close(layer.dx(dy, x, config)[:, 32:], dx[:, 32:])


@runs_kernels
@pytest.mark.parametrize("padding", [0, 1])
def test_a_step_beyond_the_last_pixel_is_not_multiplied(padding):
    """The last pixel is infinite, and so is what it meets; nothing is, times 0, NaN."""
    layer = make((16, 16, 3, 3), (16, 16), padding=padding, density=1.0)
    x, dy = batch(layer, 1, 5, 4)
    x[:, :, -1, -1] = float("inf")
    grad = layer.dvalues(dy, x, TILE | {"J": 1, "BP": 16, "splits": 1})
    assert grad.isinf().any() and not grad.isnan().any()


@runs_kernels
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_gradient_of_what_sticks_out_is_0(value, splits):
    layer = make((20, 12, 3, 3), (16, 16), padding=1, groups=2, density=1.0)
    x, dy = batch(layer, 2, 4, 5)
    grad = layer.dvalues(dy.fill_(value), x.fill_(value), TILE | {"J": 4, "BP": 16, "splits": splits})
    inside = layout.gather(torch.ones_like(layer.weight), *layer.index, layer.block, 2).bool()
    assert (grad[~inside] == 0).all() and not grad[inside].isfinite().any()


@runs_kernels
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, True)])
def test_backward(kernel, needs):
    layer = make((24, 24, kernel, kernel), (16, 16), padding=kernel // 2)
    x, dy = batch(layer, 2, 4, 5)
    args = (*layer.index, layer.runs, *layer.transposed, layer.weight.shape[2:], *layer.conv)
    grads = conv.conv2d_backward(dy, x, layer.values, *args, *needs)
    expected = layer.dense_dx(dy, x), layer.dense_dvalues(dy, x), dy.double().sum((0, 2, 3))
    for need, got, dense in zip(needs, grads, expected, strict=True):
        if need:
            close(got, dense)
        else:
            assert got.shape == (0,)


@runs_kernels
def test_mixed_dtypes_are_refused():
    layer = make((16, 16, 3, 3), (16, 16), padding=1)
    with pytest.raises(ValueError, match="Expected tensors of one dtype and device, got torch.float16"):
        layer.y(image(1, 16, 4, 4, dtype=torch.float16))


if not ACTIVE:

    def test_in_the_interpreter():
        interpreter.rerun(__file__, least=76)

    def test_offline_cases_name_every_argument():
        cases = list(conv.offline_cases())
        assert len({(case["name"], case["arch"], case["num_warps"]) for case in cases}) == len(cases)
        for case in cases:
            assert {*case["signature"], *case["constexprs"]} == set(case["kernel"].arg_names)
            assert set(case["divisible"]) <= set(case["signature"])
