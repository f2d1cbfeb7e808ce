"""How long a layer should take here: a cheap model that orders the candidates and finds the hopeless ones.

A product takes the longer of its arithmetic and its memory traffic (Williams, Waterman, Patterson, *Roofline*,
CACM 2009), plus the price of a call. The rates are those of this library and torch on this device, probed once on
small layers and kept on disk: the model is for choosing what to measure, never for choosing what to run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from . import format as formats
from .plan import cache_key, measure, recall, remember

__all__ = ["Product", "predict"]

_WIDTH, _BATCH, _CHANNELS, _SIDE = 512, 64, 64, 16
_DENSITY = 0.1


@dataclass(frozen=True)
class Product:
    """What a layer does to one input: ``places`` products of the weight's ``[out, columns]`` with a vector.

    ``weight`` counts the dense weight's elements, ``inputs`` and ``outputs`` those of the activations; ``passes`` is 1
    forward, 2 or 3 with the gradients; ``convolution`` tells which rates apply.
    """

    places: int
    weight: int
    inputs: int
    outputs: int
    passes: int
    convolution: bool
    where: torch.device
    dtype: torch.dtype

    def us(self, fmt: str, stored: int) -> float:
        """Predicted time in a format that stores so many values."""
        rates = _rates(self.where, self.dtype)
        kind = "conv" if self.convolution else "linear"
        flops = rates.get(f"{fmt} {kind}", rates[f"dense {kind}"])  # a format not probed is taken for a dense product
        size = self.dtype.itemsize
        moved = size * (self.inputs + self.outputs) + stored * (size if fmt in ("dense", "compact") else size + 4)
        return self.passes * (rates["call us"] + max(2 * stored * self.places / flops, moved / rates["bytes"]))


def predict(product: Product, stored: dict[str, int]) -> dict[str, float]:
    """Predicted us of each format, given how many values it stores."""
    return {name: product.us(name, count) for name, count in stored.items()}


@functools.cache
def _probed(where: torch.device, dtype: torch.dtype, key: str) -> dict[str, float]:
    """Rates in operations and bytes per us, and us per call."""
    kept = recall(key)
    return remember(key, _probe(where, dtype)) if kept is None else kept


def _rates(where: torch.device, dtype: torch.dtype) -> dict[str, float]:
    return _probed(where, dtype, cache_key(where, "roofline", dtype))


@torch.no_grad()
def _probe(where: torch.device, dtype: torch.dtype) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    conv = formats.Conv(padding=(1, 1))
    layers = {
        "linear": (torch.Size((_WIDTH, _WIDTH)), (_BATCH, _WIDTH), _BATCH),
        "conv": (torch.Size((_CHANNELS, _CHANNELS, 3, 3)), (4, _CHANNELS, _SIDE, _SIDE), 4 * _SIDE * _SIDE),
    }
    thunks, work = {}, {}
    for kind, (shape, size, places) in layers.items():
        weight = torch.randn(shape, generator=generator).to(where, dtype)
        x = torch.randn(size, generator=generator).to(where, dtype)
        blocks = torch.rand(shape[0] // 16, shape[1] // 16, *shape[2:], generator=generator) < _DENSITY
        masks = {
            "dense": torch.ones(shape, dtype=torch.bool),
            "csr": torch.rand(shape, generator=generator) < _DENSITY,
            "bsr": blocks.repeat_interleave(16, 0).repeat_interleave(16, 1),
        }
        for name, mask in masks.items():
            fmt, mask = formats.get(name), mask.to(where)
            if fmt.absent(where, mask):
                continue
            index = fmt.index(mask)
            index |= fmt.prepare(index, shape)
            values, index = fmt.gather(weight, index).contiguous(), tuple(index.get(n) for n in fmt.index_names)
            verb = fmt.conv2d if kind == "conv" else fmt.linear
            args = (x, values, None, index, shape, *([conv] if kind == "conv" else []))
            thunks[f"{name} {kind}"] = functools.partial(verb, *args)
            work[f"{name} {kind}"] = 2 * values.numel() * places
    source = torch.empty(1 << 24, dtype=torch.uint8, device=where)
    thunks["bytes"], work["bytes"] = source.clone, 2 * source.numel()
    tiny = torch.ones(1, device=where)
    thunks["call us"] = lambda: torch.add(tiny, tiny)
    times = measure(thunks, of=min)  # a busy machine must not make a format look hopeless
    return {name: us if name == "call us" else work[name] / us for name, us in times.items()}
