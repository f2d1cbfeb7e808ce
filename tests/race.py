"""The tests of threaded kernels under ThreadSanitizer; ``make tsan`` builds the library for it and runs this.

First the tool itself: it must accept a sum that threads share rightly (``race.cpp``), and find one where they
all write to one place. Then tests whose results threads compute together. Machine code generated for a mask
is not instrumented: what it writes is seen by no tool.
"""

import ctypes
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
TESTS = ["test_csr_ops.py", "test_bsr_native.py", "test_bsr_conv_native.py", "test_jit.py", "test_planes.py"]
CHOSEN = "number_of_threads or cut_into_pieces or leak_between_calls"
FOUND = 66  # the exit code of a process in which ThreadSanitizer found something


def sanitized(*command: str) -> subprocess.CompletedProcess:
    """A command under ThreadSanitizer; memory that only uninstrumented code touches (torch, Python) is not watched."""
    runtime = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    options = f"exitcode={FOUND} ignore_noninstrumented_modules=1 report_signal_unsafe=0 history_size=4"
    environment = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "TSAN_OPTIONS": options, "SPARSEKIT_CUDA": "0"}
    # The tool places its shadow memory where a randomised address space may have put something else.
    return subprocess.run(["setarch", "-R", *command], env=environment, check=False, capture_output=True, text=True)


def sum_of(place: int) -> subprocess.CompletedProcess:
    """Four threads add up shares, each at its own place (1) or all at one (0)."""
    return sanitized(sys.executable, str(HERE / "race.py"), "--sum", str(place))


def main() -> int:
    library = HERE.parent / "build/race.so"
    if sys.argv[1:2] == ["--sum"]:
        torch.set_num_threads(4)
        found = ctypes.CDLL(library)
        found.sparsekit_sum.restype = ctypes.c_int64
        found.sparsekit_sum(ctypes.c_int64(4), ctypes.c_int64(int(sys.argv[2])))
        return 0
    library.parent.mkdir(exist_ok=True)
    torch_root = Path(torch.__file__).parent
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    subprocess.run(
        [*compiler, "-fsanitize=thread", "-g", "-O1", "-std=c++20", "-fPIC", "-shared", "-isystem",
         str(torch_root / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000", str(HERE / "race.cpp"), "-o",
         str(library), f"-L{torch_root / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{torch_root / 'lib'}"],
        check=True,
    )  # fmt: skip
    right, wrong = sum_of(1), sum_of(0)
    if right.returncode != 0 or wrong.returncode != FOUND or "data race" not in wrong.stderr:
        print(f"Expected a clean sum and a data race, got:\n{right.stderr}\n{wrong.stderr}")
        return 1
    print("ThreadSanitizer accepts work that threads share, and finds a planted race")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider"]  # reports pass
    done = sanitized(*pytest, "-k", CHOSEN, *(str(HERE / name) for name in TESTS))
    print(done.stdout[-2000:], done.stderr[:6000], sep="\n")
    if done.returncode == 0:
        cases = sanitized(sys.executable, str(HERE / "random_kernels.py"), "--here", "--cases", "300", "--threads", "4")
        print(cases.stdout[-2000:], cases.stderr[:6000], sep="\n")
        done = cases
    print("no data race" if done.returncode == 0 else f"failed ({done.returncode})")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
