"""A layer among torch's tools: whatever torch's own module does under them, the sparse one does too."""

import copy
import io

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk

# torch warns of its own use of torch.jit.script when forward-mode differentiation is first asked for
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
FORMATS = ["dense", "compact", "csr", "bsr"]
each = pytest.mark.parametrize(("kind", "fmt"), [(kind, fmt) for kind in ("linear", "conv") for fmt in FORMATS])


def pair(kind, fmt):
    """A masked torch layer that pruned weights get no gradient in, the sparse layer of the same weights, an input."""
    dense = nn.Linear(12, 8) if kind == "linear" else nn.Conv2d(4, 8, 3, padding=1)
    x = torch.randn(5, 12) if kind == "linear" else torch.randn(5, 4, 7, 6)
    mask = torch.rand(dense.weight.shape) < 0.4
    mask[1] = False
    with torch.no_grad():
        dense.weight.mul_(mask)
    sparse_class = sk.SparseLinear if kind == "linear" else sk.SparseConv2d
    return dense, sparse_class.from_dense(dense, mask, fmt), x


def loss(layer):
    return lambda x: layer(x).square().sum()


def of_parameters(layer, x):
    return lambda parameters: torch.func.functional_call(layer, parameters, (x,)).square().sum()


def detached(layer):
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def dual(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def batched(layer, x):
    x = x.requires_grad_()
    y = layer(x)
    dy = torch.arange(3 * y.numel(), dtype=y.dtype).view(3, *y.shape) / y.numel()
    return torch.autograd.grad(y, (x, layer.bias), dy, is_grads_batched=True)


def ensemble(layer, x):
    parameters, buffers = torch.func.stack_module_state([layer, copy.deepcopy(layer)])
    call = lambda p, b, x: torch.func.functional_call(layer, (p, b), (x,))  # noqa: E731
    return torch.vmap(call, (0, 0, None))(parameters, buffers, x)


def per_sample(layer, x):
    call = lambda parameters, x: of_parameters(layer, x[None])(parameters)  # noqa: E731
    return torch.vmap(torch.func.grad(call), (None, 0))(detached(layer), x)["bias"]


TRANSFORMS = {
    "vmap": lambda layer, x: torch.vmap(layer)(x[:, None]),
    "vmap over the last axis": lambda layer, x: torch.vmap(layer, in_dims=-1)(x.movedim(0, -1)),
    "grad": lambda layer, x: torch.func.grad(of_parameters(layer, x))(detached(layer))["bias"],
    "grad of the input": lambda layer, x: torch.func.grad(loss(layer))(x),
    "per sample": per_sample,
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "vjp": lambda layer, x: torch.func.vjp(layer, x)[1](torch.ones_like(layer(x))),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x[:2]),
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer)(x[:1]),
    "hessian": lambda layer, x: torch.func.hessian(loss(layer))(x[:1]),
    "linearize": lambda layer, x: torch.func.linearize(layer, x)[1](x),
    "ensemble": ensemble,
    "forward mode": dual,
    "batched gradients": batched,
    "vectorized jacobian": lambda layer, x: torch.autograd.functional.jacobian(layer, x[:2], vectorize=True),
    "hvp": lambda layer, x: torch.autograd.functional.hvp(loss(layer), x, x),
}


def same(got, want, rtol=1e-4, atol=1e-5):
    assert type(got) is type(want)
    if isinstance(got, tuple):
        for one, other in zip(got, want, strict=True):
            same(one, other, rtol, atol)
    else:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@each
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch runs operators one by one
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # of torch.func.linearize
def test_transforms(kind, fmt, name):
    dense, sparse, x = pair(kind, fmt)
    same(TRANSFORMS[name](sparse, x.clone()), TRANSFORMS[name](dense, x.clone()))
    assert all(type(buffer) is torch.Tensor and not torch._C._functorch.is_batchedtensor(buffer)
               for buffer in sparse.buffers())  # fmt: skip


