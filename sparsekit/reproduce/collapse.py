"""Layer collapse: which criteria empty a layer, and which can go down to one weight a layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import log10

import torch
from torch import Tensor, nn

from .. import data as datasets
from .. import models
from ..collapse import collapsed, critical_compression
from ..prune import prune
from .base import Check, Setting, interval, recipe
from .figure import Curve, Panel, draw, over_seeds
from .runs import at, scaled, search

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
    checks, reached = [], []
    for name in ("random", "magnitude", "snip", "grasp", "synflow"):
        torch.manual_seed(0)
        found = critical_compression(model, name, data=batches)
        words = f"{found.critical:,.0f} of {found.largest:,.0f}"
        largest = found.critical == found.largest
        paper = "the largest there is" if name == "synflow" else "below"
        checks.append(Check(f"{name}: critical compression", paper, words, largest == (name == "synflow")))
        reached.append(found)
    names = [check.claim.partition(":")[0] for check in checks]
    places = [float(place) for place in range(len(names))]
    ours = Curve("ours", places, [log10(each.critical) for each in reached])
    paper = Curve("the largest there is, SynFlow's in the paper", places[-1:], [log10(reached[-1].largest)], paper=True)
    panel = Panel("", "log10 of weights over survivors", [ours, paper], ticks=names)
    draw(setting.out, "Critical compression: before a layer is empty", [panel])
    return checks


@recipe("collapse", _SYNFLOW + "; " + _LAYERWISE)
def collapse(setting: Setting) -> list[Check]:
    """Pruning at initialisation to 0.05 %: global magnitude empties layers, SynFlow and layerwise scores do not."""
    model, batches = _network(setting)
    sparsity = 0.9995
    checks, curves = [], []
    for name, empties in (("magnitude", True), ("synflow", False), ("lamp", False), ("layer_minmax", False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the emptied layers that are looked for
            masks = prune(model, sparsity, criterion=name, data=batches)
        empty = collapsed(masks)
        curves.append(_densities(name, masks))
        paper = "some" if empties else "none"
        claim = f"{name}: layers emptied at {100 * (1 - sparsity):.2g} %"
        checks.append(Check(claim, paper, str(len(empty)), bool(empty) == empties))
    panel = Panel("layer", "log10 of weights left (%); -4: none", curves)
    draw(setting.out, f"Layer by layer at {100 * (1 - sparsity):.2g} %", [panel])
    return checks


def _densities(name: str, masks: Mapping[str, Tensor]) -> Curve:
    shares = [float(mask.double().mean()) for mask in masks.values()]
    return Curve(name, list(range(1, len(shares) + 1)), [log10(100 * share) if share else -4.0 for share in shares])


@recipe("layerwise", _LAYERWISE)
def layerwise(setting: Setting) -> list[Check]:
    """Iterative pruning of VGG-16, late rounds: ranking by layerwise importance where magnitude collapses."""
    rounds, data = setting.pick(1, 25, 30), setting.pick("digits", "cifar10", "cifar10")
    name = setting.pick("digits-conv", "vgg16", "vgg16")
    own = models.recipe(name)
    training = scaled(name, setting.pick(4, own.iterations // 40, own.iterations // 2))
    last, curves = {}, []
    for criterion in ("magnitude", "layer_l2"):
        inner = replace(setting, out=setting.out / criterion)
        seeds = setting.seeds or setting.pick(1, 1, 3)
        found = search(inner, name, data, rounds, training, seeds, criterion=criterion, rewind="lr")
        last[criterion] = [at(s["rounds"], 0)["test_accuracy"] for s in found]
        densities = [100 * row["density"] for row in found[0]["rounds"]]
        runs = [[100 * row["test_accuracy"] for row in summary["rounds"]] for summary in found]
        curves.append(over_seeds(criterion, densities, runs))
    after = 100 * 0.8**30
    for name, accuracy in (("magnitude", 51.5), ("layer_l2", 84.0)):
        curves.append(Curve(f"{name}, paper", [after], [accuracy], paper=True))
    panel = Panel("", "test accuracy (%)", curves, densities=True)
    draw(setting.out, "VGG-16: late rounds of global ranking", [panel])
    mean, _, words = interval([a - b for a, b in zip(last["layer_l2"], last["magnitude"], strict=True)])
    claim = f"L2 importance less magnitude after {rounds} rounds, points"
    return [setting.check(claim, "+32.5 (84.0 and 51.5 after 30)", words, mean > 0)]
