"""torch's own samples and error inputs, run through our layers: the reference is torch's layer with masked weights.

A slice runs here; ``make test-peers`` (SPARSEKIT_PEERS=all) takes every format and dtype. The tables are internal to
torch and may move: a torch without them skips.
"""

import copy
import os

import pytest
import torch
from torch import nn

import sparsekit as sk

pytest.importorskip("expecttest")  # of torch's own test helpers
with_samples = pytest.importorskip("torch.testing._internal.common_methods_invocations")
common_nn = pytest.importorskip("torch.testing._internal.common_nn")
common_modules = pytest.importorskip("torch.testing._internal.common_modules")
# Importing them forbids torch's global switches for the rest of the process, other tests included.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

ALL = os.environ.get("SPARSEKIT_PEERS") == "all"
FORMATS = ["dense", "compact", "csr", "bsr", "panel"] if ALL else ["dense", "csr"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16] if ALL else [torch.float64]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
OPS = {"linear": nn.Linear, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*runs as a dense product"),
    pytest.mark.filterwarnings("ignore:.*no weight survives"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def op(name):
    return next(op for op in with_samples.op_db if op.name == f"nn.functional.{name}")


def layer_of(name, sample):
    """torch's layer that computes a sample, with the sample's weight and bias; None where no layer does."""
    arguments = dict(zip(("weight", "bias", "stride", "padding", "dilation", "groups"), sample.args, strict=False))
    arguments |= sample.kwargs
    weight, bias = arguments.pop("weight"), arguments.pop("bias", None)
    if weight.dim() != {"linear": 2, "conv1d": 3, "conv2d": 4}[name]:
        return None
    if name == "linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    else:
        size = (weight.shape[1] * arguments.get("groups", 1), weight.shape[0], tuple(weight.shape[2:]))
        layer = OPS[name](*size, **arguments, bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def masks_for(weight):
    generator = torch.Generator().manual_seed(weight.numel())
    return {
        "full": torch.ones(weight.shape, dtype=torch.bool),
        "random": torch.rand(weight.shape, generator=generator) < 0.5,
    }


def sparse_of(layer, mask, fmt):
    kinds = {nn.Linear: sk.SparseLinear, nn.Conv1d: sk.nn.SparseConv1d, nn.Conv2d: sk.SparseConv2d}
    return kinds[type(layer)].from_dense(layer, mask, fmt)


def agree(layer, x, fmt, dtype):
    """Forward and gradients under both masks; returns how many comparisons were made."""
    done = 0
    for mask in masks_for(layer.weight).values():
        if fmt == "compact" and getattr(layer, "groups", 1) != 1:
            continue
        sparse, dense = sparse_of(layer, mask, fmt), copy.deepcopy(layer).double()
        with torch.no_grad():
            dense.weight.mul_(mask)
        ours, theirs = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
        got, want = sparse(ours), dense(theirs)
        assert got.shape == want.shape and got.dtype == dtype
        near(got, want, dtype)
        dy = torch.randn_like(want)
        got.backward(dy.to(dtype))
        want.backward(dy)
        near(ours.grad, theirs.grad, dtype)
        near(sparse.values.grad, sparse.pack(dense.weight.grad * mask), dtype)
        if layer.bias is not None:
            near(sparse.bias.grad, dense.bias.grad, dtype)
        done += 1
    return done


def near(got, want, dtype):
    scale = max(float(want.detach().norm()), want.numel() ** 0.5, 1)
    assert float((got.detach().double() - want.detach()).norm()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", OPS)
def test_samples(name, fmt, dtype):
    done = 0
    for sample in op(name).sample_inputs("cpu", dtype):
        if (layer := layer_of(name, sample)) is not None:
            done += agree(layer, sample.input, fmt, dtype)
    assert done >= 10 or (fmt == "compact" and done)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["conv1d", "conv2d"])
def test_error_inputs(name, fmt):
    """What torch's layer refuses, at construction or in its call, ours refuses too, with words."""
    refused = 0
    for error in op(name).error_inputs("cpu"):
        sample, layer = error.sample_input, None
        try:
            layer = layer_of(name, sample)
        except (ValueError, RuntimeError):
            refused += 1  # our constructor makes torch's layer, so it raises the same
        if layer is None:
            continue
        try:
            layer(sample.input)
            continue  # an error of the function that a layer cannot make
        except RuntimeError:
            pass
        with pytest.raises((RuntimeError, ValueError, TypeError), match=".+"):
            sparse = sparse_of(layer, torch.rand(layer.weight.shape) < 0.5, "csr" if fmt == "compact" else fmt)
            sparse(sample.input)
        refused += 1
    assert refused >= 5


def module_tests():
    found = {}
    for test in [*common_nn.module_tests, *common_nn.get_new_module_tests()]:
        name = test.get("module_name") or test.get("fullname")
        if name.partition("_")[0] not in ("Linear", "Conv1d", "Conv2d") or "Fused" in name:
            continue
        found["_".join(filter(None, (name, test.get("desc"))))] = test
    return found


TESTS = module_tests()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", TESTS)
def test_modules(name, fmt):
    test = TESTS[name]
    kind = getattr(nn, (test.get("module_name") or test["fullname"]).partition("_")[0])
    layer = test["constructor"]() if "constructor" in test else kind(*test.get("constructor_args", ()))
    size = test.get("input_size")
    x = torch.randn(size) if size is not None else test["input_fn"]()
    done = agree(layer.double(), x.double(), fmt, torch.float64)
    assert done == 2 or (fmt == "compact" and layer.groups != 1)


DB = {module.name: module for module in common_modules.module_db}
COMPOSED = ["nn.Linear", "nn.Conv1d", "nn.Conv2d", "nn.MultiheadAttention", "nn.TransformerEncoderLayer"]


def double(value):
    """A copy of an argument; dtypes stay as torch made them."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value


def outputs(value):
    return [one for one in (value if isinstance(value, tuple) else (value,)) if one is not None]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("impl", ["csr"] if not ALL else ["csr", "dense"])
@pytest.mark.parametrize("name", [*COMPOSED, "nn.TransformerEncoder"] if ALL else COMPOSED)
def test_module_database(name, impl, training):
    """Whole modules by convert, attention and encoder layers with every mask and flag that torch tests."""
    entry, done = DB[name], 0
    arguments = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": training}
    for sample in entry.module_inputs_func(entry, **arguments):
        made, call = sample.constructor_input, sample.forward_input
        torch.manual_seed(0)
        model = entry.module_cls(*made.args, **made.kwargs).double().train(training)
        names = sk.prunable(model)
        if not names or call is None:
            continue
        masks = sk.prune(model, 0.5, scope="layer")
        fast, dense = sk.convert(model, masks, impl=impl), copy.deepcopy(model)
        with torch.no_grad():
            for weight, mask in masks.items():
                dense.get_parameter(weight).mul_(mask)
            args, kwargs = call.args, call.kwargs
            want = error = None
            try:
                torch.manual_seed(1)
                want = dense(*map(double, args), **{key: double(value) for key, value in kwargs.items()})
            except Exception as raised:
                error = raised
            torch.manual_seed(1)
            if error is not None:
                with pytest.raises((RuntimeError, ValueError, TypeError, AssertionError)):
                    fast(*args, **kwargs)
                continue
            got = fast(*map(double, args), **{key: double(value) for key, value in kwargs.items()})
        for one, other in zip(outputs(got), outputs(want), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
        done += 1
    assert done >= 2
