"""The operators as torch sees them: schemas, shape functions, and the two implementations of each."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from sparsekit import _native
from sparsekit.kernels import lanes
from sparsekit.kernels.bitmap import layout as bitmap_layout
from sparsekit.kernels.blocks import layout as bl
from sparsekit.kernels.csr import layout, planes
from sparsekit.kernels.nm import layout as nm_layout
from sparsekit.ops import TWINS
from sparsekit.schemas import SCHEMAS
from sparsekit.transposable import transposable_2_4

ops = torch.ops.sparsekit


def chain_calls(n, out, features, density):
    """Arguments of the chain's operator for two random weights."""
    masks = torch.rand(out, features) < density, torch.rand(3, out) < density
    parts = [layout.csr(mask) for mask in masks]
    values, rows = [torch.randn(int(mask.sum())) for mask in masks], [part["crow_indices"] for part in parts]
    columns, keys = [part["col_indices"] for part in parts], [layout.code_key(*part.values()) for part in parts]
    biases = [torch.randn(out), None]
    return {"csr_chain": [(torch.randn(n, features), values, rows, columns, biases, keys, ["relu", "none"])]}


def linear_calls(n, out, features, density):
    """Arguments of every linear operator for one random weight."""
    mask = torch.rand(out, features) < density
    index = layout.csr(mask)
    csr = tuple(index.values())
    csc = tuple(layout.transposed(*csr, features).values())
    values = torch.randn(int(mask.sum()))
    x, dy, bias = torch.randn(n, features), torch.randn(n, out), torch.randn(out)
    return {
        "csr_linear": [(x, values, *csr, bias), (x, values, *csr, None), (x, values, *csr, bias, None, "gelu")],
        "csr_linear_t": [(dy, values, *csc)],
        "csr_sddmm": [(dy, x, *csr)],
        "csr_linear_backward": [
            (dy, x, values, *csr, *csc, *needs)
            for needs in ((True, True, True), (False, True, False), (True, False, True))
        ],
    }


