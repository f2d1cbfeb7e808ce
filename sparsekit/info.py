"""What this installation can do here, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from typing import Any

import torch

from . import data, device
from ._version import __version__

__all__ = ["collect", "render"]

# For a source tree that was never installed; an installed one is asked for its own metadata.
_EXTRAS = {"demo": ["matplotlib", "scikit-learn"]}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+).*;.*\bextra\s*==\s*['\"]([^'\"]+)['\"]")


def collect() -> dict[str, Any]:
    """Every fact of the report, JSON-ready; nothing is measured and nothing is written."""
    from . import _native, _nodes, format

    return {
        "sparsekit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
        },
        "packages": {name: _version(name) for name in ("numpy", "safetensors", "triton")},
        "native": _native.status(),
        "autograd_nodes": _nodes.status(),
        "formats": list(format.names()),
        "cpu": device.cpu(),
        "gpus": device.gpus(),
        "device_key": device.describe(),
        "compilers": device.compilers(),
        "extras": {extra: {name: _version(name) for name in names} for extra, names in _extras().items()},
        "data": _data(),
        "plan_cache": str(device.cache_dir()),
    }


def render(facts: dict[str, Any]) -> str:
    """The report of :func:`collect` as text; every line about a missing thing says how to get it."""
    rows = [
        ("sparsekit", f"{facts['sparsekit']}, Python {facts['python']}, {facts['platform']}"),
        ("torch", _torch(facts["torch"])),
        *((name, _package(name, version)) for name, version in facts["packages"].items()),
        ("native library", _native_line(facts["native"])),
        ("autograd nodes", _nodes_line(facts["autograd_nodes"])),
        ("formats", ", ".join(facts["formats"])),
        ("cpu", _cpu(facts["cpu"], facts["device_key"])),
        *_gpus(facts["gpus"], facts["torch"]["cuda"]),
        *_compilers(facts["compilers"]),
        *((f"extra [{extra}]", _extra(extra, found)) for extra, found in facts["extras"].items()),
        *_data_lines(facts["data"]),
        ("plan cache", f"{facts['plan_cache']} (set SPARSEKIT_CACHE to move it)"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    try:
        requirements = importlib.metadata.requires("sparsekit") or []
    except importlib.metadata.PackageNotFoundError:
        return _EXTRAS
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        if match := _REQUIREMENT.match(requirement):
            extras.setdefault(match[2], []).append(match[1])
    return extras or _EXTRAS


def _data() -> dict[str, Any]:
    root = data.data_dir()
    found: dict[str, dict[str, str | None]] = {}
    for name in data.NAMES:
        if name == "digits":
            version = _version("scikit-learn")
            why = None if version else "needs scikit-learn: pip install 'sparsekit[demo]'"
            found[name] = {"where": f"scikit-learn {version}" if version else None, "missing": why}
            continue
        try:
            files = data.find(name)
            folder = next(iter(files.values())).parent
            found[name] = {"where": f"{folder} ({len(files)} files)", "missing": None}
        except (OSError, ValueError) as error:
            found[name] = {"where": None, "missing": str(error).removeprefix(f"{name}: ")}
    return {"directory": None if root is None else str(root), "sets": found}


def _torch(torch_: dict[str, Any]) -> str:
    cuda = f"CUDA {torch_['cuda']}" if torch_["cuda"] else "CPU only"
    return f"{torch_['version']} ({cuda}), {torch_['threads']} threads, CPU capability {torch_['capability']}"


def _package(name: str, version: str | None) -> str:
    if version:
        return version
    if name == "triton":
        return "missing; only GPU kernels use it, and torch built for CUDA brings it (or: pip install triton)"
    return f"missing; pip install {name}"


def _native_line(native: dict[str, Any]) -> str:
    if not native["loaded"]:
        return f"missing: {native['reason']}"
    build = {
        key: "/".join(map(str, value)) if isinstance(value, list) else value
        for key, value in (native.get("build") or {}).items()
    }
    return ", ".join([native["path"], *(f"{key} {value}" for key, value in build.items())])


def _nodes_line(nodes: dict[str, Any]) -> str:
    return nodes["path"] if nodes["loaded"] else f"Python's, slower on small layers: {nodes['reason']}"


def _cpu(cpu: dict[str, Any], key: str) -> str:
    caches = ", ".join(f"{level} {size}" for level, size in cpu["caches"].items())
    isa = " ".join(cpu["isa"]) or cpu["arch"]
    return f"{cpu['model']}, {cpu['cores']} cores" + (f", {caches}" if caches else "") + f"; {isa}; key {key}"


def _gpus(gpus: list[dict[str, Any]], cuda: str | None) -> list[tuple[str, str]]:
    if not gpus:
        return [("gpu", "none found; everything runs on the CPU")]
    rows = []
    for gpu in gpus:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        text = f"{gpu['name']}, {memory}, compute capability {gpu['capability']}"
        if not gpu["usable"]:
            why = "torch cannot use it (check the driver)" if cuda else "this torch is a CPU build"
            text += f"; unused, {why}: install torch for CUDA, see https://pytorch.org/get-started/locally"
        rows.append(("gpu", text))
    return rows


def _compilers(compilers: dict[str, dict[str, str] | None]) -> list[tuple[str, str]]:
    rows = [(name, f"{found['version']} ({found['path']})") for name, found in compilers.items() if found]
    if not (compilers.get("g++") or compilers.get("clang++")):
        rows.append(("c++ compiler", "missing; the native library is built with one: apt-get install g++"))
    if not compilers.get("nvcc"):
        rows.append(("nvcc", "missing; only CUDA kernels are built with it: install the CUDA toolkit"))
    return rows


def _extra(extra: str, found: dict[str, str | None]) -> str:
    text = ", ".join(f"{name} {version}" if version else f"{name} missing" for name, version in found.items())
    return text if all(found.values()) else f"{text}; pip install 'sparsekit[{extra}]'"


def _data_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    directory = found["directory"] or "none; set SPARSEKIT_DATA or pass --data-dir"
    rows = [("data directory", directory)]
    for name, entry in found["sets"].items():
        rows.append((f"  {name}", entry["where"] or f"missing: {entry['missing']}"))
    return rows