@each
def test_gradients_of_values_under_transforms_reach_survivors_only(kind, fmt):
    dense, sparse, x = pair(kind, fmt)
    got = torch.func.grad(of_parameters(sparse, x))(detached(sparse))["values"]
    want = torch.func.grad(of_parameters(dense, x))(detached(dense))["weight"]
    same(got, sparse.pack(want * sparse.survivors()))
    dead = sparse.pack(sparse.survivors().float()) == 0
    assert torch.equal(got[dead], torch.zeros(int(dead.sum())))


@pytest.mark.parametrize("fmt", ["dense", "csr"])
@pytest.mark.parametrize("name", ["grad", "vmap", "jvp"])
def test_compiled_transforms(fmt, name):
    torch._dynamo.reset()
    dense, sparse, x = pair("linear", fmt)
    transform = {
        "grad": torch.func.grad,
        "vmap": lambda f: torch.vmap(lambda x: f(x)),
        "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    }[name]
    compiled = torch.compile(transform(loss(sparse)), fullgraph=True, backend="aot_eager")
    same(compiled(x), transform(loss(dense))(x))


@pytest.mark.parametrize("fmt", ["dense", "csr"])
def test_compiled_autograd(fmt):
    torch._dynamo.reset()
    dense, sparse, x = pair("conv", fmt)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda x: loss(sparse)(x).backward(), backend="aot_eager")(x)
    loss(dense)(x).backward()
    same(sparse.bias.grad, dense.bias.grad)
    same(sparse.values.grad, sparse.pack(dense.weight.grad * sparse.survivors()))


@pytest.mark.parametrize("fmt", ["dense", "csr"])
def test_one_graph_serves_every_batch(fmt):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    dense, sparse, x = pair("conv", fmt)
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True, backend=counter)
    for n in (11, 5, 2, 13):
        x = torch.randn(n, *x.shape[1:])
        same(compiled(x), dense(x))
    assert counter.frame_count == 1


@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_traces(kind, fmt):
    dense, sparse, x = pair(kind, fmt)
    same(torch.jit.trace(sparse, x)(x[:3]), dense(x[:3]))
    graph = torch.fx.symbolic_trace(nn.Sequential(sparse, nn.ReLU()))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    same(graph(x), dense(x).relu())
    program = torch.export.export(sparse, (x,), strict=True)
    same(program.module()(x), dense(x))


def step(layer, x, scaler=None):
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
        value = layer(x).float().square().mean()
    if scaler is None:
        value.backward()
        optimizer.step()
    else:
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def checkpointed(layer, x):
    x = x.requires_grad_()
    checkpoint(loss(layer), x, use_reentrant=False).backward()
    return x.grad


def offloaded(layer, x):
    x = x.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        value = loss(layer)(x)
    value.backward()
    return x.grad


def averaged(layer, x):
    mean = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        step(layer, x)
        mean.update_parameters(layer)
    return mean(x)


def lbfgs(layer, x):
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        value = layer(x).square().mean()
        value.backward()
        return value

    optimizer.step(closure)
    return layer(x)


def scaled(layer, x):
    step(layer, x, torch.amp.GradScaler("cpu", init_scale=8.0))
    return layer(x)


def clipped(layer, x):
    loss(layer)(x).backward()
    layer_norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    nn.utils.clip_grad_value_(layer.parameters(), 0.05)
    return layer_norm, layer.bias.grad


