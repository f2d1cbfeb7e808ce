"""Kill a sweep, with all its processes, at random moments; started again each time it must end as one let be.

    python tests/kill_sweep.py --kills 20 [--seed 0]        # a minute or two; prints what was compared

A sweep that finishes before its next kill is compared and another begun, so every kill meets a living one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from sparsekit.__main__ import main as sparsekit
from sparsekit.files import read_json, read_tensors

SWEEP = ["ticket", "--model", "mlp:64-32-10", "--data", "digits", "--impl", "csr", "--rewind", "5it"]
SWEEP += ["--criterion", "magnitude,random", "--workers", "2"]
CLOCK = ("seconds", "seconds_saved", "_us", "speedup")


def life(argv: list[str]) -> None:
    os.setsid()  # its children die with it
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    os._exit(sparsekit(argv))


def start(out: Path, options: list[str]) -> multiprocessing.Process:
    argv = [*SWEEP, *options, "--out", str(out)]
    process = multiprocessing.get_context("fork").Process(target=life, args=(argv,))
    process.start()
    return process


def finish(process: multiprocessing.Process) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"Expected the sweep to finish, got exit code {process.exitcode}")


def essence(value):
    """A result without what the clock says."""
    if isinstance(value, dict):
        return {key: essence(item) for key, item in value.items() if not key.endswith(CLOCK)}
    return [essence(item) for item in value] if isinstance(value, list) else value


def contents(out: Path) -> dict:
    """Everything a finished sweep says: its summary to the byte, its runs' results, and all tensors."""
    found = {"sweep.json": (out / "sweep.json").read_bytes(), "sweep.md": (out / "sweep.md").read_bytes()}
    for file in sorted(out.rglob("*.json")):
        found.setdefault(str(file.relative_to(out)), essence(read_json(file)))
    for file in sorted(out.rglob("*.safetensors")):
        tensors, header = read_tensors(file)
        header.pop("sha256", None)
        found[str(file.relative_to(out))] = ({name: t.numpy().tobytes() for name, t in tensors.items()}, header)
    return found


def kill_and_compare(folder: Path, kills: int, seed: int, options: list[str]) -> tuple[int, int]:
    """Kill ``kills`` times; returns how many sweeps were compared, and of how many files. Raises AssertionError."""
    moments = random.Random(seed)
    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # imports half of torch, once for all that are forked
    began = time.monotonic()
    finish(start(folder / "let_be", options))
    usual, want = time.monotonic() - began, contents(folder / "let_be")
    compared = 0
    while kills or not compared:
        out = folder / f"killed_{compared}"
        while True:
            process = start(out, options)
            if kills:
                process.join(moments.uniform(0, usual))
            if not kills or process.exitcode is not None:
                finish(process)
                break
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # not yet a group of its own, or gone
                process.kill()
            process.join()
            kills -= process.exitcode == -signal.SIGKILL
        got = contents(out)
        assert got.keys() == want.keys(), got.keys() ^ want.keys()
        for name in want:
            assert got[name] == want[name], f"{out / name} differs"
        compared += 1
    return compared, len(want)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = ["--rounds", "3", "--iterations", "200", "--control", "reinit,random", "--seeds", "2"]
    with tempfile.TemporaryDirectory() as folder:
        sweeps, files = kill_and_compare(Path(folder), args.kills, args.seed, options)
    print(f"{args.kills} kills: {sweeps} sweeps of {files} files each ended as the one that was let be")


if __name__ == "__main__":
    main()
