"""Real data for tickets: digits, MNIST, Fashion-MNIST and CIFAR-10, read from files that are not trusted.

Nothing is downloaded and nothing is unpickled: the files are the usual IDX and CIFAR-10 binary ones,
plain or compressed, and are checked before a tensor is made of them.
"""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["NAMES", "Dataset", "data_dir", "find", "load"]

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")

# Folders under the data directory, in the order they are tried; "" is the directory itself.
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST", ""),
    "fashion-mnist": ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "FashionMNIST", ""),
    "cifar10": ("cifar-10-batches-bin", "cifar10", "CIFAR10/cifar-10-batches-bin", ""),
}
_IDX = {"train": 60000, "t10k": 10000}
_CIFAR_IMAGES, _CIFAR_RECORD = 10000, 1 + 3 * 32 * 32
_XZ_MEMORY = 1 << 28  # bytes; `xz -9` needs 65 MiB to decompress, a hostile header may ask for 4 GiB
# MNIST and Fashion-MNIST share file names and sizes; their first training labels tell them apart.
_FIRST_LABELS = {"mnist": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "fashion-mnist": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5)}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in memory, split for a search.

    ``*_x`` are float32 ``[N, C, H, W]``, normalised with ``mean`` and ``std`` (one per channel, of the
    training part, for pixels scaled to [0, 1]); ``*_y`` are int64 ``[N]`` in ``[0, classes)``.
    ``note`` says what was read.
    """

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return tuple(self.train_x.shape[1:])

    def to(self, device: torch.device | str) -> Dataset:
        """The same data with every tensor on ``device``."""
        parts = ("train_x", "train_y", "val_x", "val_y", "test_x", "test_y")
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})


def load(
    name: str, directory: str | Path | None = None, *, validation: int | None = None, seed: int = 0
) -> Dataset:
    """Load a data set by name, split into training, validation and test parts.

    The test part is always the same. The validation part is drawn from the rest by ``seed``, which
    leaves torch's global generator alone.

    Args:
        name: ``"digits"`` (8x8, from scikit-learn), ``"mnist"``, ``"fashion-mnist"`` or ``"cifar10"``.
        directory: where the files are; default: the environment variable ``SPARSEKIT_DATA``.
        validation: how many training images to validate on; default 200 for digits, else 1/12 of MNIST
            (55000 + 5000) and 1/10 of CIFAR-10 (45000 + 5000) as in Frankle & Carbin, arXiv:1803.03635.

    Raises: ValueError on an unknown name, a bad split, or a torn or foreign file; FileNotFoundError
    with the files that are missing and where to put them; ModuleNotFoundError without scikit-learn.
    """
    if name not in NAMES:
        raise ValueError(f"Expected a data set of {', '.join(NAMES)}, got {name!r}")
    if name == "digits":
        x, y, test_x, test_y, top, note = _digits()
    else:
        files = find(name, directory)
        x, y, test_x, test_y, note = _cifar10(files) if name == "cifar10" else _mnist(name, files)
        top = 255
    if validation is None:
        validation = {"digits": 200, "cifar10": len(y) // 10}.get(name, len(y) // 12)
        validation = max(1, validation)
    if isinstance(validation, bool) or not isinstance(validation, int) or not 0 < validation < len(y):
        raise ValueError(f"{name}: Expected 0 < validation < {len(y)} images, got {validation!r}")

    generator = torch.Generator().manual_seed(seed)
    order = _stratified(y, generator) if name == "digits" else torch.randperm(len(y), generator=generator)
    val, train = order[:validation].sort().values, order[validation:].sort().values
    mean, std = _mean_std(x[train], top)

    center, scale = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)

    def normal(images: Tensor) -> Tensor:
        return images.float().div_(top).sub_(center).div_(scale)

    parts = normal(x[train]), y[train], normal(x[val]), y[val], normal(test_x), test_y
    return Dataset(name, 10, *parts, mean=mean, std=std, note=note)


def data_dir(directory: str | Path | None = None) -> Path | None:
    """``directory``, else the one that ``SPARSEKIT_DATA`` names, else None."""
    given = directory if directory is not None else os.environ.get("SPARSEKIT_DATA") or None
    return None if given is None else Path(given).expanduser()


def find(name: str, directory: str | Path | None = None) -> dict[str, Path]:
    """The files of a data set, ``{"train-images": path, …}``; nothing is read.

    Raises FileNotFoundError that says which files are missing, where they go, and what sets the directory.
    """
    if name not in _FOLDERS:
        raise ValueError(f"Expected a data set with files ({', '.join(_FOLDERS)}), got {name!r}")
    root = data_dir(directory)
    wanted = _wanted(name)
    where = f"{_FOLDERS[name][0]}/ in a data directory named by SPARSEKIT_DATA or --data-dir"
    if root is None:
        raise FileNotFoundError(f"{name}: Expected {wanted} in {where}, got no directory")
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: Expected {wanted} in {where}, got {root}, which is not a directory")
    missing = ""
    for folder in _FOLDERS[name]:
        files = {role: path for role, names in _roles(name) if (path := _first(root / folder, names))}
        if _whole(name, files):
            return files
        if files and not missing:
            lacking = [role for role, _ in _roles(name) if role not in files]
            missing = f"; {root / folder} lacks {', '.join(lacking)}"
    if name == "cifar10" and (root / "cifar-10-batches-py").is_dir():
        missing += (
            f"; {root / 'cifar-10-batches-py'} is the Python version, which is pickled and so not read:"
            " get the binary version (cifar-10-binary.tar.gz)"
        )
    raise FileNotFoundError(f"{name}: Expected {wanted} in {where}, got {root} without them{missing}")


def _wanted(name: str) -> str:
    if name == "cifar10":
        return "data_batch_1.bin … data_batch_5.bin (any of them) and test_batch.bin (or .bin.xz)"
    return ", ".join(names[0] for _, names in _roles(name)) + " (or .gz)"


def _roles(name: str) -> Iterator[tuple[str, list[str]]]:
    """(role, file names that can play it, the best first)."""
    if name == "cifar10":
        for role in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            yield role, [f"{role}.bin{suffix}" for suffix in ("", ".xz", ".gz")]
        return
    for part in _IDX:
        for kind, rank in (("images", 3), ("labels", 1)):
            stems = [f"{part}-{kind}{dot}idx{rank}-ubyte" for dot in "-."]
            yield f"{part}-{kind}", [stem + suffix for stem in stems for suffix in ("", ".gz", ".xz")]


def _first(folder: Path, names: list[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _whole(name: str, files: dict[str, Path]) -> bool:
    if name == "cifar10":
        return "test_batch" in files and len(files) > 1
    return len(files) == 4


def _read(path: Path, limit: int) -> bytes:
    """At most ``limit + 1`` bytes of the content of a plain, gzip or xz file, so that no bomb goes off."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read(limit + 1)
        if path.suffix == ".xz":
            return _read_xz(path, limit)
        with path.open("rb") as file:
            return file.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        kind = path.suffix.removeprefix(".")
        why = f"{path}: Expected a whole {kind} file, got a torn or foreign one ({error})"
        raise ValueError(why) from None


