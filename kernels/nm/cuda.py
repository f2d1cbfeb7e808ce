"""2:4 products on sparse tensor cores, through torch's binding of cuSPARSELt.

cuSPARSELt multiplies a compressed weight: the survivors, and behind them metadata that says where they
stand. The metadata follows from ``choice`` alone, so it is made once for each ``choice`` and one copy of
the values in front of it makes a compressed weight. Nothing made from values outlives a call, so no update
of them can be missed, whoever writes it and by whatever way.

That the values come first and in order is not documented by cuSPARSELt: it is looked at for each
``choice``, and where it does not hold the weight is compressed anew for every product.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import tuning
from . import layout, reference

DTYPES = (torch.float16, torch.bfloat16)
"""What sparse tensor cores multiply here; other dtypes run through the naive twins."""

# torch sizes the compressed weight by a formula that holds for whole tiles of metadata only; smaller ones need
# more room than it gives (https://github.com/NVIDIA/CUDALibrarySamples/issues/95). Such layers are slow anyway.
_SIDE = 128
_BATCH = 8  # rows of the other operand come in multiples of this (torch/sparse/semi_structured.py)
_ALIGNMENT = 16  # bytes
# Which of its kernels cuSPARSELt runs: 0 is its default. How many there are depends on version, device and
# dtype, and torch does not say; one that does not exist raises, so tuning never chooses it.
_ALGORITHMS = tuple({"algorithm": number} for number in range(64))


def unfit(out: int, inputs: int) -> str | None:
    """Why cuSPARSELt multiplies no weight ``[out, inputs]``, or None."""
    if out % _SIDE or inputs % _SIDE or not out or not inputs:
        return f"a weight of {out}x{inputs}, no multiples of {_SIDE}"
    return None


@functools.cache
def absent(where: torch.device) -> str | None:
    """Why there is no cuSPARSELt on a CUDA device, or None."""
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    if torch.cuda.get_device_capability(where) < (8, 0):
        return "a GPU without sparse tensor cores"
    return None


def nm_linear(x: Tensor, values: Tensor, choice: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias``."""
    if not _runs(x, values):
        return reference.nm_linear(x, values, choice, bias)
    return _product(x, _compressed(values, choice), choice, bias)


def nm_linear_t(dy: Tensor, values: Tensor, choice: Tensor, t_choice: Tensor | None) -> Tensor:
    """``dy W``; a dense product unless the transposed weight is 2:4 as well."""
    dense = layout.scatter(values, choice)
    if t_choice is None or not _runs(dy, values):
        return dy @ dense
    return _product(dy, _compressed(layout.gather(dense.t(), t_choice), t_choice), t_choice, None)


KERNELS = {"nm_linear": nm_linear, "nm_linear_t": nm_linear_t}
"""The operators that have a CUDA kernel; the sampled product is the naive twin's."""


def _runs(x: Tensor, values: Tensor) -> bool:
    fits = unfit(values.shape[0], 2 * values.shape[1]) is None and absent(values.device) is None
    return fits and values.dtype in DTYPES and x.shape[0] > 0


def _product(x: Tensor, compressed: Tensor, choice: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias`` for ``x [N, in]`` and a compressed W; raises RuntimeError on other shapes or dtypes."""
    (n, inputs), (out, groups) = x.shape, choice.shape
    if inputs != 4 * groups or x.dtype != compressed.dtype:  # cuSPARSELt would read what is not there
        raise RuntimeError(f"Expected x of {compressed.dtype} [N, {4 * groups}], got {x.dtype} {list(x.shape)}")
    if bias is not None:
        if bias.shape != (out,) or bias.dtype != x.dtype:
            raise RuntimeError(f"Expected a bias of {x.dtype} [{out}], got {bias.dtype} {list(bias.shape)}")
        bias = _aligned(bias)
    x = F.pad(x, (0, 0, 0, -n % _BATCH)) if n % _BATCH else x
    x = _aligned(x)

    def launch(config: dict) -> Tensor:
        return torch._cslt_sparse_mm(compressed, x.t(), bias=bias, transpose_result=True, alg_id=config["algorithm"])

    bucket = 1 << (n - 1).bit_length()
    key = (torch.backends.cusparselt.version(), out, inputs, bucket, x.dtype, bias is not None)
    return launch(tuning.choose("nm_linear", key, _ALGORITHMS, launch, x.device))[:n]


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


class _Metadata(NamedTuple):
    """What follows the values in a compressed weight of ``shape``; None where values do not come first."""

    origin: tuple
    storage: torch.UntypedStorage  # held, so that no other tensor is given the address in ``origin``
    shape: torch.Size
    tail: Tensor | None


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""``{choice: {dtype: metadata}}`` for as long as ``choice`` lives, an eighth of the bytes of its values."""
_captured: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""``{choice: [metadata]}`` that CUDA graphs read when they are replayed."""


def _compressed(values: Tensor, choice: Tensor) -> Tensor:
    metadata = _metadata(choice, values.dtype)
    if metadata is None or metadata.tail is None:
        return torch._cslt_compress(layout.scatter(values, choice))
    return torch.cat([values.flatten(), metadata.tail]).view(metadata.shape)


def _metadata(choice: Tensor, dtype: torch.dtype) -> _Metadata | None:
    """The metadata of a ``choice``, or None where none can be kept or made now."""
    if choice.is_inference():
        return None  # a write to it would leave no trace
    origin = (choice.data_ptr(), choice._version, choice.shape, choice.stride())
    capturing = _capturing()
    found = _known.get(choice, {}).get(dtype)
    if found is None or found.origin != origin:
        if capturing:
            return None  # making it waits for the device
        found = _learn(choice, dtype, origin)
        _known.setdefault(choice, {})[dtype] = found
    if capturing:
        _captured.setdefault(choice, []).append(found)
    return found


def _learn(choice: Tensor, dtype: torch.dtype, origin: tuple) -> _Metadata:
    """Compress numbers in order, and see whether they come first and in order; waits for the device."""
    out, groups = choice.shape
    count = out * groups * 2
    numbers = (torch.arange(count, device=choice.device) % 127 + 1).to(dtype)  # exact in every dtype, never 0
    compressed = torch._cslt_compress(layout.scatter(numbers, choice))
    flat = compressed.flatten()
    tail = flat[count:].clone()
    in_order = torch.equal(flat[:count], numbers)
    return _Metadata(origin, choice.untyped_storage(), compressed.shape, tail if in_order else None)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
