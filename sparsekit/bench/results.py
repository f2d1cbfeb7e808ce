"""Result files: rows are kept as they come, and a later run goes on with them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .cases import Case

__all__ = ["Results", "place", "read", "write"]


class Results:
    """The file of a run, or only its content in memory where ``out`` is None; written after every row.

    ``out``: a JSON file, or a folder to make ``<device>/<date>-<commit>.json`` in. ``again`` forgets what it holds.
    Raises ValueError where it holds rows of another machine, version or commit.
    """

    def __init__(self, out: str | Path | None, facts: dict[str, Any], threads: int, again: bool = False) -> None:
        self.path = None if out is None else place(Path(out), facts)
        self.threads, self.device = threads, facts["device"]
        self._found = _resume(self.path, facts, again)
        self._rows = {(row["suite"], row["name"], row["threads"]): row for row in self._found["rows"] if "suite" in row}

    @property
    def rates(self) -> dict[str, Any] | None:
        """The highest rates seen with these threads, once they were found."""
        return self._found["limits"].get(str(self.threads))

    @rates.setter
    def rates(self, rates: dict[str, Any]) -> None:
        self._found["limits"][str(self.threads)] = rates

    def row(self, case: Case) -> dict[str, Any] | None:
        """The row of a case, where there is one."""
        return self._rows.get((case.suite, case.name, self.threads))

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row, measured on this device."""
        row["device"] = self.device
        self._rows[row["suite"], row["name"], row["threads"]] = row
        self._found["rows"].append(row)
        self._found["failed"].pop(f"{row['suite']}/{row['name']}", None)
        self.save()

    def fail(self, case: Case, reason: str) -> None:
        """Say why a case has no row."""
        self._found["failed"][f"{case.suite}/{case.name}"] = reason
        self.save()

    def save(self) -> None:
        """Write the file."""
        if self.path is not None:
            write(self.path, self._found)


def read(path: str | Path) -> dict[str, Any]:
    """A result file, checked; raises FileNotFoundError, or ValueError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Expected a result file of sparsekit bench, got no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["environment"], dict) or not isinstance(found["rows"], list):
            raise TypeError("another shape")
        for row in found["rows"]:
            _ = row["name"] + row["work"], float(row["ratio"]), row["rivals"].items(), int(row["threads"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: Expected a result file of sparsekit bench, got another ({error!r})") from None
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Replace a result file in one step, so that a kill leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def place(out: Path, facts: dict[str, Any]) -> Path:
    """The file that ``--json OUT`` means: in a folder, ``<device>/<date>-<commit>.json``."""
    if out.suffix == ".json" and not out.is_dir():
        return out
    dirty = "-dirty" if facts["dirty"] else ""
    return out / facts["device"] / f"{facts['date']}-{facts['commit'] or 'unknown'}{dirty}.json"


def _resume(path: Path | None, facts: dict[str, Any], again: bool) -> dict[str, Any]:
    """What an earlier run left in the file, if it ran on the same machine, versions and commit."""
    fresh = {"environment": facts, "limits": {}, "rows": [], "failed": {}}
    if path is None or not path.exists() or again:
        return fresh
    found = fresh | read(path)
    theirs = found["environment"]
    changed = [key for key in facts if key != "date" and theirs.get(key) != facts[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{path}: Expected rows with {key} {facts[key]}, got {theirs.get(key)}: another file, or --again"
        )
    return found
