"""Files: safetensors written in one step or not at all, and read with suspicion. Nothing is ever unpickled.

A *portable state* is a dense state dict in which every masked weight ``W`` became its survivors in
row-major order under the same name, with the mask in few bytes (:mod:`sparsekit.coding`) under ``W#mask``.
The header says of each such weight its ``shape``, ``pattern``, ``coding``, ``count`` and, where known, the
``format`` it ran in; beside them stand the density and a digest of the masks. The values belong to no
format, so any device can load them.

The header also holds the file's version and a SHA-256 over everything else, so a damaged file is refused.
Version 1 had all masks as bitmaps, their shapes under ``shapes``, and no hash. A reader of version N takes
any older file and keeps the keys it does not know; what such a reader could not ignore makes version N + 1.
"""

from __future__ import annotations

import hashlib
import json
import math
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

from .coding import decode, encode
from .mask import Masks, density, digest, unpack_bits

__all__ = [
    "MASK", "PARTIAL", "VERSION", "pack_state", "read_json", "read_tensors", "unpack_state",
    "weights_of", "write_json", "write_tensors",
]  # fmt: skip

KIND, VERSION = "sparsekit", 2
MASK = "#mask"
"""What a mask's name ends with, after the name of its weight."""
PARTIAL = ".partial"
"""Hidden files and folders that end so were being written when their process died."""
_ROOM_BYTES, _ROOM_FACTOR = 2**26, 1024
"""How large the dense weights of a packed file may be: so many bytes, and so many times the file's own."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file in one step; an interrupted write leaves the old file.

    With a JSON ``header`` :func:`read_tensors` reads it back; without, it is plain, for anyone's loader.
    """
    path = Path(path)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Some loaders ask for a format; one entry alone, because safetensors writes several in any order.
    metadata = {"format": "pt"}
    if header is not None:
        rest = {key: value for key, value in header.items() if key not in ("version", "sha256")}
        header = json.loads(json.dumps({"version": VERSION, **rest}))  # as it will be read: 1 as "1" in a key
        metadata = {KIND: json.dumps({**header, "sha256": _hash(own, header)})}
    with _replacing(path) as temporary:
        try:
            save_file(own, temporary, metadata)
        except SafetensorError as error:  # a full disk among others
            raise OSError(f"{path}: Expected to write a file, got {error}") from None


def read_tensors(path: Path, plain: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: ``(tensors, header)``; with ``plain``, ``{}`` for want of a header.

    Raises: FileNotFoundError; ValueError when the file is torn, damaged, foreign, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: Expected a sparsekit file, got {got}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KIND not in metadata and not plain:
                raise ValueError(f"{path}: Expected a file that sparsekit wrote, got safetensors without its header")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: Expected a whole safetensors file, got a torn or foreign one ({error})") from None
    if KIND not in metadata:
        return tensors, {}
    try:
        header = json.loads(metadata[KIND])
        version = header["version"]
        if type(version) is not int or version < 1:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: Expected a JSON header with a version, got {metadata[KIND][:80]!r}") from None
    if version > VERSION:
        raise ValueError(f"{path}: Expected file version {VERSION} or older, got {version}; upgrade sparsekit")
    stored = header.pop("sha256", None)
    if (version > 1 or stored is not None) and stored != _hash(tensors, header):
        raise ValueError(f"{path}: Expected contents with the SHA-256 in the header, got others; the file is damaged")
    return tensors, header


def _hash(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, and over the rest of the header."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


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


def pack_state(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor], formats: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], dict]:
    """A dense state dict and its masks as ``(tensors, {"weights": facts, "density": share, "masks": digest})``.

    ``formats`` names the format of some weights, ``{"fc1.weight": "csr"}``.
    """
    if missing := [name for name in masks if name not in state]:
        raise ValueError(f"{missing[0]}: Expected a weight for every mask, got none in the state dict")
    tensors: dict[str, Tensor] = {}
    weights = {}
    for name, tensor in state.items():
        if name in masks:
            mask = masks[name].to(tensor.device)
            tensors[name] = tensor[mask]
            tensors[name + MASK], facts = encode(mask)
            ran = {"format": formats[name]} if formats and name in formats else {}
            weights[name] = {"shape": list(tensor.shape), **facts, **ran}
        else:
            tensors[name] = tensor
    return tensors, {"weights": weights, "density": density(masks), "masks": digest(masks)}


def weights_of(header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``{name: facts}`` of the masked weights in a header of any version; raises ValueError where it has none."""
    if "weights" not in header and isinstance(header.get("shapes"), dict):  # version 1
        weights = {name: {"shape": shape, "coding": "bitmap"} for name, shape in header["shapes"].items()}
    else:
        weights = header.get("weights")
    if not isinstance(weights, dict) or not all(isinstance(facts, dict) for facts in weights.values()):
        raise ValueError(f"Expected a header with the shapes of the masked weights, got {type(weights).__name__}")
    for name, facts in weights.items():
        if not _is_shape(facts.get("shape")):
            raise ValueError(f"{name}: Expected mask bits and a shape, got {facts.get('shape')!r}")
    return weights


def unpack_state(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[dict[str, Tensor], Masks]:
    """The inverse of :func:`pack_state`; raises ValueError naming the weight that does not fit together."""
    weights = weights_of(header)
    for name in [*weights, *(name.removesuffix(MASK) for name in tensors if name.endswith(MASK))]:
        if not (name in tensors and name in weights and name + MASK in tensors):
            raise ValueError(f"{name}: Expected survivors, mask bits and a shape, got only some of them")
    _check_room(tensors, weights)
    state, masks = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(MASK):
            continue
        if name not in weights:
            state[name] = tensor
            continue
        facts, bits = weights[name], tensors[name + MASK]
        shape = facts["shape"]
        try:  # version 1 knew no patterns
            mask = decode(bits, shape, facts) if "pattern" in facts else unpack_bits(bits, shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if tensor.shape != (int(mask.sum()),):
            raise ValueError(f"{name}: Expected {int(mask.sum())} survivors, got {list(tensor.shape)}")
        masks[name] = mask
        state[name] = torch.zeros(shape, dtype=tensor.dtype).masked_scatter(mask, tensor)
    if header.get("masks") != digest(masks):
        raise ValueError("Expected masks with the digest in the header, got others; the file is damaged")
    return state, masks


def _check_room(tensors: Mapping[str, Tensor], weights: Mapping[str, dict[str, Any]]) -> None:
    """A few bytes can claim any shape: what would unpack to far more than was packed is refused before it does."""
    dense = 0
    for name, facts in weights.items():
        dense += math.prod(max(extent, 1) for extent in facts["shape"]) * tensors[name].element_size()
    room = _ROOM_BYTES + _ROOM_FACTOR * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if dense > room:
        raise ValueError(f"Expected weights of at most {room} bytes in a file of this size, got {dense} bytes")


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 8 and all(type(extent) is int and extent >= 0 for extent in shape)
