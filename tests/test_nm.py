"""The 2:4 format: storage, operators, modules."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nm_cases import GEOMETRIES, HALF, TOLERANCE, check_module, close, few, holds, mask_24, module, ops, transposable
from torch import nn
from torch.library import opcheck

import sparsekit as sk
from sparsekit.kernels.nm import FORMAT, layout

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
