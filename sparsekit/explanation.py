"""What a plan says of itself: one line for each layer, the totals, and tables, Markdown and a chart of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from .mask import weight_of
from .prune import check_model, crossing, why_not

__all__ = ["Explanation", "LayerPlan", "ModelPlan", "explain"]

_PLAN = "_sparsekit_plan"


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs, and why not otherwise. Times are medians in microseconds."""

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    chosen: str
    us: float | None = None
    dense_us: float | None = None
    work: str = "forward"
    input_shape: tuple[int, ...] = ()
    assumed: bool = False
    forced: bool = False
    cached: bool = False
    note: str = ""
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Dense time over chosen time, or None where nothing was measured."""
        return self.dense_us / self.us if self.us and self.dense_us else None


@dataclass(frozen=True)
class ModelPlan:
    """What :func:`sparsekit.convert` found out of a whole model: its times in us (None: ``note`` says why not).

    ``dense_us`` is the unconverted model's time, ``seconds`` what planning took, ``fallen`` the layers that were
    made dense because the whole was slower with them; ``formats`` are those the times belong to.
    """

    us: float | None = None
    dense_us: float | None = None
    work: str = "forward"
    seconds: float = 0.0
    fallen: tuple[str, ...] = ()
    note: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> ModelPlan | None:
        """The plan kept with a model, where its layers still run as planned."""
        plan = getattr(model, _PLAN, None)
        if plan is None or plan.formats != formats_of(model):
            return None
        return plan

    def keep(self, model: nn.Module) -> None:
        """Leave this plan with ``model``, for :meth:`of`."""
        object.__setattr__(model, _PLAN, self)


def formats_of(model: nn.Module) -> dict[str, str]:
    """The format of each sparse layer, ``{"fc1": "csr"}``."""
    return {name: module.format.name for name, module in model.named_modules() if hasattr(module, "survivors")}


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: a :class:`LayerPlan` per prunable layer, and totals; ``str()`` gives the table."""

    layers: tuple[LayerPlan, ...]
    whole: ModelPlan | None = None
    bytes: int = 0
    dense_bytes: int = 0

    def to_dict(self) -> dict:
        """JSON-ready: ``{"layers": [{"name", "shape", "density", "chosen", "us", "dense_us", …}], "totals": {…}}``.

        Totals: ``us`` and ``dense_us`` of the whole model where ``timed`` is ``"model"``, of the layers' sum where it
        is ``"layers"`` (None: nothing was measured); ``bytes`` of all parameters and buffers, ``dense_bytes`` those of
        the unconverted model; ``planning_seconds``; how many layers were ``measured``, ``cached``, ``unmeasured``.
        """
        return {
            "layers": [asdict(layer) | {"speedup": layer.speedup} for layer in self.layers],
            "totals": self.totals(),
        }

    def totals(self) -> dict:
        """The totals of :meth:`to_dict`."""
        whole = self.whole or ModelPlan()
        timed = [layer for layer in self.layers if layer.us]
        us, dense_us, what = whole.us, whole.dense_us, "model"
        if us is None:
            us, dense_us = (sum(getattr(layer, name) for layer in timed) or None for name in ("us", "dense_us"))
            what = "layers"
        planned = [layer for layer in self.layers if not layer.forced and layer.chosen != "torch"]
        return {
            "us": us,
            "dense_us": dense_us,
            "speedup": dense_us / us if us and dense_us else None,
            "timed": what if us else None,
            "work": whole.work,
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "planning_seconds": whole.seconds,
            "measured": sum(not layer.cached for layer in timed),
            "cached": sum(layer.cached for layer in timed),
            "unmeasured": sum(layer.us is None for layer in planned),
            "fallen": list(whole.fallen),
            "note": whole.note,
        }

    def __str__(self) -> str:
        if not self.layers:
            return "no linear or convolution layer"
        rows, notes = self._table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD) - 1)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[-1]]) for r in rows]
        return "\n".join([*lines, *notes])

    def to_markdown(self) -> str:
        """The table as Markdown."""
        rows, notes = self._table()
        rows.insert(1, ("---",) * len(_HEAD))
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"

    def chart(self, path: str | Path) -> Path:
        """Draw each layer's time beside its dense time; raises ImportError without matplotlib, ValueError without
        a measured layer."""
        measured = [layer for layer in self.layers if layer.us]
        if not measured:
            raise ValueError("Expected a measured layer to draw, got none")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1 + 0.3 * len(measured)), layout="constrained")
        axes = figure.subplots()
        for shift, name, color in ((-0.2, "dense_us", "#bbbbbb"), (0.2, "us", "#1f6f8b")):
            spots = [i + shift for i in range(len(measured))]
            axes.barh(spots, [getattr(p, name) for p in measured], 0.4, color=color, label=_LABELS[name])
        for i, layer in enumerate(measured):
            text = f" {layer.chosen} {layer.speedup:.2f}x"
            axes.text(max(layer.us, layer.dense_us), i, text, va="center", fontsize=8)
        axes.set_yticks(range(len(measured)), [layer.name or layer.kind for layer in measured], fontsize=8)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel(f"us, {measured[0].work}")
        axes.legend()
        figure.savefig(path, dpi=120)
        return Path(path)

    def _table(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """Head and rows, and the lines below: what holds for every planned layer is said there, once."""
        planned = [layer.rejected for layer in self.layers if layer.us is not None]
        common = planned[0].items() if len(planned) > 1 else ()
        common = {name: why for name, why in common if all(other.get(name) == why for other in planned)}
        notes = [f"{name}: {why}, for all layers" for name, why in common.items()]
        notes += [f"{layer.name or layer.kind}: {layer.note}" for layer in self.layers if layer.note]
        if any(layer.assumed for layer in self.layers):
            notes.append("inputs in (brackets) are assumed; give example_inputs to measure yours")
        return [_HEAD, *(_row(layer, common) for layer in self.layers)], notes + _summary(self.totals())


_HEAD = ("layer", "shape", "input", "density", "runs as", "us", "dense us", "speedup", "why not the others")
_LABELS = {"us": "as planned", "dense_us": "dense"}


def _row(layer: LayerPlan, common: Mapping[str, str]) -> tuple[str, ...]:
    def number(value, spec):
        return "-" if value is None else format(value, spec)

    size = "x".join(map(str, layer.input_shape)) or "-"
    reasons = {name: why for name, why in layer.rejected.items() if common.get(name) != why}
    return (
        layer.name or layer.kind,
        "x".join(map(str, layer.shape)),
        f"({size})" if layer.assumed else size,
        f"{layer.density:.4g}",
        layer.chosen + (" (forced)" if layer.forced else ""),
        number(layer.us, ".1f"),
        number(layer.dense_us, ".1f"),
        number(layer.speedup, ".2f") + ("x" if layer.speedup else ""),
        "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "-",
    )


def _summary(totals: Mapping) -> list[str]:
    lines = []
    if totals["timed"]:
        what = {"model": "whole model", "layers": "planned layers together"}[totals["timed"]]
        ms, dense_ms = totals["us"] / 1e3, totals["dense_us"] / 1e3
        lines.append(f"{what}, {totals['work']}: {dense_ms:.3g} ms dense -> {ms:.3g} ms, {totals['speedup']:.2f}x")
    if totals["note"]:
        lines.append(totals["note"])
    if totals["fallen"]:
        lines.append(f"dense again, because the whole model was slower with them sparse: {', '.join(totals['fallen'])}")
    if totals["dense_bytes"]:
        mb, dense_mb = totals["bytes"] / 1e6, totals["dense_bytes"] / 1e6
        lines.append(f"parameters, indices and buffers: {dense_mb:.3g} MB dense -> {mb:.3g} MB, {mb / dense_mb:.2f}x")
    if totals["planning_seconds"]:
        lines.append(
            f"planned in {totals['planning_seconds']:.1f} s: {totals['measured']} layers measured, {totals['cached']} "
            f"known from the cache, {totals['unmeasured']} not measured"
        )
    return lines


def explain(model: nn.Module) -> Explanation:
    """How each linear and convolution layer of ``model`` runs, in how many us, why not otherwise, and the totals."""
    check_model(model)
    found, cross = [], crossing(model)
    for name, module in model.named_modules():
        if hasattr(module, "survivors"):
            plan, share = getattr(module, "plan", None), module.density
            if plan is None or plan.chosen != module.format.name:  # built by hand, or moved since
                kind, shape = type(module).__name__, tuple(module.dense_shape)
                plan = LayerPlan(name, kind, shape, share, module.format.name, forced=True)
            found.append(replace(plan, name=name, density=share))
        elif why_not(module) != "":
            weight = weight_of(module)
            known = weight is not None and not nn.parameter.is_lazy(weight)
            kind, shape = type(module).__name__, tuple(weight.shape) if known else ()
            why = why_not(module) or "no weight of it is pruned"
            if any(module in (attention, getattr(attention, "in_proj", None)) for attention in cross):
                why = "queries have another input than keys and values; the output projection alone can be pruned"
            found.append(LayerPlan(name, kind, shape, 1.0, "torch", rejected={"sparse": why}))
    return Explanation(tuple(found), ModelPlan.of(model), *_bytes(model))


def _bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters and buffers, and what they would be with dense weights and no masks."""
    held = [t for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t)]
    now = sum(t.numel() * t.element_size() for t in held)
    dense = now
    for module in model.modules():
        if hasattr(module, "survivors"):
            held = getattr(module, "dtype", module.values.dtype).itemsize * torch.Size(module.shape).numel()
            bias = 0 if module.bias is None else module.bias.numel() * module.bias.element_size()
            dense += held + bias - module.bytes()
    return now, dense
