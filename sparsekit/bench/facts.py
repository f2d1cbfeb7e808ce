"""Where rows were measured: what a reader needs to judge or repeat them."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native, device
from .runtimes import version

__all__ = ["environment", "pinned"]

_LIBRARIES = ("numpy", "scipy", "triton", "onnxruntime", "openvino", "deepsparse", "cupy-cuda12x")


def environment(where: str = "cpu") -> dict[str, Any]:
    """Device, versions and commit, JSON-ready; ``dirty`` where files differ from the commit."""
    cpu = device.cpu()
    build = _native.status()["build"] or {}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device.describe(where),
        "cpu": cpu["model"],
        "caches": cpu["caches"],  # tells generations apart that go by one name
        "isa": build.get("active_isa"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsekit": __version__,
        "versions": {name: found for name in _LIBRARIES if (found := version(name))},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
    }


@contextmanager
def pinned(threads: int | None) -> Iterator[int]:
    """Within, torch uses so many threads, on as many processors; gives how many. None changes nothing.

    Raises: ValueError below one.
    """
    if threads is None:
        yield torch.get_num_threads()
        return
    if threads < 1:
        raise ValueError(f"Expected --threads of at least 1, got {threads}")
    before, mine = torch.get_num_threads(), _processors()
    torch.set_num_threads(threads)
    try:
        if mine:
            os.sched_setaffinity(0, sorted(mine)[-threads:])  # the system's own work prefers the first
        yield threads
    finally:
        torch.set_num_threads(before)
        if mine:
            os.sched_setaffinity(0, mine)


def _processors() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
