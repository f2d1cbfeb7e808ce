"""The 2:4 format: storage, operators, transposable masks, and cuSPARSELt (a stand-in here, the real one on a GPU)."""

import gc
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

import sparsekit as sk
from sparsekit.kernels import tuning
from sparsekit.kernels.nm import FORMAT, cuda, layout
from sparsekit.pattern import Pattern
from sparsekit.transposable import transposable_2_4

few = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HALF = (torch.float16, torch.bfloat16)
NM = Pattern.parse("2:4")

ops = torch.ops.sparsekit


def mask_24(out, inputs, kernel=(), holes=False):
    """A random 2:4 mask; with ``holes`` a quarter of its survivors are pruned too."""
    scores = torch.rand(out, inputs, *kernel)
    alive = torch.rand(scores.shape) < 0.75 if holes else torch.ones(scores.shape, dtype=torch.bool)
    return NM.nm_mask(scores, alive) if scores.numel() else alive


def holds(mask):
    return mask.numel() == 0 or NM.holds(mask)


def transposable(out, inputs):
    return transposable_2_4(torch.rand(out, inputs))


def close(got, want, dtype):
    assert got.shape == want.shape
    assert got.dtype == dtype
    scale = max(float(want.norm()), want.numel() ** 0.5, 1)
    assert float((got.detach().double() - want).norm()) <= TOLERANCE[dtype] * scale


def poison(*shapes, dtype=torch.float32, device="cpu"):
    """Leaves NaN in the memory that results of these sizes are likely to be given."""
    for shape in shapes:
        torch.full(shape, torch.nan, dtype=dtype, device=device)


def check_module(layer, x, dtype):
    """Forward and all gradients against the dense layer in float64."""
    dense, mask = layer.to_dense().double(), layer.survivors()
    x = x.detach().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    want = dense(x64)
    dy = torch.randn_like(want).to(dtype)
    want.backward(dy.double())
    poison(want.shape, x.shape, dtype=dtype, device=x.device)
    y = layer(x)
    layer.zero_grad()
    y.backward(dy)
    close(y, want.detach(), dtype)
    close(x.grad, x64.grad, dtype)
    close(layer.values.grad, layer.pack(dense.weight.grad), dtype)
    if layer.bias is not None:
        close(layer.bias.grad, dense.bias.grad, dtype)
    if "mask" in layer._saved_index():
        assert not layer.values.grad[~layer._saved_index()["mask"]].any()
    assert torch.equal(layer.survivors(), mask)


# ---- storage ----------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(0, 9), st.integers(0, 5).map(lambda groups: 4 * groups))


