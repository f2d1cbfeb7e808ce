"""The packed file: survivors, bit-packed masks and everything else of a model, in one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import pack_state, read_tensors, unpack_state, write_tensors
from ..mask import Masks
from ..nn import convert, dense_state, masks_of, to_dense

__all__ = ["load", "read_portable", "save", "save_state"]


def save(model: nn.Module, path: str | Path, recipe: dict[str, Any] | None = None) -> Path:
    """Write a converted model to ``path``: all parameters and buffers, survivors only of pruned weights.

    ``recipe`` is any JSON value kept in the header. The file belongs to no format and no device; it is
    written whole or not at all. Returns the path.
    """
    return save_state(dense_state(model), masks_of(model), path, recipe)


def save_state(state: dict[str, Tensor], masks: Masks, path: str | Path, recipe: dict[str, Any] | None = None) -> Path:
    """:func:`save` for a dense state dict and its masks."""
    tensors, header = pack_state(state, masks)
    write_tensors(Path(path), tensors, header | {"recipe": recipe})
    return Path(path)


def read_portable(path: str | Path) -> tuple[dict[str, Tensor], Masks, dict[str, Any]]:
    """Read a packed file: ``(dense state dict, masks, header)``; raises ValueError naming file and weight."""
    tensors, header = read_tensors(Path(path))
    try:
        state, masks = unpack_state(tensors, header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return state, masks, header


def load(
    path: str | Path,
    model: nn.Module,
    example_inputs: Any = None,
    training: bool = False,
    impl: str = "auto",
) -> nn.Module:
    """The ticket in ``path`` as a sparse copy of ``model``, which is left as it is.

    ``model`` is dense or converted, of the architecture that was saved; the other arguments are those
    of :func:`sparsekit.convert`. Raises: ValueError when the file is torn, foreign, or of another model.
    """
    state, masks, _ = read_portable(path)
    dense = to_dense(model)
    own = dense.state_dict()
    for name, tensor in own.items():
        got = list(state[name].shape) if name in state else "none"
        if got != list(tensor.shape):
            raise ValueError(f"{path}: Expected {name} of shape {list(tensor.shape)} as in the model, got {got}")
    if more := [name for name in state if name not in own]:
        raise ValueError(f"{path}: Expected the tensors of this model, got {', '.join(more)} as well")
    dense.load_state_dict(state)
    with torch.no_grad():
        return convert(dense, masks, example_inputs, training, impl, inplace=True)
