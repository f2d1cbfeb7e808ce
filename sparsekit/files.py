"""Files: safetensors written in one step or not at all, and read with suspicion. Nothing is ever unpickled.

A *portable state* is a dense state dict in which every masked weight ``W`` became its survivors in
row-major order under the same name, with the mask bit-packed under ``W#mask`` and the dense shape in
the header. It belongs to no format, so any device can load it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .mask import Masks, pack_bits, unpack_bits

__all__ = ["pack_state", "read_json", "read_tensors", "unpack_state", "write_json", "write_tensors"]

KIND, VERSION = "sparsekit", 1
_BITS = "#mask"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to a safetensors file; an interrupted write leaves the old file."""
    path = Path(path)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {KIND: json.dumps({"version": VERSION, **header})}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(own, temporary, metadata)
        _publish(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: ``(tensors, header)``.

    Raises: FileNotFoundError; ValueError when the file is torn, foreign, or of a newer major version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Expected a sparsekit file, got no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KIND not in metadata:
                raise ValueError(f"{path}: Expected a file that sparsekit wrote, got safetensors without its header")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: Expected a whole safetensors file, got a torn or foreign one ({error})") from None
    try:
        header = json.loads(metadata[KIND])
        version = int(header["version"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: Expected a JSON header with a version, got {metadata[KIND][:80]!r}") from None
    if version > VERSION:
        raise ValueError(f"{path}: Expected file version {VERSION} or older, got {version}; upgrade sparsekit")
    return tensors, header


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; an interrupted write leaves the old file."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
        _publish(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Read JSON; raises ValueError naming the file when it is torn."""
    try:
        return json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: Expected JSON, got a torn or foreign file ({error})") from None


def _publish(temporary: str, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def pack_state(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """A dense state dict and its masks as ``(tensors, {"shapes": {name: shape}})``."""
    tensors: dict[str, Tensor] = {}
    shapes = {}
    for name, tensor in state.items():
        if name in masks:
            mask = masks[name].to(tensor.device)
            tensors[name] = tensor[mask]
            tensors[name + _BITS] = pack_bits(mask)
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = tensor
    return tensors, {"shapes": shapes}


def unpack_state(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[dict[str, Tensor], Masks]:
    """The inverse of :func:`pack_state`; raises ValueError naming the weight that does not fit together."""
    shapes = header.get("shapes")
    if not isinstance(shapes, dict):
        raise ValueError(f"Expected a header with the shapes of the masked weights, got {type(shapes).__name__}")
    state, masks = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(_BITS):
            continue
        if name not in shapes:
            state[name] = tensor
            continue
        shape = shapes[name]
        if name + _BITS not in tensors or not _is_shape(shape):
            raise ValueError(f"{name}: Expected mask bits and a shape, got {shape!r}")
        try:
            mask = unpack_bits(tensors[name + _BITS], shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if tensor.shape != (int(mask.sum()),):
            raise ValueError(f"{name}: Expected {int(mask.sum())} survivors, got {list(tensor.shape)}")
        masks[name] = mask
        state[name] = torch.zeros(shape, dtype=tensor.dtype).masked_scatter(mask, tensor)
    return state, masks


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(extent) is int and extent >= 0 for extent in shape)
