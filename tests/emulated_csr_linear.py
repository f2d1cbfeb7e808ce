"""Cases of ``csrc/cuda/csr_linear.cu``: products and sampled products of a CSR weight against a float64 oracle."""

import functools
from dataclasses import dataclass

import numpy as np
from emulated import DTYPES, Kernels, int32, nan, relative_error, sparse_memory

TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


@dataclass
class Weight:
    """A random sparse ``[rows, features]`` matrix with both of its index structures."""

    dense: np.ndarray
    values: np.ndarray
    crow: np.ndarray
    columns: np.ndarray
    t_crow: np.ndarray
    t_row: np.ndarray
    t_perm: np.ndarray


def offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def weight(rng, rows: int, features: int, density: float, dtype: str) -> Weight:
    """Row lengths are skewed and a few rows and columns are empty, unless everything survives."""
    chance = np.full((rows, features), density)
    if density < 1:
        chance *= rng.choice([0, 0.3, 1, 1, 2], size=(rows, 1)) * rng.choice([0, 1, 1, 1, 1], size=(1, features))
    mask = rng.random((rows, features)) < chance
    dense = np.where(mask, rng.standard_normal((rows, features)), 0).astype(dtype)
    row, column = mask.nonzero()
    order = np.argsort(column, kind="stable")
    return Weight(
        dense.astype(np.float64),
        dense[row, column],
        offsets(mask.sum(1)),
        column.astype(np.int32),
        offsets(mask.sum(0)),
        row[order].astype(np.int32),
        order.astype(np.int32),
    )


def work_space(kernels: Kernels, name: str, *sizes) -> np.ndarray:
    return nan(max(1, kernels.size(name, *sizes)) // 8 + 2, np.float64)[: -(-kernels.size(name, *sizes) // 8)]


def device(kernels: Kernels, multiprocessors: int, shared_bytes: int = 232448) -> None:
    kernels.library.sparsekit_emulate_device(multiprocessors, shared_bytes)


def linear(kernels, x, values, perm, crow, columns, bias, rows, dtype, x_stride=None, y=None, y_stride=None):
    tokens, features = x.shape
    code = int32(DTYPES[dtype])
    y = nan((tokens, rows), dtype) if y is None else y
    sizes = (tokens, features, rows, len(columns))
    space = work_space(kernels, "sparsekit_cuda_csr_linear_workspace", *sizes, code)
    strides = x_stride or features, y_stride or rows
    kernels(
        "sparsekit_cuda_csr_linear",
        *(x, strides[0], values, perm, crow, columns, bias, y, strides[1], *sizes, code, space, None),
    )
    return y


def sddmm(kernels, dy, x, crow, columns, dtype):
    code = int32(DTYPES[dtype])
    out = nan(len(columns), dtype)
    sizes = (x.shape[0], x.shape[1], dy.shape[1], len(columns))
    space = work_space(kernels, "sparsekit_cuda_csr_sddmm_workspace", *sizes, code)
    kernels(
        "sparsekit_cuda_csr_sddmm",
        *(dy, dy.shape[1], x, x.shape[1], crow, columns, out, *sizes, code, space, None),
    )
    return out


def check(kernels, tokens, rows, features, density, dtype="float32", multiprocessors=1000, shared_bytes=232448):
    """All three products; one multiprocessor makes the launchers choose the large tiles, many the small ones."""
    device(kernels, multiprocessors, shared_bytes)
    rng = np.random.default_rng([tokens, rows, features])
    w = weight(rng, rows, features, density, dtype)
    x, dy = rng.standard_normal((tokens, features)).astype(dtype), rng.standard_normal((tokens, rows)).astype(dtype)
    bias = rng.standard_normal(rows).astype(dtype)
    exact_x, exact_dy = x.astype(np.float64), dy.astype(np.float64)

    def close(what, got, reference):
        error = relative_error(got, reference)
        assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e}"

    y = linear(kernels, x, w.values, None, w.crow, w.columns, bias, rows, dtype)
    close("y", y, exact_x @ w.dense.T + bias)
    again = linear(kernels, x, w.values, None, w.crow, w.columns, bias, rows, dtype)
    assert np.array_equal(y, again), "the same product differs the second time"
    dx = linear(kernels, dy, w.values, w.t_perm, w.t_crow, w.t_row, None, features, dtype)
    close("dx", dx, exact_dy @ w.dense)
    row = np.repeat(np.arange(rows), np.diff(w.crow))
    close("dw", sddmm(kernels, dy, x, w.crow, w.columns, dtype), (exact_dy.T @ exact_x)[row, w.columns])


