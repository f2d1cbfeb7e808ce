"""2:4 through cuSPARSELt: a stand-in here, the real one on a GPU."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from nm_cases import GEOMETRIES, HALF, check_module, close, holds, mask_24, module, transposable
from torch import nn

import sparsekit as sk
from sparsekit.kernels import tuning
from sparsekit.kernels.nm import FORMAT, cuda, layout

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
