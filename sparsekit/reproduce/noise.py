"""Stability to SGD noise: from which step on do trainings that differ in data order stay linearly connected?"""

from __future__ import annotations

from .. import data as datasets
from .. import models
from ..ticket.stability import Branches, rewind_point
from .base import Check, Setting, recipe
from .imp import _training

_PAPER = "Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv:1912.05671, figure 3"


@recipe("stability", _PAPER)
def stability(setting: Setting) -> list[Check]:
    """LeNet is stable to SGD noise from its initialisation; ResNet-20 only after about 2000 steps."""
    checks = []
    data = datasets.load(setting.pick("digits", "mnist", "mnist"), setting.data_dir, seed=0)
    shape = tuple(data.train_x.shape[1:])
    model = models.build("lenet-300-100", classes=data.classes, input_shape=shape, seed=0)
    training = _training("lenet-300-100", setting.pick(40, 3000, 24_000))
    found = Branches(model, data, training, [0]).instability(0, alphas=setting.pick(5, 11, 30))
    words = f"{100 * found.value:.2f} %"
    checks.append(setting.check("instability of LeNet from step 0 (below 2 %)", "0", words, found.stable))
    if setting.scale == "paper":
        data = datasets.load("cifar10", setting.data_dir, seed=0)
        model = models.build("resnet20", classes=10, input_shape=tuple(data.train_x.shape[1:]), seed=0)
        steps = [0, 500, 1000, 2000, 4000, 8000]
        branches = Branches(model.to(setting.device), data.to(setting.device), _training("resnet20", 30_000), steps)
        first, known = rewind_point(steps, branches.instability)
        words = f"{first} ({', '.join(f'{k}: {100 * each.value:.1f} %' for k, each in known.items())})"
        near = first is not None and 500 <= first <= 4000
        checks.append(setting.check("first stable step of ResNet-20 (500 to 4000)", "2000", words, near))
    return checks