def strided(kernels):
    """Rows of x and y lie apart; what lies between the rows of y is left alone."""
    device(kernels, 1000)
    rng = np.random.default_rng(5)
    w = weight(rng, 19, 30, 0.3, "float32")
    wide, y = rng.standard_normal((9, 40)).astype("float32"), np.full((9, 25), 7, "float32")
    x = wide[:, :30]
    linear(kernels, x, w.values, None, w.crow, w.columns, None, 19, "float32", 40, y, 25)
    assert relative_error(y[:, :19], x.astype(np.float64) @ w.dense.T) < TOLERANCE["float32"]
    assert (y[:, 19:] == 7).all()


def far(kernels):
    """The last row of x and y starts beyond 2**31 elements."""
    device(kernels, 1000)
    rng = np.random.default_rng(6)
    w = weight(rng, 20, 24, 0.4, "float32")
    stride = 2**30 + 8
    x, y = sparse_memory(2 * stride + 24, np.float32), sparse_memory(2 * stride + 20, np.float32)
    rows = np.lib.stride_tricks.as_strided(x, (3, 24), (stride * 4, 4))
    rows[:] = rng.standard_normal((3, 24))
    linear(kernels, rows, w.values, None, w.crow, w.columns, None, 20, "float32", stride, y, stride)
    got = np.lib.stride_tricks.as_strided(y, (3, 20), (stride * 4, 4))
    assert relative_error(got, rows.astype(np.float64) @ w.dense.T) < TOLERANCE["float32"]


def infinite(kernels):
    """An infinite input reaches only the outputs whose rows use its feature."""
    device(kernels, 1000)
    rng = np.random.default_rng(7)
    w = weight(rng, 40, 50, 0.2, "float32")
    x = rng.standard_normal((5, 50)).astype("float32")
    feature = int((w.dense != 0).sum(0).argmax())
    x[2, feature] = np.inf
    y = linear(kernels, x, w.values, None, w.crow, w.columns, None, 40, "float32")
    uses = w.dense[:, feature] != 0
    assert uses.any() and not uses.all()
    assert np.isinf(y[2, uses]).all()
    assert np.isfinite(y[2, ~uses]).all()
    assert np.isfinite(np.delete(y, 2, 0)).all()


def refusals(kernels):
    """Arguments that cannot run are refused with a sentence."""
    x, index = np.zeros((2, 3), "float32"), np.zeros(4, np.int32)
    for sizes, dtype, sentence in (
        ((2, 3, 3, 0), 3, "csr linear: Expected float32 or float64, got bfloat16"),
        ((2, 2**31, 3, 0), 0, "csr linear: Expected features, rows and survivors below 2^31, got 2147483648"),
        ((-1, 3, 3, 0), 0, "csr linear: Expected a number of tokens, got -1"),
    ):
        try:
            kernels("sparsekit_cuda_csr_linear", x, 3, x, None, index, index, None, x, 3, *sizes, int32(dtype), x, None)
        except RuntimeError as refused:
            assert str(refused) == sentence, refused
        else:
            raise AssertionError(f"{sizes} ran")


def case(*arguments, **options):
    return functools.partial(check, tokens=arguments[0], rows=arguments[1], features=arguments[2],
                             density=arguments[3], **options)  # fmt: skip


CASES = {
    "one": case(1, 1, 1, 1.0),
    "ragged": case(37, 45, 83, 0.3),
    "ragged double": case(37, 45, 83, 0.3, dtype="float64"),
    "full": case(5, 33, 70, 1.0),
    "empty": case(5, 33, 70, 0.0),
    "no tokens": case(0, 33, 70, 0.3),
    "no rows": case(3, 0, 70, 0.3),
    "no features": case(3, 5, 0, 0.3),
    "token tail": case(130, 17, 65, 0.2),
    "token splits": case(2100, 5, 9, 0.5),
    "wide": case(259, 140, 203, 0.2, multiprocessors=1),
    "wide double": case(131, 129, 97, 0.3, dtype="float64", multiprocessors=1),
    "tall": case(131, 260, 390, 0.02, multiprocessors=1),
    "tall double": case(66, 257, 193, 0.02, dtype="float64", multiprocessors=1),
    "sampled in parts": case(3, 90, 100, 0.9, multiprocessors=1),
    "less shared memory": case(40, 140, 110, 0.3, multiprocessors=1, shared_bytes=101376),
    "strided": strided,
    "far": far,
    "infinite": infinite,
    "refusals": refusals,
}
SMALLEST = ["one", "ragged", "no features", "no tokens", "sampled in parts"]
LONG = {
    "long wide": case(1030, 520, 610, 0.1, multiprocessors=1),
    "long tall": case(520, 1030, 800, 0.02, multiprocessors=1),
    "long double": case(400, 520, 410, 0.1, dtype="float64", multiprocessors=1),
    "long small": case(400, 300, 410, 0.1),
}
