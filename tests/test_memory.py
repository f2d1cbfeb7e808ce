import ctypes
import platform
import subprocess
import sys

import pytest

import sparsekit as sk

# 40 MB twice: blocks so large glibc always fetches anew by itself.
_STEPS = """
import resource, sys
import torch
import sparsekit as sk
if sys.argv[1] == "keep":
    assert sk.keep_memory()
def step():
    kept = [torch.ones(10 << 20) for _ in range(2)]
    return float(kept[0][0])
for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _STEPS, how], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


def test_kept_memory_is_not_fetched_again():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    assert 10 * _faults("keep") < _faults("default")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(ctypes, "CDLL", None)  # calling it would be a TypeError
    assert sk.keep_memory() is False
