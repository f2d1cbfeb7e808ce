"""Builds the CUDA kernels for the CPU, against ``csrc/emulate``, and runs their cases in processes of their own.

The cases of ``csrc/cuda/<name>.cu`` are in ``tests/emulated_<name>.py``: numpy and ctypes only, no torch, so that they
also start under a sanitizer. Such a module holds

``CASES``     ``{name: function(kernels)}``, functions that raise AssertionError;
``SMALLEST``  the names of the cases for ThreadSanitizer, some 20 times slower;
``LONG``      further cases for ``python tests/emulated.py long`` (``make emulate``);
``SOURCES``   the names of the .cu files that make up its library, if more than ``<name>`` itself.

``kernels`` is the loaded library (:class:`Kernels`). Run as a script, this file is the worker:
``python tests/emulated.py MODE NAME CASE,CASE SEED,SEED``, with MODE plain, asan (address and undefined behaviour) or
tsan (data races between threads of one block and between blocks).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/emulated"
COMPILER = shutil.which("g++")

COMMON = ["-std=c++20", "-fPIC", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
COMMON += ["-fno-gnu-unique"]  # two libraries in one process must not share their threadIdx
MODES = {
    "plain": (["-O2"], [], []),
    "asan": (
        ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
        ["-DEMU_ASAN"],
        ["libasan.so", "libubsan.so", "libstdc++.so"],
    ),
    "tsan": (["-O1", "-fsanitize=thread"], ["-DEMU_TSAN"], ["libtsan.so", "libstdc++.so"]),
}
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}


def names() -> list[str]:
    """The kernels that have cases."""
    return sorted(path.stem.removeprefix("emulated_") for path in ROOT.glob("tests/emulated_*.py"))


def sources(name: str) -> list[str]:
    """The .cu files of a kernel's library; launch.cu, the error texts, belongs to all."""
    return getattr(module(name), "SOURCES", [name])


# ---- build -------------------------------------------------------------------------------------------


@functools.cache
def _headers() -> bytes:
    found = [*ROOT.glob("csrc/cuda/*.*h"), *ROOT.glob("csrc/emulate/*.h"), *ROOT.glob("csrc/cuda/*.h")]
    version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True).stdout
    return version + b"".join(path.read_bytes() for path in sorted(set(found)))


def _produce(kind: str, stem: str, command: list[str], content: bytes) -> Path:
    """The output of ``command``, made once per content and command line; older ones of the stem are removed."""
    digest = hashlib.sha256(repr(command).encode() + content).hexdigest()[:20]
    target = BUILD / f"{stem}-{digest}.{kind}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run([*command, "-o", str(part)], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        for old in BUILD.glob(f"{stem}-{'[0-9a-f]' * 20}.{kind}"):
            old.unlink(missing_ok=True)
        os.replace(part, target)
    return target


def build(mode: str, sources: list[Path], name: str, options: Sequence[str] = ()) -> Path:
    """A shared library of ``sources`` and the emulator, which is compiled with ``options``."""
    flags, emulator_flags, _ = MODES[mode]

    def compile_one(source: Path) -> Path:
        own = ["-O2", *emulator_flags, *options] if source.suffix == ".cpp" else [*flags, "-DSPARSEKIT_EMULATE"]
        command = [COMPILER, *COMMON, *own, "-x", "c++", "-c", str(source)]
        return _produce("o", f"{mode}-{source.stem}{''.join(options)}", command, _headers() + source.read_bytes())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sorted(ROOT.glob("csrc/emulate/*.cpp")), *sources]))
    command = [COMPILER, "-shared", *flags, *map(str, objects)]
    return _produce("so", f"{mode}-lib-{name}", command, b"")


def build_kernel(mode: str, name: str) -> Path:
    """The library of one kernel's launchers."""
    return build(mode, [ROOT / f"csrc/cuda/{source}.cu" for source in ["launch", *sources(name)]], name)


# ---- call --------------------------------------------------------------------------------------------


