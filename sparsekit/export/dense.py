"""Dense files: plain safetensors with the original keys, zeros baked in, for anyone's loader."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..files import write_tensors

__all__ = ["save_dense"]


def save_dense(state: dict[str, Tensor], path: str | Path) -> Path:
    """Write a dense state dict under its own keys; an interrupted write leaves the old file. Returns the path."""
    write_tensors(Path(path), state)
    return Path(path)
