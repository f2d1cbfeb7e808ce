"""Files: safetensors written in one step or not at all, and read with suspicion. Nothing is ever unpickled.

A *portable state* is a dense state dict in which every masked weight ``W`` became its survivors in
row-major order under the same name, with the mask bit-packed under ``W#mask`` and the dense shape in
the header, next to a digest of the masks. It belongs to no format, so any device can load it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .mask import Masks, density, digest, pack_bits, unpack_bits

__all__ = ["PARTIAL", "pack_state", "read_json", "read_tensors", "unpack_state", "write_json", "write_tensors"]

KIND, VERSION = "sparsekit", 1
PARTIAL = ".partial"
"""Hidden files and folders that end so were being written when their process died."""
_BITS = "#mask"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file in one step; an interrupted write leaves the old file.

    With a JSON ``header`` :func:`read_tensors` reads it back; without, it is plain, for anyone's loader.
    """
    path = Path(path)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Some loaders ask for a format; one entry alone, because safetensors writes several in any order.
    metadata = {"format": "pt"} if header is None else {KIND: json.dumps({"version": VERSION, **header})}
    with _replacing(path) as temporary:
        try:
            save_file(own, temporary, metadata)
        except SafetensorError as error:  # a full disk among others
            raise OSError(f"{path}: Expected to write a file, got {error}") from None


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
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: Expected a JSON header with a version, got {metadata[KIND][:80]!r}") from None
    if version > VERSION:
        raise ValueError(f"{path}: Expected file version {VERSION} or older, got {version}; upgrade sparsekit")
    return tensors, header


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; an interrupted write leaves the old file."""
    with _replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Read JSON; raises ValueError naming the file when it is torn."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: Expected JSON, got a torn or foreign file ({error})") from None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to: it becomes ``path`` when the block ends well and goes away when not."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: Expected the name of a file, got a directory")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: Expected a file in an existing directory, got no {path.parent}")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # what the umask gives; safetensors would make it private
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def pack_state(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """A dense state dict and its masks as ``(tensors, {"shapes": {name: shape}, "density", "masks": digest})``."""
    if missing := [name for name in masks if name not in state]:
        raise ValueError(f"{missing[0]}: Expected a weight for every mask, got none in the state dict")
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
    return tensors, {"shapes": shapes, "density": density(masks), "masks": digest(masks)}


def unpack_state(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[dict[str, Tensor], Masks]:
    """The inverse of :func:`pack_state`; raises ValueError naming the weight that does not fit together."""
    shapes = header.get("shapes")
    if not isinstance(shapes, dict):
        raise ValueError(f"Expected a header with the shapes of the masked weights, got {type(shapes).__name__}")
    for name in [*shapes, *(name.removesuffix(_BITS) for name in tensors if name.endswith(_BITS))]:
        if name not in tensors or name not in shapes:
            raise ValueError(f"{name}: Expected survivors, mask bits and a shape, got only some of them")
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
    if header.get("masks") != digest(masks):
        raise ValueError("Expected masks with the digest in the header, got others; the file is damaged")
    return state, masks


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(extent) is int and extent >= 0 for extent in shape)
