"""Iterative magnitude pruning on the papers' networks: ticket, re-initialised and random controls, seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .. import data as datasets
from .. import models
from ..report import write_report
from ..ticket.loop import tickets
from ..ticket.replicates import train_round_together
from ..ticket.train import Training, train_round
from ..ticket.verdict import study, verdict_table
from .base import Check, Setting, interval, recipe

__all__ = ["search"]

_PAPER = "Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019, arXiv:1803.03635"


def search(
    setting: Setting, model: str, data: str, rounds: int, training: Training, seeds: int, controls: Sequence[str] = (),
    rewind: str = "init", criterion: str = "magnitude", together: bool = False,
) -> list[dict]:  # fmt: skip
    """Summaries of one search per seed, each with its run directory and report in ``setting.out``."""
    summaries = []
    for seed in range(seeds):
        loaded = datasets.load(data, setting.data_dir, seed=seed).to(setting.device)
        shape = tuple(loaded.train_x.shape[1:])

        def build(seed: int, loaded=loaded, shape=shape):
            return models.build(model, classes=loaded.classes, input_shape=shape, seed=seed).to(setting.device)

        torch.manual_seed(seed)
        recipe_of, network = models.recipe(model), build(seed)
        rates, spared = models.rates(model), [name for name, rate in models.rates(model).items() if rate == 0]
        run = tickets(
            network, rounds, rates["*"] if recipe_of.scope == "global" else rates, scope=recipe_of.scope,
            criterion=criterion, rewind=rewind, run_dir=setting.out / f"seed_{seed}", exclude=spared,
            example_inputs=loaded.train_x[: training.batch_size],
            impl="csr" if together or setting.scale == "smoke" else "auto",
            note={"model": model, "data": data, "note": loaded.note, "seed": seed, "training": str(training)},
        )  # fmt: skip
        step: Callable = train_round_together if together else train_round
        for round_ in run:
            step(round_, loaded, training, controls=controls, fresh=build, seed=seed)
            print(f"seed {seed}: round {round_.number} of {rounds}, {100 * round_.density:.1f} % left", flush=True)
        summaries.append(run.summary)
        write_report(setting.out / f"seed_{seed}")
    return summaries


def _training(model: str, iterations: int, images: int | None = None) -> Training:
    """The recipe's training at another length: schedules shrink with it."""
    own = models.recipe(model)

    def scaled(step: int) -> int:
        return step * iterations // own.iterations

    return Training(
        iterations, own.batch_size, own.optimizer, own.lr, own.momentum, own.weight_decay,
        min(own.eval_every, iterations), scaled(own.warmup), tuple(map(scaled, own.milestones)),
    )  # fmt: skip


def at(rows: list[dict], density: float) -> dict:
    """The round whose density is nearest."""
    return min(rows, key=lambda row: abs(row["density"] - density))


def gaps(summaries: list[dict], density: float, control: str | None = None) -> list[float]:
    """Ticket less dense (or less a control) in accuracy at early stop, one per seed."""
    found = []
    for summary in summaries:
        row = at(summary["rounds"][1:], density)
        other = summary["rounds"][0] if control is None else row["controls"][control]
        found.append(row["test_accuracy"] - other["test_accuracy"])
    return found


def _sooner(summaries: list[dict], density: float) -> list[float]:
    """How much earlier than the dense network the ticket stops, as a share of the dense network's iterations."""
    rows = [(at(s["rounds"][1:], density), s["rounds"][0]) for s in summaries]
    return [1 - row["early_stop_iteration"] / dense["early_stop_iteration"] for row, dense in rows]


@recipe("lenet", _PAPER + ", section 2")
def lenet(setting: Setting) -> list[Check]:
    """LeNet-300-100 on MNIST: layerwise 20 % a round, Adam, ticket against dense, re-initialised and random."""
    rounds, iterations = setting.pick(3, 15, 19), setting.pick(40, 5000, 50_000)
    seeds = setting.seeds or setting.pick(1, 3, 5)
    controls = setting.pick(["reinit", "random"], ["reinit", "random"], ["reinit"] * 3 + ["random"])
    data, training = setting.pick("digits", "mnist", "mnist"), _training("lenet-300-100", iterations)
    found = search(setting, "lenet-300-100", data, rounds, training, seeds, controls, together=True)
    print(verdict_table(study(found)))
    checks = []
    if data == "mnist":  # on other images the first layer, and so the count, is another
        expected = {3: 0.513, 7: 0.211, 9: 0.135, 15: 0.036, 19: 0.015}
        got = {k: found[0]["rounds"][k]["density"] for k in expected if k <= rounds}
        exact = all(abs(got[k] - expected[k]) < 6e-4 for k in got)
        words = "/".join(f"{100 * share:.1f}" for share in got.values())
        paper = "/".join(f"{100 * expected[k]:.1f}" for k in got)
        checks.append(Check(f"weights left after rounds {'/'.join(map(str, got))}, %", paper, words, exact))
    mean, _, words = interval(_sooner(found, 0.211), spec="+.0f")
    checks.append(setting.check("early stop of the 21 % ticket, sooner by % (at least 20)", "38", words, mean >= 0.2))
    mean, _, words = interval(gaps(found, 0.135))
    checks.append(setting.check("13.5 % ticket less dense, points (not below 0)", "+0.3", words, mean >= 0))
    for name, text in (("reinit", "re-initialised"), ("random", "randomly masked")):
        small = [row["density"] for row in found[0]["rounds"][1:] if row["density"] <= 0.22] or [0.135]
        mean, _, words = min(interval(gaps(found, density, name)) for density in small)
        checks.append(setting.check(f"ticket less {text}, points, least from 21 % on", "above 0", words, mean > 0))
    last = found[0]["rounds"][-1]["density"]
    pairs = zip(gaps(found, last, "random"), gaps(found, last, "reinit"), strict=True)
    mean, _, words = interval([random - reinit for random, reinit in pairs])
    claim = f"re-initialised less randomly masked at {100 * last:.1f} %, points"
    checks.append(setting.check(claim, "above 0", words, mean >= 0))
    mean, _, words = interval(gaps(found, 0.036))
    checks.append(setting.check("3.6 % ticket less dense, points (within 0.4)", "0", words, abs(mean) <= 0.004))
    return checks


