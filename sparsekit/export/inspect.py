"""``sparsekit info FILE``: what a file of tensors holds, weight by weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import MASK, read_tensors, weights_of

__all__ = ["describe", "render"]


def describe(path: str | Path) -> dict[str, Any]:
    """JSON-ready facts of a packed file, or of any safetensors file.

    ``tensors`` is a list of ``name, shape, dtype, density, pattern, coding, format, bytes, dense_bytes``; the mask of
    a weight counts in its ``bytes``. ``file_bytes``, ``share`` of the dense file's, ``version``,
    ``recipe`` and ``masks`` (the digest) stand beside. Raises ValueError when the file is torn or damaged.
    """
    path = Path(path)
    tensors, header = read_tensors(path, plain=True)
    try:
        weights = weights_of(header) if "weights" in header or "shapes" in header else {}
        rows = [_row(name, tensors, weights.get(name)) for name in tensors if name.removesuffix(MASK) not in weights]
        rows += [_row(name, tensors, facts) for name, facts in weights.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: Expected survivors, mask and shape of every weight, got others ({error})") from None
    held, dense = sum(row["bytes"] for row in rows), sum(row["dense_bytes"] for row in rows)
    return {
        "file": str(path),
        "version": header.get("version"),
        "file_bytes": path.stat().st_size,
        "share": held / dense if dense else 1.0,
        "masks": header.get("masks"),
        "recipe": header.get("recipe"),
        "tensors": sorted(rows, key=lambda row: list(tensors).index(row["name"])),
    }


def _row(name: str, tensors: dict[str, Tensor], facts: dict[str, Any] | None) -> dict[str, Any]:
    tensor = tensors[name]
    size = tensor.numel() * tensor.element_size()
    row = {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if facts is None:
        none = dict.fromkeys(("pattern", "coding", "format"))
        return row | {"density": 1.0, **none, "bytes": size, "dense_bytes": size}
    count = math.prod(facts["shape"])
    return row | {
        "shape": list(facts["shape"]),
        "density": tensor.numel() / count if count else 1.0,
        "pattern": facts.get("pattern"),
        "coding": facts["coding"],
        "format": facts.get("format"),
        "bytes": size + tensors[name + MASK].numel(),
        "dense_bytes": count * tensor.element_size(),
    }


def render(facts: dict[str, Any]) -> str:
    """The facts of :func:`describe` as a table; one line counts the tensors that are not pruned."""
    head = ("weight", "shape", "dtype", "density", "pattern", "coding", "format", "bytes", "of dense")
    table = [head] + [
        (
            row["name"], "x".join(map(str, row["shape"])), row["dtype"], f"{row['density']:.3f}",
            str(row["pattern"] or "-"), str(row["coding"]), str(row["format"] or "-"), str(row["bytes"]),
            f"{row['bytes'] / max(row['dense_bytes'], 1):.3f}",
        )
        for row in facts["tensors"] if row["coding"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table] if len(table) > 1 else []
    plain = [row for row in facts["tensors"] if not row["coding"]]
    kind = "plain safetensors" if facts["version"] is None else f"sparsekit file, version {facts['version']}"
    lines.append(f"{len(plain)} tensors as they are, {sum(row['bytes'] for row in plain)} bytes")
    lines.append(f"{facts['file']}: {kind}, {facts['file_bytes']} bytes, {facts['share']:.3f} of its tensors dense")
    return "\n".join(lines)
