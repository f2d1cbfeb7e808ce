"""From masks to CSR index tensors and back; all of it plain torch, on any device."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor


def columns(shape: torch.Size) -> int:
    """Columns of a weight viewed as ``[out, in * kernel]``."""
    return int(torch.Size(shape[1:]).numel())


def csr(mask: Tensor) -> dict[str, Tensor]:
    """``crow_indices [out + 1]`` and ``col_indices [nnz]`` (int32) of a bool mask ``[out, ...]``."""
    flat = mask.flatten(1)
    row, col = (part.contiguous() for part in flat.nonzero().unbind(1))
    ends = torch.arange(flat.shape[0] + 1, device=mask.device)
    # The rows ascend, so where each begins is a search: adding up bools takes twice as long as all the rest.
    return {"crow_indices": torch.searchsorted(row, ends).to(torch.int32), "col_indices": col.to(torch.int32)}


def transposed(crow_indices: Tensor, col_indices: Tensor, cols: int) -> dict[str, Tensor]:
    """The same survivors column by column; rows ascend within a column because the sort is stable."""
    order = col_indices.argsort(stable=True)
    counts = torch.bincount(col_indices.long(), minlength=cols)
    return {
        "t_crow": _offsets(counts),
        "t_row": rows(crow_indices, col_indices.numel())[order].to(torch.int32),
        "t_perm": order.to(torch.int32),
    }


def code_key(crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """int64 ``[2]``: a hash of the index, under which machine code made for the mask is kept."""
    digest = blake2b(digest_size=16)
    for tensor in (crow_indices, col_indices):
        digest.update(tensor.contiguous().numpy())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)


def rows(crow_indices: Tensor, nnz: int) -> Tensor:
    """The row of every survivor, int64 ``[nnz]``."""
    return torch.repeat_interleave(crow_indices.diff().long(), output_size=nnz)


def mask(crow_indices: Tensor, col_indices: Tensor, shape: torch.Size) -> Tensor:
    """The bool mask of ``shape``."""
    flat = torch.zeros(shape[0], columns(shape), dtype=torch.bool, device=col_indices.device)
    flat[rows(crow_indices, col_indices.numel()), col_indices.long()] = True
    return flat.view(shape)


def gather(weight: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """The survivors of a dense weight, ``[nnz]``."""
    return weight.flatten(1)[rows(crow_indices, col_indices.numel()), col_indices.long()]


def scatter(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: torch.Size) -> Tensor:
    """The dense weight of ``shape``, 0 where pruned."""
    cols = columns(shape)
    flat = rows(crow_indices, values.numel()) * cols + col_indices.long()
    return values.new_zeros(shape[0] * cols).scatter(0, flat, values).view(shape)


def _offsets(counts: Tensor) -> Tensor:
    zero = counts.new_zeros(1)
    return torch.cat([zero, counts.cumsum(0)]).to(torch.int32)


def check(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: torch.Size) -> str | None:
    """Why the parts are no CSR weight of ``shape`` (kernels read through these indices unchecked), or None."""
    nnz, cols = col_indices.numel(), columns(shape)
    if crow_indices.dtype != torch.int32 or col_indices.dtype != torch.int32:
        return f"int32 indices, got {crow_indices.dtype} and {col_indices.dtype}"
    if crow_indices.shape != (shape[0] + 1,) or col_indices.dim() != 1 or values.shape != (nnz,):
        return (
            f"crow_indices [{shape[0] + 1}] and col_indices, values of one length, got "
            f"{list(crow_indices.shape)}, {list(col_indices.shape)}, {list(values.shape)}"
        )
    counts = crow_indices.long().diff()  # int32 differences of a torn file can wrap
    if int(crow_indices[0]) != 0 or int(crow_indices[-1]) != nnz or bool((counts < 0).any()):
        return f"crow_indices that ascend from 0 to {nnz}, got {int(crow_indices[0])} to {int(crow_indices[-1])}"
    if nnz and (int(col_indices.min()) < 0 or int(col_indices.max()) >= cols):
        return f"col_indices in [0, {cols}), got {int(col_indices.min())} to {int(col_indices.max())}"
    flat = rows(crow_indices, nnz) * cols + col_indices.long()
    if bool((flat.diff() <= 0).any()):
        return "col_indices that ascend within each row, got others"
    return None
