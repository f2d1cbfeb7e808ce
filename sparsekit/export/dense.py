"""Files for anyone's loader: plain safetensors with the original keys, or with those of torch.nn.utils.prune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn.utils import prune

from ..files import write_tensors
from ..mask import Masks
from ..nn import masks_of, to_dense

__all__ = ["from_prune", "save_dense", "save_prune", "to_prune"]

_ORIG, _MASK = "_orig", "_mask"


def save_dense(state: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write a dense state dict under its own keys; an interrupted write leaves the old file. Returns the path."""
    write_tensors(Path(path), state)
    return Path(path)


def save_prune(state: Mapping[str, Tensor], masks: Mapping[str, Tensor], path: str | Path) -> Path:
    """:func:`save_dense`, each masked weight as ``weight_orig`` and ``weight_mask`` (1 survives) of its dtype."""
    tensors = {name: tensor for name, tensor in state.items() if name not in masks}
    for name, mask in masks.items():
        tensors |= {name + _ORIG: state[name], name + _MASK: mask.to(state[name].dtype)}
    return save_dense(tensors, path)


def from_prune(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Masks]:
    """The dense state dict, zeros baked in, and masks of a state dict that torch.nn.utils.prune has renamed."""
    masks = {}
    for name, tensor in tensors.items():
        weight = name.removesuffix(_MASK)
        if name.endswith(_MASK) and weight + _ORIG in tensors:
            if tensor.shape != tensors[weight + _ORIG].shape:
                shapes = [list(tensors[weight + part].shape) for part in (_ORIG, _MASK)]
                raise ValueError(f"{weight}: Expected a mask of shape {shapes[0]}, got {shapes[1]}")
            masks[weight] = tensor != 0
    if not masks:
        raise ValueError("Expected a file that sparsekit wrote or weight_orig and weight_mask in it, got neither")
    used = {weight + part for weight in masks for part in (_ORIG, _MASK)}
    state = {name: tensor for name, tensor in tensors.items() if name not in used}
    return state | {name: tensors[name + _ORIG].masked_fill(~mask, 0) for name, mask in masks.items()}, masks


def to_prune(model: nn.Module) -> nn.Module:
    """A dense copy of a converted model under ``torch.nn.utils.prune``; :func:`sparsekit.convert` takes it back."""
    masks, dense = masks_of(model), to_dense(model)
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        prune.custom_from_mask(dense.get_submodule(path), leaf, mask)
    return dense
