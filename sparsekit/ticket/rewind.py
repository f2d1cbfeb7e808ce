"""Rewinding: what a ticket goes back to, and the snapshots that make going back exact.

``init`` is the original lottery-ticket procedure (arXiv:1803.03635); a step such as ``500it`` or
``2ep`` is late rewinding (arXiv:1912.05671); ``lr`` keeps the trained weights and replays the learning
rates, ``none`` fine-tunes on (both arXiv:2003.02389).
"""

from __future__ import annotations

import collections
import copy
import random
import re
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..mask import bias_name, weight_name
from ..nn import SparseModule

__all__ = ["Rewind", "Snapshot", "check_optimizer", "decode", "encode", "get_rng", "set_rng"]

_STEP = re.compile(r"(\d+)(it|ep)")


@dataclass(frozen=True)
class Rewind:
    """Where a round starts: ``kind`` is ``weights`` (go back to step ``count`` ``unit``), ``lr`` or ``none``."""

    kind: str
    count: int = 0
    unit: str = "it"

    @classmethod
    def parse(cls, text: str) -> Rewind:
        """Read ``"init"``, ``"500it"``, ``"2ep"``, ``"lr"`` or ``"none"``; raises ValueError on others."""
        if text in ("lr", "none"):
            return cls(text)
        if text == "init":
            return cls("weights")
        if isinstance(text, str) and (match := _STEP.fullmatch(text)):
            return cls("weights", int(match[1]), match[2])
        raise ValueError(f"Expected rewind 'init', '500it', '2ep', 'lr' or 'none', got {text!r}")

    def __str__(self) -> str:
        if self.kind != "weights":
            return self.kind
        return f"{self.count}{self.unit}" if self.count else "init"

    def step(self, steps_per_epoch: int | None) -> int:
        """The rewind point in steps; raises ValueError when epochs cannot be turned into steps."""
        if self.unit == "it" or not self.count:
            return self.count
        if not steps_per_epoch:
            raise ValueError(f"Expected round.begin(..., steps_per_epoch=...) for rewind='{self.count}ep', got none")
        return self.count * steps_per_epoch


@dataclass
class Snapshot:
    """A training state: dense ``model`` state dict, ``optimizer``, ``scheduler``, ``rng``, and the ``step``."""

    step: int
    model: dict[str, Tensor]
    rng: dict[str, Any]
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None

    @classmethod
    def take(cls, step: int, model: nn.Module, optimizer=None, scheduler=None) -> Snapshot:
        """Copy the state of a dense model in training; optimizer state is kept by parameter name."""
        return cls(
            step,
            {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            get_rng(),
            None if optimizer is None else _optimizer_state(model, optimizer),
            None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
        )

    def restore_optimizer(self, model: nn.Module, optimizer, scheduler=None) -> None:
        """Put optimizer and scheduler back; state of a pruned weight's survivors is gathered from the dense one."""
        if self.optimizer is not None:
            _load_optimizer(model, optimizer, self.optimizer)
        if self.scheduler is not None and scheduler is not None:
            scheduler.load_state_dict(self.scheduler)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict]:
        """As ``(tensors, header)`` for a safetensors file."""
        tensors: dict[str, Tensor] = {}
        rest = encode([self.step, self.model, self.rng, self.optimizer, self.scheduler], tensors)
        return tensors, {"snapshot": rest}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], header: dict) -> Snapshot:
        """The inverse of :meth:`to_tensors`."""
        return cls(*decode(header["snapshot"], tensors))


_OWN = ("params", "param_names")  # what a parameter group holds of its own model, whose parameters are others


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless every parameter of ``optimizer`` is one of ``model``."""
    own = {id(parameter) for parameter in model.parameters()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := sum(id(parameter) not in own for parameter in given):
        raise ValueError(f"Expected an optimizer over round.model's parameters, got {foreign} of {len(given)} others")


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {names[id(p)]: {k: _copy(v) for k, v in values.items()} for p, values in optimizer.state.items()}
    groups = [{k: _copy(v) for k, v in group.items() if k not in _OWN} for group in optimizer.param_groups]
    return {"state": state, "groups": groups}


def _copy(value):
    return value.detach().clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    want, got = len(saved["groups"]), len(optimizer.param_groups)
    if want != got:
        raise ValueError(f"Expected {want} parameter groups as at the rewind point, got {got}")
    owners = {
        id(module.values): (name, module) for name, module in model.named_modules() if isinstance(module, SparseModule)
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if hasattr(module, "joint"):  # a converted attention's in_proj.bias was called in_proj_bias
            names |= {id(module.bias): bias_name(path, module)}
            if not isinstance(module, SparseModule):
                names |= {id(module.weight): weight_name(path, module)}
    state, groups, count = {}, [], 0
    for group, old in zip(optimizer.param_groups, saved["groups"], strict=True):
        numbers = range(count, count := count + len(group["params"]))
        groups.append({k: _copy(v) for k, v in old.items()} | {"params": list(numbers)})
        for number, parameter in zip(numbers, group["params"], strict=True):
            name, gather = names[id(parameter)], _copy
            if id(parameter) in owners:
                prefix, module = owners[id(parameter)]
                name = weight_name(prefix, module)
                gather = _gatherer(module)
            if name in saved["state"]:
                state[number] = {k: gather(v) for k, v in saved["state"][name].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})  # knows what goes on which device


def _gatherer(module: SparseModule):
    def gather(value):
        if isinstance(value, Tensor) and value.shape == module.dense_shape:
            return module.pack(value.to(module.values.device))
        return _copy(value)

    return gather


def get_rng() -> dict[str, Any]:
    """The state of torch's (CPU, CUDA), numpy's and Python's generators."""
    algorithm, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [algorithm, torch.from_numpy(keys.astype("int64")), *rest],
        "python": random.getstate(),
    }


def set_rng(state: dict[str, Any]) -> None:
    """Put generator states back as :func:`get_rng` gave them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    algorithm, keys, *rest = state["numpy"]
    numpy.random.set_state((algorithm, keys.numpy().astype("uint32"), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


_CLASSES = {"dict": dict, "Counter": collections.Counter, "OrderedDict": collections.OrderedDict}


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested plain containers as JSON; tensors go to ``tensors`` and leave their number behind.

    Raises TypeError on anything but dict, list, tuple, str, int, float, bool, None and tensors.
    """
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):
        pairs = [[encode(key, tensors), encode(item, tensors)] for key, item in value.items()]
        name = type(value).__name__
        return {name if name in _CLASSES else "dict": pairs}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [encode(item, tensors) for item in value]}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"Expected plain values and tensors in the training state, got {type(value).__name__}")


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind in _CLASSES:
        return _CLASSES[kind]({decode(key, tensors): decode(item, tensors) for key, item in content})
    items = [decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
