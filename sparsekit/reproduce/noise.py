"""Stability to SGD noise: from which step on do trainings that differ in data order stay linearly connected?"""

from __future__ import annotations

from .. import data as datasets
from .. import models
from ..files import write_json
from ..ticket.stability import Branches, Instability, rewind_point
from .base import Check, Setting, recipe
from .figure import Curve, Panel, draw
from .runs import scaled

_PAPER = "Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv:1912.05671, figure 3"


@recipe("stability", _PAPER)
def stability(setting: Setting) -> list[Check]:
    """LeNet is stable to SGD noise from its initialisation; ResNet-20 only after about 2000 steps."""
    data = setting.pick("digits", "mnist", "mnist")
    iterations = setting.pick(40, 3000, 24_000)
    steps = setting.pick([0, 10], [0, 300, 1000], [0, 1000, 4000])
    branches = _branches(setting, "lenet-300-100", data, iterations, steps)
    found = {step: branches.instability(step, alphas=setting.pick(5, 11, 30)) for step in steps}
    measured = {"lenet-300-100": found}
    _keep(setting, "lenet-300-100", data, iterations, found)
    words = f"{100 * found[0].value:.2f} %"
    checks = [setting.check("instability of LeNet from step 0 (below 2 %)", "0", words, found[0].stable)]
    if setting.scale == "paper":
        steps = [0, 500, 1000, 2000, 4000, 8000]
        branches = _branches(setting, "resnet20", "cifar10", 30_000, steps)
        first, known = rewind_point(steps, branches.instability)
        measured["resnet20"] = known
        _keep(setting, "resnet20", "cifar10", 30_000, known)
        words = f"{first} ({', '.join(f'{k}: {100 * each.value:.1f} %' for k, each in known.items())})"
        near = first is not None and 500 <= first <= 4000
        checks.append(setting.check("first stable step of ResNet-20 (500 to 4000)", "2000", words, near))
    _figure(setting, measured)
    return checks


def _branches(setting: Setting, model: str, data: str, iterations: int, steps: list[int]) -> Branches:
    loaded = datasets.load(data, setting.data_dir, seed=0)
    net = models.build(model, classes=loaded.classes, input_shape=loaded.input_shape, seed=0)
    return Branches(net.to(setting.device), loaded.to(setting.device), scaled(model, iterations), steps)


def _keep(setting: Setting, model: str, data: str, iterations: int, found: dict[int, Instability]) -> None:
    """As ``sparsekit stability --json`` writes it, for ``sparsekit report``."""
    rows = [each.row(step) for step, each in found.items()]
    facts = {"model": model, "data": data, "seed": 0, "iterations": iterations, "ticket": None}
    write_json(setting.out / f"stability-{model}.json", facts | {"steps": rows})


def _figure(setting: Setting, measured: dict[str, dict[int, Instability]]) -> None:
    first = [
        Curve(name, list(found), [100 * each.value for each in found.values()],
              [100 * min(each.values) for each in found.values()], [100 * max(each.values) for each in found.values()])
        for name, found in measured.items()
    ]  # fmt: skip
    first.append(Curve("LeNet, paper", [0.0], [0.0], paper=True))
    if len(measured) > 1:
        first.append(Curve("ResNet-20 stable from, paper", [2000.0], [2.0], paper=True))
    lines = [
        Curve(f"{name}, k = {step}", list(each.alphas), [100 * error for error in each.curves[0]])
        for name, found in measured.items()
        for step, each in found.items()
    ]
    panels = [
        Panel("step k that children branch from", "instability (%)", first, level=2.0),
        Panel("alpha, from one child to the other", "error (%)", lines),
    ]
    draw(setting.out, "Instability to SGD noise", panels)
