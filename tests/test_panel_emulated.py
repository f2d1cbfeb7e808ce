"""The panel kernels on the index that :mod:`sparsekit.kernels.blocks.layout` makes, against the formats' naive twins.

``emulated_panel.py`` has the cases of the kernels themselves; these tests tie both to the package.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekit.kernels.blocks import layout, reference

sys.path.insert(0, str(Path(__file__).parent))
import emulated_panel as panel  # noqa: E402
from emulated import COMPILER, Kernels, build_kernel  # noqa: E402

SEEDS = (0, 1, 5)
LINEAR = panel.linear(37, 45, 42, block=(8, 8))
CONVOLUTION = panel.Shape(2, 18, 5, 6, 20, (3, 2), (2, 1), (1, 1), (1, 2), groups=2, block=(16, 8), dtype="float32")


def mask_of(shape: panel.Shape, density: float) -> torch.Tensor:
    """Whole blocks survive or die."""
    rng = np.random.default_rng(3)
    inside = panel.blocks(np.ones((shape.outputs, shape.inputs // shape.groups, *shape.kernel)), shape)
    alive = rng.random(inside.shape[:2]) < density
    return torch.from_numpy(panel.unblocks(inside * alive[..., None, None], shape)) > 0


def index_of(mask: torch.Tensor, shape: panel.Shape) -> dict[str, torch.Tensor]:
    index = layout.index(mask, shape.block, shape.groups)
    grid = layout.grid(mask.shape, shape.block, shape.groups)
    return index | layout.transposed(index["crow_indices"], index["col_indices"], grid)


@pytest.mark.parametrize("block", panel.SHAPES, ids=str)
@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def test_cases_index_blocks_as_the_package_does(shape, block):
    shape = panel.replace(shape, block=block)
    mask = mask_of(shape, 0.4)
    packed = index_of(mask, shape)
    own = panel.index(panel.blocks(mask.numpy(), shape).any((2, 3)), shape)
    pairs = (own.crow, "crow_indices"), (own.col, "col_indices"), (own.t_crow, "t_crow"), (own.t_row, "t_row")
    for array, name in (*pairs, (own.t_perm, "t_perm")):
        assert np.array_equal(array, packed[name].numpy()), name
        assert packed[name].dtype == torch.int32


@pytest.fixture(scope="module")
def kernels():
    if COMPILER is None:
        pytest.skip("g++ is not installed")
    return Kernels(build_kernel("plain", "panel"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def test_verbs_match_their_twins(kernels, shape, density, seed):
    kernels.seed(seed)
    torch.manual_seed(seed)
    mask = mask_of(shape, density)
    index = index_of(mask, shape)
    lists = panel.Index(*(index[name].numpy() for name in ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm")))
    weight = torch.randn(mask.shape, dtype=torch.float64).where(mask, torch.zeros(()))
    dense = layout.gather(weight, index["crow_indices"], index["col_indices"], shape.block, shape.groups)
    x = torch.randn(shape.batch, shape.height, shape.width, shape.inputs, dtype=torch.float64)
    dy = torch.randn(shape.batch, *shape.size(), shape.outputs, dtype=torch.float64)
    bias = torch.randn(shape.outputs, dtype=torch.float64)
    own = [panel.encode(t.numpy(), shape.dtype) for t in (x, dy, dense, bias)]
    x, dy, dense = (torch.from_numpy(panel.decode(array, shape.dtype)) for array in own[:3])
    bias = torch.from_numpy(
        own[3].astype(np.float64) if shape.dtype == "float32" else panel.decode(own[3], shape.dtype)
    )

    forward = (index["crow_indices"], index["col_indices"])
    backward = tuple(index[name] for name in ("t_crow", "t_row", "t_perm", "t_order"))
    image, out = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
    conv = (shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups)
    y = reference.conv2d(image, dense, *forward, index["row_order"], bias, shape.outputs, *conv, "silu")
    dx = reference.conv2d_t(out, dense, *backward, shape.inputs, (shape.height, shape.width), *conv)
    dvalues = reference.conv2d_sddmm(out, image, *forward, index["runs"], shape.block, *conv)

    x, dy, values, bias = own
    close = lambda got, twin: panel.close(got, twin.numpy(), shape.dtype, "")  # noqa: E731
    close(panel.call_forward(kernels, shape, x, values, lists, bias, "silu"), y.permute(0, 2, 3, 1))
    close(panel.call_input_gradient(kernels, shape, dy, values, lists), dx.permute(0, 2, 3, 1))
    close(panel.call_weight_gradient(kernels, shape, dy, x, lists), dvalues)
