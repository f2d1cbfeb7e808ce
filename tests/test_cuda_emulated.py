"""Every CUDA kernel, executed on the CPU: see emulated.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from emulated import COMPILER, ROOT, module, names, run, sources  # noqa: E402

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def test_every_kernel_has_cases():
    covered = {source for name in names() for source in sources(name)}
    assert covered | {"launch"} == {path.stem for path in ROOT.glob("csrc/cuda/*.cu")}


@pytest.mark.parametrize("name", names())
def test_against_the_oracle(name):
    run("plain", name, list(module(name).CASES), seeds=[0, 1, 2])


@pytest.mark.parametrize("name", names())
def test_memory_and_undefined_behaviour(name):
    run("asan", name, list(module(name).CASES), seeds=[3, 4])


@pytest.mark.parametrize("name", names())
def test_data_races(name):
    run("tsan", name, module(name).SMALLEST, seeds=[5])
