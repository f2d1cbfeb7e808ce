"""Converted models on a real GPU: the plan, compiled and captured steps, packages, optimizers. ``pytest -m gpu``."""

import copy
import json

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit import format as formats
from sparsekit.kernels import tuning

pytestmark = pytest.mark.gpu
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Net(nn.Module):
    """Two convolutions and two linear layers, all large enough for blocks of 32."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 32)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


def images(n=16, dtype=torch.float32):
    return torch.randn(n, 32, 12, 12, device="cuda", dtype=dtype)


def sparse_net(dtype=torch.float32, training=True, impl="bsr"):
    dense = Net().to("cuda", dtype)
    masks = sk.prune(dense, 0.6, pattern="block:32x32", scope="layer")
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_parameter(name).mul_(mask)
    return dense, sk.convert(dense, masks, training=training, impl=impl), masks


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_and_gradients(dtype):
    dense, sparse, _ = sparse_net(dtype)
    exact = copy.deepcopy(dense).double()
    x = images(dtype=dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, want = sparse(x), exact(x64)
    assert relative(y, want) < 4 * DTYPES[dtype]
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy.double())
    assert relative(x.grad, x64.grad) < 8 * DTYPES[dtype]
    for name in ("conv1", "conv2", "fc1", "fc2"):
        layer = getattr(sparse, name)
        got = layer.format.scatter(layer.values.grad, layer._saved_index(), torch.Size(layer.shape))
        assert relative(got, getattr(exact, name).weight.grad * layer.survivors()) < 8 * DTYPES[dtype]


def test_a_step_runs_twice_to_the_same_bits():
    _, sparse, _ = sparse_net(torch.bfloat16)
    x, grads = images(dtype=torch.bfloat16), []
    for _ in range(2):
        sparse.zero_grad()
        sparse(x).square().sum().backward()
        grads.append([p.grad.clone() for p in sparse.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_every_format_on_its_own_pattern():
    layer, x = nn.Linear(256, 384).cuda().bfloat16(), torch.randn(100, 256, device="cuda", dtype=torch.bfloat16)
    patterns = {"bsr": "block:32x32", "nm": "2:4t", "panel": "block:8x8", "compact": "channel"}
    for name in formats.names():
        share = {} if name == "nm" else {"sparsity": 0.7}
        mask = sk.prune(layer, pattern=patterns.get(name, "unstructured"), **share)["weight"]
        sparse = sk.SparseLinear.from_dense(layer, mask, name)
        want = nn.functional.linear(x.double(), (layer.weight * mask).double(), layer.bias.double())
        with torch.no_grad():
            assert relative(sparse(x), want) < 1e-2, name


KERNELS = [
    ("csr", torch.float32, "unstructured"), ("csr", torch.float64, "unstructured"),
    ("csr", torch.bfloat16, "unstructured"), ("panel", torch.bfloat16, "block:8x1"),
    ("panel", torch.float16, "block:16x16"), ("panel", torch.bfloat16, "block:8x8"),
    ("panel", torch.bfloat16, "unstructured"), ("panel", torch.float16, "block:16x1"),
    ("bitmap", torch.bfloat16, "unstructured"), ("bitmap", torch.float32, "unstructured"),
    ("bsr", torch.bfloat16, "block:16x16"), ("bsr", torch.float32, "block:64x32"), ("bsr", torch.float16, "block:8x8"),
]  # fmt: skip
ids = pytest.mark.parametrize(("name", "dtype", "pattern"), KERNELS, ids=lambda value: str(value).replace("torch.", ""))


def check_layer(dense, x, name, pattern):
    """Forward and every gradient of a layer in a format against the masked dense layer in float64."""
    mask = sk.prune(dense, 0.7, pattern=pattern, scope="layer")["weight"]
    kind = sk.SparseLinear if isinstance(dense, nn.Linear) else sk.SparseConv2d
    sparse = kind.from_dense(dense, mask, name)
    exact = copy.deepcopy(dense).double()
    with torch.no_grad():
        exact.weight.mul_(mask)
    x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    for size in (x.numel(), 4096):
        torch.full((size,), torch.nan, device=x.device, dtype=x.dtype)  # what results are likely to be given
    y, want = sparse(x), exact(x64)
    assert y.shape == want.shape and y.dtype == x.dtype
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, sparse.values, sparse.bias], dy)
    wanted = torch.autograd.grad(want, [x64, exact.weight, exact.bias], dy.double())
    dense_grad = sparse.format.scatter(got[1], sparse._saved_index(), torch.Size(sparse.shape))
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(x.dtype, 8e-3)
    for one, other in zip((y, got[0], dense_grad, got[2]), (want, wanted[0], wanted[1] * mask, wanted[2]), strict=True):
        assert (one.double() - other).norm() <= limit * max(float(other.norm()), 1e-3)


@ids
@pytest.mark.parametrize("n", [0, 1, 37, 300])
def test_linear_kernels(name, dtype, pattern, n):
    dense = nn.Linear(200, 136).to("cuda", dtype)
    check_layer(dense, torch.randn(n, 200, device="cuda", dtype=dtype), name, pattern)


@ids
@pytest.mark.parametrize(
    "geometry", [{"padding": 1}, {"stride": 2, "padding": 1, "groups": 2}, {"dilation": 2}], ids=str
)
def test_convolution_kernels(name, dtype, pattern, geometry):
    if name == "bitmap":
        pytest.skip("for linear layers")
    dense = nn.Conv2d(48, 80, 3, **geometry).to("cuda", dtype)
    x = torch.randn(3, 48, 9, 11, device="cuda", dtype=dtype)
    check_layer(dense, x, name, pattern)
    check_layer(dense, x.detach().contiguous(memory_format=torch.channels_last), name, pattern)


def test_panels_in_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    dense, x = nn.Linear(256, 128).cuda(), torch.randn(100, 256, device="cuda")
    mask = sk.prune(dense, 0.7, pattern="block:8x8")["weight"]
    sparse = sk.SparseLinear.from_dense(dense, mask, "panel")
    exact = nn.functional.linear(x.double(), (dense.weight * mask).double(), dense.bias.double())
    try:
        errors = []
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            with torch.no_grad():
                errors.append(relative(sparse(x), exact))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors[0] < 1e-5 < errors[1] < 5e-3


def test_the_plan_measures_and_explains():
    dense = Net().cuda()
    sparse = sk.convert(dense, sk.prune(dense, 0.9, pattern="block:32x32"), example_inputs=images(), training=True)
    for layer in sk.explain(sparse).layers:
        assert layer.us > 0 and layer.dense_us > 0
        assert layer.us <= 1.05 * layer.dense_us
        assert {layer.chosen, *layer.rejected} == set(formats.names())


def test_tuning_is_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    _, sparse, _ = sparse_net(torch.bfloat16)
    x = images(dtype=torch.bfloat16)
    sparse(x)
    assert not (tmp_path / "tuning.json").exists()  # a step never tunes
    with tuning.on():
        want = sparse(x)
    assert json.loads((tmp_path / "tuning.json").read_text())
    assert relative(sparse(x), want) < 1e-2
    monkeypatch.setenv("SPARSEKIT_AUTOTUNE", "0")
    assert relative(sparse(x), want) < 1e-2


@pytest.mark.parametrize("flavour", [{"foreach": True}, {"fused": True}, {"fused": True, "capturable": True}], ids=str)
def test_optimizers_hold_survivors_only(flavour):
    _, sparse, masks = sparse_net()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2, weight_decay=0.1, **flavour)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(images()).square().mean().backward()
        optimizer.step()
    for name in ("conv1", "conv2", "fc1", "fc2"):
        layer = getattr(sparse, name)
        assert optimizer.state[layer.values]["exp_avg"].shape == layer.values.shape
        assert not bool(layer.weight[~masks[f"{name}.weight"]].any())


def test_a_whole_training_step_is_captured_as_a_graph():
    _, eager, _ = sparse_net()
    captured = copy.deepcopy(eager)
    batches = [images() for _ in range(6)]

    def make(model):
        return torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)

    def step(model, optimizer, x):
        optimizer.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = make(eager)
    losses = [step(eager, optimizer, x).item() for x in batches]
    optimizer, still = make(captured), batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm = [step(captured, optimizer, still.copy_(x)).item() for x in batches[:3]]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, optimizer, still)
    replayed = []
    for x in batches[3:]:
        still.copy_(x)
        graph.replay()
        replayed.append(loss.item())
    assert warm + replayed == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_without_a_break(training):
    _, sparse, _ = sparse_net(training=training)
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True)
    for n in (16, 24):
        x = images(n)
        if training:
            want = torch.autograd.grad(sparse(x).square().sum(), list(sparse.parameters()))
            got = torch.autograd.grad(compiled(x).square().sum(), list(sparse.parameters()))
            for g, w in zip(got, want, strict=True):
                assert relative(g, w) < 1e-5
        else:
            with torch.no_grad():
                assert relative(compiled(x), sparse(x)) < 1e-5


def test_reduce_overhead_mode():
    _, sparse, _ = sparse_net(training=False)
    compiled = torch.compile(sparse, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = images()
            assert relative(compiled(x).clone(), sparse(x)) < 1e-5


def test_an_aot_package_holds_the_kernels(tmp_path):
    _, sparse, _ = sparse_net(training=False)
    x = images()
    with torch.no_grad():
        program = torch.export.export(sparse.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        served = torch._inductor.aoti_load_package(path)
        for n in (16, 5):
            x = images(n)
            assert relative(served(x), sparse(x)) < 1e-5


def test_autocast():
    _, sparse, _ = sparse_net()
    x = images()
    with torch.autocast("cuda", torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16 and relative(y, sparse(x)) < 3e-2
    y.float().square().sum().backward()
    assert sparse.fc1.values.grad.dtype == torch.float32


def test_another_stream():
    _, sparse, _ = sparse_net()
    x = images()
    with torch.no_grad():
        want = sparse(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = sparse(x)
        side.synchronize()
    assert torch.equal(got, want)


def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    _, sparse, _ = sparse_net()
    x = images()
    with torch.no_grad():
        want = sparse(x)
        got = copy.deepcopy(sparse).to("cuda:1")(x.to("cuda:1"))
    assert got.device.index == 1 and relative(got.to("cuda:0"), want) < 1e-5


def test_tf32_follows_torch():
    _, sparse, _ = sparse_net()
    exact, x = copy.deepcopy(sparse).double(), images()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        errors = []
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            torch.backends.cudnn.conv.fp32_precision = precision
            with torch.no_grad():
                errors.append(relative(sparse(x), exact(x.double())))
    finally:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = before
    assert errors[0] < 1e-5 < errors[1] < 5e-3


def test_fused_epilogue():
    body = [nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    dense = nn.Sequential(*body, nn.Conv2d(64, 32, 1), nn.SiLU()).cuda()
    for _ in range(3):
        dense(images())
    dense.eval()
    sparse = sk.convert(dense, sk.prune(dense, 0.5, pattern="block:32x32"), impl="bsr")
    with torch.no_grad():
        x = images()
        assert relative(sk.fuse(sparse)(x), sparse(x)) < 1e-5


def test_sizes_past_two_to_the_31():
    """70,000 x 32,768 inputs are 2.3e9 elements: addresses beyond 32 bits."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    layer = nn.Linear(32768, 64, bias=False).cuda().bfloat16()
    mask = sk.prune(layer, 0.9, pattern="block:64x64")["weight"]
    x = torch.randn(70_000, 32768, device="cuda", dtype=torch.bfloat16)
    sparse = sk.SparseLinear.from_dense(layer, mask, "bsr")
    with torch.no_grad():
        y = sparse(x)
        want = nn.functional.linear(x[-64:].float(), (layer.weight * mask).float())
    assert relative(y[-64:], want) < 1e-2