@few
@given(sizes, st.sampled_from([(), (1, 1)]), st.booleans(), st.integers(0, 99))
def test_survivors_go_round(size, kernel, holes, seed):
    torch.manual_seed(seed)
    mask = mask_24(*size, kernel, holes)
    weight = torch.randn(mask.shape)
    weight[~mask] = torch.nan
    index = FORMAT.index(mask)
    values = FORMAT.gather(weight, index)
    assert values.shape == (size[0], size[1] // 2)
    assert index["choice"].shape == (size[0], size[1] // 4)
    assert torch.equal(FORMAT.survivors(index, mask.shape), mask)
    assert torch.equal(FORMAT.scatter(values, index, mask.shape), torch.where(mask, weight, 0.0))
    assert FORMAT.check(values, index, mask.shape) is None
    assert ("mask" in index) == (int(mask.sum()) < values.numel())


def test_choice_holds_ascending_positions_low_bits_first():
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    index = FORMAT.index(mask)
    assert index["choice"].flatten().tolist() == [0b1101, 0b0100, 0b1100, 0b0100]
    assert index["mask"].tolist() == [[True, True], [True, False], [False, True], [False, False]]
    weight = torch.arange(1.0, 17).view(4, 4)
    assert FORMAT.gather(weight, index).tolist() == [[2, 4], [5, 0], [0, 12], [0, 0]]


def test_the_six_codes_are_all_there_are():
    masks = torch.tensor([bits for bits in product([False, True], repeat=4) if sum(bits) == 2])
    assert sorted(layout.index(masks)["choice"].flatten().tolist()) == sorted(layout.CODES)


def test_the_transposed_choice_is_there_exactly_where_the_transpose_is_24():
    mask = transposable(12, 8)
    index = FORMAT.index(mask)
    assert torch.equal(layout.scatter(torch.ones(8, 6, dtype=torch.bool), index["t_choice"]), mask.t())
    mask[:, 0], mask[:3, 0] = False, True
    mask[:3, 1:4] = False
    assert holds(mask)
    assert "t_choice" not in FORMAT.index(mask)
    assert "t_choice" not in FORMAT.index(mask_24(6, 8))


@pytest.mark.parametrize(
    ("mask", "groups", "reason"),
    [
        (torch.ones(4, 8, dtype=torch.bool), 1, "more than 2 survivors"),
        (torch.zeros(4, 6, dtype=torch.bool), 1, "6 inputs, no multiple of 4"),
        (torch.zeros(4, 8, 3, 3, dtype=torch.bool), 1, "a kernel of 3x3"),
        (torch.zeros(4, 8, 1, 1, dtype=torch.bool), 2, "grouped convolution"),
    ],
    ids=["dense", "ragged", "3x3", "grouped"],
)
def test_masks_that_are_refused(mask, groups, reason):
    assert reason in FORMAT.unsupported(mask, groups)
    with pytest.raises(ValueError, match=f"2:4 format can hold, got .*{reason}"):
        FORMAT.index(mask, groups)


def test_the_cpu_is_no_candidate_but_holds_the_layer():
    mask = mask_24(128, 256)
    assert FORMAT.unsupported(mask) is None
    assert FORMAT.absent(torch.device("cpu"), mask_24(8, 8)) == "no 2:4 kernel on the CPU"
    model = nn.Sequential(nn.Linear(256, 128))
    plan = sk.explain(sk.convert(model, {"0.weight": mask})).layers[0]
    assert plan.rejected["nm"] == "no 2:4 kernel on the CPU"
    assert sk.SparseLinear.from_dense(model[0], mask, "nm").format is FORMAT


def test_a_forced_layer_of_a_size_without_a_kernel_is_refused():
    mask = mask_24(8, 16)
    assert FORMAT.unsupported(mask) == "a weight of 8x16, no multiples of 128"
    with pytest.raises(ValueError, match="0.weight: Expected a layer that 'nm' can hold, got a weight of 8x16"):
        sk.convert(nn.Sequential(nn.Linear(16, 8)), {"0.weight": mask}, impl="nm")


def damaged(name):
    shape = torch.Size((8, 8))
    mask = transposable(8, 8)
    mask[0] = False
    index = FORMAT.index(mask)
    values = FORMAT.gather(torch.randn(shape), index)
    assert set(index) == {"choice", "mask", "t_choice"}
    assert FORMAT.check(values, index, shape) is None
    match name:
        case "descending":
            index["choice"][1, 0] = 0b0110
        case "equal":
            index["choice"][1, 0] = 0b0101
        case "high bits":
            index["choice"][1, 0] |= 0b10000
        case "choice dtype":
            index["choice"] = index["choice"].int()
        case "choice shape":
            index["choice"] = index["choice"][:-1]
        case "values shape":
            values = values[:, :-1]
        case "mask dtype":
            index["mask"] = index["mask"].byte()
        case "mask shape":
            index["mask"] = index["mask"].t()[:-1]
        case "free slot":
            values[0, 0] = 1
        case "t_choice":
            index["t_choice"][0, 0] = layout.CODES[index["t_choice"][0, 0] == layout.CODES[0]]
        case "t_choice of another mask":
            index["choice"] = FORMAT.index(mask_24(8, 8))["choice"]
        case "weight":
            shape = torch.Size((8, 8, 3, 3))
    return values, index, shape


@pytest.mark.parametrize(
    "name",
    [
        "descending", "equal", "high bits", "choice dtype", "choice shape", "values shape", "mask dtype",
        "mask shape", "free slot", "t_choice", "t_choice of another mask", "weight",
    ],
)  # fmt: skip
def test_check_finds(name):
    assert FORMAT.check(*damaged(name)) is not None


# ---- operators --------------------------------------------------------------------------------------


@few
@given(st.integers(0, 6), sizes, st.booleans(), st.sampled_from([torch.float32, torch.float64, *HALF]))
def test_operators_against_the_dense_weight(n, size, with_bias, dtype):
    mask = mask_24(*size)
    index = FORMAT.index(mask)
    weight = torch.randn(size).to(dtype) * mask
    values, choice = FORMAT.gather(weight, index), index["choice"]
    x, dy = torch.randn(size[1], n).to(dtype).t(), torch.randn(n, size[0]).to(dtype)
    bias = torch.randn(size[0]).to(dtype) if with_bias else None
    y = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    close(ops.nm_linear(x, values, choice, bias), y, dtype)
    for t_choice in (None, index.get("t_choice")):
        close(ops.nm_linear_t(dy, values, choice, t_choice), dy.double() @ weight.double(), dtype)
    close(ops.nm_sddmm(dy, x, choice), layout.gather(dy.double().t() @ x.double(), choice), dtype)


def operator_calls(n=5, out=8, inputs=12):
    index = FORMAT.index(transposable(out, inputs))
    values, choice = torch.randn(out, inputs // 2), index["choice"]
    x, dy, bias = torch.randn(n, inputs), torch.randn(n, out), torch.randn(out)
    return [
        ("nm_linear", (x, values, choice, bias)),
        ("nm_linear", (x, values, choice, None)),
        ("nm_linear_t", (dy, values, choice, index["t_choice"])),
        ("nm_linear_t", (dy, values, choice, None)),
        ("nm_sddmm", (dy, x, choice)),
    ]


@pytest.mark.parametrize("n", [5, 0])
def test_opcheck(n):
    for name, arguments in operator_calls(n):
        opcheck(getattr(ops, name).default, arguments)


# ---- modules ----------------------------------------------------------------------------------------


def module(out=8, inputs=16, holes=False, dtype=torch.float32, bias=True, mask=None, device=None):
    dense = nn.Linear(inputs, out, bias, dtype=dtype, device=device)
    mask = mask_24(out, inputs, holes=holes) if mask is None else mask
    return sk.SparseLinear.from_dense(dense, mask.to(dense.weight.device), "nm")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("holes", [False, True])
def test_linear_module(dtype, holes):
    layer = module(holes=holes, dtype=dtype)
    assert layer.values.shape == (8, 8)
    check_module(layer, torch.randn(5, 16).to(dtype), dtype)
    check_module(layer, torch.randn(16, 2, 3).to(dtype).permute(2, 1, 0), dtype)
    check_module(layer, torch.randn(0, 16).to(dtype), dtype)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_linear_module_without_rows_and_without_survivors():
    check_module(module(out=0), torch.randn(3, 16), torch.float32)
    check_module(module(mask=torch.zeros(8, 16, dtype=torch.bool)), torch.randn(3, 16), torch.float32)
    check_module(module(mask=transposable(8, 16)), torch.randn(3, 16), torch.float32)


GEOMETRIES = {
    "plain": {},
    "strided": {"stride": (2, 3)},
    "padded": {"padding": (2, 1)},
    "both": {"stride": 2, "padding": 1, "bias": False},
    "same": {"padding": "same"},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("n", [2, 0])
def test_pointwise_convolution(geometry, memory_format, n):
    dense = nn.Conv2d(8, 12, 1, **GEOMETRIES[geometry])
    layer = sk.SparseConv2d.from_dense(dense, mask_24(12, 8, (1, 1), holes=True), "nm")
    x = torch.randn(n, 8, 7, 6).to(memory_format=memory_format)
    check_module(layer, x, torch.float32)
    assert layer(x).is_contiguous(memory_format=memory_format)


def test_convolution_kernels_larger_than_a_pixel_are_refused():
    dense = nn.Conv2d(8, 12, 3)
    with pytest.raises(ValueError, match="a kernel of 3x3"):
        sk.SparseConv2d.from_dense(dense, mask_24(12, 8, (3, 3)), "nm")
    assert "a kernel of 3x3" in FORMAT.unsupported(mask_24(12, 8, (3, 3)))


def test_second_gradients():
    layer = module(holes=True, dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)

    def run(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, x)

    alive = layer._saved_index()["mask"]
    values = layer.values.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v, b: run(x, v * alive, b), (x, values, layer.bias))
    assert torch.autograd.gradgradcheck(lambda x, v, b: run(x, v * alive, b), (x, values, layer.bias))


def test_pruned_stays_pruned_under_momentum_and_weight_decay():
    layer = module(holes=True)
    mask = layer.survivors()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight != 0, mask)


def test_autocast():
    layer = module()
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    close(y, F.linear(x.double(), layer.weight.double(), layer.bias.double()).detach(), torch.bfloat16)


@pytest.mark.parametrize("holes", [False, True])
def test_compiles_in_one_graph(holes):
    layer = module(holes=holes)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 16, requires_grad=True)
    wanted = (x, layer.values, layer.bias)
    for got, want in zip(
        (compiled(x), *torch.autograd.grad(compiled(x).sum(), wanted)),
        (layer(x), *torch.autograd.grad(layer(x).sum(), wanted)),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_state_dict_goes_round():
    layer, other = module(holes=True), module(mask=transposable(8, 16))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.survivors(), layer.survivors())
    dense = nn.Linear(16, 8)
    dense.load_state_dict(layer.to_dense().state_dict())
    assert torch.equal(dense.weight, layer.weight)
    csr = sk.SparseLinear.from_dense(nn.Linear(16, 8), mask_24(8, 16), "csr")
    csr.load_state_dict(layer.state_dict())
    assert torch.equal(csr.weight, layer.weight)
    csr.set_format("nm")
    assert csr.format is FORMAT
    assert torch.equal(csr.weight, layer.weight)


# ---- transposable masks -----------------------------------------------------------------------------


def best_by_force(tile):
    """The largest sum over all 4x4 patterns that keep two in every row and column."""
    patterns = torch.tensor(list(product([0, 1], repeat=16)), dtype=torch.float64).view(-1, 4, 4)
    fits = (patterns.sum(1) == 2).all(1) & (patterns.sum(2) == 2).all(1)
    return float((patterns[fits].flatten(1) @ tile.double().flatten()).max())


def test_transposable_masks_are_optimal():
    tiles = [torch.rand(4, 4), torch.randn(4, 4).abs(), torch.zeros(4, 4), torch.eye(4), torch.rand(4, 4).round()]
    for tile in tiles:
        mask = transposable_2_4(tile)
        assert int(mask.sum()) == 8
        assert float(tile[mask].double().sum()) == pytest.approx(best_by_force(tile), abs=1e-12)
    together = transposable_2_4(torch.cat(tiles, 1))
    for tile, mask in zip(tiles, together.split(4, 1), strict=True):
        assert torch.equal(mask, transposable_2_4(tile))


def test_ragged_transposable_masks_are_optimal():
    for rows, cols in product((1, 2, 3, 4), repeat=2):
        scores = torch.rand(rows, cols)
        tile = F.pad(scores, (0, 4 - cols, 0, 4 - rows))
        kept = float(scores[transposable_2_4(scores)].double().sum())
        assert kept == pytest.approx(best_by_force(tile), abs=1e-12)


@few
@given(st.integers(0, 41), st.integers(0, 41), st.sampled_from([(), (1, 1), (2, 3)]))
def test_transposable_masks_are_valid(out, inputs, kernel):
    scores = torch.rand(out, inputs, *kernel)
    mask = transposable_2_4(scores)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert holds(mask)
    assert holds(mask.transpose(0, 1).contiguous())
    whole = mask[: out // 4 * 4, : inputs // 4 * 4]
    assert int(whole.sum()) * 2 == whole.numel()
    assert torch.equal(mask, transposable_2_4(scores))


def test_transposable_masks_over_many_tiles(monkeypatch):
    scores = torch.randn(64, 96).abs()
    mask = transposable_2_4(scores)
    assert holds(mask)
    assert holds(mask.t().contiguous())
    upper = float(scores[NM.nm_mask(scores, torch.ones_like(mask))].sum())
    assert 0.9 * upper < float(scores[mask].sum()) <= upper
    monkeypatch.setattr("sparsekit.transposable._CHUNK", 7)
    assert torch.equal(transposable_2_4(scores), mask)


def test_transposable_masks_keep_the_dead_dead():
    scores, alive = torch.rand(16, 16), torch.rand(16, 16) < 0.5
    mask = transposable_2_4(scores, alive)
    assert not bool((mask & ~alive).any())
    for tile, live, kept in zip(scores.split(4), alive.split(4), mask.split(4), strict=True):
        for one, there, got in zip(tile.split(4, 1), live.split(4, 1), kept.split(4, 1), strict=True):
            assert float(one[got].double().sum()) == pytest.approx(best_by_force(one * there), abs=1e-12)


def test_transposable_masks_of_infinite_scores():
    scores = torch.rand(4, 4)
    scores[1, 2], scores[2, 2] = torch.inf, torch.inf
    assert bool(transposable_2_4(scores)[1:3, 2].all())


# ---- cuSPARSELt, by a stand-in ----------------------------------------------------------------------


class StandIn:
    """What torch's binding of cuSPARSELt does, on the CPU; counts calls and refuses what the real one would misread."""

    def __init__(self, values_first=True):
        self.values_first, self.compressions, self.algorithms, self.rows = values_first, 0, [], []

    def compress(self, dense):
        assert dense.dim() == 2
        assert dense.is_contiguous()
        assert dense.dtype in HALF
        self.compressions += 1
        out, inputs = dense.shape
        choice, _ = layout._code(dense != 0)
        assert holds(dense != 0)
        parts = [layout.gather(dense, choice).flatten(), choice.to(dense.dtype).flatten()]
        return torch.cat(parts if self.values_first else parts[::-1]).view(out, inputs // 2 + inputs // 4)

    def mm(self, compressed, dense, bias=None, transpose_result=False, alg_id=0):
        inputs, n = dense.shape
        assert transpose_result
        assert n % 8 == 0
        assert dense.t().is_contiguous()
        assert compressed.dtype == dense.dtype
        assert dense.data_ptr() % 16 == 0
        out = compressed.shape[0]
        flat, count = compressed.flatten(), out * inputs // 2
        values, codes = (flat[:count], flat[count:]) if self.values_first else (flat[-count:], flat[:-count])
        weight = layout.scatter(values.view(out, -1), codes.to(torch.uint8).view(out, -1))
        self.algorithms.append(alg_id)
        self.rows.append(n)
        return F.linear(dense.t(), weight, bias)


@pytest.fixture
def cslt(monkeypatch):
    """Installs a stand-in and lets ``cuda`` believe that CPU tensors are on a GPU that has cuSPARSELt."""

    def install(**options):
        stand_in = StandIn(**options)
        monkeypatch.setattr(torch, "_cslt_compress", stand_in.compress)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in.mm)
        monkeypatch.setattr(cuda, "absent", lambda where: None)
        monkeypatch.setattr(cuda, "_capturing", lambda: False)
        return stand_in

    return install


def weight_24(out=128, inputs=256, dtype=torch.bfloat16, mask=None):
    mask = mask_24(out, inputs) if mask is None else mask
    index = FORMAT.index(mask)
    return torch.randn(out, inputs).to(dtype)[mask].view(out, inputs // 2), index["choice"], index.get("t_choice")


def check_product(n, values, choice, bias=None):
    x = torch.randn(n, 4 * choice.shape[1]).to(values.dtype)
    want = F.linear(x.double(), layout.scatter(values, choice).double(), None if bias is None else bias.double())
    got = cuda.nm_linear(x, values, choice, bias)
    assert got.is_contiguous()
    close(got, want, values.dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("values_first", [True, False])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 16])
def test_batches_are_padded_and_cut(cslt, dtype, values_first, n):
    stand_in = cslt(values_first=values_first)
    values, choice, _ = weight_24(dtype=dtype)
    check_product(n, values, choice)
    check_product(n, values, choice, torch.randn(128).to(dtype))
    assert stand_in.rows == ([-(-n // 8) * 8] * 2 if n else [])


def test_inputs_of_any_layout(cslt):
    stand_in = cslt()
    values, choice, _ = weight_24()
    weight = layout.scatter(values, choice)
    flat = torch.randn(8 * 256 + 1).bfloat16()
    for x in (torch.randn(256, 8).bfloat16().t(), flat[1:].view(8, 256), flat[1:2].expand(8, 256)):
        close(cuda.nm_linear(x, values, choice, None), x.double() @ weight.double().t(), torch.bfloat16)
    bias = torch.randn(2, 128).bfloat16().t().contiguous()[:, 0]
    check_product(8, values, choice, bias)
    check_product(8, values.t().contiguous().t(), choice)
    assert len(stand_in.rows) == 5


def test_wrong_inputs_never_reach_the_kernel(cslt):
    stand_in = cslt()
    values, choice, _ = weight_24()
    x = torch.randn(8, 256).bfloat16()
    for bad in (x.half(), x.float(), x[:, :128]):
        with pytest.raises(RuntimeError, match="Expected x of torch.bfloat16"):
            cuda.nm_linear(bad, values, choice, None)
    for bias in (torch.randn(128), torch.randn(64).bfloat16()):
        with pytest.raises(RuntimeError, match="Expected a bias of torch.bfloat16"):
            cuda.nm_linear(x, values, choice, bias)
    assert stand_in.rows == []


@pytest.mark.parametrize(("out", "inputs", "dtype"), [(64, 256, torch.float16), (128, 132, torch.float16),
                                                      (128, 256, torch.float32), (0, 128, torch.float16)])  # fmt: skip
def test_what_cusparselt_does_not_multiply_runs_dense(cslt, out, inputs, dtype):
    stand_in = cslt()
    values, choice, _ = weight_24(out, inputs, dtype)
    check_product(8, values, choice)
    assert stand_in.compressions == 0


def test_the_metadata_is_made_once_and_no_weight_update_is_missed(cslt):
    stand_in = cslt()
    values, choice, _ = weight_24()
    values.requires_grad_()
    updates = [
        lambda: None,
        lambda: torch.optim.SGD([values], lr=1.0).step(),
        lambda: values.data.mul_(-2),  # leaves no trace in the version
        lambda: values.data.zero_(),  # neither does a group without a nonzero value change the metadata
        lambda: values.detach().normal_(),
        lambda: setattr(values, "data", torch.randn(values.shape).to(values.dtype)),
    ]
    for update in updates:
        values.grad = torch.ones_like(values)
        update()
        check_product(8, values.detach(), choice)
    assert stand_in.compressions == 1


def test_without_values_first_every_product_compresses_anew(cslt):
    stand_in = cslt(values_first=False)
    values, choice, _ = weight_24()
    for _ in range(3):
        values.data.mul_(-2)
        check_product(8, values, choice)
    assert stand_in.compressions == 1 + 3  # the first to see how this cuSPARSELt stores the values


def test_a_changed_choice_is_seen(cslt):
    stand_in = cslt()
    values, choice, _ = weight_24()
    check_product(8, values, choice)
    for change in (choice.copy_, lambda new: setattr(choice, "data", new)):
        change(weight_24()[1])
        check_product(8, values, choice)
    assert stand_in.compressions == 3


def test_the_address_of_a_replaced_choice_is_not_given_away(cslt):
    cslt()
    values, choice, _ = weight_24()
    check_product(8, values, choice)
    address = choice.data_ptr()
    choice.data = torch.empty_like(choice)  # a weak key alone would let go of the memory here
    others = [torch.empty_like(choice) for _ in range(20)]
    assert address not in [other.data_ptr() for other in others]


def test_both_dtypes_keep_their_metadata(cslt):
    stand_in = cslt()
    values, choice, _ = weight_24()
    for _ in range(3):
        check_product(8, values, choice)
        check_product(8, values.half(), choice)
    assert stand_in.compressions == 2


def test_the_metadata_goes_with_its_choice(cslt):
    cslt()
    values, choice, _ = weight_24()
    check_product(8, values, choice)
    tail = weakref.ref(cuda._known[choice][torch.bfloat16].tail)
    gc.collect()
    assert tail() is not None
    del choice
    gc.collect()
    assert tail() is None


def test_inference_tensors_are_compressed_every_time(cslt):
    stand_in = cslt()
    with torch.inference_mode():
        values, choice, _ = weight_24()
        for _ in range(2):
            check_product(8, values, choice)
    assert stand_in.compressions == 2


def test_a_captured_graph_keeps_what_it_reads(cslt, monkeypatch):
    stand_in = cslt()
    values, choice, _ = weight_24()
    monkeypatch.setattr(cuda, "_capturing", lambda: True)
    check_product(8, values, choice)
    assert choice not in cuda._known  # looking at the layout would wait for the device
    assert stand_in.compressions == 1
    monkeypatch.setattr(cuda, "_capturing", lambda: False)
    check_product(8, values, choice)
    read = cuda._known[choice][torch.bfloat16]
    monkeypatch.setattr(cuda, "_capturing", lambda: True)
    check_product(8, values, choice)
    monkeypatch.setattr(cuda, "_capturing", lambda: False)
    choice.copy_(choice.clone())  # as load_state_dict does
    check_product(8, values, choice)
    assert cuda._known[choice][torch.bfloat16] is not read
    assert any(kept is read for kept in cuda._captured[choice])


def test_the_input_gradient_is_sparse_where_the_transpose_is_24(cslt):
    stand_in = cslt()
    values, choice, t_choice = weight_24(mask=transposable(128, 256))
    dy = torch.randn(9, 128).bfloat16()
    want = dy.double() @ layout.scatter(values, choice).double()
    assert t_choice is not None
    close(cuda.nm_linear_t(dy, values, choice, t_choice), want, torch.bfloat16)
    assert stand_in.rows == [16]
    close(cuda.nm_linear_t(dy, values, choice, None), want, torch.bfloat16)
    close(cuda.nm_linear_t(dy[:0], values, choice, t_choice), want[:0], torch.bfloat16)
    assert stand_in.rows == [16]


def test_tuning_chooses_the_algorithm(cslt, monkeypatch):
    stand_in, asked = cslt(), []

    def choose(kernel, key, configs, launch, where):
        asked.append((kernel, key, configs[0]))
        return {"algorithm": 5}

    monkeypatch.setattr(tuning, "choose", choose)
    values, choice, _ = weight_24()
    for n in (9, 16, 17):
        check_product(n, values, choice)
    assert stand_in.algorithms == [5, 5, 5]
    assert {(kernel, first["algorithm"]) for kernel, _, first in asked} == {("nm_linear", 0)}
    assert asked[0][1] == asked[1][1] != asked[2][1]  # 9 to 16 rows are one shape class


def test_reasons_of_a_gpu(monkeypatch):
    old, new = torch.device("cuda", 6), torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (7, 5) if where == old else (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert FORMAT.absent(old, mask_24(8, 8)) == "a GPU without sparse tensor cores"
    assert FORMAT.absent(new, mask_24(8, 8)) is None
    cuda.absent.cache_clear()
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert FORMAT.absent(new, mask_24(8, 8)) == "this torch has no cuSPARSELt"
    cuda.absent.cache_clear()


# ---- cuSPARSELt itself ------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    where = torch.device("cuda", torch.cuda.current_device())
    if reason := cuda.absent(where):
        pytest.skip(reason)
    return where


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("out,inputs", [(128, 256), (384, 128), (1024, 1024), (64, 36)])
@pytest.mark.parametrize("kind", ["24", "holes", "transposable"])
def test_gpu_linear(gpu, dtype, out, inputs, kind):
    mask = transposable(out, inputs) if kind == "transposable" else mask_24(out, inputs, holes=kind == "holes")
    layer = module(out, inputs, dtype=dtype, mask=mask, device=gpu)
    for n in (0, 1, 7, 64, 257):
        check_module(layer, torch.randn(n, inputs, device=gpu).to(dtype), dtype)
    x = torch.randn(inputs, 40, device=gpu).to(dtype).t()
    check_module(layer, x, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("geometry", ["plain", "both"])
def test_gpu_convolution(gpu, memory_format, geometry):
    dense = nn.Conv2d(128, 256, 1, **GEOMETRIES[geometry], device=gpu, dtype=torch.bfloat16)
    layer = sk.SparseConv2d.from_dense(dense, mask_24(256, 128, (1, 1)).to(gpu), "nm")
    x = torch.randn(3, 128, 9, 7, device=gpu).bfloat16().to(memory_format=memory_format)
    check_module(layer, x, torch.bfloat16)


@pytest.mark.gpu
def test_gpu_values_with_metadata_are_what_compression_gives(gpu):
    """Says by its skip when this cuSPARSELt stores values otherwise; products are right all the same."""
    values, choice, _ = (t if t is None else t.to(gpu) for t in weight_24(256, 512))
    x = torch.randn(64, 512, device=gpu).bfloat16()
    got = cuda._compressed(values, choice)
    compressed = torch._cslt_compress(layout.scatter(values, choice))
    assert got.shape == compressed.shape
    y = torch._cslt_sparse_mm(got, x.t(), transpose_result=True)
    assert torch.equal(y, torch._cslt_sparse_mm(compressed, x.t(), transpose_result=True))
    if cuda._known[choice][torch.bfloat16].tail is None:
        pytest.skip("this cuSPARSELt does not store the values first and in order")


@pytest.mark.gpu
def test_gpu_weight_updates_are_never_missed(gpu):
    layer = module(256, 256, dtype=torch.bfloat16, mask=transposable(256, 256), device=gpu)
    x = torch.randn(64, 256, device=gpu).bfloat16()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        check_module(layer, x, torch.bfloat16)
        optimizer.step()
    layer.values.data.mul_(-1)
    check_module(layer, x, torch.bfloat16)
    layer.load_state_dict(module(256, 256, dtype=torch.bfloat16).state_dict())
    check_module(layer, x, torch.bfloat16)


@pytest.mark.gpu
def test_gpu_every_algorithm_gives_the_product(gpu):
    values, choice, _ = (t if t is None else t.to(gpu) for t in weight_24(256, 512))
    x = torch.randn(64, 512, device=gpu).bfloat16()
    want = x.double() @ layout.scatter(values, choice).double().t()
    ran = 0
    for config in cuda._ALGORITHMS:
        compressed = cuda._compressed(values, choice)
        try:
            y = torch._cslt_sparse_mm(compressed, x.t(), transpose_result=True, alg_id=config["algorithm"])
        except RuntimeError:
            continue
        close(y, want, torch.bfloat16)
        ran += 1
    assert ran >= 1
    with tuning.on():
        close(cuda.nm_linear(x, values, choice, None), want, torch.bfloat16)
    close(cuda.nm_linear(x, values, choice, None), want, torch.bfloat16)


@pytest.mark.gpu
def test_gpu_autocast_and_convert(gpu):
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)).to(gpu)
    masks = {f"{i}.weight": mask_24(model[i].out_features, 256).to(gpu) for i in (0, 2)}
    sparse = sk.convert(model, masks, impl="nm")
    dense = sk.to_dense(sparse)
    x = torch.randn(32, 256, device=gpu)
    with torch.autocast("cuda", torch.bfloat16):
        y = sparse(x)
    close(y, dense.double()(x.double()).detach(), torch.bfloat16)


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_weights(gpu):
    layer = module(256, 256, dtype=torch.bfloat16, mask=transposable(256, 256), device=gpu)
    x = torch.randn(64, 256, device=gpu).bfloat16().requires_grad_()

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, layer.values))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for _ in range(3):
        with torch.no_grad():
            layer.values.normal_()
            layer.load_state_dict(layer.state_dict())
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(held, step(), strict=True):
            close(got, want.detach().double(), torch.bfloat16)
