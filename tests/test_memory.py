import ctypes
import platform
import subprocess
import sys

import pytest

import sparsekit as sk
from sparsekit import __main__

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


@pytest.mark.parametrize(("command", "times"), [(["reproduce"], 1), (["bench", "ops", "--list"], 1), (["info"], 0)])
def test_commands_that_train_or_time_ask_for_it(monkeypatch, capsys, command, times):
    asked = []
    monkeypatch.setattr(__main__, "keep_memory", lambda: asked.append(True))
    assert __main__.main(command) == 0 and len(asked) == times
    assert capsys.readouterr().out
