"""Layer collapse: which criteria empty a layer, and which can go down to one weight a layer."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from .. import data as datasets
from .. import models
from ..collapse import collapsed, critical_compression
from ..prune import prune
from .base import Check, Setting, interval, recipe
from .imp import _training, at, search

_SYNFLOW = "Tanaka et al., Pruning neural networks without any data, NeurIPS 2020, arXiv:2006.05467"
_LAYERWISE = "Liu et al., Layer-wise importance in iterative pruning, arXiv:2302.11244, table 2"


def _network(setting: Setting) -> tuple[nn.Module, list]:
    """A network without shortcuts (they carry the flow past an empty layer) at its initialisation, and some batches."""
    data = datasets.load(setting.pick("digits", "cifar10", "cifar10"), setting.data_dir, seed=0)
    shape = tuple(data.train_x.shape[1:])
    name = setting.pick("digits-conv", "vgg16", "vgg16")
    model = models.build(name, classes=data.classes, input_shape=shape, seed=0)
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(0))[:256]
    return model, list(zip(data.train_x[order].split(128), data.train_y[order].split(128), strict=True))


@recipe("synflow", _SYNFLOW + ", figure 1")
def synflow(setting: Setting) -> list[Check]:
    """Pruning at initialisation: SynFlow alone reaches maximal critical compression."""
    model, batches = _network(setting)
    checks = []
    for name in ("random", "magnitude", "snip", "grasp", "synflow"):
        torch.manual_seed(0)
        found = critical_compression(model, name, data=batches)
        words = f"{found.critical:,.0f} of {found.largest:,.0f}"
        largest = found.critical == found.largest
        paper = "the largest there is" if name == "synflow" else "below"
        checks.append(Check(f"{name}: critical compression", paper, words, largest == (name == "synflow")))
    return checks


@recipe("collapse", _SYNFLOW + "; " + _LAYERWISE)
def collapse(setting: Setting) -> list[Check]:
    """Pruning at initialisation to 0.05 %: global magnitude empties layers, SynFlow and layerwise scores do not."""
    model, batches = _network(setting)
    sparsity = 0.9995
    checks = []
    for name, empties in (("magnitude", True), ("synflow", False), ("lamp", False), ("layer_minmax", False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the emptied layers that are looked for
            empty = collapsed(prune(model, sparsity, criterion=name, data=batches))
        paper = "some" if empties else "none"
        claim = f"{name}: layers emptied at {100 * (1 - sparsity):.2g} %"
        checks.append(Check(claim, paper, str(len(empty)), bool(empty) == empties))
    return checks


@recipe("layerwise", _LAYERWISE)
def layerwise(setting: Setting) -> list[Check]:
    """Iterative pruning of VGG-16, late rounds: ranking by layerwise importance where magnitude collapses."""
    rounds, data = setting.pick(2, 25, 30), setting.pick("digits", "cifar10", "cifar10")
    name = setting.pick("digits-conv", "vgg16", "vgg16")
    own = models.recipe(name)
    training = _training(name, setting.pick(4, own.iterations // 40, own.iterations // 2))
    last = {}
    for criterion in ("magnitude", "layer_l2"):
        inner = replace(setting, out=setting.out / criterion)
        seeds = setting.seeds or setting.pick(1, 1, 3)
        found = search(inner, name, data, rounds, training, seeds, criterion=criterion, rewind="lr")
        last[criterion] = [at(s["rounds"], 0)["test_accuracy"] for s in found]
    mean, _, words = interval([a - b for a, b in zip(last["layer_l2"], last["magnitude"], strict=True)])
    claim = f"L2 importance less magnitude after {rounds} rounds, points"
    return [setting.check(claim, "+32.5 (84.0 and 51.5 after 30)", words, mean > 0)]
