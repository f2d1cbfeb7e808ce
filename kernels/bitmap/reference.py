"""The naive twin of the bitmap product: make the weight dense, then let torch do it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..reference import activate
from . import layout


def bitmap_linear(x, values, bitmap, offsets, bias, out_features, activation):
    weight = layout.scatter(values, bitmap, torch.Size((out_features, x.shape[1])))
    return activate(F.linear(x, weight, bias), activation)
