"""The ledger: what a search cost, and what the same steps would have cost masked-dense.

The rival is the best masked loop torch allows: dense layers that multiply weight and mask in every
forward pass. It does the same arithmetic at every density, so a sample of its steps stands for a round.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..mask import Masks
from ..nn import to_dense
from ..plan import measure

__all__ = ["MaskedConv2d", "MaskedLinear", "masked_dense", "masked_dense_us", "summarize"]


class MaskedLinear(nn.Linear):
    """nn.Linear whose forward multiplies the weight by a float mask."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedConv2d(nn.Conv2d):
    """nn.Conv2d whose forward multiplies the weight by a float mask."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


_MASKED = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}


def masked_dense(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of ``model`` that simulates the masks the way every other tool does; no mask, no product."""
    twin = to_dense(model)
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        module = twin.get_submodule(path)
        if type(module) in _MASKED:
            module.register_buffer("mask", mask.to(module.weight.dtype), persistent=False)
            module.__class__ = _MASKED[type(module)]
        else:
            parametrize.register_parametrization(module, leaf, _Masked(mask))
    return twin


class _Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked_dense_us(model: nn.Module, masks: Masks, example_inputs: Any) -> tuple[float, float]:
    """Median us of forward + backward of ``model`` and of its masked-dense twin on the example inputs."""
    models = {"ours": copy.deepcopy(model), "masked": masked_dense(model, masks)}
    times = measure({name: _step(m.train(), example_inputs) for name, m in models.items()}, seconds=0.2)
    return times["ours"], times["masked"]


def _step(model: nn.Module, inputs: Any):
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        if isinstance(inputs, dict):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
        torch.autograd.grad(_total(output), parameters, allow_unused=True)

    return step


def _total(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.sum()
    return sum(_total(part) for part in (output.values() if isinstance(output, dict) else output))


def summarize(config: dict[str, Any], rounds: list[dict]) -> dict[str, Any]:
    """The content of ``summary.json``."""
    train = sum(r["train_seconds"] for r in rounds)
    known = [r for r in rounds if r.get("masked_dense_seconds")]
    masked = sum(r["masked_dense_seconds"] for r in known) if len(known) == len(rounds) else None
    total = {
        "train_seconds": train,
        "masked_dense_seconds": masked,
        "speedup": masked / train if masked and train else None,
        "seconds_saved": masked - train if masked else None,
        "overhead_seconds": sum(r["overhead_seconds"] for r in rounds),
        "control_seconds": sum(r.get("control_seconds") or 0.0 for r in rounds),
        "threads": torch.get_num_threads(),
    }
    return {"config": config, "rounds": rounds, "total": total}
