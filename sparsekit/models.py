"""The networks of the papers, with readable layer names, and the recipes they were pruned with."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from . import nets

__all__ = ["NAMES", "RECIPES", "Recipe", "build", "output_layer", "rates", "recipe"]

_MLP = re.compile(r"mlp:[1-9]\d*(-[1-9]\d*)+")
_LENET = (300, 100)
# Convolution widths between pools, then the widths of the hidden fully connected layers.
_CONV: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "conv2": (((64, 64),), (256, 256)),
    "conv4": (((64, 64), (128, 128)), (256, 256)),
    "conv6": (((64, 64), (128, 128), (256, 256)), (256, 256)),
    "digits-conv": (((32, 64),), (128,)),
}
NAMES = ("lenet-300-100", "mlp:IN-…-OUT", *_CONV, *nets.NAMES)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters a model was trained and pruned with.

    ``iterations`` steps of ``batch_size`` images per round, validated every ``eval_every`` steps;
    ``rates`` maps fnmatch patterns of layers to the share of survivors removed per round, later
    entries winning, and ``scope`` says whether layers are ranked together; ``warmup`` steps rise to the
    learning rate, ``milestones`` divide it by ten; ``source`` cites where the numbers come from.
    """

    optimizer: str
    lr: float
    batch_size: int
    iterations: int
    rates: dict[str, float]
    source: str
    eval_every: int = 100
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup: int = 0
    milestones: tuple[int, ...] = ()
    scope: str = "layer"


_PAPER = "Frankle & Carbin 2019, arXiv:1803.03635, figure 2"
_DEEP = "Frankle & Carbin 2019, arXiv:1803.03635, figure 2 and section 4"
_OURS = "sparsekit, after arXiv:1803.03635"
_SGD = {"momentum": 0.9, "weight_decay": 1e-4, "scope": "global", "eval_every": 500}
RECIPES: dict[str, Recipe] = {
    "lenet-300-100": Recipe("adam", 1.2e-3, 60, 50_000, {"*": 0.2, "fc3.weight": 0.1}, _PAPER),
    "conv2": Recipe("adam", 2e-4, 60, 20_000, {"*": 0.2, "conv*": 0.1, "fc3.weight": 0.1}, _PAPER),
    "conv4": Recipe("adam", 3e-4, 60, 25_000, {"*": 0.2, "conv*": 0.1, "fc3.weight": 0.1}, _PAPER),
    "conv6": Recipe("adam", 3e-4, 60, 30_000, {"*": 0.2, "conv*": 0.15, "fc3.weight": 0.1}, _PAPER),
    "digits-conv": Recipe("adam", 1.2e-3, 60, 600, {"*": 0.2, "conv*": 0.1, "fc2.weight": 0.1}, _OURS, 20),
    # The paper's "Resnet-18" is CIFAR's ResNet-20; its VGG-19 drops the rate after 80 and 120 epochs.
    "resnet20": Recipe(
        "sgd", 0.03, 128, 30_000, {"*": 0.2, "fc.weight": 0.0}, _DEEP,
        warmup=20_000, milestones=(20_000, 25_000), **_SGD,
    ),
    "vgg19": Recipe(
        "sgd", 0.1, 64, 112_480, {"*": 0.2, "classifier.weight": 0.0}, _DEEP,
        warmup=10_000, milestones=(56_240, 84_360), **_SGD,
    ),
}  # fmt: skip
"""The recipe of the papers' names; :func:`recipe` knows what the others borrow."""


def build(
    name: str, *, classes: int = 10, input_shape: tuple[int, ...] = (1, 28, 28), seed: int | None = None
) -> nn.Module:
    """A network by name: ``x [N, *input_shape]`` to logits ``[N, classes]``.

    ``lenet-300-100``; ``mlp:64-1024-1024-10`` with any widths, the first being the pixels of an input and
    the last the classes; ``conv2``, ``conv4``, ``conv6`` (VGG-like, arXiv:1803.03635) and ``digits-conv``:
    Gaussian Glorot weights, zero biases. Residual nets, VGGs and transformers as :func:`nets.build` says.
    With a ``seed`` the weights come from a generator of their own and torch's global one is left alone;
    without, the global one seeds them.

    Raises: ValueError on an unknown name or widths that do not fit the input or the classes.
    """
    if len(input_shape) == 0 or min(input_shape) < 1 or classes < 1:
        got = f"input_shape {tuple(input_shape)}, classes {classes}"
        raise ValueError(f"{name}: Expected sizes of at least 1, got {got}")
    inputs = math.prod(input_shape)
    if name == "lenet-300-100":
        layers = _fully_connected((inputs, *_LENET, classes))
    elif name.startswith("mlp:"):
        widths = _widths(name)
        if (widths[0], widths[-1]) != (inputs, classes):
            shape = "x".join(map(str, input_shape))
            raise ValueError(
                f"{name}: Expected widths from {inputs} ({shape} inputs) to {classes} (classes),"
                f" got {widths[0]} to {widths[-1]}"
            )
        layers = _fully_connected(widths)
    elif name in _CONV:
        layers = _convolutional(name, classes, tuple(input_shape))
    elif name in nets.NAMES:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return nets.build(name, classes, tuple(input_shape), generator)
    else:
        raise ValueError(f"Expected a model of {', '.join(NAMES)}, got {name!r}")
    model = nn.Sequential(layers)
    _glorot(model, seed)
    return model