def hooked(layer, x):
    seen = []
    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append("grad"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    loss(layer)(x.requires_grad_()).backward()
    return torch.tensor([len(seen), seen.index("backward pre")])


def doubled_bias(layer, x):
    class Double(nn.Module):
        def forward(self, bias):
            return 2 * bias

    parametrize.register_parametrization(layer, "bias", Double())
    loss(layer)(x).backward()
    return layer(x), layer.parametrizations.bias.original.grad


def saved_whole(layer, x):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(x)


def inferred(layer, x):
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
        y = copied(x).clone()
    step(layer, x)
    return y, layer(x)


def vectorised(layer, x):
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(2 * vector, layer.parameters())
    return layer(x)


TOOLS = {
    "checkpoint": checkpointed,
    "save_on_cpu": offloaded,
    "EMA": averaged,
    "LBFGS": lbfgs,
    "GradScaler": scaled,
    "clipping": clipped,
    "hooks": hooked,
    "a parametrized bias": doubled_bias,
    "torch.save": saved_whole,
    "inference_mode": inferred,
    "parameters_to_vector": vectorised,
    "type": lambda layer, x: layer.type(torch.float64)(x.double()),
    "half": lambda layer, x: layer.half()(x.half()),
    "bfloat16": lambda layer, x: layer.bfloat16()(x.bfloat16()),
    "share_memory": lambda layer, x: layer.share_memory()(x),
    "autocast of half inputs": lambda layer, x: torch.autocast("cpu", torch.float16)(layer)(x.half()),
}


@each
@pytest.mark.parametrize("name", TOOLS)
def test_tools(kind, fmt, name):
    dense, sparse, x = pair(kind, fmt)
    mask = sparse.survivors().clone()
    # Steps of a torch layer move pruned weights, so the rival of the training tools is ours in the dense format.
    trained = name in ("EMA", "LBFGS", "clipping", "GradScaler")
    rival = type(sparse).from_dense(dense, mask, "dense") if trained else dense
    if name == "inference_mode":
        dense.weight.register_hook(lambda grad: grad * mask)
    loose = name in ("half", "bfloat16", "GradScaler", "autocast of half inputs")
    tolerance = (2e-2, 2e-2) if loose else (1e-4, 1e-5)
    same(TOOLS[name](sparse, x.clone()), TOOLS[name](rival, x.clone()), *tolerance)
    assert torch.equal(sparse.survivors(), mask)
    assert torch.equal(sparse.weight[~mask], torch.zeros(int((~mask).sum()), dtype=sparse.weight.dtype))


@pytest.mark.parametrize("name", ["weight", "values"])
@each
def test_a_parametrized_weight_is_refused_and_nothing_changes(kind, fmt, name):
    _, sparse, x = pair(kind, fmt)
    before, keys, class_ = sparse(x).detach(), list(sparse.state_dict()), type(sparse)
    why = {"weight": "does not have a parameter.* with name 'weight'", "values": "Expected values to stay a parameter"}
    with pytest.raises(ValueError, match=why[name]):
        parametrize.register_parametrization(sparse, name, nn.Identity())
    with pytest.raises((ValueError, KeyError)):
        nn.utils.parametrizations.spectral_norm(sparse, name)
    assert type(sparse) is class_ and list(sparse.state_dict()) == keys
    assert torch.equal(sparse(x), before)


def test_index_keeps_its_dtype():
    layer = sk.SparseLinear(6, 4, mask=torch.rand(4, 6) < 0.5)
    before = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    for moved in (layer.type(torch.float16), layer._apply(lambda t: t.to(torch.float64))):
        assert {name: buffer.dtype for name, buffer in moved.named_buffers()} == before


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_sequences(fmt):
    dense, sparse, x = pair("linear", fmt)
    jagged = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged, requires_grad=True)
    y = sparse(jagged)
    same(y.values(), dense(x))
    y.values().square().sum().backward()
    same(jagged.grad.values(), torch.func.grad(loss(dense))(x))
    strided = torch.nested.as_nested_tensor([x[:2], x[2:]], layout=torch.strided)
    if sparse.format.masked:  # torch's own operator takes it
        same(torch.cat(sparse(strided).unbind()), dense(x))
        return
    with pytest.raises(TypeError, match="SparseLinear: Expected a tensor or a jagged nested one, got a strided nested"):
        sparse(strided)


@each
def test_reset_parameters(kind, fmt):
    dense, sparse, _ = pair(kind, fmt)
    torch.manual_seed(7)
    dense.reset_parameters()
    torch.manual_seed(7)
    sparse.reset_parameters()
    assert torch.equal(sparse.weight, torch.where(sparse.survivors(), dense.weight, 0))
    assert torch.equal(sparse.bias, dense.bias)
    empty = copy.deepcopy(sparse).to("meta")
    empty.reset_parameters()
    assert empty.values.is_meta
