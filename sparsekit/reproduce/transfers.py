"""Tickets on the move: to another data set, another optimizer, and from a network that was trained before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data as datasets
from .. import models
from ..data import Dataset
from ..ticket.solo import read_round, read_start, solo
from ..ticket.train import Training
from ..ticket.transfer import transfer as move
from .base import Check, Setting, interval, recipe
from .figure import Panel, draw, over_seeds
from .runs import scaled, search

_PAPER = "Morcos et al., One ticket to win them all, NeurIPS 2019, arXiv:1906.02773"
_PRETRAINED = "Chen et al., The Lottery Tickets Hypothesis for ... Pre-training in Computer Vision, arXiv:2012.06908"
_RUNS = (
    "dense", "own ticket", "moved ticket", "random ticket", "dense, sgd", "moved ticket, sgd", "random ticket, sgd",
)  # fmt: skip


@recipe("transfer", f"{_PAPER}; {_PRETRAINED}")
def transfer(setting: Setting) -> list[Check]:
    """A ticket of MNIST on another hand's digits, by Adam and by SGD; then one found from pre-trained weights there."""
    model = setting.pick("lenet-300-100", "lenet-300-100", "vgg19")
    source, target = _tasks(setting)
    names = setting.pick(("digits", "digits"), ("mnist", "digits"), ("cifar10 a", "cifar10 b"))
    seeds, (rounds, every) = setting.seeds or setting.pick(1, 3, 3), setting.pick((1, 2), (5, 2), (16, 1))
    first = scaled(model, setting.pick(10, 2000, models.recipe(model).iterations))
    second = scaled(model, setting.pick(10, 1000, models.recipe(model).iterations))
    second = replace(second, eval_every=setting.pick(10, 20, second.eval_every))
    late = setting.pick("init", "init", "1ep")  # deep networks rewind to a late step

    def run(where: str, name: str, load: Callable, training: Training, **how) -> list[dict]:
        inner = replace(setting, out=setting.out / where)
        return search(inner, model, name, rounds, training, seeds, load=load, every=every, **how)

    found = {
        "source": run("source", names[0], source, first, rewind=late),
        "target": run("target", names[1], target, second, rewind=late),
    }

    def pretrained(network: nn.Module, seed: int) -> None:
        network.load_state_dict(read_round(setting.out / "source" / f"seed_{seed}", 0)[0])

    found["pretrained"] = run("pretrained", names[1], target, second, start=pretrained, controls=["random"])
    parts = []
    for seed in range(seeds):
        at_target = _Target(setting, model, target(seed).to(setting.device), second, seed, found)
        parts.append(setting.once(f"seed_{seed}", at_target.runs))
    _figure(setting, found, parts)
    share = found["source"][0]["rounds"][-1]["density"]
    return _checks(setting, found, parts, f"{100 * share:.0f} %")


def _tasks(setting: Setting) -> tuple[Callable[[int], Dataset], Callable[[int], Dataset]]:
    """Source and target data by seed: MNIST and scikit-learn's digits, or the two halves of CIFAR-10."""

    def mnist(seed: int) -> Dataset:
        return datasets.load("mnist", setting.data_dir, seed=seed)

    def half(number: int, seed: int) -> Dataset:
        data = datasets.load("cifar10", setting.data_dir, seed=seed)
        mine = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))[number::2]
        return replace(data, train_x=data.train_x[mine], train_y=data.train_y[mine])

    return setting.pick((digits, digits), (mnist, digits), (partial(half, 0), partial(half, 1)))


def digits(seed: int) -> Dataset:
    """scikit-learn's digits of 8x8 pixels laid out as MNIST's: in the middle 20x20 of 28x28."""
    data = datasets.load("digits", seed=seed)

    def grown(x: Tensor) -> Tensor:
        return F.pad(F.interpolate(x, size=(20, 20), mode="bilinear"), (4,) * 4, value=float(x.min()))

    return replace(data, **{part: grown(getattr(data, part)) for part in ("train_x", "val_x", "test_x")})


class _Target:
    """What is trained on the target data for one seed."""

    def __init__(self, setting: Setting, model: str, data: Dataset, training: Training, seed: int, found: dict) -> None:
        self.data, self.training, self.seed = data, training, seed
        row = found["source"][seed]["rounds"][-1]
        run = setting.out / "source" / f"seed_{seed}"
        self.start, self.masks = read_start(run), read_round(run, row["round"])[1]
        self.fresh = models.build(model, classes=data.classes, input_shape=data.input_shape, seed=seed + 500)
        self.fresh.to(setting.device)
        self.head = models.output_layer(self.fresh).removesuffix(".weight")
        self.row = found["target"][seed]["rounds"]

    def runs(self) -> dict[str, float]:
        """Accuracy at early stop of dense, moved and random networks, by both optimizers."""
        moved = move(self.start, self.masks, self.fresh, exclude=self.head)
        found = {"own ticket": self.row[-1]["test_accuracy"]}
        sgd = replace(self.training, optimizer="sgd", lr=0.05, momentum=0.9)
        for end, training in (("", self.training), (", sgd", sgd)):
            for name, model, masks in (
                ("dense", self.fresh, {}),
                ("moved ticket", moved.model, moved.masks),
                ("random ticket", self.fresh, moved.random(self.seed)),
            ):
                found[name + end] = solo(model, masks, self.data, training, self.seed)["test_accuracy"]
        return found


def _checks(setting: Setting, found: dict, parts: list[dict], share: str) -> list[Check]:
    last = [summary["rounds"][-1] for summary in found["pretrained"]]
    ticket = [row["test_accuracy"] for row in last]
    random = [row["controls"]["random"]["test_accuracy"] for row in last]
    dense = [summary["rounds"][0]["test_accuracy"] for summary in found["pretrained"]]

    def of(name: str) -> list[float]:
        return [part[name] for part in parts]

    moved, random_ticket = of("moved ticket"), of("random ticket")
    claims = (
        (f"moved {share} ticket less random ticket, points", "above 0", moved, random_ticket, 0.0),
        ("moved ticket less the target's own, points (at least -1)", "about 0", moved, of("own ticket"), -1.0),
        ("moved less random ticket, by SGD, points", "above 0", of("moved ticket, sgd"), of("random ticket, sgd"), 0.0),
        ("pre-trained dense less dense from scratch, points", "above 0", dense, of("dense"), 0.0),
        (f"pre-trained {share} ticket less dense, points (at least -0.5)", "0 (41 to 3.5 %)", ticket, dense, -0.5),
        ("pre-trained ticket less randomly masked, points", "above 0", ticket, random, 0.0),
    )
    checks = []
    for claim, paper, ours, theirs, least in claims:
        mean, _, words = interval([a - b for a, b in zip(ours, theirs, strict=True)])
        checks.append(setting.check(claim, paper, words, 100 * mean >= least if least else mean > 0))
    return checks


def _figure(setting: Setting, found: dict, parts: list[dict]) -> None:
    bars = over_seeds("ours", range(len(_RUNS)), [[100 * part[name] for name in _RUNS] for part in parts])
    densities = [100 * row["density"] for row in found["target"][0]["rounds"]]
    starts = [
        over_seeds(text, densities, [[100 * row["test_accuracy"] for row in each["rounds"]] for each in found[key]])
        for key, text in (("target", "from scratch"), ("pretrained", "from pre-trained weights"))
    ]
    panels = [
        Panel("", "accuracy on the target (%)", [bars], ticks=_RUNS),
        Panel("", "accuracy on the target (%)", starts, densities=True),
    ]
    draw(setting.out, "A ticket moved, and tickets from pre-trained weights", panels)