def output_layer(model: nn.Module) -> str:
    """The weight of the last linear or convolution layer, ``"fc3.weight"``; raises ValueError without one.

    The papers prune it at half the rate, being small and hard to prune (arXiv:1803.03635).
    """
    # what prune.prunable takes: plain layers, and sparsekit's own, which `survivors` marks
    plain = (nn.Linear, nn.Conv2d)
    names = [n for n, m in model.named_modules() if type(m) in plain or hasattr(m, "survivors")]
    if not names:
        raise ValueError(f"Expected a model with a linear or convolution layer, got {type(model).__name__}")
    return f"{names[-1]}.weight" if names[-1] else "weight"


def recipe(name: str) -> Recipe:
    """The recipe of a model name; an ``mlp:…`` borrows LeNet-300-100's, other nets ResNet-20's or VGG-19's."""
    if name in RECIPES:
        return RECIPES[name]
    if name in nets.NAMES:
        lender = "vgg19" if name.startswith("vgg") else "resnet20"
        head = "head.weight" if name.startswith("vit") else list(RECIPES[lender].rates)[-1]
        return replace(RECIPES[lender], rates={"*": 0.2, head: 0.0}, source=_OURS)
    depth = len(_widths(name)) - 1
    lenet = RECIPES["lenet-300-100"]
    share = {"*": 0.2, f"fc{depth}.weight": 0.1}
    return Recipe(lenet.optimizer, lenet.lr, lenet.batch_size, lenet.iterations, share, _OURS)


def rates(model: str | nn.Module, rate: float | None = None) -> dict[str, float]:
    """Pruning rates per layer as ``{fnmatch pattern: share of survivors}``, later entries winning.

    With a ``rate``, that rate and half of it for the output layer (none where the recipe spares it);
    without, those of the model's recipe (a module that has no name gets 0.2). ``model`` is a name that
    :func:`build` knows, or a module.
    """
    if isinstance(model, str):
        own = dict(recipe(model).rates)
        output = list(own)[-1]
    else:
        output = output_layer(model)
        own = {"*": 0.2, output: 0.1}
    return own if rate is None else {"*": rate, output: rate / 2 if own[output] else 0.0}


def _widths(name: str) -> tuple[int, ...]:
    if not _MLP.fullmatch(name):
        raise ValueError(f"Expected a model of {', '.join(NAMES)}, such as mlp:64-1024-1024-10, got {name!r}")
    return tuple(int(width) for width in name.removeprefix("mlp:").split("-"))


def _fully_connected(widths: tuple[int, ...]) -> OrderedDict[str, nn.Module]:
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    pairs = list(pairwise(widths))
    for i, (wide, narrow) in enumerate(pairs, start=1):
        # skip_init: nn's own initialisation would draw from the global generator
        layers[f"fc{i}"] = nn.utils.skip_init(nn.Linear, wide, narrow)
        if i < len(pairs):
            layers[f"relu_fc{i}"] = nn.ReLU()
    return layers


def _convolutional(name: str, classes: int, input_shape: tuple[int, ...]) -> OrderedDict[str, nn.Module]:
    stages, hidden = _CONV[name]
    shrink = 2 ** len(stages)
    if len(input_shape) != 3 or min(input_shape[1:]) < shrink:
        raise ValueError(
            f"{name}: Expected an input_shape (channels, height, width) of at least {shrink}x{shrink} pixels,"
            f" got {input_shape}"
        )
    layers = OrderedDict[str, nn.Module]()
    channels, height, width = input_shape
    number = 0
    for stage, widths in enumerate(stages, start=1):
        for out in widths:
            number += 1
            layers[f"conv{number}"] = nn.utils.skip_init(nn.Conv2d, channels, out, kernel_size=3, padding=1)
            layers[f"relu_conv{number}"] = nn.ReLU()
            channels = out
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
        height, width = height // 2, width // 2
    layers.update(_fully_connected((channels * height * width, *hidden, classes)))
    return layers


@torch.no_grad()
def _glorot(model: nn.Module, seed: int | None) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
