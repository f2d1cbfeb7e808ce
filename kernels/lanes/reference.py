"""The naive twin of the product in lanes: make the weight dense, then let torch do it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..reference import activate
from . import layout


def lanes_linear(x, values, codes, bases, starts, order, scale, bias, out_features, activation):
    shape = torch.Size((out_features, x.shape[1]))
    if scale is None:
        weight = layout.scatter(values, layout.places(codes, bases, starts, order, shape)[0], shape)
    else:
        weight = dequantized(values, codes, bases, starts, order, scale, shape).to(x.dtype)
    return activate(F.linear(x, weight, bias), activation)


def dequantized(values, codes, bases, starts, order, scale, shape):
    """The dense weight, float32, of int8 or bfloat16 values and a factor for each row."""
    return layout.scatter(values.float(), layout.places(codes, bases, starts, order, shape)[0], shape) * scale[:, None]
