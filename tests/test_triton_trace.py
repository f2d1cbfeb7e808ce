"""torch.compile sees through the operators: traced on pretended CUDA tensors, they turn into the Triton kernels."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

PRELUDE = """
import torch, triton, sparsekit as sk
from types import SimpleNamespace
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch._dynamo.source import ConstantSource
from triton.backends.compiler import GPUTarget
from sparsekit import ops, format as formats
from sparsekit.format import Conv
from sparsekit.kernels import tuning

if not torch.version.cuda:  # else done at import
    ops.register_triton()
torch.cuda.get_device_capability = lambda device=None: (9, 0)  # a Hopper that this machine need not have
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
tuning.choose = lambda kernel, key, configs, launch, where: configs[0]
fmt = formats.get("bsr")

def pretend(tensors):
    return [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]

def index_of(mask, groups=1):
    index = fmt.index(mask, groups)
    index |= fmt.derive(index, mask.shape)
    values = fmt.gather(mask.float(), index)
    return values, [index.get(name) for name in fmt.index_names]

def trace(function, tensors, mode="real"):
    present = [t for t in tensors if t is not None]
    def rebuilt(*some):
        some = list(some)
        return function(*[None if t is None else some.pop(0) for t in tensors])
    graph = make_fx(dispatch_functionalize(rebuilt), tracing_mode=mode)(*present)
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"], graph

def verdict(traced, kernels):
    names, graph = traced
    assert not any("sparsekit" in name for name in names), names
    launches = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(launches) >= kernels, names
    for node in launches:  # torch knows which tensors a kernel writes: its results, never what it reads
        written = set(node.kwargs["tensors_to_clone"])
        assert 1 <= len(written) <= 2 and not written & {"x", "dy", "values", "bias", "image"}, written
"""

LINEAR = """
mask = sk.prune(torch.nn.Linear(96, 128), 0.5, pattern="block:32x32")["weight"]
values, index = index_of(mask)
with FakeTensorMode(), torch.no_grad():
    x, dy, bias = (torch.empty(size, device="cuda") for size in ((64, 96), (64, 128), (128,)))
    def step(x, dy, bias, values, *index):
        y = fmt.linear(x, values, bias, index, (128, 96), "relu")
        return y, *fmt.linear_backward(dy, x, values, index, (128, 96), (True, True, True))
    verdict(trace(step, [x, dy, bias, *pretend([values]), *pretend(index)]), 3)
"""

CONV = """
mask = sk.prune(torch.nn.Conv2d(32, 64, 3), 0.5, pattern="block:32x32")["weight"]
values, index = index_of(mask)
conv = Conv((2, 2), (1, 1), (1, 1), 1)
with FakeTensorMode(), torch.no_grad():
    last = torch.channels_last
    x, dy = (torch.empty(size, device="cuda", memory_format=last) for size in ((4, 32, 10, 8), (4, 64, 5, 4)))
    bias = torch.empty(64, device="cuda")
    def step(x, dy, bias, values, *index):
        y = fmt.conv2d(x, values, bias, index, (64, 32, 3, 3), conv)
        return y, *fmt.conv2d_backward(dy, x, values, index, (64, 32, 3, 3), conv, (True, True, True))
    verdict(trace(step, [x, dy, bias, *pretend([values]), *pretend(index)]), 3)
"""

DYNAMIC = """
mask = sk.prune(torch.nn.Linear(96, 128), 0.5, pattern="block:32x32")["weight"]
values, index = index_of(mask)
shapes = ShapeEnv()
symbol = shapes.create_symbol(64, source=ConstantSource("n"), dynamic_dim=DimDynamic.DYNAMIC)
with FakeTensorMode(shape_env=shapes), torch.no_grad():
    x = torch.empty(shapes.create_symintnode(symbol, hint=64), 96, device="cuda")
    def forward(x, values, *index):
        return fmt.linear(x, values, None, index, (128, 96))
    names, graph = trace(forward, [x, *pretend([values]), *pretend(index)], "symbolic")
    verdict((names, graph), 1)
    first = next(node for node in graph.graph.nodes if node.op == "placeholder")
    assert isinstance(first.meta["val"].shape[0], torch.SymInt), first.meta["val"].shape  # the batch stays open
"""

OPAQUE = """
mask = sk.prune(torch.nn.Linear(96, 128), 0.5, pattern="block:32x32")["weight"]
values, index = index_of(mask)
double = values.double()
x = torch.randn(4, 96)
def forward(x, values, *index):
    return fmt.linear(x, values, None, index, (128, 96))
with torch.no_grad():
    names, graph = trace(forward, [x, values, *index])
    assert names == ["sparsekit.bsr_linear.default"], names  # CPU tensors: nothing of Triton
    with FakeTensorMode():
        tensors = [torch.empty(4, 96, device="cuda", dtype=torch.float64), *pretend([double]), *pretend(index)]
        names, _ = trace(forward, tensors)
    assert names == ["sparsekit.bsr_linear.default"], names  # no tensor core multiplies float64 here
"""


@pytest.mark.parametrize("what", [LINEAR, CONV, DYNAMIC, OPAQUE], ids=["linear", "conv", "dynamic batch", "others"])
def test_operators_turn_into_kernels(what):
    command = [sys.executable, "-c", PRELUDE + what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
