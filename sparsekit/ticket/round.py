"""One round of a search, as the training loop sees it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..mask import Masks
from ..nn import SparseModule
from .controls import control, parse
from .rewind import Rewind, Snapshot, check_optimizer, encode, get_rng, set_rng
from .tangent import Tangent

__all__ = ["Round", "formats_of", "plain", "shapes"]

_OWN_METRICS = {"round", "density", "flop_density", "masks_sha256", "layers", "speedup", "overhead_seconds"}


class Round:
    """One round of a search: train ``model``; everything else is optional.

    Attributes: ``number`` (0 is the dense round), ``model`` (already sparse where that is faster),
    ``masks``, ``density`` (share of prunable weights that survive), ``rewind``.
    """

    def __init__(self, number: int, model: nn.Module, masks: Masks, rewind: Rewind, search: Any) -> None:
        self.number, self.model, self.masks, self.rewind = number, model, masks, rewind
        self.density = search.density(masks)
        self.metrics: dict[str, Any] = {}
        self.steps = 0
        self._search = search  # the TicketSearch that opened this round
        self._optimizer = self._scheduler = None
        self._point: int | None = None  # the step to rewind to, known once begin() was called
        self._first = 0

    @property
    def _late(self) -> bool:
        return self.rewind.kind == "weights" and self.rewind.count > 0

    def begin(self, optimizer=None, scheduler=None, steps_per_epoch: int | None = None) -> int:
        """Announce the optimizer (and scheduler); returns the step to train from.

        Needed for rewinding to a step, where round 0 must be watched and later rounds get optimizer,
        scheduler and generator states of that step back; also carries the last learning rate on with
        ``rewind="none"``. Call :meth:`step` after every iteration. A shuffling ``DataLoader`` draws its
        order when an epoch begins, so with one rewind to whole epochs (``"2ep"``), or order the data by
        :meth:`permutation`, which is exact at any step.
        """
        self._optimizer, self._scheduler = optimizer, scheduler
        if optimizer is not None:
            check_optimizer(self.model, optimizer)
        search = self._search
        if self._late:
            self._point = self.rewind.step(steps_per_epoch)
            if self.number:
                search.point.restore_optimizer(self.model, optimizer, scheduler)
                set_rng(search.point.rng)
                self.steps = self._first = search.point.step
        elif self.rewind.kind == "none" and self.number and optimizer is not None:
            _resume_rates(optimizer, scheduler, search.end)
        if scheduler is not None and (self._late or self.rewind.kind == "none"):
            encode(scheduler.state_dict(), {})  # one that cannot be kept fails here, not after the training
        return self.steps

    def step(self, count: int = 1) -> None:
        """Count finished iterations (after the optimizer's and the scheduler's step)."""
        self.steps += count
        if self.number == 0 and self._point and self.steps == self._point:
            self._search.keep_point(Snapshot.take(self.steps, self.model, self._optimizer, self._scheduler))

    def record(self, **metrics: Any) -> None:
        """Add to the ledger's line: ``test_accuracy``, ``val_loss``, ``early_stop_iteration``, or any JSON value.

        Numbers may be tensors or numpy scalars; NaN and infinity become null. ``train_seconds`` and
        ``masked_dense_seconds`` replace what the search measures by itself, and ``control_seconds``, spent
        on controls inside the loop, count neither as training nor as overhead.
        """
        if own := _OWN_METRICS & metrics.keys():
            raise ValueError(f"Expected metrics other than {', '.join(sorted(_OWN_METRICS))}, got {sorted(own)}")
        self.metrics.update({name: plain(name, value) for name, value in metrics.items()})

    def variant(self, fresh: nn.Module, masks: Masks | None = None) -> nn.Module:
        """A copy of ``fresh``, a dense model of the same architecture, under this round's masks: for control runs.

        Under the round's own masks in the round's formats; under other ``masks`` planned anew.
        """
        formats = formats_of(self.model) if masks is None else {}
        return self._search.convert(copy.deepcopy(fresh), self.masks if masks is None else masks, formats)

    def control(self, text: str, seed: int, fresh: nn.Module | None = None) -> tuple[nn.Module, Callable[..., int]]:
        """A control of this round, sparse like the ticket, and its ``begin(optimizer, scheduler, …)``.

        Args:
            text: ``"reinit"``, ``"random"``, ``"shuffle"``, ``"noise:0.5"`` or ``"signs"`` (see ``controls``), or
                ``"linear"``, the ticket's own mask and weights with the network linearised about them (``Tangent``,
                dense work; its moves have no optimizer state to restore).
            fresh: a newly initialised model for ``"reinit"``; None deals the first weights out anew.

        ``begin`` returns the step to train from: the rewind point with the optimizer's state there, or 0 for
        ``"reinit"``, whose weights have not been trained at all.
        """
        search, new = self._search, parse(text)[0] == "reinit"
        point = search.start if new or search.point is None else search.point
        given = None if fresh is None else fresh.state_dict()
        if given is not None and shapes(given) != search.config["parameters"]:
            raise ValueError(f"Expected fresh as a new model of the search's architecture, got {type(fresh).__name__}")
        state, masks = control(text, point.model, self.masks, seed, search.pattern, given)
        model = copy.deepcopy(search.model)
        model.load_state_dict(state)
        linear = text == "linear"

        def begin(optimizer=None, scheduler=None, steps_per_epoch: int | None = None) -> int:
            if linear and scheduler is not None and point.scheduler is not None:
                scheduler.load_state_dict(point.scheduler)
            elif point.step and not linear:
                point.restore_optimizer(sparse, optimizer, scheduler)
            return point.step

        sparse = Tangent(model, masks) if linear else self.variant(model, None if masks is self.masks else masks)
        return sparse, begin

    def permutation(self, count: int, epoch: int) -> Tensor:
        """A data order that depends on the epoch alone: the same in every round and after a resume."""
        generator = torch.Generator().manual_seed(self._search.order_seed + epoch)
        return torch.randperm(count, generator=generator)

    def end(self) -> dict[str, Any]:
        """What the next round needs of this one's end."""
        end: dict[str, Any] = {"rng": get_rng()}
        if self.rewind.kind == "none" and self._optimizer is not None:
            groups = self._optimizer.param_groups
            end["groups"] = [{k: v for k, v in group.items() if k in ("lr", "initial_lr")} for group in groups]
            end["scheduler"] = None if self._scheduler is None else self._scheduler.state_dict()
        return end

    def check_end(self) -> None:
        """Raise ValueError unless the training said what rewinding to a step needs to know."""
        if not self._late:
            return
        text = str(self.rewind)
        if self._point is None:
            raise ValueError(
                f"Expected round.begin(optimizer, scheduler) in every round and round.step() after every iteration, "
                f"which rewind={text!r} needs, got no begin() in round {self.number}"
            )
        if self._search.point is None:
            raise ValueError(
                f"Expected round 0 to reach the rewind point {text!r}, step {self._point}, got {self.steps} calls of "
                "round.step()"
            )


def shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shape of every entry of a state dict, JSON-ready."""
    return {name: list(tensor.shape) for name, tensor in state.items()}


def formats_of(model: nn.Module) -> dict[str, str]:
    """The format of each sparse layer, ``{"fc1": "csr"}``."""
    return {name: module.format.name for name, module in model.named_modules() if isinstance(module, SparseModule)}


def _resume_rates(optimizer, scheduler, end: dict[str, Any]) -> None:
    """Go on at the learning rates the last round ended with."""
    if end.get("groups") is None:
        return
    if len(end["groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"Expected {len(end['groups'])} parameter groups as in the last round, got {len(optimizer.param_groups)}"
        )
    for group, rates in zip(optimizer.param_groups, end["groups"], strict=True):
        group.update(rates)
    if scheduler is not None and end["scheduler"] is not None:
        scheduler.load_state_dict(end["scheduler"])


def plain(name: str, value: Any) -> Any:
    """A metric as a JSON value; what is not finite becomes None."""
    if hasattr(value, "item") and math.prod(value.shape) == 1:  # a tensor's or numpy's
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(name, item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{name}: Expected a number, text, or a list or dict of them, got {type(value).__name__}")
