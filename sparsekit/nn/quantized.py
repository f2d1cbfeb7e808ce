"""quantize: linear layers of a converted model with int8 or bfloat16 survivors, for inference on a CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..autograd import in_cxx
from ..explanation import LayerPlan
from ..functional import check_linear, transformed
from ..kernels.lanes import FORMAT
from ..kernels.lanes.reference import dequantized
from ..plan import NOISE, measure
from ..prune import check_model
from .chain import LINKED, unlink
from .linear import SparseLinear
from .operations import hooked

__all__ = ["QuantizedLinear", "quantize"]

_DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16}
_KEYS = ("values", *FORMAT.index_names, "scale")
_linear = torch.ops.sparsekit.lanes_linear.default


class QuantizedLinear(nn.Module):
    """A linear layer whose survivors have 8 or 16 bits, in the layout of ``lanes``; sums are float32. Not trainable.

    ``values`` int8 are multiples of ``scale [out]``, a row's largest magnitude / 127; bfloat16 ones are rounded to
    nearest. ``error`` is ‖Wq − W‖ / ‖W‖ of the survivors when it was made. Everything is a buffer: a state dict holds
    it all and brings it to a layer of the same size under any mask. Made by :func:`quantize`.
    """

    plan: LayerPlan | None = None
    layer_name = ""
    activation = "none"

    def __init__(self, layer: SparseLinear, dtype: str) -> None:
        super().__init__()
        self.layer_name, self.activation, self.shape = layer.layer_name, layer.activation, layer.shape
        self.out_features, self.in_features = self.shape
        self.dtype, self.format = layer.values.dtype, SimpleNamespace(name=f"lanes {dtype}")
        weight = layer.weight.detach().float()
        index = FORMAT.index(layer.survivors())
        if _DTYPES[dtype] is torch.int8:
            largest = weight.abs().amax(1) if weight.numel() else weight.new_zeros(len(weight))
            scale = torch.where(largest > 0, largest / 127, 1.0)
            values = (FORMAT.gather(weight / scale[:, None], index)).round().to(torch.int8)
        else:
            scale, values = weight.new_ones(len(weight)), FORMAT.gather(weight, index).bfloat16()
        for name, tensor in {"values": values, **index, "scale": scale}.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        norm = float(weight.norm())
        self.error = float((self._weight() - weight).norm()) / norm if norm else 0.0
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]``; raises RuntimeError where a gradient is wanted."""
        if isinstance(input, Proxy):
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        own = self._buffers
        values, *index, scale = [own[key] for key in _KEYS]
        if not (transform := transformed()):
            how = None, self.activation, scale
            y = in_cxx(input, values, own["bias"], tuple(index), self.shape, FORMAT, *how)
            if y is not NotImplemented:
                return y
        name = self.layer_name or type(self).__name__
        try:
            check_linear(input, self.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if (torch.is_grad_enabled() and input.requires_grad) or transform:
            raise RuntimeError(f"{name}: Expected inference, got a call to differentiate or transform; its survivors "
                               "are quantized")  # fmt: skip
        x = input if input.dim() == 2 else input.reshape(prod(input.shape[:-1]), self.in_features)
        y = _linear(x, values, *index, scale, own["bias"], self.out_features, self.activation)
        return y if input.dim() == 2 else y.view(*input.shape[:-1], self.out_features)

    def _weight(self) -> Tensor:
        own = [self._buffers[key] for key in _KEYS]
        return dequantized(*own, torch.Size(self.shape))

    @property
    def weight(self) -> Tensor:
        """The dense weight that is multiplied with, 0 where pruned."""
        return self._weight().to(self.dtype)

    def survivors(self) -> Tensor:
        """The mask: bool ``[out, in]``."""
        return FORMAT.survivors({key: self._buffers[key] for key in FORMAT.index_names}, torch.Size(self.shape))

    @property
    def dense_shape(self) -> torch.Size:
        """``[out, in]``."""
        return torch.Size(self.shape)

    @property
    def density(self) -> float:
        """Share of the weights that survive."""
        count = self.dense_shape.numel()
        return int(self.survivors().count_nonzero()) / count if count else 1.0

    def bytes(self) -> int:
        """Bytes of everything it holds."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` of the rounded weights."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.clone())
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format.name}, density={self.density:.4g}, error={self.error:.2g}"
        )

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        given = {key: state_dict[prefix + key] for key in _KEYS if prefix + key in state_dict}
        if given.keys() == set(_KEYS):
            if problem := self._check(given):
                errors.append(f"{prefix}values: Expected {problem}")
                return
            for key in _KEYS:  # another mask has other sizes
                if given[key].shape != self._buffers[key].shape:
                    self._buffers[key] = torch.empty_like(given[key], device=self._buffers[key].device)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _check(self, given: dict[str, Tensor]) -> str | None:
        values, scale = given["values"], given["scale"]
        if values.dtype != self.values.dtype:
            return f"{self.values.dtype} survivors, got {values.dtype}"
        if scale.dtype != torch.float32 or scale.shape != (self.out_features,):
            return f"a float32 scale [{self.out_features}], got {scale.dtype} {list(scale.shape)}"
        return FORMAT.check(values, given, self.dense_shape)

    def _apply(self, fn, recurse=True):
        def keeping(tensor):  # module.half() is about the bias and what goes in and comes out
            moved = fn(tensor)
            return moved if tensor is self._buffers["bias"] else tensor.to(moved.device)

        return super()._apply(keeping, recurse)


def quantize(model: nn.Module, dtype: str = "int8", inplace: bool = False) -> nn.Module:
    """Round the survivors of a converted model's linear layers to ``"int8"`` or ``"bfloat16"``, for inference.

    Each plain :class:`SparseLinear` on the CPU becomes a :class:`QuantizedLinear`, where that is no slower than dense
    on the input the plan knows (else on one sample) and no bigger than the layer; :func:`explain` says why not, and how
    the times compare: what waits for memory gets faster, what is in a cache does not. Products are summed in float32.
    The ``error`` of each layer is in its ``repr``; what it does to accuracy only a test set tells. Save the model
    first: packed files hold unrounded survivors. Returns a deep copy unless ``inplace``.
    Raises ValueError on another dtype or a model without such layers, TypeError on what is no model.
    """
    check_model(model)
    if dtype not in _DTYPES:
        raise ValueError(f"Expected dtype {' or '.join(_DTYPES)}, got {dtype!r}")
    if not any(_fits(module) for module in model.modules()):
        raise ValueError("Expected a converted model with a sparse linear layer on the CPU, got none")
    if not inplace:
        model = copy.deepcopy(model)
    unlink(model)
    for path, module in list(model.named_modules()):
        if _fits(module):
            found = _settle(module, dtype, path)
            if path == "":
                model = found
            else:
                model.set_submodule(path, found)
    return model


def _fits(module: nn.Module) -> bool:
    plain = type(module) in (SparseLinear, *LINKED) and not hooked(module) and module.joint == "."
    return plain and module.values.is_cpu and module.values.dtype in (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def _settle(layer: SparseLinear, dtype: str, path: str) -> nn.Module:
    """The layer quantized, or itself with the reason in its plan."""
    small = QuantizedLinear(layer, dtype)
    plan = layer.plan or LayerPlan(path, "Linear", layer.shape, layer.density, layer.format.name, forced=True)
    name = small.format.name
    if small.bytes() > layer.bytes():
        reason = f"{small.bytes() / layer.bytes():.2f}x the memory of {layer.format.name}"
    else:
        size = plan.input_shape or (1, layer.in_features)
        x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(layer.values.dtype)
        dense = layer.to_dense()
        us = measure({"dense": lambda: dense(x), "as it is": lambda: layer(x), "quantized": lambda: small(x)})
        if us["quantized"] <= us["dense"] * NOISE:
            other = {layer.format.name: f"{us['as it is'] / us['quantized']:.2f}x the time of {name}"}
            note = f"survivors rounded to {dtype}, {small.error:.2g} of their norm"
            rejected = {k: why for k, why in plan.rejected.items() if k != name} | other
            facts = {"us": us["quantized"], "dense_us": us["dense"], "input_shape": tuple(x.shape)}
            small.plan = replace(plan, chosen=name, rejected=rejected, note=note, **facts)
            return small
        reason = f"{us['quantized']:.0f} us, {us['quantized'] / us['dense']:.2f}x the time of dense"
    layer.plan = replace(plan, rejected=plan.rejected | {name: reason})
    return layer