def _read_xz(path: Path, limit: int) -> bytes:
    decompressor = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)  # lzma.open() has no such limit
    content = bytearray()
    with path.open("rb") as file:
        while len(content) <= limit and not decompressor.eof:
            chunk = b""
            if decompressor.needs_input and not (chunk := file.read(1 << 16)):
                raise EOFError("it ends early")
            content += decompressor.decompress(chunk, limit + 1 - len(content))
    return bytes(content)


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of bytes as uint8 ``[n, *shape[1:]]`` with ``n <= shape[0]``."""
    rank = len(shape)
    head = 4 + 4 * rank
    content = _read(path, head + int(np.prod(shape)))
    magic = bytes((0, 0, 8, rank))  # 8: unsigned bytes
    if content[:4] != magic:
        got = content[:4].hex() or "nothing"
        raise ValueError(f"{path}: Expected an IDX file with magic {magic.hex()}, got {got}")
    if len(content) < head:
        raise ValueError(f"{path}: Expected an IDX header of {head} bytes, got {len(content)}")
    got = tuple(int(n) for n in np.frombuffer(content, ">u4", rank, 4))
    if got[1:] != shape[1:] or not 0 < got[0] <= shape[0]:
        size = "x".join(map(str, shape[1:])) + " " if rank > 1 else ""
        raise ValueError(f"{path}: Expected 1 to {shape[0]} {size}items, got {'x'.join(map(str, got))}")
    expected = head + int(np.prod(got))
    if len(content) != expected:
        more = "more" if len(content) > expected else len(content)
        raise ValueError(f"{path}: Expected {expected} bytes, as its header says, got {more}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(got).copy())


def _labels(path: Path, labels: Tensor) -> Tensor:
    if len(labels) and int(labels.max()) > 9:
        raise ValueError(f"{path}: Expected labels 0 to 9, got {int(labels.max())}")
    return labels.long()


Parts = tuple[Tensor, Tensor, Tensor, Tensor, str]


def _mnist(name: str, files: dict[str, Path]) -> Parts:
    parts = []
    for part, count in _IDX.items():
        image_path, label_path = files[f"{part}-images"], files[f"{part}-labels"]
        images = _read_idx(image_path, (count, 28, 28)).unsqueeze(1)
        labels = _labels(label_path, _read_idx(label_path, (count,)))
        if len(images) != len(labels):
            raise ValueError(f"{label_path}: Expected {len(images)} labels, one per image, got {len(labels)}")
        parts += [images, labels]
    for other, first in _FIRST_LABELS.items():
        if other != name and tuple(parts[1][:10].tolist()) == first:
            raise ValueError(f"{files['train-labels']}: Expected the labels of {name}, got those of {other}")
    folder = files["train-images"].parent
    if len(parts[1]) < 2:
        raise ValueError(f"{files['train-labels']}: Expected at least 2 training images, got {len(parts[1])}")
    return *parts, f"{len(parts[1])} training and {len(parts[3])} test images from {folder}"


def _cifar10(files: dict[str, Path]) -> Parts:
    batches = [role for role in files if role != "test_batch"]
    loaded = [_read_cifar(files[role]) for role in (*batches, "test_batch")]
    images, labels = (torch.cat(tensors) for tensors in zip(*loaded[:-1], strict=True))
    numbers = ", ".join(role.rpartition("_")[2] for role in batches)
    return images, labels, *loaded[-1], f"training batches found: {numbers} ({len(labels)} images)"


def _read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """A batch as uint8 images ``[10000, 3, 32, 32]`` and int64 labels ``[10000]``."""
    expected = _CIFAR_IMAGES * _CIFAR_RECORD
    content = _read(path, expected)
    if len(content) != expected:
        got = "more" if len(content) > expected else len(content)
        raise ValueError(f"{path}: Expected {expected} bytes ({_CIFAR_IMAGES} images of CIFAR-10), got {got}")
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(_CIFAR_IMAGES, _CIFAR_RECORD).copy())
    return records[:, 1:].reshape(-1, 3, 32, 32), _labels(path, records[:, 0])


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor, int, str]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"digits: Expected scikit-learn, which has them, got {error}; pip install 'sparsekit[demo]'"
        ) from None
    found = load_digits()
    images = torch.from_numpy(found.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(found.target.astype(np.int64))
    order = _stratified(labels, torch.Generator().manual_seed(0))  # the file is sorted by writer
    train, test = order[:1400].sort().values, order[1400:].sort().values
    note = "1797 handwritten digits of 8x8 pixels from scikit-learn, 1400 for training and validation"
    return images[train], labels[train], images[test], labels[test], 16, note


def _stratified(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation of which every prefix holds the classes in nearly their shares."""
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        at = (labels == label).nonzero().flatten()
        at = at[torch.randperm(len(at), generator=generator)]
        place[at] = (torch.arange(len(at), dtype=torch.float64) + 0.5) / len(at)
    return place.argsort(stable=True)


def _mean_std(images: Tensor, top: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel of uint8 ``[N, C, H, W]``; summed in integers, so equal on any number of threads."""
    count = images.numel() // images.shape[1]
    total = images.sum((0, 2, 3), dtype=torch.int64).double()
    squares = sum(part.int().square_().sum((0, 2, 3), dtype=torch.int64) for part in images.split(4096))
    mean = total / count
    std = (squares.double() / count - mean.square()).clamp_min(0).sqrt()
    std[std == 0] = top  # constant images: leave their scale alone
    return tuple((mean / top).tolist()), tuple((std / top).tolist())
