"""Memory that is freed stays with the process: training on a CPU otherwise fetches it anew in every step."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_memory"]

# Of mallopt(3); the largest values that its int arguments and glibc's limits take.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}


def keep_memory() -> bool:
    """Tell the C library to keep freed memory for the next allocation; whether it will.

    Activations and gradients of images are freed and allocated anew in every step. By default glibc gives blocks of
    tens of MB back to the system, which hands them out again page by page, each cleared first: a tenth to a third of
    the time of a sparse training step. Afterwards this process holds on to its peak (blocks below
    1 GiB; free memory beyond 2 GiB still goes back). Call it once, before training; the command line does. It concerns
    all of the process, so importing sparsekit does not. False, and nothing is changed, without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(option, value) == 1 for option, value in _KEPT.items()])
