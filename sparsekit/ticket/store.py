"""The run directory: every finished step leaves a file, and a step whose file exists is not done again.

::

    RUN/config.json            what was asked for; another configuration is refused
    RUN/stability.json         what was measured to find the step to rewind to, when that was asked for
    RUN/start.safetensors      the weights and generator states the search began with
    RUN/rewind.safetensors     the snapshot to rewind to, when that is not the start
    RUN/formats.json           the format of each layer in each round, kept before the round trains
    RUN/round_03/trained.safetensors   the trained ticket, a packed file as sparsekit.save writes it
    RUN/round_03/end.safetensors       generator states and learning rates at the round's end
    RUN/round_03/result.json   the ledger's line
    RUN/summary.json           config, all rounds, totals

A round's directory appears under its name only when it is whole, so a kill loses at most that round.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import PARTIAL, pack_state, read_json, read_tensors, unpack_state, write_json, write_tensors
from ..mask import Masks
from .rewind import Snapshot, decode, encode

__all__ = ["RunDir", "finished_rounds", "round_path"]

_FREE = ("rounds",)  # a search may be continued with more rounds
_PLACE = ("cpu", "torch", "threads", "ranks")  # and elsewhere, if it must, but then not to the same bits
_ROUND = re.compile(r"round_(\d{2,})")


class RunDir:
    """A run's files under ``path``; with None everything stays in memory and nothing can be resumed."""

    def __init__(self, path: str | Path | None, config: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.config = config
        self._last: tuple[dict, Masks, Any] | None = None
        self._formats: dict[str, dict[str, str]] = {}
        if self.path is not None:
            self._open()

    def _open(self) -> None:
        file = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: Expected a run directory, got a file")
        if file.exists():
            self._compare(file, read_json(file))
        elif self.path.exists() and any(not _may_precede(entry) for entry in self.path.iterdir()):
            raise ValueError(f"{self.path}: Expected a run directory or an empty one, got other files")
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in filter(_is_partial, list(self.path.iterdir())):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_json(file, self.config)
        if (file := self.path / "formats.json").exists():
            self._formats = read_json(file)
            if not isinstance(self._formats, dict):
                raise ValueError(f"{file}: Expected the formats of each round, got {type(self._formats).__name__}")

    def _compare(self, file: Path, old: Any) -> None:
        if not isinstance(old, dict) or not {"rounds", "rewind", "parameters"} <= old.keys():
            raise ValueError(f"{file}: Expected the configuration of a ticket search, got another file")
        pairs = {key: (old.get(key), self.config.get(key)) for key in {**old, **self.config} if key not in _FREE}
        differ = {key: pair for key, pair in pairs.items() if not _same(*pair)}
        moved = [_difference(key, *differ.pop(key)) for key in _PLACE if key in differ]
        if differ:
            texts = "; ".join(_difference(key, *pair) for key, pair in sorted(differ.items()))
            raise ValueError(f"{self.path}: Expected the configuration this run began with ({texts})")
        if moved:
            why = (
                f"{self.path}: Expected the machine this run began on ({'; '.join(moved)}); results may differ in bits"
            )
            warnings.warn(why, stacklevel=6)

    def snapshot(self, name: str) -> Snapshot | None:
        """The snapshot ``start`` or ``rewind``, when its file exists."""
        if self.path is None or not (self.path / f"{name}.safetensors").exists():
            return None
        return _read(self.path / f"{name}.safetensors", Snapshot.from_tensors)

    def keep_snapshot(self, name: str, snapshot: Snapshot) -> None:
        """Write a snapshot."""
        if self.path is not None:
            write_tensors(self.path / f"{name}.safetensors", *snapshot.to_tensors())

    def formats(self, number: int) -> dict[str, str]:
        """The formats a round began with, ``{"fc1": "csr"}``, so that it runs the same way again; empty when new."""
        return self._formats.get(str(number), {})

    def keep_formats(self, number: int, formats: dict[str, str]) -> None:
        """Keep a round's formats, before it trains."""
        if self._formats.get(str(number)) != formats:
            self._formats[str(number)] = formats
            if self.path is not None:
                write_json(self.path / "formats.json", self._formats)

    def finish_round(self, number: int, state: dict[str, Tensor], masks: Masks, end: Any, result: dict) -> None:
        """Keep a round whole: trained dense ``state``, its ``masks``, what the next round starts from, the result."""
        if self.path is None:
            self._last = (state, masks, end)
            return
        final = round_path(self.path, number)
        partial = final.with_name(f".{final.name}{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            write_tensors(partial / "trained.safetensors", *pack_state(state, masks))
            tensors: dict[str, Tensor] = {}
            end = encode(end, tensors)
            write_tensors(partial / "end.safetensors", tensors, {"end": end})
            write_json(partial / "result.json", result)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def keep_summary(self, summary: dict) -> None:
        """Write ``summary.json``."""
        if self.path is not None:
            write_json(self.path / "summary.json", summary)

    def result(self, number: int) -> dict | None:
        """A finished round's result, or None."""
        if self.path is None:
            return None
        file = round_path(self.path, number) / "result.json"
        return read_json(file) if file.exists() else None

    def load_last(self, number: int) -> tuple[dict[str, Tensor], Masks, Any]:
        """The last finished round's ``(trained dense state, masks, end)``; ``number`` is that round's."""
        if self.path is None:
            return self._last
        folder = round_path(self.path, number)
        state, masks = _read(folder / "trained.safetensors", unpack_state)
        end = _read(folder / "end.safetensors", lambda tensors, header: decode(header["end"], tensors))
        return state, masks, end


def round_path(run: Path, number: int) -> Path:
    """The directory of a round."""
    return run / f"round_{number:02d}"


def finished_rounds(run: Path) -> list[int]:
    """The numbers of the rounds that a run directory holds, ascending."""
    found = (_ROUND.fullmatch(entry.name) for entry in run.iterdir() if (entry / "result.json").exists())
    return sorted(int(match[1]) for match in found if match)


def _read(file: Path, build: Any) -> Any:
    tensors, header = read_tensors(file)
    try:
        return build(tensors, header)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: Expected what a ticket search wrote, got a damaged file ({error})") from None


def _may_precede(entry: Path) -> bool:
    return _is_partial(entry) or entry.name == "stability.json"


def _is_partial(entry: Path) -> bool:
    return entry.name.startswith(".") and entry.name.endswith(PARTIAL)


def _same(old: Any, new: Any) -> bool:
    in_order = not isinstance(old, dict) or list(old) == list(new or ())  # of two rates the later entry wins
    return old == new and in_order


def _difference(key: str, old: Any, new: Any) -> str:
    if key == "parameters" and isinstance(old, dict) and isinstance(new, dict):
        name = next((name for name in {**old, **new} if old.get(name) != new.get(name)), None)
        if name is not None:
            return f"{name} of shape {old.get(name, 'none')}, got {new.get(name, 'none')}"
    return f"{key} {old!r}, got {new!r}"