class Kernels:
    """A loaded library: ``kernels("sparsekit_cuda_x", array, 3, ...)`` raises with the sentence of a failed launcher.

    numpy arrays become pointers, None a null pointer, ints 64-bit integers (see :func:`int32` for others).
    """

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.sparsekit_emulate_seed.argtypes = [ctypes.c_uint64]
        self.library.sparsekit_cuda_error.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        self.library.sparsekit_emulate_seed(seed)

    def error(self) -> str:
        return self.library.sparsekit_cuda_error().decode()

    def __call__(self, name: str, *arguments) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_int
        if function(*map(_argument, arguments)):
            raise RuntimeError(self.error())

    def size(self, name: str, *arguments) -> int:
        """The answer of a function that returns int64_t."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return function(*map(_argument, arguments))


def int32(value: int) -> ctypes.c_int32:
    return ctypes.c_int32(value)


def _argument(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_int64(value) if isinstance(value, int) else value


def sparse_memory(elements: int, dtype) -> np.ndarray:
    """An array of zeros that takes memory only where it is touched: strides beyond 2**31 elements cost nothing."""
    noreserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    return np.frombuffer(mmap.mmap(-1, elements * np.dtype(dtype).itemsize, flags=flags), dtype=dtype)


def nan(shape, dtype=np.float32) -> np.ndarray:
    """An output nobody has written."""
    return np.full(shape, np.nan, dtype)


def relative_error(got: np.ndarray, reference: np.ndarray) -> float:
    """``|got - reference| / |reference|``; NaN where an output was not written."""
    scale = float(np.linalg.norm(reference)) or 1.0
    return float(np.linalg.norm(got.astype(np.float64) - reference)) / scale


# ---- processes ---------------------------------------------------------------------------------------


def environment(mode: str) -> dict[str, str]:
    """What a Python process needs to load a library of ``mode``."""

    def runtime(name):
        where = subprocess.run([COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        return where.stdout.strip()

    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime(name) for name in MODES[mode][2]),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@functools.cache
def _fixed_addresses() -> list[str]:
    """The command that keeps ThreadSanitizer's shadow memory where it expects it, if it may be used here."""
    command = ["setarch", "--addr-no-randomize"]
    works = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else []


def python(mode: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs a Python script that loads a library of ``mode``."""
    command = [sys.executable, *arguments]
    if mode == "tsan":
        command = [*_fixed_addresses(), *command]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout, env=environment(mode), cwd=ROOT
    )


def run(mode: str, name: str, cases: list[str], seeds: list[int], timeout: float = 600) -> None:
    """Runs the cases of a kernel; raises AssertionError with what the worker printed."""
    build_kernel(mode, name)
    done = python(mode, __file__, mode, name, ",".join(cases), ",".join(map(str, seeds)), timeout=timeout)
    assert done.returncode == 0, f"{mode} {name}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def module(name: str):
    """``tests/emulated_<name>.py``."""
    path = Path(__file__).with_name(f"emulated_{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def work(mode: str, name: str, cases: str, seeds: str) -> None:
    kernels, loaded = Kernels(build_kernel(mode, name)), module(name)
    for case in cases.split(","):
        for seed in seeds.split(","):
            print(f"{name} {case}, seed {seed}", flush=True)
            kernels.seed(int(seed))
            start = time.perf_counter()
            {**loaded.CASES, **loaded.LONG}[case](kernels)
            print(f"    {time.perf_counter() - start:.2f} s", flush=True)


def long_run() -> None:
    """Every case of every kernel with many seeds, in all modes."""
    for name in names():
        loaded = module(name)
        everything = [*loaded.CASES, *loaded.LONG]
        for mode, cases, seeds in (
            ("plain", everything, range(20)),
            ("asan", everything, range(10)),
            ("tsan", loaded.SMALLEST, range(10)),
        ):
            print(f"{name}: {mode}, {len(cases)} cases, {len(seeds)} seeds", flush=True)
            run(mode, name, cases, list(seeds), timeout=7200)


if __name__ == "__main__":
    if sys.argv[1:] == ["long"]:
        long_run()
    else:
        work(*sys.argv[1:])
