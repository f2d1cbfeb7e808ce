"""Hardware and compiler facts; the only module that probes for them."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["cache_dir", "compilers", "cpu", "describe", "gpus"]

_TIMEOUT = 10.0  # seconds that a program asked for its version may take
# Instruction sets that kernels choose by, as Linux spells them; widest first.
_ISA = (
    "amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512vl", "avx512bw",
    "avx512dq", "avx512f", "avx_vnni", "avx2", "fma", "f16c", "avx", "sse4_2", "sve2", "sve", "bf16", "asimd",
)  # fmt: skip
_TIERS = {"avx512f": "avx512", "avx2": "avx2", "avx": "avx", "sve": "sve", "asimd": "neon"}


def cpu() -> dict[str, Any]:
    """The processor: ``{"model", "arch", "cores", "isa", "caches"}``.

    ``cores`` counts the logical ones this process may use, ``isa`` lists instruction sets, ``caches``
    maps level to size as the kernel prints it (``{"L1d": "48K"}``). What cannot be found out is empty.
    """
    model, isa, _ = _cpu_identity()
    arch = platform.machine()
    return {"model": model, "arch": arch, "cores": _cores(), "isa": list(isa), "caches": _caches()}


def gpus() -> list[dict[str, Any]]:
    """The GPUs: ``{"name", "capability", "memory_bytes", "multiprocessors", "usable"}`` each.

    Where torch has no CUDA but the NVIDIA driver is there, its cards are listed with ``usable`` False.
    """
    if torch.cuda.is_available():
        return [_torch_gpu(index) for index in range(torch.cuda.device_count())]
    return _driver_gpus()


def describe(device: torch.device | str | int | None = None) -> str:
    """A short stable key of a device for caches and results: ``"cpu-avx512-AMD-EPYC-f25m17-2c"``, ``"NVIDIA-H200"``.

    An x86 key has the family and model of the processor (f25m17 is a Zen 4): under a hypervisor the name alone does
    not tell one generation from the next, and times of one mislead on the other.
    Raises RuntimeError for a CUDA device where torch has none.
    """
    device = torch.device("cpu" if device is None else device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"{device}: Expected a GPU that torch can use, got none; see sparsekit info")
        return _slug(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    model, isa, generation = _cpu_identity()
    tier = next((tier for flag, tier in _TIERS.items() if flag in isa), platform.machine().lower())
    return "-".join(filter(None, ("cpu", tier, _slug(model), generation, f"{_cores()}c")))


def compilers() -> dict[str, dict[str, str] | None]:
    """``{"g++": {"path", "version"} or None}`` for gcc, g++, clang, clang++ and nvcc."""
    return {name: _compiler(name) for name in ("gcc", "g++", "clang", "clang++", "nvcc")}


def settle() -> None:
    """Wait for the GPU where one is in use: a clock read earlier has timed launches only."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def cache_dir() -> Path:
    """Where measured plans are kept: ``SPARSEKIT_CACHE``, else ``~/.cache/sparsekit``; not created here."""
    if given := os.environ.get("SPARSEKIT_CACHE"):
        return Path(given).expanduser()
    try:
        return Path.home() / ".cache" / "sparsekit"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"sparsekit-{os.getuid()}"


@functools.cache
def _cpu_identity() -> tuple[str, tuple[str, ...], str]:
    """The model's name, its instruction sets, and on x86 its generation, ``"f25m17"``; else ``""``."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    if not flags and platform.machine().lower() in ("arm64", "aarch64"):
        flags = {"asimd"}  # part of the architecture
    model = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    generation = "f{cpu family}m{model}".format_map(fields) if {"cpu family", "model"} <= fields.keys() else ""
    return model, tuple(flag for flag in _ISA if flag in flags), generation


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _caches() -> dict[str, str]:
    found = {}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((entry / part).read_text().strip() for part in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def _torch_gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "usable": True,
    }


def _driver_gpus() -> list[dict[str, Any]]:
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    query = "--query-gpu=name,compute_cap,memory.total"
    found = []
    for line in _output(program, query, "--format=csv,noheader,nounits").splitlines():
        name, *facts = (part.strip() for part in line.split(","))
        if len(facts) == 2 and facts[1].isdigit():  # an error message has other fields
            memory = int(facts[1]) * 2**20
            known = {"name": name, "capability": facts[0], "memory_bytes": memory}
            found.append(known | {"multiprocessors": None, "usable": False})
    return found


def _compiler(name: str) -> dict[str, str] | None:
    path = os.environ.get("PATH", os.defpath)
    if name == "nvcc":  # usually off the PATH
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
        path = os.pathsep.join((path, os.path.join(home, "bin")))
    if (program := shutil.which(name, path=path)) is None:
        return None
    text = _output(program, "--version")
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text) if name == "nvcc" else None
    # "gcc (Debian 14.2.0-19) 14.2.0": the last on the line; "clang version 19.1.7 (3)": after the word
    match = match or re.search(r"version (\d+(?:\.\d+)+)", text)
    numbers = [match[1]] if match else re.findall(r"\d+(?:\.\d+)+", text.partition("\n")[0])
    return {"path": program, "version": numbers[-1] if numbers else "unknown"}


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _slug(name: str) -> str:
    """``"Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz"`` as ``"Intel-Xeon-Gold-6338"``."""
    name = re.sub(r"\((R|TM|C)\)|\bCPU\b|\bProcessor\b|\b\d+-Core\b|@.*", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._+]+", "-", name).strip("-") or "unknown"
