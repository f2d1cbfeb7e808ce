"""Masks: ``{parameter name: bool tensor}``, True where a weight survives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Masks", "check_masks", "density", "digest", "from_model", "pack_bits", "unpack_bits"]

Masks = dict[str, Tensor]


def weight_of(module: nn.Module) -> Tensor:
    """The effective dense weight of a layer, read through ``torch.nn.utils.prune`` when it is applied."""
    leaf = leaf_name(module)
    orig, mask = getattr(module, f"{leaf}_orig", None), getattr(module, f"{leaf}_mask", None)
    if orig is not None and mask is not None:
        return orig * mask.to(orig.dtype)
    return getattr(module, leaf)


def leaf_name(module: nn.Module) -> str:
    """What a module calls the weight that is pruned."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def pruned_by_torch(module: nn.Module) -> Tensor | None:
    """The bool mask of ``torch.nn.utils.prune``, or None where it is not applied."""
    leaf = leaf_name(module)
    if getattr(module, f"{leaf}_orig", None) is None or getattr(module, f"{leaf}_mask", None) is None:
        return None
    return getattr(module, f"{leaf}_mask") != 0


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is GPT-2's ``Conv1D``, a linear layer whose weight is ``[in, out]``; known by name alone."""
    names = {(kind.__module__, kind.__name__) for kind in (type(module), getattr(module, "dense_class", None)) if kind}
    return ("transformers.pytorch_utils", "Conv1D") in names


def weight_name(path: str, module: nn.Module) -> str:
    """The key under which a dense state dict holds the weight of the layer at ``path``."""
    if isinstance(module, nn.MultiheadAttention):
        return f"{path}.in_proj_weight" if path else "in_proj_weight"
    # What was in_proj_weight is the weight of a layer in_proj once converted.
    return f"{path}{getattr(module, 'joint', '.')}weight" if path else "weight"


def bias_name(path: str, module: nn.Module) -> str:
    """The key of the layer's bias, as of :func:`weight_name`."""
    return weight_name(path, module).removesuffix("weight") + "bias"


def mask_of(module: nn.Module) -> Tensor:
    """The mask a layer already carries: its own, the one of ``torch.nn.utils.prune``, or its zeros."""
    if hasattr(module, "survivors"):
        return module.survivors()
    mask = pruned_by_torch(module)
    return mask if mask is not None else weight_of(module).detach() != 0


def from_model(model: nn.Module, names: list[str]) -> Masks:
    """Masks of the named weights (``"0.weight"``) as the model carries them now."""
    layers = {weight_name(path, module): module for path, module in model.named_modules()}
    return {name: mask_of(layers[name]) for name in names}


def check_masks(masks: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError or TypeError unless every mask names a known weight and has its shape and dtype bool."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"Expected masks as a dict of name to bool tensor, got {type(masks).__name__}")
    for name, mask in masks.items():
        if name not in shapes:
            known = ", ".join(shapes) or "none"
            raise ValueError(f"Expected masks for prunable weights of this model ({known}), got {name!r}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: Expected a mask of dtype torch.bool, got {got}")
        if mask.shape != shapes[name]:
            raise ValueError(f"{name}: Expected a mask of shape {list(shapes[name])}, got {list(mask.shape)}")


def density(masks: Mapping[str, Tensor]) -> float:
    """Share of the masked weights that survive; 1.0 for no masks."""
    total = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) / total if total else 1.0


def digest(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bits, equal on every rank that holds the same ticket."""
    sha = hashlib.sha256()
    for name in sorted(masks):
        sha.update(f"{name}{list(masks[name].shape)}".encode())
        sha.update(pack_bits(masks[name]).numpy().tobytes())
    return sha.hexdigest()


_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as uint8 ``[ceil(numel / 8)]`` on the CPU, least significant bit first."""
    flat = mask.detach().cpu().flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat * torch.tensor(_WEIGHTS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """The inverse of :func:`pack_bits`; raises ValueError when the byte count does not fit ``shape``."""
    count = 1
    for extent in shape:
        count *= extent
    if bits.dtype != torch.uint8 or bits.numel() != -(-count // 8):
        raise ValueError(
            f"Expected {-(-count // 8)} mask bytes for shape {list(shape)}, got {bits.numel()} of {bits.dtype}"
        )
    ones = bits.view(-1, 1).bitwise_and(torch.tensor(_WEIGHTS, dtype=torch.uint8)) != 0
    return ones.flatten()[:count].view(list(shape)).clone()
