"""Cases of ``csrc/cuda/bitmap_linear.cu``: products of a bitmap weight against a float64 oracle."""

import functools
import math

import numpy as np
from emulated import DTYPES, int32, nan, relative_error, sparse_memory

TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}
ACTIVATIONS = {
    "none": lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "gelu": np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))), otypes=[np.float64]),
    "silu": lambda v: v / (1 + np.exp(-v)),
}


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """An array of its own in ``dtype``; bfloat16 as bit patterns."""
    if dtype != "bfloat16":
        return np.array(values, dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def loaded(array: np.ndarray) -> np.ndarray:
    """What :func:`stored` made, in float64."""
    return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if array.dtype == np.uint16 else (
        array.astype(np.float64)
    )  # fmt: skip


def pack(weight: np.ndarray, mask: np.ndarray, dtype: str):
    """``values, bitmap, offsets`` of a weight, survivor by survivor."""
    rows, features = mask.shape
    tile_rows, tile_columns, runs = -(-rows // 8), -(-features // 8), -(-features // 128)
    padded = np.zeros((8 * tile_rows, 8 * tile_columns), bool)
    padded[:rows, :features] = mask
    tiles = padded.reshape(tile_rows, 8, tile_columns, 8).transpose(0, 2, 1, 3)
    bitmap = np.zeros((tile_rows, tile_columns), np.uint64)
    for bit in range(64):
        bitmap |= tiles[:, :, bit // 8, bit % 8].astype(np.uint64) << np.uint64(bit)
    row, column, r, c = tiles.nonzero()  # in the order of the format
    values = weight[8 * row + r, 8 * column + c]
    counts = np.bincount(row * runs + column // 16, minlength=tile_rows * runs)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    return stored(values, dtype), bitmap.view(np.int64), offsets


def device(kernels, multiprocessors: int, shared_bytes: int = 232448) -> None:
    kernels.library.sparsekit_emulate_device(multiprocessors, shared_bytes)


def linear(kernels, x, packed, bias, rows, dtype, activation="none", shape=None, x_stride=None):
    """y, by way of a work space full of NaN."""
    values, bitmap, offsets = packed
    tokens, features = shape or x.shape
    stride, code = x_stride or features, int32(DTYPES[dtype])
    y = np.full((tokens, rows), 0xFFFF, np.uint16) if dtype == "bfloat16" else nan((tokens, rows), dtype)
    sizes = tokens, features, rows, len(values)
    space = nan(kernels.size("sparsekit_cuda_bitmap_linear_workspace", x, stride, *sizes, code) // 4)
    kernels(
        "sparsekit_cuda_bitmap_linear",
        *(x, stride, values, bitmap, offsets, bias, y, *sizes, int32([*ACTIVATIONS].index(activation)), code),
        *(space, None),
    )
    return y


def random_mask(rng, rows, features, density):
    """Skewed, with empty rows and columns and one crowded tile row, unless everything survives."""
    chance = np.full((rows, features), density)
    if 0 < density < 1:
        chance *= rng.choice([0, 0.3, 1, 1, 2], size=(rows, 1)) * rng.choice([0, 1, 1, 1, 1], size=(1, features))
        chance[8:16, :130] = 1
    return rng.random((rows, features)) < chance


def check(
    kernels, tokens, rows, features, density, dtype="float16", activation="none", bias=True, multiprocessors=1,
    shared_bytes=232448,
):  # fmt: skip
    device(kernels, multiprocessors, shared_bytes)
    rng = np.random.default_rng([tokens, rows, features])
    mask = random_mask(rng, rows, features, density)
    packed = pack(rng.standard_normal((rows, features)), mask, dtype)
    dense = np.zeros((rows, features))
    dense[unpacked_places(mask)] = loaded(packed[0])
    x = stored(rng.standard_normal((tokens, features)), dtype)
    b = stored(rng.standard_normal(rows), dtype) if bias else None
    want = loaded(x) @ dense.T
    want = ACTIVATIONS[activation](want + loaded(b) if bias else want)
    y = linear(kernels, x, packed, b, rows, dtype, activation)
    error = relative_error(loaded(y), want) if want.size else 0.0
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"
    again = linear(kernels, x, packed, b, rows, dtype, activation)
    assert np.array_equal(y, again), "the same product differs the second time"


def unpacked_places(mask):
    """Rows and columns of the survivors in the order of the format."""
    row, column = mask.nonzero()
    order = np.lexsort((column % 8, row % 8, column // 8, row // 8))
    return row[order], column[order]


def strided(kernels):
    """Rows of x lie apart, aligned for copies of 16 bytes or not; NaN between them is not touched."""
    device(kernels, 1)
    rng = np.random.default_rng(5)
    mask = random_mask(rng, 19, 150, 0.3)
    packed = pack(rng.standard_normal(mask.shape), mask, "float16")
    dense = np.zeros(mask.shape)
    dense[unpacked_places(mask)] = packed[0]
    for stride, first in ((160, 0), (163, 0), (160, 1)):
        x = nan(8 * stride + 150 + first, "float16")
        rows = np.lib.stride_tricks.as_strided(x[first:], (9, 150), (2 * stride, 2))
        rows[:] = rng.standard_normal(rows.shape)
        y = linear(kernels, x[first:], packed, None, 19, "float16", shape=rows.shape, x_stride=stride)
        assert relative_error(y, rows.astype(np.float64) @ dense.T) <= TOLERANCE["float16"], (stride, first)


def brim(kernels):
    """The last run of a block fills its place to the last element; what is next to its last survivor is read too."""
    device(kernels, 1)
    mask = np.zeros((128, 128), bool)
    mask[120:, :32] = True
    x, weight = np.arange(3 * 128).reshape(3, 128).astype("float16") % 7, np.ones(mask.shape)
    y = linear(kernels, x, pack(weight, mask, "float16"), None, 128, "float16")
    assert np.array_equal(y, x @ mask.T.astype("float16"))


def far(kernels):
    """The last token of x starts beyond 2**31 elements."""
    device(kernels, 1)
    rng = np.random.default_rng(6)
    mask = random_mask(rng, 20, 24, 0.4)
    packed = pack(rng.standard_normal(mask.shape), mask, "float32")
    dense = np.zeros(mask.shape)
    dense[unpacked_places(mask)] = packed[0]
    stride = 2**30 + 8
    x = sparse_memory(2 * stride + 24, np.float32)
    rows = np.lib.stride_tricks.as_strided(x, (3, 24), (stride * 4, 4))
    rows[:] = rng.standard_normal((3, 24))
    y = linear(kernels, x, packed, None, 20, "float32", shape=(3, 24), x_stride=stride)
    assert relative_error(y, rows.astype(np.float64) @ dense.T) <= TOLERANCE["float32"]


def extreme(kernels):
    """Infinities and NaN in x reach the outputs of their token and no others; activations pass NaN on."""
    device(kernels, 1)
    mask = np.ones((9, 12), bool)
    packed = pack(np.ones(mask.shape), mask, "float16")
    x = np.zeros((3, 12), "float16")
    x[0, 3], x[1, 4], x[2, 5] = np.inf, np.nan, -np.inf
    for activation, low in (("none", -np.inf), ("relu", 0)):
        y = linear(kernels, x, packed, None, 9, "float16", activation)
        assert np.isposinf(y[0]).all() and np.isnan(y[1]).all() and (y[2] == low).all(), activation


def no_weight(kernels):
    """Nothing survives and there are no values to point at: y is the bias."""
    for dtype in TOLERANCE:
        _, bitmap, offsets = pack(np.zeros((9, 140)), np.zeros((9, 140), bool), dtype)
        bias, x = stored(np.arange(9), dtype), stored(np.ones((2, 140)), dtype)
        y = nan((2, 9), x.dtype) if dtype != "bfloat16" else np.full((2, 9), 0xFFFF, np.uint16)
        kernels(
            "sparsekit_cuda_bitmap_linear",
            *(x, 140, None, bitmap, offsets, bias, y, 2, 140, 9, 0, int32(0), int32(DTYPES[dtype])),
            *(nan(4096), None),
        )
        assert (loaded(y) == np.arange(9)).all()


def refusals(kernels):
    """Arguments that cannot run are refused with a sentence."""
    x, index, wide = np.zeros(64, "float32"), np.zeros(4, np.int32), np.zeros(4, np.int64)
    for values, sizes, activation, dtype, sentence in (
        (x, (2, 3, 3, 0), 0, 1, "Expected float16, bfloat16 or float32, got float64"),
        (x, (2, 2**31, 3, 0), 0, 0, "Expected features, rows and survivors below 2^31, got 2147483648"),
        (x, (-1, 3, 3, 0), 0, 0, "Expected a number of tokens, got -1"),
        (x, (2, 3, 3, 0), 4, 0, "Expected an activation from 0 (none) to 3 (silu), got 4"),
        (x[1:], (2, 3, 3, 0), 0, 0, "Expected values at an address that is a multiple of 16, got 0x"),
    ):
        try:
            kernels(
                "sparsekit_cuda_bitmap_linear",
                *(x, 3, values, wide, index, None, x, *sizes, int32(activation), int32(dtype), x, None),
            )
        except RuntimeError as refused:
            assert str(refused).startswith(f"bitmap linear: {sentence}"), refused
        else:
            raise AssertionError(f"{sizes} ran")


def case(*arguments, **options):
    return functools.partial(check, tokens=arguments[0], rows=arguments[1], features=arguments[2],
                             density=arguments[3], **options)  # fmt: skip


CASES = {
    "one": case(1, 1, 1, 1.0),
    "two tokens": case(2, 13, 50, 0.4, dtype="bfloat16"),
    "ragged": case(11, 45, 301, 0.3),
    "ragged bfloat16": case(13, 37, 270, 0.2, dtype="bfloat16", activation="silu"),
    "full": case(3, 40, 150, 1.0, activation="gelu"),
    "empty": case(5, 33, 70, 0.0, activation="relu"),
    "no tokens": case(0, 33, 70, 0.3),
    "no rows": case(3, 0, 70, 0.3),
    "no features": case(3, 5, 0, 0.3),
    "32 tokens": case(27, 20, 400, 0.3, activation="relu"),
    "64 tokens": case(64, 40, 264, 0.5, bias=False),
    "more tokens": case(70, 9, 140, 0.1, dtype="bfloat16"),
    "row blocks": case(4, 150, 136, 0.2),
    "many splits": case(5, 21, 1000, 0.2, multiprocessors=100, activation="silu"),
    "two stages": case(17, 24, 700, 0.6, shared_bytes=101376),
    "little shared memory": case(40, 24, 300, 1.0, shared_bytes=80000),
    "vector": case(1, 45, 303, 0.05),
    "vector bfloat16": case(1, 40, 650, 0.05, dtype="bfloat16", activation="gelu", multiprocessors=100),
    "vector tensor cores": case(1, 45, 303, 0.5),
    "float32 vector": case(1, 45, 303, 0.3, dtype="float32", activation="silu"),
    "float32": case(11, 45, 301, 0.3, dtype="float32", activation="gelu"),
    "float32 full": case(9, 20, 264, 1.0, dtype="float32", shared_bytes=101376),
    "brim": brim,
    "strided": strided,
    "far": far,
    "extreme": extreme,
    "no weight": no_weight,
    "refusals": refusals,
}
SMALLEST = ["one", "two tokens", "vector", "float32"]
LONG = {
    "long": case(64, 300, 1500, 0.4),
    "long float32": case(20, 300, 1500, 0.2, dtype="float32"),
    "long vector": case(1, 300, 3000, 0.08, dtype="bfloat16", multiprocessors=100),
    "long many tokens": case(200, 140, 800, 0.3, dtype="bfloat16", activation="gelu"),
}
