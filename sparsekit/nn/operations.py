"""What torch's operations do to units: which keep them in place, which move their axis, which keep a constant."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

__all__ = ["argument", "extents", "hooked", "inplace", "is_layer", "is_norm", "named", "norm_constants", "only_axis",
           "spatial", "unit_axis"]  # fmt: skip

ELEMENTWISE = frozenset((
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "abs", "neg", "sqrt", "exp", "square", "pow",
    "clamp", "contiguous", "clone", "detach", "identity", "float", "double", "half", "bfloat16", "to",
))  # fmt: skip
BINARY = frozenset((
    "add", "sub", "mul", "div", "truediv", "maximum", "minimum",
))  # fmt: skip
DROPOUT = frozenset(["dropout", "dropout1d", "dropout2d", "dropout3d"])
RESHAPE = frozenset((
    "flatten", "view", "reshape", "expand", "permute", "transpose", "unsqueeze", "squeeze", "movedim", "getitem",
))  # fmt: skip
SIZED = frozenset(["view", "reshape", "expand"])
SIZES = frozenset(["size", "shape", "dim", "numel", "getattr"])  # numbers, not tensors
_REDUCTIONS = frozenset(["mean", "sum", "amax", "amin"])
_POOLS = {"max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3, "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3,
          "adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3,
          "adaptive_max_pool1d": 1, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3}  # fmt: skip
_MODULES = {"Hardswish": "hardswish", "Hardsigmoid": "hardsigmoid", "Hardtanh": "hardtanh", "LogSigmoid": "logsigmoid",
            "ReLU": "relu", "ReLU6": "relu6", "LeakyReLU": "leaky_relu", "ELU": "elu", "SELU": "selu", "CELU": "celu",
            "GELU": "gelu", "SiLU": "silu", "Upsample": "interpolate", "UpsamplingNearest2d": "interpolate",
            "UpsamplingBilinear2d": "interpolate"}  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, which treats every channel alone."""
    return type(module) in _NORMS


def is_layer(module: nn.Module) -> bool:
    """Whether a module has rows or channels that can be cut: plain linear, convolution, batch norm."""
    return type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, *_NORMS)


def hooked(module: nn.Module) -> bool:
    """Whether foreign code sees the tensors that go in or out of a module."""
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))


def extents(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of a layer."""
    if is_norm(module):
        return module.num_features, module.num_features
    return module.weight.shape[0], module.weight.shape[1] * getattr(module, "groups", 1)


def unit_axis(module: nn.Module, rank: int) -> int:
    """The axis along which a layer has its units."""
    return 1 if is_norm(module) else rank - {nn.Linear: 1, nn.Conv1d: 2, nn.Conv2d: 3}[type(module)]


def norm_constants(norm: nn.Module, const: np.ndarray, training: bool) -> np.ndarray:
    """What a batch norm makes of constant channels; the statistics of a constant batch leave its shift alone."""

    def numbers(tensor: Tensor | None, default: float) -> np.ndarray | float:
        return default if tensor is None else tensor.detach().double().cpu().numpy()

    shift = numbers(norm.bias, 0.0)
    if training or norm.running_mean is None:
        return np.where(np.isnan(const), np.nan, shift)
    scale = numbers(norm.weight, 1.0) / np.sqrt(numbers(norm.running_var, 1.0) + norm.eps)
    return (const - numbers(norm.running_mean, 0.0)) * scale + shift


def named(kind: str, target: Any) -> tuple[str, Callable]:
    """The plain name of what a node calls, ``""`` for what is not torch's own, and a function of its arguments."""
    if kind == "call_module":
        if not type(target).__module__.startswith("torch.nn.modules") or hooked(target):
            return "", target
        name = type(target).__name__
        name = _MODULES.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        return name, target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.partition("::")[2].removesuffix("_")
        return name, Tensor.reshape if name in ("view", "_unsafe_view") else target
    if kind == "call_method" and target == "view":
        return target, Tensor.reshape
    if kind == "call_method":
        return target.removesuffix("_"), lambda t, *args, **kwargs: getattr(t, target)(*args, **kwargs)
    owner = getattr(target, "__module__", None) or ""
    if owner and owner.split(".")[0] not in ("torch", "_operator", "builtins"):
        return "", target
    name = getattr(target, "__name__", "").removesuffix("_")
    return (name[1:] if name in ("iadd", "isub", "imul") else name.removeprefix("itrue")), target


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """A call's argument by place or name."""
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


def inplace(node: fx.Node, name: str, target: Any) -> bool:
    """Whether a call overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(target, "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.endswith("_")
    own = getattr(node.target, "__name__", "")
    flag = node.kwargs.get("inplace", name in ELEMENTWISE | DROPOUT and True in node.args[1:])
    return bool(flag) or own in ("iadd", "isub", "imul", "itruediv") or own.endswith("_")


def spatial(name: str, target: Any, node: fx.Node, shape: torch.Size, axis: int) -> tuple[int, Callable] | None:
    """Where the units of a pooled, padded, resized or reduced tensor lie, and which constants stay; None: unknown.

    Zeros always stay zeros, but under a padding with another number: such a padding is unknown.
    """

    def option(place: int, word: str, default: Any) -> Any:
        return getattr(target, word, default) if node.op == "call_module" else argument(node, place, word, default)

    def all_stay(const: np.ndarray) -> np.ndarray:
        return np.ones(const.shape, bool)

    def none_stay(const: np.ndarray) -> np.ndarray:
        return np.zeros(const.shape, bool)

    rank = len(shape)
    if name in _POOLS:
        if axis != rank - 1 - _POOLS[name] or option(9, "return_indices", False):
            return None
        padding = option(3, "padding", 0) if name.startswith("avg") else 0
        return axis, all_stay if np.all(np.array(padding) == 0) else none_stay
    if name == "interpolate":
        return (axis, all_stay) if axis == 1 and rank > 2 else None
    if name == "pad":
        pads, mode = argument(node, 1, "pad", ()), argument(node, 2, "mode", "constant")
        number = argument(node, 3, "value", 0)
        if axis >= rank - len(pads) // 2 or (mode == "constant" and number not in (0, None)):
            return None
        return axis, none_stay if mode == "constant" else all_stay
    if name == "zero_pad2d":
        return (axis, none_stay) if axis < rank - 2 else None
    if name in _REDUCTIONS:
        axes = argument(node, 1, "dim", None)
        axes = (axes,) if isinstance(axes, int) else axes
        if not axes or not all(isinstance(a, int) for a in axes) or node.kwargs.get("dtype") is not None:
            return None
        axes = {a % rank for a in axes}
        if axis in axes:
            return None
        keep = argument(node, 2, "keepdim", False)
        return axis if keep else axis - sum(a < axis for a in axes), none_stay if name == "sum" else all_stay
    return None


def only_axis(moved: Tensor, count: int) -> tuple[int, np.ndarray] | None:
    """The one axis along which positions vary after a view, and their order there; None unless all stay alike."""
    axes = [a for a in range(moved.dim()) if moved.shape[a] > 1 and bool((moved != moved.narrow(a, 0, 1)).any())]
    if len(axes) != 1:
        return None
    order = moved
    for axis in reversed(range(moved.dim())):
        if axis != axes[0]:
            order = order.select(axis, 0)
    order = order.numpy().astype(int)
    times = np.bincount(order, minlength=count)
    return (axes[0], order) if times.min() == times.max() else None
