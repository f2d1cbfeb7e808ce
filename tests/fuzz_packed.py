"""Mutated packed files: each gives a sentence or the model that was saved, never a crash, a hang or much memory.

``python tests/fuzz_packed.py 10000 [seed]`` runs as many under a limit of memory and time; the test suite runs a slice.
Half of the mutations hit the bytes of the file, the others its header and tensors, and those are signed again, so that
they get past the hash: what they hold must then be a state of the shapes it claims.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekit as sk
from sparsekit.export import describe, read_portable
from sparsekit.export.inspect import render
from sparsekit.files import _hash
from sparsekit.nn import dense_state

_STRANGE = [
    None, True, -1, 0, 1, 7, 2**31, 2**62, 10**30, 0.5, float("nan"), "", "csr", "os.system", "block:9999999x1", "2:4",
    "block:2x2", "channel", "unstructured", "bitmap", "elias-fano", [], [0], [2**40, 2**40], [-3, 4], [1] * 70, {},
    {"a": 1},
]  # fmt: skip


def make(folder: Path) -> tuple[Path, nn.Module, dict]:
    """A packed file that uses both codings, a pattern and plain tensors; the model, and its dense state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 24), nn.Linear(24, 16))
    masks = {
        name: torch.rand(model.get_parameter(name).shape) < d for name, d in (("0.weight", 0.5), ("3.weight", 0.1))
    }
    masks["4.weight"] = (torch.rand(2, 24) < 0.4).repeat_interleave(8, 0)
    ticket = sk.convert(model, masks, impl="csr")
    path = folder / "good.safetensors"
    sk.save(ticket, path, recipe={"rounds": 3})
    facts = [row["coding"] for row in describe(path)["tensors"]]
    assert {"bitmap", "elias-fano"} <= {*facts}
    return path, model, dense_state(ticket)


def mutate_bytes(good: bytes, rng: random.Random) -> bytes:
    """A few edits anywhere, or in the two lengths that the file begins with and its header."""
    data = bytearray(good)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        reach = rng.choice((8, min(header, len(data)), len(data)))
        at = rng.randrange(min(reach, len(data)))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice((1, 7, 300))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == 4:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64))))
        else:
            other = rng.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def mutate_contents(path: Path, rng: random.Random, out: Path) -> None:
    """Edits of header entries and whole tensors, signed like a file that somebody wrote on purpose."""
    tensors = load_file(path)
    with open(path, "rb") as file:
        whole = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header = json.loads(whole["__metadata__"]["sparsekit"])
    header.pop("sha256")
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = header
        while True:
            key = rng.choice(list(where))
            if not (isinstance(where[key], dict) and where[key]) or rng.random() < 0.1:
                break
            where = where[key]
        kind = rng.randrange(5)
        if kind == 0:
            del where[key]
        elif kind == 1 and isinstance(where[key], list) and where[key]:
            where[key][rng.randrange(len(where[key]))] = copy.deepcopy(rng.choice(_STRANGE))
        elif kind <= 2:
            where[key] = copy.deepcopy(rng.choice(_STRANGE))
        elif tensors:
            name = rng.choice(list(tensors))
            tensor = tensors[name]
            if kind == 3:
                tensors[name] = rng.choice(
                    (
                        tensor.reshape(-1)[:0],
                        tensor.reshape(-1).repeat(2),
                        tensor.double(),
                        tensor.to(torch.uint8),
                        tensor.reshape(1, -1),
                    )
                )
            else:
                raw = (
                    bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes()) if tensor.dim() else bytearray()
                )
                if raw:
                    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
                    tensors[name] = torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
        if not header:
            break
    text = json.dumps({**header, "sha256": _hash(tensors, json.loads(json.dumps(header)))})
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, out, {"sparsekit": text})


def check(path: Path, model: nn.Module, good: dict | None) -> str:
    """Read a file every way there is; returns what came of it, raises where that is not allowed."""
    try:
        render(describe(path))
        state, masks, _ = read_portable(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are none, and of dead layers
            sk.load(path, model, impl="saved")
    except (ValueError, TypeError) as error:
        assert str(path) in str(error) or "Expected" in str(error), f"no clear sentence: {error!r}"
        return "refused"
    if good is not None:
        assert state.keys() == good.keys() and all(_same(state[name], good[name]) for name in good), "another model"
    for name, mask in masks.items():
        assert mask.shape == state[name].shape and not state[name][~mask].any()
    return "read"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def fuzz(count: int, seed: int, folder: Path) -> dict[str, int]:
    """How many of ``count`` mutated files were refused and how many read; raises naming the seed of a bad one."""
    path, model, good = make(folder)
    whole, out, found = path.read_bytes(), folder / "bad.safetensors", {"refused": 0, "read": 0}
    assert check(path, model, good) == "read"
    for number in range(seed, seed + count):
        rng = random.Random(number)
        signed = number % 2
        mutate_contents(path, rng, out) if signed else out.write_bytes(mutate_bytes(whole, rng))
        start = time.perf_counter()
        try:
            found[check(out, model, None if signed else good)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - start < 5, f"mutation {number} took {time.perf_counter() - start:.1f} s"
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))  # torch and its libraries map 3 to 4 of them
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("a file hung"))
    signal.alarm(1200)
    with tempfile.TemporaryDirectory() as name:
        print(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(name)))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
