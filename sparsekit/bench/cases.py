"""What is measured, as data: the suites, made of the layers and networks of :mod:`sparsekit.bench.layers`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .layers import LAYERS, MODELS

__all__ = ["LEVELS", "SUITES", "TICKETS", "Case", "select"]

DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
LEVELS = ("quick", "usual", "full")
WORKS = ("forward", "dx", "dw", "step", "memory")


@dataclass(frozen=True)
class Case:
    """One row to be: a layer or a model at one density, and the ``work`` on it.

    ``work``: ``forward``, ``dx`` and ``dw`` (operators alone), ``step`` (forward and backward), ``memory``
    (bytes, no time). ``block`` (outputs, inputs) are pruned together. ``format`` ``auto`` lets the plan choose.
    ``level`` is the smallest selection that includes the case: quick, usual or full. ``masks`` of models: those of
    ``magnitude`` pruning of a fresh network as a whole, ``uniform`` where every layer has the density, or of a
    ``ticket`` that a search finds first; ``regrouped`` orders their rows by :func:`sparsekit.regroup`. ``device`` is
    ``cuda`` for what has a kernel on a GPU alone.
    """

    suite: str
    subject: str
    work: str
    density: float
    batch: int
    format: str = "csr"
    block: tuple[int, int] = (1, 1)
    dtype: str = "float32"
    level: str = "usual"
    masks: str = "magnitude"
    regrouped: bool = False
    device: str = ""

    @property
    def name(self) -> str:
        """``linear-1024x1024-b64-16x16-d0.1-forward``; what is not usual is named too."""
        parts = [self.subject, f"b{self.batch}"]
        parts += [] if self.block == (1, 1) else ["x".join(map(str, self.block))]
        parts += [] if self.format in ("auto", "csr" if self.block == (1, 1) else "bsr") else [self.format]
        parts += [] if self.dtype == "float32" else [self.dtype]
        parts += [] if self.masks == "magnitude" else [self.masks]
        parts += ["regrouped"] if self.regrouped else []
        return "-".join([*parts, f"d{self.density:g}", self.work])

    @property
    def pattern(self) -> str:
        """The mask's structure in the words of :mod:`sparsekit.pattern`."""
        if self.format == "nm":
            return "2:4"
        return "unstructured" if self.block == (1, 1) else f"block:{self.block[0]}x{self.block[1]}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations and weights."""
        return getattr(torch, self.dtype)


_HERO = (
    "linear-1024x1024", "linear-784x300", "linear-4096x1024", "linear-1024x1024-one",
    "conv3x3-128-28", "conv3x3-64-32", "conv1x1-256-28",
)  # fmt: skip
_TINY = ("linear-8x8", "linear-64x64", "conv3x3-8-8")


TICKETS = {"mlp:64-300-100-10": "digits", "digits-conv": "digits", "lenet-300-100": "mnist"}
"""Model → the data on which its tickets are found."""
_SMALL_MODELS = ("lenet-300-100", "vgg16", "resnet18")


def _case(suite: str, subject: str, work: str, density: float, **more) -> Case:
    return Case(suite, subject, work, density, LAYERS[subject].batch, **more)


def _blocks(subject: str) -> Iterable[tuple[int, int]]:
    return ((16, 16), (16, 1)) if "." in subject else ((16, 16), (16, 1), (8, 1), (8, 8), (4, 4), (1, 16))


def _level(subject: str, density: float) -> str:
    """Networks' own layers belong to the full selection but for their 90 %."""
    if "." not in subject:
        return "usual"
    return "usual" if density == 0.1 and not subject.startswith("llama") else "full"


def _ops() -> Iterable[Case]:
    for subject in (name for name in LAYERS if name not in _TINY):
        for density, work in itertools.product((*DENSITIES, 0.01), ("forward", "dx", "dw")):
            level = "full" if "." in subject or density in (0.5, 0.01) else "usual"
            quick = subject in ("linear-1024x1024", "conv3x3-128-28") and density == 0.1
            yield _case("ops", subject, work, density, level="quick" if quick else level)
            if LAYERS[subject].batch == 1 and not LAYERS[subject].size and work == "forward":
                yield _case("ops", subject, work, density, format="lanes", level=level)
            if density not in (0.2, 0.1, 0.05):
                continue
            for block in _blocks(subject):
                quick = subject == "linear-1024x1024" and density == 0.1 and block in ((16, 1), (16, 16))
                level = "quick" if quick else "full"
                yield _case("ops", subject, work, density, format="bsr", block=block, level=level)
            if "." not in subject and density == 0.1:
                for dtype in ("float64", "bfloat16"):
                    yield _case("ops", subject, work, density, dtype=dtype, level="full")
                    yield _case("ops", subject, work, density, format="bsr", block=(16, 1), dtype=dtype, level="full")


