"""The CPU kernels for aarch64 on another machine: cross-compiled, the micro-kernels also run by an emulator.

    make aarch64          # Debian: apt-get install g++-aarch64-linux-gnu qemu-user

The drivers around the micro-kernels need torch and are only compiled: no aarch64 torch is run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++20", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fno-trapping-math", "-Wno-psabi"]


def missing() -> str | None:
    """What is needed and not here, or None."""
    tools = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
    packages = [package for tool, package in tools.items() if not shutil.which(tool)]
    return f"apt-get install {' '.join(packages)}" if packages else None


def run_micro_kernels(folder: Path, level: str = "-O1") -> subprocess.CompletedProcess:
    """Compile the micro-kernels and their driver, run them emulated; prints ``ok``."""
    program = folder / "driver"
    sources = [ROOT / "csrc/cpu/micro.cpp", ROOT / "tests/aarch64_driver.cpp"]
    command = [COMPILER, *FLAGS, level, "-static", "-DSPARSEKIT_ISA_TABLE=portable", *map(str, sources), "-o", program]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run([EMULATOR, program], check=False, capture_output=True, text=True, timeout=120)


def compile_all(folder: Path) -> None:
    """Compile every source of the CPU half as a release would; generated headers are those of the last build."""
    import torch

    torch_headers = Path(torch.__file__).parent / "include"
    defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DSPARSEKIT_ISA_TABLE=portable"]
    includes = [f"-I{ROOT / 'build/generated'}", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_headers)]
    for source in [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "csrc/library.cpp"]:
        target = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *FLAGS, "-O3", *defines, *includes, "-c", str(source), "-o", str(target)], check=True)
        print(f"{source.relative_to(ROOT)} compiles for aarch64", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/aarch64")
    args = parser.parse_args()
    if need := missing():
        print(f"not tested: {need}")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    compile_all(args.out)
    done = run_micro_kernels(args.out, "-O3")
    print(f"micro-kernels on an emulated aarch64: {done.stdout.strip() or done.stderr.strip()}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
