"""The block-sparse format on its own: which block it picks, what it stores, what it refuses from outside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit import format as formats
from sparsekit.kernels.blocks import layout

BSR = formats.get("bsr")
LINEAR = torch.Size((72, 50))


def block_mask(shape, block, density, groups=1):
    cells = layout.blocks(torch.ones(shape), block, groups)
    cells = (torch.rand(cells.shape[:2]) < density)[:, :, None, None].expand(cells.shape).contiguous()
    return layout.unblocks(cells, shape, groups)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.sampled_from([(), (1, 1), (3, 2)]), st.sampled_from([1, 2, 3]),
    st.sampled_from([(8, 8), (16, 16), (32, 8), (8, 64), None]), st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.randoms(),
)  # fmt: skip
def test_any_mask_comes_back(out, inputs, kernel, groups, block, density, random):
    torch.manual_seed(random.randrange(2**31))
    groups = groups if kernel else 1
    shape = torch.Size((out * groups, inputs, *kernel))
    mask = torch.rand(shape) < density if block is None else block_mask(shape, block, density, groups)
    index = BSR.index(mask, groups)
    weight = torch.randn(shape).masked_fill(~mask, 0)
    values = BSR.gather(weight, index)
    assert BSR.check(values, index, shape) is None
    assert torch.equal(BSR.survivors(index, shape), mask)
    assert torch.equal(BSR.scatter(values, index, shape), weight)
    assert ("mask" in index) == (not layout.holds(mask, tuple(index["block"].shape[2:]), groups))


@pytest.mark.parametrize("block", [(128, 128), (128, 16), (64, 64), (32, 32), (16, 16), (8, 8), (16, 8)])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_block_is_the_pattern(block, kernel):
    shape = (512, 512) if not kernel else (256, 256, *kernel)
    layer = torch.nn.Linear(512, 512) if not kernel else torch.nn.Conv2d(256, 256, kernel)
    mask = sk.prune(layer, 0.7, pattern=f"block:{block[0]}x{block[1]}", scope="layer")["weight"]
    assert mask.shape == shape
    index = BSR.index(mask)
    assert tuple(index["block"].shape) == (0, 1, *block)
    assert "mask" not in index
    assert BSR.gather(torch.ones(shape), index).numel() == int(mask.sum())
    assert BSR.unsupported(mask) is None


def test_ragged_edges_do_not_blow_up_what_is_stored():
    mask = torch.ones(40, 24, dtype=torch.bool)
    values = BSR.gather(torch.ones(mask.shape), BSR.index(mask))
    assert values.numel() <= 1.25 * mask.numel()
    assert tuple(BSR.index(torch.ones(7, 5).bool())["block"].shape) == (0, 1, 8, 8)


def test_blocks_never_straddle_groups():
    mask = block_mask((24, 8, 3, 3), (8, 8), 0.5, groups=2)  # 12 outputs a group: 8 and a ragged 4
    index = BSR.index(mask, 2)
    assert tuple(index["block"].shape) == (0, 2, 8, 8)
    assert index["crow_indices"].numel() == 2 * 2 + 1


def test_unstructured_masks_are_no_candidate():
    assert "prune with a block pattern" in BSR.unsupported(torch.rand(64, 64) < 0.3)
    assert BSR.unsupported(torch.zeros(8, 8, dtype=torch.bool)) == "no survivor"


def test_schedules():
    crow = torch.tensor([0, 0, 5, 6, 25], dtype=torch.int32)
    schedule = layout.schedule(crow, (16, 16))
    assert schedule["row_order"].tolist() == [3, 1, 2, 0]
    assert schedule["runs"].tolist() == [[1, 0], [2, 5], [3, 6], [3, 22]]  # runs of at most 256 / 16 blocks
    assert layout.schedule(crow, (16, 128))["runs"].shape == (3 + 1 + 10, 2)


def test_transposed_lists_every_block_once():
    shape = torch.Size((40, 24, 3, 2))
    mask = block_mask(shape, (8, 8), 0.4)
    index = BSR.index(mask)
    grid = layout.grid(shape, tuple(index["block"].shape[2:]))
    t = BSR.derive(index, shape)
    assert t["t_perm"].sort().values.tolist() == list(range(index["col_indices"].numel()))
    row_of = torch.repeat_interleave(index["crow_indices"].diff().long())
    segment = torch.repeat_interleave(t["t_crow"].diff().long())
    tap, col = segment % grid.taps, segment // grid.taps
    assert torch.equal(index["col_indices"][t["t_perm"].long()].long(), tap * grid.cols + col)
    assert torch.equal(t["t_row"].long(), tap * grid.rows + row_of[t["t_perm"].long()])
    longest = t["t_crow"].diff().view(grid.cols, grid.taps).sum(1)[t["t_order"].long()]
    assert bool((longest.diff() <= 0).all())


BREAKS = {
    "a side that no kernel has": ("block", lambda t: torch.empty(0, 1, 8, 24, dtype=t.dtype)),
    "groups that do not divide": ("block", lambda t: torch.empty(0, 5, 8, 8, dtype=t.dtype)),
    "a block with data": ("block", lambda t: torch.empty(1, 1, 8, 8, dtype=t.dtype)),
    "another dtype": ("col_indices", lambda t: t.long()),
    "a column out of range": ("col_indices", lambda t: t + 7),
    "a negative column": ("col_indices", lambda t: t - 100),
    "columns that repeat": ("col_indices", lambda t: torch.zeros_like(t)),
    "offsets that fall": ("crow_indices", lambda t: t.flip(0)),
    "too few offsets": ("crow_indices", lambda t: t[:-1]),
    "offsets past the end": ("crow_indices", lambda t: t + 1),
    "an order that skips rows": ("row_order", lambda t: torch.zeros_like(t)),
    "runs that leave blocks out": ("runs", lambda t: t[:-1]),
    "runs past the end": ("runs", lambda t: t + 1000),
    "a mask of another shape": ("mask", lambda t: torch.ones(3, dtype=torch.bool)),
}


@pytest.mark.parametrize("what", BREAKS)
def test_tensors_from_outside_are_checked(what):
    mask = block_mask(LINEAR, (8, 8), 0.5)
    index = BSR.index(mask)
    values = BSR.gather(torch.randn(LINEAR), index)
    name, change = BREAKS[what]
    problem = BSR.check(values, index | {name: change(index.get(name))}, LINEAR)
    assert problem and "got" in problem


def test_values_of_another_shape_are_refused():
    index = BSR.index(block_mask(LINEAR, (8, 8), 0.5))
    values = BSR.gather(torch.randn(LINEAR), index)
    assert BSR.check(values[:-1], index, LINEAR)
    assert BSR.check(values.flatten(1), index, LINEAR)


def test_memory_is_density_times_dense():
    layer = torch.nn.Linear(1024, 1024, bias=False)
    sparse = sk.SparseLinear.from_dense(layer, sk.prune(layer, 0.9, pattern="block:32x32")["weight"], "bsr")
    sparse.derive()
    assert sparse.bytes() <= 0.102 * layer.weight.numel() * 4


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_hold_state_for_survivors_only(optimizer):
    """Nothing of ours is needed for it: the parameter is the packed values."""
    layer = torch.nn.Linear(72, 50)
    mask = sk.prune(layer, 0.6, pattern="block:16x16")["weight"]
    sparse = sk.SparseLinear.from_dense(layer, mask, "bsr")
    steps = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    opt = optimizer(sparse.parameters(), lr=0.1, weight_decay=0.1, **steps)
    for _ in range(3):
        opt.zero_grad()
        sparse(torch.randn(6, 72)).square().sum().backward()
        opt.step()
    state = opt.state[sparse.values]
    assert all(t.shape == sparse.values.shape for t in state.values() if t.dim())
    assert torch.equal(sparse.survivors(), mask)
    assert torch.equal(sparse.weight != 0, mask)
    outside = ~BSR.gather(mask, sparse._saved_index())
    assert bool(outside.any()) and not bool(sparse.values[outside].any())  # what sticks out stays 0
