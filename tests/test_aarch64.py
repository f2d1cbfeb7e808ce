"""The micro-kernels compile for aarch64 and are right there, where a cross compiler and an emulator are at hand."""

import aarch64
import pytest


@pytest.mark.skipif(aarch64.missing() is not None, reason=f"needs {aarch64.missing()}")
def test_micro_kernels_on_an_emulated_aarch64(tmp_path):
    done = aarch64.run_micro_kernels(tmp_path)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr
