"""Dense files: plain safetensors with the original keys, zeros baked in, for anyone's loader."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["save_dense"]


def save_dense(state: dict[str, Tensor], path: str | Path) -> Path:
    """Write a dense state dict under its own keys; an interrupted write leaves the old file. Returns the path."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
