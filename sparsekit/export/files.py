"""``sparsekit export``: from a run or a packed file to a packed or dense file."""

from __future__ import annotations

from pathlib import Path

from ..files import read_json
from ..ticket.store import read_round
from .dense import save_dense
from .packed import read_portable, save_state

__all__ = ["export_file"]


def export_file(source: str | Path, to: str, out: str | Path, number: int | None = None) -> Path:
    """Write the trained ticket of a run's round (default: the last finished), or a packed file, to ``out``.

    ``to`` is ``"packed"`` (survivors and masks; :func:`sparsekit.load` reads it) or ``"dense"`` (plain
    safetensors, original keys, zeros baked in). Raises ValueError or FileNotFoundError naming the file.
    """
    source, out = Path(source), Path(out)
    recipe = None
    if source.is_dir():
        rounds = sorted(path.name for path in source.glob("round_*") if (path / "result.json").exists())
        if not rounds:
            raise FileNotFoundError(f"{source}: Expected a run with a finished round, got none")
        name = rounds[-1] if number is None else f"round_{number:02d}"
        if name not in rounds:
            raise FileNotFoundError(f"{source}: Expected one of {', '.join(rounds)}, got {name}")
        state, masks, _ = read_round(source / name / "trained.safetensors")
        config = read_json(source / "config.json")
        recipe = {"round": int(name.removeprefix("round_")), "config": config}
    else:
        if number is not None:
            raise ValueError(f"{source}: Expected a run directory with --round, got a file")
        state, masks, header = read_portable(source)
        recipe = header.get("recipe")
    out.parent.mkdir(parents=True, exist_ok=True)
    return save_state(state, masks, out, recipe) if to == "packed" else save_dense(state, out)
