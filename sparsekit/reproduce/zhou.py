"""Zeros, signs and the supermask: which mask, what the kept weights start from, what the pruned ones become."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import data as datasets
from .. import models
from ..data import Dataset
from ..prune import prunable, prune
from ..ticket.controls import shuffle, signs
from ..ticket.solo import read_round, solo
from ..ticket.train import Training, evaluate
from .base import Check, Setting, interval, recipe
from .figure import Panel, draw, over_seeds
from .runs import at, scaled, search

_PAPER = "Zhou et al., Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask, NeurIPS 2019, arXiv:1905.01067"
_MODEL = "lenet-300-100"
_CRITERIA = (
    "magnitude", "magnitude_increase", "movement", "large_init_large_final", "large_init", "random", "small_init",
    "small_init_small_final", "small_final",
)  # fmt: skip
_KEPT = ("reinit", "reshuffle", "constant")
_PRUNED = ("frozen", "frozen unless shrunk")
_UNTRAINED = ("magnitude", "large_final_same_sign", "large_final_diff_sign", "random")

State = dict[str, Tensor]


@recipe("zhou", _PAPER)
def zhou(setting: Setting) -> list[Check]:
    """LeNet-300-100 on MNIST: nine mask criteria, kept weights with and without their signs, pruned ones frozen."""
    data = setting.pick("digits", "mnist", "mnist")
    rounds, every = setting.pick((1, 2), (5, 2), (19, 1))
    training, seeds = scaled(_MODEL, setting.pick(20, 2000, 50_000)), setting.seeds or setting.pick(1, 2, 5)
    found = {}
    for criterion in _CRITERIA:
        inner = replace(setting, out=setting.out / criterion)
        found[criterion] = search(inner, _MODEL, data, rounds, training, seeds, criterion=criterion, every=every)
    density = 0.109

    def accuracies(criterion: str) -> list[float]:
        return [at(summary["rounds"][1:], density)["test_accuracy"] for summary in found[criterion]]

    actions, untrained = [], []
    for seed in range(seeds):
        loaded = datasets.load(data, setting.data_dir, seed=seed).to(setting.device)
        laboratory = _Laboratory(setting, loaded, training, seed, at(found["magnitude"][0]["rounds"][1:], density))
        actions.append(setting.once(f"actions_{seed}", laboratory.actions))
        untrained.append(setting.once(f"untrained_{seed}", laboratory.untrained))
    rewound = accuracies("magnitude")
    _figure(setting, found, [a | {"rewind": ticket} for a, ticket in zip(actions, rewound, strict=True)], untrained)

    def action(name: str) -> list[float]:
        return [each[name] for each in actions]

    def less(a: list[float], b: list[float]) -> tuple[float, str]:
        mean, _, words = interval([x - y for x, y in zip(a, b, strict=True)])
        return mean, words

    random, checks = accuracies("random"), []
    for name in ("magnitude", "magnitude_increase", "movement"):
        mean, words = less(accuracies(name), random)
        checks.append(setting.check(f"mask by {name} less random mask, points", "above 0", words, mean > 0))
    mean, words = less(accuracies("magnitude_increase"), rewound)
    claim = "mask by magnitude_increase less by magnitude, points (at least -0.5)"
    checks.append(setting.check(claim, "as good or better", words, mean >= -0.005))
    for name in ("small_final", "small_init_small_final"):
        mean, words = less(accuracies(name), random)
        checks.append(setting.check(f"mask by {name} less random mask, points", "below 0", words, mean < 0))
    for name in _KEPT:
        mean, words = less(action(f"{name}, sign kept"), action(name))
        checks.append(setting.check(f"{name}: signs kept less signs at random, points", "above 0", words, mean > 0))
    mean, words = less(action("constant, sign kept"), rewound)
    claim = "constants with the signs kept less rewound weights, points (at least -0.5)"
    checks.append(setting.check(claim, "as good", words, mean >= -0.005))
    mean, words = less(action("frozen"), rewound)
    claim = "pruned weights frozen at their first values less at zero, points"
    checks.append(setting.check(claim, "below 0", words, mean < 0))
    mean, words = less(action("frozen unless shrunk"), action("frozen"))
    claim = "zero where training moved towards it, less all frozen, points"
    checks.append(setting.check(claim, "above 0", words, mean > 0))
    best = [max(curve["best"] for curve in each.values()) for each in untrained]
    mean, _, words = interval(best, spec=".1f")
    checks.append(setting.check("accuracy of an untrained supermask, % (at least 76)", "86", words, mean >= 0.76))
    return checks


class _Laboratory:
    """What is done to one seed's ticket: everything is counted against the same mask and first weights."""

    def __init__(self, setting: Setting, data: Dataset, training: Training, seed: int, row: dict) -> None:
        self.data, self.training, self.seed = data, training, seed
        self.model = self._fresh(seed).to(setting.device)
        run = setting.out / "magnitude" / f"seed_{seed}"
        self.trained, self.masks = read_round(run, 0)[0], read_round(run, row["round"])[1]

    def _fresh(self, seed: int) -> nn.Module:
        return models.build(_MODEL, classes=self.data.classes, input_shape=self.data.input_shape, seed=seed)

    def actions(self) -> dict[str, float]:
        """Accuracy after training by what the kept weights start from, and by what the pruned ones are."""
        first, generator = self.model.state_dict(), torch.Generator().manual_seed(self.seed)
        fresh = self._fresh(self.seed + 1000).state_dict()
        shuffled = shuffle(first, self.masks, generator)
        starts = dict(zip(_KEPT, (fresh, shuffled, signs(fresh, self.masks)), strict=True))
        found = {}
        for name, start in starts.items():
            for text, state in ((name, start), (f"{name}, sign kept", _signed(start, first, self.masks))):
                model = copy.deepcopy(self.model)
                model.load_state_dict(state)
                found[text] = solo(model, self.masks, self.data, self.training, self.seed)["test_accuracy"]
        for name in _PRUNED:
            model = copy.deepcopy(self.model)
            for weight, module in prunable(model).items():
                mask, start = self.masks[weight], first[weight]
                shrunk = self.trained[weight].abs() < start.abs()
                rest = start * ~shrunk if name == "frozen unless shrunk" else start
                parametrize.register_parametrization(module, "weight", Frozen(mask, rest))
            found[name] = solo(model, {}, self.data, self.training, self.seed)["test_accuracy"]
        return found

    def untrained(self) -> dict[str, dict]:
        """Accuracy of first weights, and of constants of their signs, under masks of the trained ones; no training."""
        first, trained, found = self.model.state_dict(), copy.deepcopy(self.model), {}
        trained.load_state_dict(self.trained)
        steps = range(1, 20, 2)
        for criterion in _UNTRAINED:
            curves: dict[str, list[float]] = {"weights": [], "constants": []}
            for step in steps:
                shares = {name: 1 - (1 - rate) ** step for name, rate in models.rates(_MODEL).items()}
                masks = prune(trained, shares, criterion=criterion, scope="layer", init=first)
                for kind, state in (("weights", first), ("constants", signs(first, masks))):
                    model = copy.deepcopy(self.model)
                    model.load_state_dict(state | {name: state[name] * mask for name, mask in masks.items()})
                    curves[kind].append(evaluate(model, self.data.test_x, self.data.test_y)[1])
            densities = [0.8**step for step in steps]
            for kind, curve in curves.items():
                found[f"{kind}, {criterion}"] = {"density": densities, "accuracy": curve, "best": max(curve)}
        return found


