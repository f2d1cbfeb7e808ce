"""The CUDA half of the native library on a machine without a GPU: it loads, registers, and says what is missing."""

import ctypes

import pytest
import torch

from sparsekit import _native
from sparsekit import format as formats

BUILT = _native.lacks_cuda() is None
KERNELS = [
    "csr_linear", "csr_linear_t", "csr_sddmm", "csr_linear_backward", "bitmap_linear",
    "panel_linear", "panel_linear_t", "panel_sddmm", "panel_conv2d", "panel_conv2d_t", "panel_conv2d_sddmm",
]  # fmt: skip


@pytest.mark.skipif(not BUILT, reason="the native library was built without nvcc")
@pytest.mark.parametrize("name", KERNELS)
def test_operators_have_cuda_kernels(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekit::{name}", "CUDA")


@pytest.mark.skipif(not BUILT or torch.cuda.is_available(), reason="needs CUDA kernels and no GPU")
def test_without_a_driver_a_launch_is_a_sentence():
    library = ctypes.CDLL(_native.status()["path"])
    library.sparsekit_cuda_error.restype = ctypes.c_char_p
    memory = ctypes.create_string_buffer(1 << 16)
    sizes = [ctypes.c_int64(n) for n in (4, 8, 8, 16)]  # tokens, features, rows, survivors
    x, y = (memory, ctypes.c_int64(8)), (memory, ctypes.c_int64(8))
    status = library.sparsekit_cuda_csr_linear(*x, memory, None, memory, memory, None, *y, *sizes, 0, memory, None)
    text = library.sparsekit_cuda_error().decode()
    assert status != 0
    assert "csr" in text and "[4, 8]" in text and "CUDA error" in text


@pytest.mark.skipif(not BUILT, reason="the native library was built without nvcc")
def test_launchers_refuse_with_a_sentence():
    library = ctypes.CDLL(_native.status()["path"])
    library.sparsekit_cuda_error.restype = ctypes.c_char_p
    sizes = [ctypes.c_int64(n) for n in (4, 8, 8, 16)]
    half = 2
    assert library.sparsekit_cuda_csr_linear(
        None, ctypes.c_int64(8), None, None, None, None, None, None, ctypes.c_int64(8), *sizes, half, None, None
    )
    assert "Expected float32 or float64, got float16" in library.sparsekit_cuda_error().decode()


def test_formats_say_why_they_have_no_kernel(monkeypatch):
    where, mask = torch.device("cuda"), torch.ones(16, 16, dtype=torch.bool)
    monkeypatch.setattr(_native, "status", lambda: {"loaded": True, "build": {"cuda": False}})
    for name in ("csr", "panel", "bitmap"):
        assert formats.get(name).absent(where, mask) == "the native library was built without nvcc"
    monkeypatch.setattr(_native, "status", lambda: {"loaded": True, "build": {"cuda": True}})
    for name in ("csr", "panel", "bitmap"):
        assert formats.get(name).absent(where, mask) is None
    assert "no csr convolution kernel" in formats.get("csr").absent(where, torch.ones(4, 4, 3, 3, dtype=torch.bool))
    monkeypatch.setattr(_native, "status", lambda: {"loaded": False, "build": None})
    for name in ("csr", "panel", "bitmap"):
        assert "the native library is missing" in formats.get(name).absent(where, mask)