def _conv(setting: Setting, name: str, density: float, gain: str, faster: str) -> list[Check]:
    iterations = setting.pick(4, {"conv2": 4000, "conv4": 5000, "conv6": 6000}[name], models.recipe(name).iterations)
    rounds = setting.pick(1, 11, 20)
    data, model = setting.pick(("digits", "digits-conv"), ("cifar10", name), ("cifar10", name))
    training = _training(model, iterations)
    if setting.scale == "smoke":
        training = replace(training, eval_every=iterations)
    found = search(setting, model, data, rounds, training, setting.seeds or setting.pick(1, 1, 5), ["reinit", "random"])
    checks = []
    mean, _, words = interval(gaps(found, density))
    claim = f"{100 * density:.0f} % ticket less dense, points (not below 0)"
    checks.append(setting.check(claim, gain, words, mean >= 0))
    for control in ("reinit", "random"):
        mean, _, words = interval(gaps(found, density, control))
        checks.append(setting.check(f"ticket less {control} there, points", "above 0", words, mean > 0))
    mean, _, words = interval(_sooner(found, density), spec="+.0f")
    checks.append(setting.check("early stop there, sooner by %", faster, words, mean > 0))
    return checks


@recipe("conv2", _PAPER + ", section 3")
def conv2(setting: Setting) -> list[Check]:
    """Conv-2 on CIFAR-10: the ticket at about 10 % learns faster and no worse than the whole network."""
    return _conv(setting, "conv2", 0.1, "up to +3.4", "up to 71")


@recipe("conv4", _PAPER + ", section 3")
def conv4(setting: Setting) -> list[Check]:
    """Conv-4 on CIFAR-10: the ticket at about 11 % learns faster and no worse than the whole network."""
    return _conv(setting, "conv4", 0.11, "up to +3.5", "up to 71")


@recipe("conv6", _PAPER + ", section 3")
def conv6(setting: Setting) -> list[Check]:
    """Conv-6 on CIFAR-10: the ticket at about 15 % learns faster and no worse than the whole network."""
    return _conv(setting, "conv6", 0.15, "up to +3.3", "up to 60")


def _deep(setting: Setting, name: str, density: float, k: int, source_gap: str) -> list[Check]:
    """Global pruning with late rewinding against rewinding to the start (arXiv:1912.05671)."""
    iterations = setting.pick(6, models.recipe(name).iterations // 5, models.recipe(name).iterations)
    rounds, data = setting.pick(1, 10, 18), setting.pick("digits", "cifar10", "cifar10")
    model = setting.pick("digits-conv", name, name)
    training = replace(_training(model, iterations), warmup=0)
    late = max(1, k * iterations // models.recipe(name).iterations)
    seeds, results = setting.seeds or setting.pick(1, 1, 3), {}
    for rewind in ("init", f"{late}it"):
        own = replace(setting, out=setting.out / rewind)
        results[rewind] = search(own, model, data, rounds, training, seeds, rewind=rewind)
    first, after = (gaps(found, density) for found in results.values())
    mean, _, words = interval(after)
    claim = f"rewound to step {late}: {100 * density:.0f} % ticket less dense, points (at least -0.5)"
    checks = [setting.check(claim, source_gap, words, mean >= -0.005)]
    mean, _, words = interval([a - b for a, b in zip(after, first, strict=True)])
    checks.append(setting.check("late rewinding less rewinding to the start, points", "above 0", words, mean > 0))
    return checks


_LATE = "Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, arXiv:1912.05671"


@recipe("resnet20", _LATE)
def resnet20(setting: Setting) -> list[Check]:
    """ResNet-20 on CIFAR-10, global pruning: tickets exist when rewound to step 500, not to the start."""
    return _deep(setting, "resnet20", 0.168, 500, "within 0.2 (80 to 13.4 %)")


@recipe("vgg16", _LATE)
def vgg16(setting: Setting) -> list[Check]:
    """VGG-16 on CIFAR-10, global pruning: tickets exist when rewound to step 1000, not to the start."""
    return _deep(setting, "vgg16", 0.134, 1000, "within 0.2 (16.8 to 1.2 %)")