class Frozen(nn.Module):
    """A parametrization that trains the weights under ``mask`` and holds the others at ``values``."""

    def __init__(self, mask: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("values", values.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, self.values)


def _signed(state: State, first: State, masks: dict[str, Tensor]) -> State:
    return state | {name: state[name].abs() * first[name].sign() for name in masks}


def _figure(setting: Setting, found: dict[str, list[dict]], actions: list[dict], untrained: list[dict]) -> None:
    curves = []
    for criterion, summaries in found.items():
        rows = [summary["rounds"] for summary in summaries]
        densities = [100 * row["density"] for row in rows[0]]
        curves.append(over_seeds(criterion, densities, [[100 * r["test_accuracy"] for r in each] for each in rows]))
    names = ["rewind", *(f"{name}{end}" for name in _KEPT for end in ("", ", sign kept")), *_PRUNED]
    bars = over_seeds("ours", range(len(names)), [[100 * each[name] for name in names] for each in actions])
    masks = []
    for name, curve in untrained[0].items():
        runs = [[100 * accuracy for accuracy in each[name]["accuracy"]] for each in untrained]
        masks.append(over_seeds(name, [100 * density for density in curve["density"]], runs))
    panels = [
        Panel("", "accuracy (%) by mask criterion", curves, densities=True),
        Panel("", "accuracy (%) of the magnitude mask", [bars], ticks=names),
        Panel("", "accuracy (%) without training; paper's best 86", masks, densities=True, level=86.0),
    ]
    draw(setting.out, "Criteria, starts and supermasks of LeNet-300-100", panels)