def _gpu_ops() -> Iterable[Case]:
    """Formats and dtypes that only GPUs have kernels of; plain layers in bfloat16 at 90 % are usual."""
    stored = [("panel", (rows, cols), d) for rows, cols in ((1, 1), (8, 1), (16, 1), (8, 8)) for d in (0.2, 0.1, 0.05)]
    stored += [("bsr", (side, side), d) for side in (32, 64, 128) for d in (0.2, 0.1, 0.05)]
    stored += [("nm", (1, 1), 0.5), *(("bitmap", (1, 1), d) for d in (0.5, 0.3, 0.1))]
    for subject, layer in ((name, layer) for name, layer in LAYERS.items() if name not in _TINY):
        for dtype, (format, block, density) in itertools.product(("bfloat16", "float16"), stored):
            if (format == "nm" and layer.kernel > 1) or (format == "bitmap" and (layer.size or layer.batch > 64)):
                continue
            plain = "." not in subject and dtype == "bfloat16" and density in (0.1, 0.5)
            for work in ("forward", "dx", "dw")[: 1 if format == "bitmap" else 3]:
                yield _case("ops", subject, work, density, format=format, block=block, dtype=dtype, device="cuda",
                            level="usual" if plain else "full")  # fmt: skip


def _layers() -> Iterable[Case]:
    for subject in (name for name in LAYERS if name not in _TINY):
        for density in DENSITIES:
            for work in ("forward", "step"):
                quick = subject in ("linear-1024x1024", "linear-784x300", "conv3x3-128-28") and density == 0.1
                yield _case("layers", subject, work, density, level="quick" if quick else _level(subject, density))


def _hero() -> Iterable[Case]:
    for subject in _HERO:
        for density in DENSITIES:
            for work in ("forward", "step"):
                yield _case("hero", subject, work, density, level="quick")


def _block_layers() -> Iterable[Case]:
    for block in ((16, 16), (16, 1), (8, 1), (8, 8)):
        for density in (0.2, 0.1, 0.05):
            for work in ("forward", "step"):
                level = "quick" if density == 0.1 else "usual"
                yield _case("blocks", "linear-1024x1024", work, density, format="bsr", block=block, level=level)


def _models() -> Iterable[Case]:
    for model in TICKETS:
        for work, order in itertools.product(("forward", "step"), (False, True)):
            level = "quick" if model.startswith("mlp:") else "usual"
            yield Case("models", model, work, 0.1, MODELS[model][1], "auto", level=level, masks="ticket",
                       regrouped=order)  # fmt: skip
    for model, (_, batch, _) in MODELS.items():
        if model in TICKETS and model != "lenet-300-100":
            continue
        for density in (0.2, 0.1, 0.05):
            for work in ("forward", "step"):
                level = "usual" if model in _SMALL_MODELS else "full"
                level = "quick" if density == 0.1 and model == "lenet-300-100" else level
                level = "full" if density != 0.1 and model != "lenet-300-100" else level
                yield Case("models", model, work, density, batch, "auto", level=level)
                if model in _SMALL_MODELS and density == 0.1:
                    yield Case("models", model, work, density, batch, "auto", masks="uniform")
                level = level if density == 0.1 and model in ("lenet-300-100", "vgg16") else "full"
                yield Case("models", model, work, density, batch, "auto", level=level, regrouped=True)
                if model != "lenet-300-100":
                    yield Case("models", model, work, density, batch, "auto", (16, 1), level="full")


def _memory() -> Iterable[Case]:
    for subject in ("lenet-300-100", "mlp:1024-1024-1024", "vgg16", "resnet18"):
        for density in DENSITIES:
            level = "quick" if subject in ("lenet-300-100", "mlp:1024-1024-1024") else "usual"
            yield Case("memory", subject, "memory", density, 1, "csr", level=level)


def _overhead() -> Iterable[Case]:
    for subject in _TINY:
        for work in ("forward", "step"):
            yield _case("overhead", subject, work, 0.1, level="quick")
            yield _case("overhead", subject, work, 0.1, format="dense", level="quick")
    for subject in ("linear-1024x1024", "conv3x3-128-28"):  # a layer that the plan leaves dense
        for work in ("forward", "step"):
            yield _case("overhead", subject, work, 0.5, format="dense")


SUITES: dict[str, tuple[Case, ...]] = {
    "hero": tuple(_hero()),
    "ops": (*_ops(), *_gpu_ops()),
    "layers": tuple(_layers()),
    "blocks": tuple(_block_layers()),
    "models": tuple(_models()),
    "memory": tuple(_memory()),
    "overhead": tuple(_overhead()),
}
"""Suite → its cases. ``tickets``, whole searches, is not made of cases: :mod:`sparsekit.bench.tickets`."""


def select(suite: str, level: str = "usual", filter: str = "", where: str = "cpu") -> list[Case]:
    """The cases of a suite (``all``: of each) at a level, on ``where``, with every word of ``filter`` in their names.

    Raises: ValueError on an unknown suite, or where nothing is left.
    """
    if suite not in (*SUITES, "all"):
        raise ValueError(f"Expected a suite of {', '.join((*SUITES, 'tickets', 'all'))}, got {suite!r}")
    known = [case for cases in SUITES.values() for case in cases] if suite == "all" else SUITES[suite]
    words = filter.split()
    chosen = [
        case for case in known
        if LEVELS.index(case.level) <= LEVELS.index(level) and case.device in ("", where)
        and all(word in case.name for word in words)
    ]  # fmt: skip
    if not chosen:
        raise ValueError(f"{suite}: Expected cases named like {filter!r} at level {level}, got none; see --list")
    return chosen
