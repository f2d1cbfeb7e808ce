"""Measured times kept on disk: ``{key: {name: microseconds}}`` in one JSON file of the cache directory."""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from pathlib import Path

from . import device

__all__ = ["Times"]


class Times:
    """The times in ``file`` of the cache directory; a torn file is replaced, an unwritable one done without."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._path: Path | None = None
        self._entries: dict[str, dict[str, float]] = {}

    def _load(self) -> None:
        path = device.cache_dir() / self._file
        if path != self._path:
            self._path, self._entries = path, _read(path)

    def get(self, key: str) -> dict[str, float] | None:
        """The times kept under ``key``, or None."""
        self._load()
        return self._entries.get(key)

    def put(self, key: str, times: dict[str, float]) -> None:
        """Keep ``times`` under ``key``, in memory and on disk."""
        self._load()
        with warnings.catch_warnings(action="ignore"):  # a torn file was warned of when it was first read
            theirs = _read(self._path)  # another process may have written since
        self._entries = theirs | self._entries | {key: times}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(self._entries, file, indent=0)
                os.replace(temporary, self._path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            warnings.warn(f"{self._path}: the cache of measured times cannot be written ({error})", stacklevel=4)


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        entries = json.loads(path.read_text())
        entries = {key: {str(name): float(us) for name, us in times.items()} for key, times in entries.items()}
        if not all(0 < us < math.inf for times in entries.values() for us in times.values()):
            raise ValueError("times that are not positive")
        return entries
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(f"{path}: Expected a cache of measured times, got {error}; measuring anew", stacklevel=5)
    return {}
