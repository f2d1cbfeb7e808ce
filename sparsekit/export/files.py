"""``sparsekit export``: from a run or a packed file to a packed or dense file."""

from __future__ import annotations

from pathlib import Path

from ..files import read_json
from ..ticket.store import finished_rounds, round_path
from .dense import save_dense
from .packed import read_portable, save_state

__all__ = ["export_file"]


def export_file(source: str | Path, to: str, out: str | Path, number: int | None = None) -> Path:
    """Write the trained ticket of a run's round (default: the last finished), or a packed file, to ``out``.

    ``to`` is ``"packed"`` (survivors and masks; :func:`sparsekit.load` reads it) or ``"dense"`` (plain
    safetensors, original keys, zeros baked in). Raises ValueError or FileNotFoundError naming the file.
    """
    if to not in ("packed", "dense"):
        raise ValueError(f"Expected to='packed' or 'dense', got {to!r}")
    source, out = Path(source), Path(out)
    if source.is_dir():
        number = _choose_round(source, number)
        state, masks, _ = read_portable(round_path(source, number) / "trained.safetensors")
        recipe = {"round": number, "config": read_json(source / "config.json")}
    else:
        if number is not None:
            raise ValueError(f"{source}: Expected a run directory with --round, got a file")
        state, masks, header = read_portable(source)
        recipe = header.get("recipe")
    out.parent.mkdir(parents=True, exist_ok=True)
    return save_state(state, masks, out, recipe) if to == "packed" else save_dense(state, out)


def _choose_round(run: Path, number: int | None) -> int:
    finished = finished_rounds(run)
    if not finished:
        raise FileNotFoundError(f"{run}: Expected a run with a finished round, got none")
    if number is None:
        return finished[-1]
    if number not in finished:
        raise FileNotFoundError(f"{run}: Expected a finished round of {', '.join(map(str, finished))}, got {number}")
    return number
