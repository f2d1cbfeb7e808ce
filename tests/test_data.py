"""Loaders: right splits from good files, a sentence from bad ones."""

import gzip
import lzma
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekit import data

PREFIX = {"train": "train", "test": "t10k"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("SPARSEKIT_DATA", raising=False)


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    head = struct.pack(">I", 0x800 + array.ndim if magic is None else magic)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28))


def write_mnist(folder: Path, train: int = 48, test: int = 10, pack=lambda b: b, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("test", test)):
        (folder / f"{PREFIX[part]}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images(count))))
        labels = np.arange(count) % 10
        (folder / f"{PREFIX[part]}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    return folder


def test_digits_are_split_evenly_and_normalised():
    found = data.load("digits")
    assert found.train_x.shape == (1200, 1, 8, 8) and found.train_x.dtype == torch.float32
    assert (len(found.val_y), len(found.test_y), found.classes) == (200, 397, 10)
    assert found.train_y.dtype == torch.int64 and found.input_shape == (1, 8, 8)
    assert found.train_x.mean().abs() < 1e-5 and abs(found.train_x.std() - 1) < 1e-3
    for labels, share in ((found.val_y, 20), (found.test_y, 39.7)):
        assert (labels.bincount(minlength=10) - share).abs().max() <= 3


def test_splits_depend_on_the_seed_alone_and_spare_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = data.load("digits", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = data.load("digits", seed=5), data.load("digits", seed=6)
    assert torch.equal(first.train_x, again.train_x) and torch.equal(first.val_y, again.val_y)
    assert not torch.equal(first.val_x, other.val_x)
    assert torch.equal(first.test_y, other.test_y)  # the test part is no choice of the seed


def test_parts_are_disjoint_and_complete(tmp_path):
    write_mnist(tmp_path / "mnist")
    found = data.load("mnist", tmp_path, validation=8)
    raw = torch.from_numpy(images(48)).float().flatten(1) / 255
    mean, std = torch.tensor(found.mean), torch.tensor(found.std)
    parts = torch.cat([found.train_x, found.val_x]).flatten(1) * std + mean
    assert len(found.train_y) == 40
    nearest = torch.cdist(parts, raw, compute_mode="donot_use_mm_for_euclid_dist")
    assert sorted(nearest.argmin(1).tolist()) == list(range(48)) and nearest.min(1).values.max() < 1e-3


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("mnist", "."),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_layouts(tmp_path, name, folder):
    write_mnist(tmp_path / folder)
    found = data.load(name, tmp_path)
    assert found.train_x.shape == (44, 1, 28, 28) and len(found.val_y) == 4 and len(found.test_y) == 10
    assert "48 training" in found.note


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_idx_equals_plain(tmp_path, suffix, pack):
    write_mnist(tmp_path / "a")
    write_mnist(tmp_path / "b", pack=pack, suffix=suffix)
    plain, packed = data.load("mnist", tmp_path / "a"), data.load("mnist", tmp_path / "b")
    assert torch.equal(plain.train_x, packed.train_x) and torch.equal(plain.test_y, packed.test_y)


def test_directory_from_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("SPARSEKIT_DATA", str(tmp_path))
    assert len(data.load("mnist").test_y) == 10


def test_statistics_are_of_the_training_part(tmp_path):
    write_mnist(tmp_path)
    found = data.load("mnist", tmp_path)
    assert abs(found.train_x.double().mean()) < 1e-6
    assert abs(found.train_x.double().std(correction=0) - 1) < 1e-6


def test_constant_images_do_not_divide_by_zero(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.full((48, 28, 28), 7)))
    found = data.load("mnist", tmp_path)
    assert found.train_x.abs().max() < 1e-6 and found.test_x.isfinite().all()


BAD_IMAGES = {
    "wrong magic": (idx(images(48), magic=0x801), "magic 00000803, got 00000801"),
    "empty": (b"", "got nothing"),
    "header only begun": (idx(images(48))[:9], "header of 16 bytes, got 9"),
    "truncated": (idx(images(48))[:-5], "Expected 37648 bytes, as its header says, got 37643"),
    "trailing bytes": (idx(images(48)) + b"x", "got more"),
    "wrong size": (idx(np.zeros((48, 32, 32))), "28x28 items, got 48x32x32"),
    "no image": (idx(np.zeros((0, 28, 28))), "Expected 1 to 60000"),
    "too many": (struct.pack(">4I", 0x803, 2**32 - 1, 28, 28), "got 4294967295x28x28"),
    "other count": (idx(images(47)), "Expected 47 labels, one per image, got 48"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_idx_files_are_named(tmp_path, case):
    content, message = BAD_IMAGES[case]
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-\w+-idx") as caught:
        data.load("mnist", tmp_path)
    assert message in str(caught.value)


def test_label_out_of_range(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(10) + 1))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte: Expected labels 0 to 9, got 10"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_torn_and_foreign_compressed_files(tmp_path, suffix, pack):
    write_mnist(tmp_path, pack=pack, suffix=suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for bad in (whole[: len(whole) // 2], whole[:-3], bytes(flipped), b"<html>not found</html>", b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
            data.load("mnist", tmp_path)


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_a_bomb_is_read_no_further_than_a_data_set_is_large(tmp_path, suffix, opener):
    resource = pytest.importorskip("resource")
    write_mnist(tmp_path)
    bomb = tmp_path / f"train-images-idx3-ubyte{suffix}"
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with opener(bomb, "wb", **({"preset": 0} if suffix == ".xz" else {"compresslevel": 1})) as file:
        file.write(struct.pack(">4I", 0x803, 60000, 28, 28))
        for _ in range(300):
            file.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="Expected 47040016 bytes, as its header says, got more"):
        data.load("mnist", tmp_path)
    if sys.platform == "linux":  # KiB; the whole content would be 300 MiB
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_an_xz_header_may_not_ask_for_gigabytes(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    # Compressing with so large a dictionary would itself need gigabytes: rewrite the header instead.
    packed = bytearray(lzma.compress(idx(images(48)), check=lzma.CHECK_NONE))
    header = packed[12:24]  # size, flags, filter, size of its properties, dictionary, padding, CRC
    assert header[2:4] == b"\x21\x01"
    header[4] = 36  # a dictionary of 1 GiB
    header[8:12] = struct.pack("<I", zlib.crc32(header[:8]))
    packed[12:24] = header
    (tmp_path / "train-images-idx3-ubyte.xz").write_bytes(bytes(packed))
    with pytest.raises(ValueError, match="Expected a whole xz file"):
        data.load("mnist", tmp_path)


def test_missing_files_say_what_goes_where(tmp_path):
    for where in (None, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError) as caught:
            data.load("mnist", where)
        for part in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "mnist/", "SPARSEKIT_DATA"):
            assert part in str(caught.value)
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="mnist lacks t10k-images"):
        data.load("mnist", tmp_path)


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path):
    write_mnist(tmp_path)
    labels = np.r_[data._FIRST_LABELS["mnist"], np.zeros(38)]
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    assert data.load("mnist", tmp_path).name == "mnist"
    with pytest.raises(ValueError, match="Expected the labels of fashion-mnist, got those of mnist"):
        data.load("fashion-mnist", tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="digits, mnist, fashion-mnist, cifar10, got 'imagenet'"):
        data.load("imagenet")
    for bad in (0, 1400, -1, True, 2.5):
        with pytest.raises(ValueError, match="digits: Expected 0 < validation < 1400"):
            data.load("digits", validation=bad)


@pytest.fixture(scope="module")
def cifar_batch() -> bytes:
    records = np.random.default_rng(0).integers(0, 256, (10000, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(10000) % 10
    records[:, 1 : 1 + 1024] = 10 + np.arange(10000)[:, None] % 7  # red
    records[:, 1025 : 1 + 2048] //= 2  # green
    return records.tobytes()


def test_cifar_uses_the_batches_it_finds(tmp_path, cifar_batch):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "data_batch_4.bin").write_bytes(cifar_batch)
    quick = {"preset": 0, "check": lzma.CHECK_CRC32}
    (folder / "test_batch.bin.xz").write_bytes(lzma.compress(bytes(30_730_000), **quick))
    found = data.load("cifar10", tmp_path)
    assert found.note == "training batches found: 4 (10000 images)"
    assert (
        found.train_x.shape == (9000, 3, 32, 32) and len(found.val_y) == 1000 and len(found.test_y) == 10000
    )
    red, green, blue = (255 * m for m in found.mean)
    assert red == pytest.approx(13, abs=0.1) and green == pytest.approx(63.5, abs=1)
    assert blue == pytest.approx(127.5, abs=1)
    assert found.train_x.std((0, 2, 3)) == pytest.approx([1, 1, 1], abs=1e-3)


def test_bad_cifar_files_are_named(tmp_path, cifar_batch):
    (tmp_path / "test_batch.bin").write_bytes(cifar_batch)
    batch = tmp_path / "data_batch_1.bin"
    batch.write_bytes(cifar_batch[:-1])
    with pytest.raises(ValueError, match=r"data_batch_1.bin: Expected 30730000 bytes .* got 30729999"):
        data.load("cifar10", tmp_path)
    batch.write_bytes(cifar_batch + b"\0")
    with pytest.raises(ValueError, match=r"data_batch_1.bin: Expected 30730000 bytes .* got more"):
        data.load("cifar10", tmp_path)
    batch.write_bytes(b"\x63" + cifar_batch[1:])
    with pytest.raises(ValueError, match=r"data_batch_1.bin: Expected labels 0 to 9, got 99"):
        data.load("cifar10", tmp_path)


def test_the_pickled_cifar_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FileNotFoundError, match="pickled and so not read: get the binary version"):
        data.load("cifar10", tmp_path)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sparsekit\[demo\]'"):
        data.load("digits")


def test_to_moves_every_tensor():
    moved = data.load("digits").to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
