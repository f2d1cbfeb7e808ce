"""The run directory: every finished step leaves a file, and a step whose file exists is not done again.

::

    RUN/config.json            what was asked for; another configuration is refused
    RUN/start.safetensors      the weights and generator states the search began with
    RUN/rewind.safetensors     the snapshot to rewind to, when that is not the start
    RUN/round_03/trained.safetensors   survivors after training, generator states at the end
    RUN/round_03/result.json   the ledger's line
    RUN/summary.json           config, all rounds, totals

A round's directory appears under its name only when it is whole, so a kill loses at most that round.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import pack_state, read_json, read_tensors, unpack_state, write_json, write_tensors
from ..mask import Masks
from .rewind import Snapshot, decode, encode

__all__ = ["RunDir"]

_FREE = ("rounds",)  # a search may be continued with more rounds


class RunDir:
    """A run's files under ``path``; with None everything stays in memory and nothing can be resumed."""

    def __init__(self, path: str | Path | None, config: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.config = config
        self._memory: dict[int, tuple[dict, Masks, Any, dict]] = {}
        if self.path is not None:
            self._open()

    def _open(self) -> None:
        file = self.path / "config.json"
        if file.exists():
            old = read_json(file)
            if not isinstance(old, dict):
                raise ValueError(f"{file}: Expected a run's configuration, got {type(old).__name__}")
            keys = [k for k in {**old, **self.config} if k not in _FREE and old.get(k) != self.config.get(k)]
            if keys:
                differ = "; ".join(f"{k} {old.get(k)!r}, got {self.config.get(k)!r}" for k in sorted(keys))
                raise ValueError(f"{self.path}: Expected the configuration this run began with ({differ})")
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path}: Expected a run directory or an empty one, got other files")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(file, self.config)

    def snapshot(self, name: str) -> Snapshot | None:
        """The snapshot ``start`` or ``rewind``, when its file exists."""
        if self.path is None or not (self.path / f"{name}.safetensors").exists():
            return None
        return Snapshot.from_tensors(*read_tensors(self.path / f"{name}.safetensors"))

    def keep_snapshot(self, name: str, snapshot: Snapshot) -> None:
        """Write a snapshot."""
        if self.path is not None:
            write_tensors(self.path / f"{name}.safetensors", *snapshot.to_tensors())

    def finish_round(self, number: int, state: dict[str, Tensor], masks: Masks, end: Any, result: dict) -> None:
        """Keep a round whole: the trained dense ``state``, its ``masks``, what the next round starts from, the result."""
        if self.path is None:
            self._memory[number] = (state, masks, end, result)
            return
        final = self.round_path(number)
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        partial.mkdir()
        tensors, header = pack_state(state, masks)
        extra: dict[str, Tensor] = {}
        header["end"] = encode(end, extra)
        tensors.update({f"#end.{key}": tensor for key, tensor in extra.items()})
        write_tensors(partial / "trained.safetensors", tensors, header)
        write_json(partial / "result.json", result)
        partial.rename(final)

    def keep_summary(self, summary: dict) -> None:
        """Write ``summary.json``."""
        if self.path is not None:
            write_json(self.path / "summary.json", summary)

    def round_path(self, number: int) -> Path:
        """The directory of a round."""
        return self.path / f"round_{number:02d}"

    def result(self, number: int) -> dict | None:
        """A finished round's result, or None."""
        if self.path is None:
            return self._memory[number][3] if number in self._memory else None
        file = self.round_path(number) / "result.json"
        return read_json(file) if file.exists() else None

    def load_round(self, number: int) -> tuple[dict[str, Tensor], Masks, Any]:
        """A finished round's ``(trained dense state, masks, end)``."""
        if self.path is None:
            return self._memory[number][:3]
        return read_round(self.round_path(number) / "trained.safetensors")


def read_round(file: Path) -> tuple[dict[str, Tensor], Masks, Any]:
    """Read a round's ``trained.safetensors``: ``(trained dense state, masks, end)``."""
    tensors, header = read_tensors(file)
    extra = {key.removeprefix("#end."): tensors.pop(key) for key in list(tensors) if key.startswith("#end.")}
    try:
        state, masks = unpack_state(tensors, header)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return state, masks, decode(header.get("end"), extra)
