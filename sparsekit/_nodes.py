"""Finds and loads the autograd nodes in C++; without them Python's do the same, slower.

Not part of the one native library, whose stable ABI has no nodes: they serve the torch and the Python they were
built with and would crash another, so a file is loaded by its name alone. SPARSEKIT_CXX_AUTOGRAD=0 switches it off.
"""

from __future__ import annotations

import os
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from . import _native

_FOLDER = Path(__file__).parent
_HOW = "reinstall: pip install --no-build-isolation --force-reinstall ."
_found: tuple[ModuleType | None, str] | None = None


def load() -> ModuleType | None:
    """The functions of ``csrc/torch/autograd.cpp``, or None with the reason in :func:`status`; looks once."""
    global _found
    if _found is None:
        _found = _try_load()
    return _found[0]


def status() -> dict:
    """``{"loaded": bool, "path": str | None, "reason": str | None}``."""
    module = load()
    if module is None:
        return {"loaded": False, "path": None, "reason": _found[1]}
    return {"loaded": True, "path": module.__file__, "reason": None}


def _try_load() -> tuple[ModuleType | None, str]:
    if os.environ.get("SPARSEKIT_CXX_AUTOGRAD") == "0":
        return None, "switched off by SPARSEKIT_CXX_AUTOGRAD=0"
    if not _native.load():
        return None, "they call the native library, which is missing"
    path = _FOLDER / f"_autograd.torch{torch.__version__}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        others = ", ".join(sorted(other.name for other in _FOLDER.glob("_autograd.torch*.so")))
        return None, f"Expected {path.name}, got {others or 'none'}; {_HOW}"
    try:
        loader = ExtensionFileLoader("sparsekit._autograd", str(path))
        module = module_from_spec(spec_from_file_location("sparsekit._autograd", path, loader=loader))
        loader.exec_module(module)
    except ImportError as error:
        return None, f"{path.name} does not load ({error}); {_HOW}"
    if module.schemas != _native.schema_digest():
        return None, f"{path.name} is from another version of the source; {_HOW}"
    try:
        module.connect(_native.status()["path"])
    except RuntimeError as error:
        return None, f"{path.name} does not fit the native library ({error}); {_HOW}"
    return module, ""
