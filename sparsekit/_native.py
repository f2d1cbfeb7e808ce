"""Finds and loads the native library; the package works without it, slower. SPARSEKIT_NATIVE=0 switches it off."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from .schemas import SCHEMAS

_PATH = Path(__file__).with_name("_C.abi3.so")
_HOW = "reinstall with a C++20 compiler: apt-get install g++; pip install --no-build-isolation --force-reinstall ."
_status: dict | None = None


def schema_digest() -> str:
    """Fingerprint of the operator table; the library must have been built from the same one."""
    return hashlib.sha256(json.dumps(SCHEMAS, sort_keys=True).encode()).hexdigest()[:16]


def load() -> bool:
    """Load the library once; False when there is none, with the reason in :func:`status`."""
    global _status
    if _status is None:
        _status = _try_load()
    return _status["loaded"]


def status() -> dict:
    """``{"loaded": bool, "path": str | None, "reason": str | None, "build": dict | None}``."""
    load()
    return dict(_status)


def stamp() -> str:
    """Size and date of the library file: times measured with another build of it are worth nothing."""
    if not load():
        return "none"
    found = _PATH.stat()
    return f"{found.st_size}-{found.st_mtime_ns}"


def lacks_cpu() -> str | None:
    """Why there are no CPU kernels, or None when there are."""
    return None if status()["loaded"] else "the native library is missing (see sparsekit info)"


def lacks_cuda() -> str | None:
    """Why the library has no CUDA kernels, or None when it has."""
    if missing := lacks_cpu():
        return missing
    return None if status()["build"].get("cuda") else "the native library was built without nvcc"


def _try_load() -> dict:
    missing = {"loaded": False, "path": None, "build": None}
    if os.environ.get("SPARSEKIT_NATIVE") == "0":
        return missing | {"reason": "the native library is switched off by SPARSEKIT_NATIVE=0"}
    if not _PATH.exists():
        return missing | {"reason": f"the native library was not built; {_HOW}"}
    if _PATH.with_suffix(".json").exists():
        try:
            built = json.loads(_PATH.with_suffix(".json").read_text())["schemas"]
        except (OSError, ValueError, KeyError, TypeError):
            built = None
        if built != schema_digest():
            return missing | {"reason": f"the native library is from another version of the source; {_HOW}"}
    try:
        torch.ops.load_library(_PATH)
        build = json.loads(torch.ops.sparsekit.build_info())
    except (OSError, RuntimeError) as error:
        return missing | {"reason": f"the native library does not load ({error}); {_HOW}"}
    return {"loaded": True, "path": str(_PATH), "reason": None, "build": build}
