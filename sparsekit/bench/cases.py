"""What is measured, as data: layer shapes of known networks, and the suites made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["LAYERS", "LEVELS", "SUITES", "Case", "Layer", "select"]

DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
LEVELS = ("quick", "usual", "full")
WORKS = ("forward", "dx", "dw", "step", "memory")


@dataclass(frozen=True)
class Layer:
    """A layer and its input: ``batch`` rows, or images of ``size`` a side (convolutions; padding ``kernel // 2``)."""

    out: int
    inputs: int
    batch: int
    size: int = 0
    kernel: int = 1
    stride: int = 1

    def module(self) -> nn.Module:
        """The torch layer, with bias."""
        if not self.size:
            return nn.Linear(self.inputs, self.out)
        return nn.Conv2d(self.inputs, self.out, self.kernel, self.stride, self.kernel // 2)

    @property
    def kind(self) -> str:
        """``linear`` or ``conv2d``."""
        return "conv2d" if self.size else "linear"

    @property
    def input(self) -> tuple[int, ...]:
        """The shape of x."""
        return (self.batch, self.inputs, *([self.size] * 2 if self.size else []))

    @property
    def positions(self) -> int:
        """Outputs per output channel: rows or pixels."""
        side = (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return self.batch * (side * side if self.size else 1)


@dataclass(frozen=True)
class Case:
    """One row to be: a layer or a model at one density, and the ``work`` on it.

    ``work``: ``forward``, ``dx`` and ``dw`` (operators alone), ``step`` (forward and backward), ``memory``
    (bytes, no time). ``block`` (outputs, inputs) are pruned together. ``format`` ``auto`` lets the plan choose.
    ``level`` is the smallest selection that includes the case: quick, usual or full. ``masks`` of models: those of
    ``magnitude`` pruning of a fresh network, or of a ``ticket`` that a search finds first; ``regrouped`` orders their
    rows by :func:`sparsekit.regroup`.
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
        return "unstructured" if self.block == (1, 1) else f"block:{self.block[0]}x{self.block[1]}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations and weights."""
        return getattr(torch, self.dtype)


LAYERS: dict[str, Layer] = {
    "linear-1024x1024": Layer(1024, 1024, 64),
    "linear-784x300": Layer(300, 784, 60),
    "linear-4096x1024": Layer(1024, 4096, 64),
    "linear-1024x1024-one": Layer(1024, 1024, 1),
    "linear-4096x1024-one": Layer(1024, 4096, 1),
    "linear-1024x1024-eight": Layer(1024, 1024, 8),
    "linear-1024x1024-many": Layer(1024, 1024, 256),
    "conv3x3-128-28": Layer(128, 128, 16, 28, 3),
    "conv3x3-64-32": Layer(64, 64, 64, 32, 3),
    "conv3x3-256-14": Layer(256, 256, 16, 14, 3),
    "conv1x1-256-28": Layer(256, 256, 1, 28),
    "linear-8x8": Layer(8, 8, 4),
    "linear-64x64": Layer(64, 64, 16),
    "conv3x3-8-8": Layer(8, 8, 2, 8, 3),
}
_HERO = (
    "linear-1024x1024", "linear-784x300", "linear-4096x1024", "linear-1024x1024-one",
    "conv3x3-128-28", "conv3x3-64-32", "conv1x1-256-28",
)  # fmt: skip
_TINY = ("linear-8x8", "linear-64x64", "conv3x3-8-8")


# Layers of one shape are named once, after the first of them; batches are those of the papers, or one picture.
_NETWORKS: dict[str, dict[str, Layer]] = {
    "lenet-300-100": {"fc1": Layer(300, 784, 60), "fc2": Layer(100, 300, 60), "fc3": Layer(10, 100, 60)},
    "conv2": {"conv1": Layer(64, 3, 60, 32, 3), "conv2": Layer(64, 64, 60, 32, 3), "fc1": Layer(256, 16384, 60)},
    "conv4": {"conv3": Layer(128, 64, 60, 16, 3), "conv4": Layer(128, 128, 60, 16, 3), "fc1": Layer(256, 8192, 60)},
    "conv6": {
        "conv5": Layer(256, 128, 60, 8, 3), "conv6": Layer(256, 256, 60, 8, 3), "fc1": Layer(256, 4096, 60),
        "fc2": Layer(256, 256, 60),
    },
    "vgg16": {
        "conv2": Layer(64, 64, 64, 32, 3), "conv4": Layer(128, 128, 64, 16, 3), "conv6": Layer(256, 256, 64, 8, 3),
        "conv8": Layer(512, 256, 64, 4, 3), "conv9": Layer(512, 512, 64, 4, 3), "conv11": Layer(512, 512, 64, 2, 3),
    },
    "resnet18": {
        "stem": Layer(64, 3, 1, 224, 7, 2), "stage1": Layer(64, 64, 1, 56, 3), "stage2": Layer(128, 128, 1, 28, 3),
        "stage2_first": Layer(128, 64, 1, 56, 3, 2), "stage3": Layer(256, 256, 1, 14, 3),
        "stage4": Layer(512, 512, 1, 7, 3), "fc": Layer(1000, 512, 1),
    },
    "resnet18-b16": {
        "stage1": Layer(64, 64, 16, 56, 3), "stage2": Layer(128, 128, 16, 28, 3),
        "stage3": Layer(256, 256, 16, 14, 3), "stage4": Layer(512, 512, 16, 7, 3),
    },
    "resnet50": {
        "stage1_reduce": Layer(64, 256, 1, 56), "stage1_expand": Layer(256, 64, 1, 56),
        "stage2_reduce": Layer(128, 512, 1, 28), "stage2_expand": Layer(512, 128, 1, 28),
        "stage3_reduce": Layer(256, 1024, 1, 14), "stage3_expand": Layer(1024, 256, 1, 14),
        "stage4_reduce": Layer(512, 2048, 1, 7), "stage4_expand": Layer(2048, 512, 1, 7), "fc": Layer(1000, 2048, 1),
    },
    "vit-b16": {
        "qkv": Layer(2304, 768, 197), "out": Layer(768, 768, 197), "fc1": Layer(3072, 768, 197),
        "fc2": Layer(768, 3072, 197),
    },
    "bert-base": {"query": Layer(768, 768, 128), "fc1": Layer(3072, 768, 128), "fc2": Layer(768, 3072, 128)},
    "llama-7b": {
        "up": Layer(11008, 4096, 16), "down": Layer(4096, 11008, 16), "up_one": Layer(11008, 4096, 1),
        "down_one": Layer(4096, 11008, 1),
    },
}  # fmt: skip
LAYERS |= {f"{network}.{name}": layer for network, layers in _NETWORKS.items() for name, layer in layers.items()}

# batch and input of a model; what it is trained with when it is trained
MODELS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "lenet-300-100": ((1, 28, 28), 60, 10),
    "vgg16": ((3, 32, 32), 16, 10),
    "resnet18": ((3, 224, 224), 1, 1000),
    "conv6": ((3, 32, 32), 60, 10),
    "resnet50": ((3, 224, 224), 1, 1000),
    "vit-b16": ((3, 224, 224), 1, 1000),
    "mlp:64-300-100-10": ((64,), 60, 10),
    "digits-conv": ((1, 8, 8), 60, 10),
}
"""Model → (input shape, batch, classes)."""
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
    "ops": tuple(_ops()),
    "layers": tuple(_layers()),
    "blocks": tuple(_block_layers()),
    "models": tuple(_models()),
    "memory": tuple(_memory()),
    "overhead": tuple(_overhead()),
}
"""Suite → its cases. ``tickets``, whole searches, is not made of cases: :mod:`sparsekit.bench.tickets`."""


def select(suite: str, level: str = "usual", filter: str = "") -> list[Case]:
    """The cases of a suite at a level whose names contain every word of ``filter``; ``all`` is every suite.

    Raises: ValueError on an unknown suite, or where nothing is left.
    """
    if suite not in (*SUITES, "all"):
        raise ValueError(f"Expected a suite of {', '.join((*SUITES, 'tickets', 'all'))}, got {suite!r}")
    known = [case for cases in SUITES.values() for case in cases] if suite == "all" else SUITES[suite]
    words = filter.split()
    chosen = [
        case for case in known
        if LEVELS.index(case.level) <= LEVELS.index(level) and all(word in case.name for word in words)
    ]  # fmt: skip
    if not chosen:
        raise ValueError(f"{suite}: Expected cases named like {filter!r} at level {level}, got none; see --list")
    return chosen
