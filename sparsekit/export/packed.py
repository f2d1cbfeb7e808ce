"""The packed file: survivors, masks in few bytes and everything else of a model, in one safetensors file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import format as formats
from ..files import pack_state, read_tensors, unpack_state, weights_of, write_tensors
from ..mask import Masks
from ..nn import SparseModule, convert, dense_state, masks_of, to_dense
from ..prune import check_model
from .dense import from_prune

__all__ = ["load", "read_portable", "save", "save_state"]

_OURS = {"version", "weights", "shapes", "density", "masks", "recipe"}


def save(model: nn.Module, path: str | Path, recipe: dict[str, Any] | None = None) -> Path:
    """Write a converted model to ``path``: all parameters and buffers, survivors only of pruned weights.

    ``recipe`` is any JSON value kept in the header, beside each weight's shape, pattern and format. The
    values belong to no format and no device; the file is written whole or not at all. Returns the path.
    """
    check_model(model)
    ran = {
        f"{name}.weight" if name else "weight": module.format.name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseModule)
    }
    tensors, facts = pack_state(dense_state(model), masks_of(model), ran)
    write_tensors(Path(path), tensors, facts | {"recipe": recipe})
    return Path(path)


def save_state(state: dict[str, Tensor], masks: Masks, path: str | Path, header: dict[str, Any]) -> Path:
    """:func:`save` for what :func:`read_portable` gave: formats, recipe and keys of later versions are kept."""
    old = weights_of(header) if "weights" in header else {}
    tensors, facts = pack_state(state, masks)
    facts["weights"] = {name: old.get(name, {}) | new for name, new in facts["weights"].items()}
    later = {key: value for key, value in header.items() if key not in _OURS}
    write_tensors(Path(path), tensors, facts | {"recipe": header.get("recipe")} | later)
    return Path(path)


def read_portable(path: str | Path) -> tuple[dict[str, Tensor], Masks, dict[str, Any]]:
    """Read a packed file, or a plain one with ``weight_orig`` and ``weight_mask``: ``(dense state, masks, header)``.

    Raises ValueError naming file and weight.
    """
    tensors, header = read_tensors(Path(path), plain=True)
    try:
        state, masks = unpack_state(tensors, header) if header else from_prune(tensors)
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
    of :func:`sparsekit.convert`, and ``impl="saved"`` takes the formats the file names without measuring
    again: where one is unknown or has no kernel on this device the layer is planned anew, with a warning.
    Raises: ValueError when the file is torn, damaged, foreign, or of another model.
    """
    state, masks, header = read_portable(path)
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
        impls = _saved_formats(header, masks, dense) if impl == "saved" else impl
        return convert(dense, masks, example_inputs, training, impls, inplace=True)


def _saved_formats(header: dict[str, Any], masks: Masks, model: nn.Module) -> dict[str, str]:
    """``{layer: format}`` as saved, for the layers that can have it here; the others are left to be planned."""
    impls = {}
    known = weights_of(header) if header else {}
    for name, mask in masks.items():
        layer, saved = name.rpartition(".")[0], known.get(name, {}).get("format")
        module = model.get_submodule(layer)
        groups, where = getattr(module, "groups", 1), module.weight.device
        if saved not in formats.names():
            why = f"got {saved!r}, which is no format of this version" if saved else "the file names none"
        else:
            fmt = formats.get(saved)
            why = fmt.absent(where, mask, groups) or fmt.unsupported(mask, groups)
            why = f"{saved!r} cannot run it on {where.type}: {why}" if why else None
        if why is None:
            impls[layer] = saved
        else:
            warnings.warn(f"{name}: Expected the format it was saved in, {why}; planned anew", stacklevel=3)
    return impls
