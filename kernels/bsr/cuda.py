"""Which Triton launcher runs each ``bsr`` operator on CUDA; importing this needs triton."""

from __future__ import annotations

import torch

from . import conv, linear

LAUNCHERS = {
    "bsr_linear": linear.linear,
    "bsr_linear_t": linear.linear_t,
    "bsr_sddmm": linear.sddmm,
    "bsr_linear_backward": linear.linear_backward,
    "bsr_conv2d": conv.conv2d,
    "bsr_conv2d_t": conv.conv2d_t,
    "bsr_conv2d_sddmm": conv.conv2d_sddmm,
    "bsr_conv2d_backward": conv.conv2d_backward,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels multiply."""
LEAST = 8
"""The smallest side of a block that they take."""


def takes(name: str, *args) -> bool:
    """Whether the kernels run an operator on these arguments; others run through the naive twin."""
    values = args[2] if name.endswith("backward") else args[1]
    block = args[5] if name.endswith("sddmm") else values.shape[1:]
    return args[0].dtype in DTYPES and min(block) >= LEAST