def conv_calls(n, out, inputs, size, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Arguments of every convolution operator for one random weight of density 0.3."""
    shape = (out, inputs // groups, *kernel)
    mask = torch.rand(shape) < 0.3
    index = layout.csr(mask)
    csr = tuple(index.values())
    csc = tuple(layout.transposed(*csr, layout.columns(shape)).values())
    conv = tuple(map(list, (kernel, stride, padding, dilation)))
    values, x, bias = torch.randn(int(mask.sum())), torch.randn(n, inputs, *size), torch.randn(out)
    y = torch.nn.functional.conv2d(x, torch.zeros(shape), None, stride, padding, dilation, groups)
    dy = torch.randn_like(y)
    return {
        "csr_conv2d": [
            (x, values, *csr, bias, *conv, groups),
            (x, values, *csr, None, *conv, groups, None, "relu", dy),
        ],
        "csr_conv2d_t": [(dy, values, *csc, list(size), *conv, groups)],
        "csr_conv2d_sddmm": [(dy, x, *csr, *conv, groups)],
        "csr_conv2d_backward": [
            (dy, x, values, *csr, *csc, *conv, groups, *needs) for needs in ((True, True, True), (False, True, False))
        ],
    }


def pool_calls(n, channels, size):
    """Arguments of the pooling operator."""
    x = torch.randn(n, channels, *size)
    return {"max_pool2d": [(x, [3, 3], [2, 2], [1, 1]), (x.double(), [2, 3], [1, 4], [0, 1])]}


def planes_calls(n, inputs, size, stride=1):
    """Arguments of the operators of planes, every lane a sample."""
    mask, x = torch.rand(5, inputs, 3, 3) < 0.3, torch.randn(n, inputs, *size, dtype=torch.float64)
    weight = (torch.randn(int(mask.sum()), dtype=torch.float64), *layout.csr(mask).values())
    conv, lanes = [[3, 3], [stride] * 2, [1, 1], [1, 1], 1], 8 if n % 8 == 0 else 1
    held, own = planes.to_planes(x, 2, lanes), [n, *size, 2]
    y = torch.nn.functional.conv2d(x, torch.zeros(5, inputs, 3, 3, dtype=x.dtype), None, stride, 1)
    skip = planes.to_planes(torch.randn_like(y), 0, lanes), [n, *y.shape[2:], 0]
    return {
        "csr_conv2d_planes": [
            (held, own, *weight, None, *conv, None, "relu", *skip, lanes, 1),
            (x, [], *weight, torch.randn(5, dtype=x.dtype), *conv, None, "silu", torch.randn_like(y), [], lanes, 0),
            (held, own, *weight, None, *conv, None, "none", None, [], lanes, -1),
        ],
        "max_pool2d_planes": [(held, own, [3, 3], [2, 2], [1, 1], 1)],
    }


def blocks(shape, density, groups=1, block=(8, 16)):
    """A random block weight: values, forward index, gradient index, transposed list."""
    cells = bl.blocks(torch.ones(shape), block, groups)
    cells = (torch.rand(cells.shape[:2]) < density)[:, :, None, None].expand(cells.shape).contiguous()
    mask = bl.unblocks(cells, shape, groups)
    index = bl.index(mask, block, groups)
    values = bl.gather(torch.randn(shape), index["crow_indices"], index["col_indices"], block, groups)
    grid = bl.grid(shape, block, groups)
    transposed = bl.transposed(index["crow_indices"], index["col_indices"], grid)
    crow, col, order, runs = index.values()
    return values, (crow, col, order), (crow, col, runs), tuple(transposed.values())


def bsr_linear_calls(n, out, features, density):
    """Arguments of every block-sparse linear operator for one random weight."""
    values, forward, gradient, transposed = blocks((out, features), density)
    x, dy, bias = torch.randn(n, features), torch.randn(n, out), torch.randn(out)
    return {
        "bsr_linear": [(x, values, *forward, bias, out, "none"), (x, values, *forward, None, out, "gelu")],
        "bsr_linear_t": [(dy, values, *transposed, features)],
        "bsr_sddmm": [(dy, x, *gradient, list(values.shape[1:]))],
        "bsr_linear_backward": [
            (dy, x, values, *gradient, *transposed, *needs)
            for needs in ((True, True, True), (False, True, False), (True, False, True))
        ],
    }


def bsr_conv_calls(n, out, inputs, size, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Arguments of every block-sparse convolution operator for one random weight."""
    shape = (out, inputs // groups, *kernel)
    values, forward, gradient, transposed = blocks(shape, 0.3, groups)
    conv = tuple(map(list, (kernel, stride, padding, dilation)))
    x, bias = torch.randn(n, inputs, *size), torch.randn(out)
    y = torch.nn.functional.conv2d(x, torch.zeros(shape), None, stride, padding, dilation, groups)
    dy = torch.randn_like(y)
    return {
        "bsr_conv2d": [(x, values, *forward, b, out, *conv, groups, "relu") for b in (bias, None)],
        "bsr_conv2d_t": [(dy, values, *transposed, inputs, list(size), *conv, groups)],
        "bsr_conv2d_sddmm": [(dy, x, *gradient, list(values.shape[1:]), *conv, groups)],
        "bsr_conv2d_backward": [
            (dy, x, values, *gradient, *transposed, *conv, groups, *needs)
            for needs in ((True, True, True), (False, True, False))
        ],
    }


def nm_calls(n, out, features, density):
    """Arguments of every 2:4 operator for one weight that is 2:4 both ways."""
    mask = transposable_2_4(torch.rand(4 * out, 4 * features))
    index = nm_layout.index(mask)
    choice, t_choice = index["choice"], index["t_choice"]
    values = torch.randn(4 * out, 2 * features)
    x, dy, bias = torch.randn(n, 4 * features), torch.randn(n, 4 * out), torch.randn(4 * out)
    return {
        "nm_linear": [(x, values, choice, bias), (x, values, choice, None)],
        "nm_linear_t": [(dy, values, choice, t_choice), (dy, values, choice, None)],
        "nm_sddmm": [(dy, x, choice)],
    }


def panel_calls(*sizes):
    """Arguments of every operator of the format ``panel``, which takes those of ``bsr``."""
    calls = (bsr_linear_calls if len(sizes) == 4 else bsr_conv_calls)(*sizes)
    return {name.replace("bsr", "panel"): calls[name] for name in calls if not name.endswith("backward")}


def bitmap_calls(n, out, features, density):
    """Arguments of the bitmap operator for one random weight."""
    mask = torch.rand(out, features) < density
    index = bitmap_layout.index(mask)
    values = bitmap_layout.gather(torch.randn(out, features), index["bitmap"])
    x, bias = torch.randn(n, features), torch.randn(out)
    return {"bitmap_linear": [(x, values, *index.values(), b, out, "silu") for b in (bias, None)]}


def lanes_calls(n, out, features, density):
    """Arguments of the operator of weights in lanes for one random weight, also with quantized values."""
    index = lanes.FORMAT.index(torch.rand(out, features) < density)
    values = lanes.FORMAT.gather(torch.randn(out, features), index)
    x, bias, scale = torch.randn(n, features), torch.randn(out), torch.rand(out)
    small = values.to(torch.int8)
    return {
        "lanes_linear": [
            *[(x, values, *index.values(), None, b, out, "silu") for b in (bias, None)],
            (x, small, *index.values(), scale, bias, out, "none"),
        ]
    }


LINEARS = {"plain": (5, 7, 9, 0.3), "empty": (3, 4, 6, 0.0), "full": (2, 3, 5, 1.0), "no batch": (0, 7, 9, 0.3)}
CONVS = {
    "plain": (2, 4, 3, (7, 6), (3, 3)),
    "strided": (2, 6, 4, (9, 8), (3, 2), (2, 3), (1, 2), (1, 2), 2),
    "pointwise": (1, 5, 4, (4, 4), (1, 1)),
    "no batch": (0, 4, 3, (5, 5), (3, 3)),
}
def dense_calls(n, out, features, density):
    """Arguments of the operators of the dense format; one of them changes its first."""
    mask, dy, x = torch.rand(out, features) < density, torch.randn(n, out), torch.randn(n, features)
    return {
        "dense_sddmm": [(dy, x, mask), (dy[:, :1].expand(-1, out), x.t().contiguous().t(), mask)],
        "zero_pruned_": [(torch.randn(out, features), mask), (torch.randn(features, out).t(), mask)],
    }


CASES = [
    *[pytest.param(chain_calls, LINEARS[name], id=f"chain {name}") for name in LINEARS],
    *[pytest.param(linear_calls, LINEARS[name], id=f"linear {name}") for name in LINEARS],
    *[pytest.param(conv_calls, CONVS[name], id=f"conv {name}") for name in CONVS],
    *[pytest.param(bsr_linear_calls, LINEARS[name], id=f"bsr linear {name}") for name in LINEARS],
    *[pytest.param(panel_calls, LINEARS[name], id=f"panel linear {name}") for name in LINEARS],
    *[pytest.param(panel_calls, CONVS[name], id=f"panel conv {name}") for name in CONVS],
    *[pytest.param(bitmap_calls, LINEARS[name], id=f"bitmap linear {name}") for name in LINEARS],
    *[pytest.param(lanes_calls, LINEARS[name], id=f"lanes linear {name}") for name in LINEARS],
    *[pytest.param(dense_calls, LINEARS[name], id=f"dense linear {name}") for name in LINEARS],
    *[pytest.param(nm_calls, LINEARS[name], id=f"nm linear {name}") for name in ("plain", "no batch")],
    *[pytest.param(bsr_conv_calls, CONVS[name], id=f"bsr conv {name}") for name in CONVS],
    *[pytest.param(pool_calls, (n, 3, (7, 9)), id=f"pool {n}") for n in (0, 2)],
    *[pytest.param(planes_calls, (n, 3, (7, 9), stride), id=f"planes {n}") for n, stride in ((0, 1), (2, 2), (8, 1))],
]


def flat(result):
    return result if isinstance(result, tuple | list) else () if result is None else (result,)


def test_cases_cover_the_table():
    kinds = (chain_calls, linear_calls, bsr_linear_calls, panel_calls, bitmap_calls, lanes_calls, nm_calls, dense_calls)
    linears = {name for calls in kinds for name in calls(*LINEARS["plain"])}
    convs = {name for calls in (conv_calls, bsr_conv_calls, panel_calls) for name in calls(*CONVS["plain"])}
    assert {*linears, *convs, *pool_calls(1, 1, (4, 4)), *planes_calls(1, 1, (4, 4)), "build_info"} == SCHEMAS.keys()


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_registered_schema_is_the_one_of_the_table(name):
    assert str(getattr(ops, name).default._schema) == str(torch._C.parse_schema(f"sparsekit::{name}{SCHEMAS[name]}"))


@pytest.mark.parametrize(("calls", "sizes"), CASES)
def test_opcheck(calls, sizes):
    for name, arguments in calls(*sizes).items():
        for one in arguments:
            opcheck(getattr(ops, name).default, one)


@pytest.mark.parametrize(("calls", "sizes"), CASES)
def test_fakes_have_the_shapes_of_real_results(calls, sizes):
    for name, arguments in calls(*sizes).items():
        for one in arguments:
            real = flat(getattr(ops, name)(*one))
            with FakeTensorMode() as mode:
                faked = tree_map_only(torch.Tensor, mode.from_tensor, one)
                fake = flat(getattr(ops, name)(*faked))
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), name


@pytest.mark.parametrize(("calls", "sizes"), CASES)
def test_native_agrees_with_the_reference(calls, sizes):
    for name, arguments in calls(*sizes).items():
        for one in arguments:
            double = tree_map_only(torch.Tensor, lambda a: a.double() if a.is_floating_point() else a, one)
            expected = flat(TWINS[name](*double))
            for got, want in zip(flat(getattr(ops, name)(*one)), expected, strict=True):
                assert got.shape == want.shape, name
                assert (got.double() - want).norm() <= 1e-5 * max(float(want.norm()), 1), name


FALLBACK = """
import json, torch, sparsekit as sk
from sparsekit import _native
torch.manual_seed(0)
x, mask = torch.randn(3, 4, 6, 6, requires_grad=True), torch.rand(5, 4, 3, 3) < 0.4
layer = sk.SparseConv2d(4, 5, 3, padding=1, mask=mask)
y = layer(x)
torch.nn.functional.linear(y, layer.weight.new_ones(2, 6)).square().sum().backward()
head = sk.SparseLinear(4, 3, mask=torch.rand(3, 4) < 0.5)
h = torch.randn(2, 4, requires_grad=True)
head(h).square().sum().backward()
tensors = [y, x.grad, layer.values.grad, layer.bias.grad, h.grad, head.values.grad]
print(json.dumps({
    "status": _native.status(), "build": torch.ops.sparsekit.build_info(),
    "sums": [t.double().square().sum().item() for t in tensors],
}))
"""


def run_fallback(native):
    environment = os.environ | {"SPARSEKIT_NATIVE": native, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_works_without_the_native_library():
    without = run_fallback("0")
    assert without["status"]["loaded"] is False
    assert "switched off by SPARSEKIT_NATIVE=0" in without["status"]["reason"]
    assert json.loads(without["build"]) == {}
    with_it = run_fallback("")
    assert with_it["status"]["loaded"] is _native.status()["loaded"]
    assert without["sums"] == pytest.approx(with_it["sums"], rel=1e-5)


def test_a_library_of_other_schemas_is_refused(tmp_path, monkeypatch):
    library = tmp_path / "_C.abi3.so"
    monkeypatch.setattr(_native, "_PATH", library)
    assert "was not built" in _native._try_load()["reason"]
    library.write_bytes(b"torn")
    assert "does not load" in _native._try_load()["reason"]
    library.with_suffix(".json").write_text(json.dumps({"schemas": "0" * 16}))
    status = _native._try_load()
    assert not status["loaded"] and "another version" in status["reason"] and "g++" in status["reason"]
    library.with_suffix(".json").write_text("{torn")
    assert not _native._try_load()["loaded"]
