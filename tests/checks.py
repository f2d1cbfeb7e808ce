"""What the tests of native CPU kernels share."""

import torch

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def randn(*shape, dtype=torch.float32, seed=1):
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poison(*tensors):
    """Leaves NaN in the memory that results of these sizes are likely to be given."""
    for t in tensors:
        torch.full_like(t, float("nan"))


def check(got, expected, dtype=torch.float32):
    """A contiguous (an image may be channels_last) result of ``dtype`` close to the float64 ``expected``."""
    assert got.shape == expected.shape
    assert got.dtype == dtype
    assert got.is_contiguous() or (got.dim() == 4 and got.is_contiguous(memory_format=torch.channels_last))
    # Terms are of order one, so a result smaller than that has lost digits to cancellation.
    scale = max(expected.norm().item(), expected.numel() ** 0.5, 1)
    assert (got.double() - expected).norm().item() <= TOLERANCE[dtype] * scale
