"""Iterative magnitude pruning on the papers' networks: ticket, re-initialised and random controls, seeds."""

from __future__ import annotations

from dataclasses import replace

from .. import models
from ..ticket.verdict import study, verdict_table
from .base import Check, Setting, interval, recipe
from .figure import Curve, Panel, draw, over_seeds
from .runs import figure, gaps, scaled, search, sooner

_PAPER = "Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019, arXiv:1803.03635"


@recipe("lenet", _PAPER + ", section 2")
def lenet(setting: Setting) -> list[Check]:
    """LeNet-300-100 on MNIST: layerwise 20 % a round, Adam, ticket against dense, re-initialised and random."""
    rounds, iterations = setting.pick(3, 15, 19), setting.pick(40, 5000, 50_000)
    seeds = setting.seeds or setting.pick(1, 3, 5)
    controls = setting.pick(["reinit", "random"], ["reinit", "random"], ["reinit"] * 3 + ["random"])
    data, training = setting.pick("digits", "mnist", "mnist"), scaled("lenet-300-100", iterations)
    found = search(setting, "lenet-300-100", data, rounds, training, seeds, controls, together=True)
    print(verdict_table(study(found)))
    reported = {"accuracy": [(13.5, 0.3), (3.6, 0.0)], "stop": [(21.1, 0.62)]}
    figure(setting, f"LeNet-300-100 on {data}", found, reported)
    checks = []
    if data == "mnist":  # on other images the first layer, and so the count, is another
        expected = {3: 0.513, 7: 0.211, 9: 0.135, 15: 0.036, 19: 0.015}
        got = {k: found[0]["rounds"][k]["density"] for k in expected if k <= rounds}
        exact = all(abs(got[k] - expected[k]) < 6e-4 for k in got)
        words = "/".join(f"{100 * share:.1f}" for share in got.values())
        paper = "/".join(f"{100 * expected[k]:.1f}" for k in got)
        checks.append(Check(f"weights left after rounds {'/'.join(map(str, got))}, %", paper, words, exact))
    mean, _, words = interval(sooner(found, 0.211), spec="+.0f")
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


# Best accuracy and earliest stop of tickets (arXiv:1803.03635, section 3): weights left %, points or share of dense.
_CONV = {
    "conv2": {"accuracy": [(4.6, 3.4)], "stop": [(8.8, 1 / 3.5)]},
    "conv4": {"accuracy": [(11.1, 3.5)], "stop": [(9.2, 1 / 3.5)]},
    "conv6": {"accuracy": [(26.4, 3.3)], "stop": [(15.1, 1 / 2.5)]},
}


def _conv(setting: Setting, name: str, density: float, gain: str, faster: str) -> list[Check]:
    iterations = setting.pick(4, {"conv2": 2000, "conv4": 2500, "conv6": 3000}[name], models.recipe(name).iterations)
    rounds, every = setting.pick((1, 1), (5, 2), (20, 1))  # short: the paper's first ten rounds in five
    data, model = setting.pick(("digits", "digits-conv"), ("cifar10", name), ("cifar10", name))
    training = replace(scaled(model, iterations), eval_every=setting.pick(iterations, 125, 100))
    seeds, below = setting.seeds or setting.pick(1, 1, 5), setting.pick(1.0, 1.3 * density, 1.0)
    controls = ["reinit", "random"]
    found = search(setting, model, data, rounds, training, seeds, controls, every=every, below=below)
    figure(setting, f"{name} on CIFAR-10", found, _CONV[name])
    checks = []
    mean, _, words = interval(gaps(found, density))
    claim = f"{100 * density:.0f} % ticket less dense, points (not below 0)"
    checks.append(setting.check(claim, gain, words, mean >= 0))
    for control in ("reinit", "random"):
        mean, _, words = interval(gaps(found, density, control))
        checks.append(setting.check(f"ticket less {control} there, points", "above 0", words, mean > 0))
    mean, _, words = interval(sooner(found, density), spec="+.0f")
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


def _draw_deep(setting: Setting, name: str, results: dict[str, list[dict]], band: tuple[float, float]) -> None:
    curves = []
    for rewind, found in results.items():
        densities = [100 * row["density"] for row in found[0]["rounds"]]
        runs = [[100 * (r["test_accuracy"] - s["rounds"][0]["test_accuracy"]) for r in s["rounds"]] for s in found]
        curves.append(over_seeds(f"rewound to {rewind}", densities, runs))
    curves.append(Curve("matching in the paper, late rewinding", list(band), [0.0, 0.0], paper=True))
    draw(setting.out, name, [Panel("", "accuracy less dense (points)", curves, densities=True, level=0.0)])


def _deep(setting: Setting, name: str, density: float, k: int, band: tuple[float, float]) -> list[Check]:
    """Global pruning with late rewinding against rewinding to the start (arXiv:1912.05671)."""
    iterations = setting.pick(6, models.recipe(name).iterations // 5, models.recipe(name).iterations)
    rounds, data = setting.pick(1, 10, 18), setting.pick("digits", "cifar10", "cifar10")
    model = setting.pick("digits-conv", name, name)
    training = replace(scaled(model, iterations), warmup=0)
    late = max(1, k * iterations // models.recipe(name).iterations)
    seeds, results = setting.seeds or setting.pick(1, 1, 3), {}
    for rewind in ("init", f"{late}it"):
        own = replace(setting, out=setting.out / rewind)
        results[rewind] = search(own, model, data, rounds, training, seeds, rewind=rewind)
    _draw_deep(setting, name, results, band)
    first, after = (gaps(found, density) for found in results.values())
    mean, _, words = interval(after)
    claim = f"rewound to step {late}: {100 * density:.0f} % ticket less dense, points (at least -0.5)"
    reported = f"within 0.2 ({band[0]:g} to {band[1]:g} %)"
    checks = [setting.check(claim, reported, words, mean >= -0.005)]
    mean, _, words = interval([a - b for a, b in zip(after, first, strict=True)])
    checks.append(setting.check("late rewinding less rewinding to the start, points", "above 0", words, mean > 0))
    return checks


_LATE = "Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, arXiv:1912.05671"


@recipe("resnet20", _LATE)
def resnet20(setting: Setting) -> list[Check]:
    """ResNet-20 on CIFAR-10, global pruning: tickets exist when rewound to step 500, not to the start."""
    return _deep(setting, "resnet20", 0.168, 500, (80.0, 13.4))


@recipe("vgg16", _LATE)
def vgg16(setting: Setting) -> list[Check]:
    """VGG-16 on CIFAR-10, global pruning: tickets exist when rewound to step 1000, not to the start."""
    return _deep(setting, "vgg16", 0.134, 1000, (16.8, 1.2))
