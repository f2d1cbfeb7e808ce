"""The naive twin of every ``nm`` operator: make the weight dense, then let torch do it."""

from __future__ import annotations

import torch.nn.functional as F

from . import layout


def nm_linear(x, values, choice, bias):
    return F.linear(x, layout.scatter(values, choice), bias)


def nm_linear_t(dy, values, choice, t_choice):
    return dy @ layout.scatter(values, choice)


def nm_sddmm(dy, x, choice):
    return layout.gather(dy.t() @ x, choice)
