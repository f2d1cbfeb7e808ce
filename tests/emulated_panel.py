"""Cases of ``csrc/cuda/panel_*.cu``: linear layers and convolutions with blocks of 8 or 16 outputs, float64 oracle."""

import math
from dataclasses import dataclass, replace

import numpy as np
from emulated import DTYPES, Kernels, int32, nan, relative_error

SOURCES = ["panel_product", "panel_gradient"]
TOLERANCE = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 4e-3}
ACTIVATIONS = ["none", "relu", "gelu", "silu"]
CODES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # bfloat16 as bit patterns


@dataclass(frozen=True)
class Shape:
    """What ``struct PanelShape`` holds but for the blocks; a linear layer is an image of one line."""

    batch: int
    inputs: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    block: tuple[int, int] = (8, 1)
    dtype: str = "bfloat16"
    chunk: int = 0
    stages: int = 0
    split: int = 0
    warps: int = 0

    def size(self) -> tuple[int, int]:
        """Height and width of the output."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        sides = zip((self.height, self.width), self.padding, reach, self.stride, strict=True)
        return tuple((side + 2 * pad - span) // step + 1 for side, pad, span, step in sides)

    def struct(self, blocks: int) -> np.ndarray:
        tail = (self.groups, *self.block, blocks, DTYPES[self.dtype], self.chunk, self.stages, self.split, self.warps)
        head = (self.batch, self.inputs, self.height, self.width, self.outputs)
        return np.array([*head, *self.kernel, *self.stride, *self.padding, *self.dilation, *tail], np.int64)


def linear(tokens: int, inputs: int, outputs: int, **options) -> Shape:
    return Shape(1, inputs, 1, tokens, outputs, **options)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """An array of its own in ``dtype``, rounded to nearest even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def plain(values: np.ndarray, dtype: str) -> np.ndarray:
    """What an array in ``dtype`` holds, in float64."""
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def decode(values: np.ndarray, dtype: str) -> np.ndarray:
    """The same as tensor cores read it: of a float32 10 bits of mantissa, ties away from zero."""
    if dtype == "float32":
        bits = values.view(np.uint32)
        rounded = np.where(np.isfinite(values), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)
        values = rounded.astype(np.uint32).view(np.float32)
    return plain(values, dtype)


def poisoned(shape, dtype: str) -> np.ndarray:
    return np.full(shape, 0xFFFF, np.uint16) if dtype == "bfloat16" else nan(shape, dtype)


# ---- index, as kernels/blocks/layout.py makes it (tests/test_panel_emulated.py compares) -----------------


def offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def blocks(weight: np.ndarray, shape: Shape) -> np.ndarray:
    """``[groups * rows, taps * cols, R, C]`` of a weight ``[out, in / groups, kh, kw]``."""
    (r, c), g = shape.block, shape.groups
    out, inputs = shape.outputs // g, shape.inputs // g
    rows, cols, taps = -(-out // r), -(-inputs // c), shape.kernel[0] * shape.kernel[1]
    padded = np.zeros((g, rows * r, cols * c, taps), weight.dtype)
    padded[:, :out, :inputs] = weight.reshape(g, out, inputs, taps)
    tiles = padded.reshape(g, rows, r, cols, c, taps).transpose(0, 1, 5, 3, 2, 4)
    return np.ascontiguousarray(tiles.reshape(g * rows, taps * cols, r, c))


def unblocks(tiles: np.ndarray, shape: Shape) -> np.ndarray:
    """The inverse of :func:`blocks`."""
    (r, c), g = shape.block, shape.groups
    rows, cols = len(tiles) // g, tiles.shape[1] // (shape.kernel[0] * shape.kernel[1])
    weight = tiles.reshape(g, rows, -1, cols, r, c).transpose(0, 1, 4, 3, 5, 2).reshape(g, rows * r, cols * c, -1)
    weight = weight[:, : shape.outputs // g, : shape.inputs // g]
    return weight.reshape(shape.outputs, shape.inputs // g, *shape.kernel)


@dataclass
class Index:
    crow: np.ndarray
    col: np.ndarray
    t_crow: np.ndarray
    t_row: np.ndarray
    t_perm: np.ndarray


def index(alive: np.ndarray, shape: Shape) -> Index:
    """Both lists of the blocks that are ``alive [groups * rows, taps * cols]``."""
    row, place = alive.nonzero()
    taps = shape.kernel[0] * shape.kernel[1]
    rows, cols = alive.shape[0] // shape.groups, alive.shape[1] // taps
    tap, col = place // cols, place % cols
    segment = (row // rows * cols + col) * taps + tap
    order = np.argsort(segment, kind="stable")
    return Index(
        offsets(alive.sum(1)),
        place.astype(np.int32),
        offsets(np.bincount(segment, minlength=shape.groups * cols * taps)),
        (tap * rows + row % rows)[order].astype(np.int32),
        order.astype(np.int32),
    )


# ---- oracle ----------------------------------------------------------------------------------------------


def taps(shape: Shape):
    """Of each tap its place and the slices of the padded image that it reads."""
    high, wide = shape.size()
    for r in range(shape.kernel[0]):
        for s in range(shape.kernel[1]):
            top, left = r * shape.dilation[0], s * shape.dilation[1]
            rows = slice(top, top + (high - 1) * shape.stride[0] + 1, shape.stride[0])
            yield r, s, (slice(None), rows, slice(left, left + (wide - 1) * shape.stride[1] + 1, shape.stride[1]))


def padded(x: np.ndarray, shape: Shape) -> np.ndarray:
    return np.pad(x, ((0, 0), *((p, p) for p in shape.padding), (0, 0)))


def grouped(x: np.ndarray, groups: int) -> np.ndarray:
    return x.reshape(*x.shape[:-1], groups, -1)


def forward(x: np.ndarray, weight: np.ndarray, shape: Shape) -> np.ndarray:
    g, image = shape.groups, grouped(padded(x, shape), shape.groups)
    y = np.zeros((shape.batch, *shape.size(), g, shape.outputs // g))
    split = weight.reshape(g, shape.outputs // g, *weight.shape[1:])
    for r, s, part in taps(shape):
        y += np.einsum("nhwgi,goi->nhwgo", image[part], split[..., r, s])
    return y.reshape(*y.shape[:3], shape.outputs)


def input_gradient(dy: np.ndarray, weight: np.ndarray, shape: Shape) -> np.ndarray:
    g, (ph, pw) = shape.groups, shape.padding
    split = weight.reshape(g, shape.outputs // g, *weight.shape[1:])
    dx = np.zeros((shape.batch, shape.height + 2 * ph, shape.width + 2 * pw, g, shape.inputs // g))
    for r, s, part in taps(shape):
        dx[part] += np.einsum("nhwgo,goi->nhwgi", grouped(dy, g), split[..., r, s])
    return dx[:, ph : ph + shape.height, pw : pw + shape.width].reshape(shape.batch, shape.height, shape.width, -1)


def weight_gradient(dy: np.ndarray, x: np.ndarray, shape: Shape) -> np.ndarray:
    g, image = shape.groups, grouped(padded(x, shape), shape.groups)
    weight = np.zeros((g, shape.outputs // g, shape.inputs // g, *shape.kernel))
    for r, s, part in taps(shape):
        weight[..., r, s] = np.einsum("nhwgo,nhwgi->goi", grouped(dy, g), image[part])
    return weight.reshape(shape.outputs, -1, *shape.kernel)


def activate(y: np.ndarray, activation: str) -> np.ndarray:
    if activation == "relu":
        return np.maximum(y, 0)
    if activation == "gelu":
        return 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    return y / (1 + np.exp(-y)) if activation == "silu" else y


# ---- calls -----------------------------------------------------------------------------------------------


def work_space(kernels: Kernels, name: str, struct: np.ndarray) -> np.ndarray:
    """Exactly as many bytes as asked for, NaN in every dtype."""
    size = kernels.size(f"sparsekit_cuda_{name}_workspace", struct)
    assert size >= 0
    return np.full(size, 0xFF, np.uint8)


def call_forward(kernels, shape: Shape, x, values, lists: Index, bias=None, activation="none"):
    struct = shape.struct(len(lists.col))
    y = poisoned((shape.batch, *shape.size(), shape.outputs), shape.dtype)
    space = work_space(kernels, "panel_conv2d", struct)
    code = int32(ACTIVATIONS.index(activation))
    kernels("sparsekit_cuda_panel_conv2d", struct, x, values, lists.crow, lists.col, bias, code, y, space, None)
    return y


def call_input_gradient(kernels, shape: Shape, dy, values, lists: Index):
    struct = shape.struct(len(lists.col))
    dx = poisoned((shape.batch, shape.height, shape.width, shape.inputs), shape.dtype)
    space = work_space(kernels, "panel_conv2d_t", struct)
    lists = (lists.t_crow, lists.t_row, lists.t_perm)
    kernels("sparsekit_cuda_panel_conv2d_t", struct, dy, values, *lists, dx, space, None)
    return dx


def call_weight_gradient(kernels, shape: Shape, dy, x, lists: Index):
    struct = shape.struct(len(lists.col))
    dvalues = poisoned((len(lists.col), *shape.block), shape.dtype)
    space = work_space(kernels, "panel_conv2d_sddmm", struct)
    kernels("sparsekit_cuda_panel_conv2d_sddmm", struct, dy, x, lists.crow, lists.col, dvalues, space, None)
    return dvalues


# ---- problems ----------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Operands in the kernel's dtype, and what they mean in float64."""

    shape: Shape
    alive: np.ndarray
    lists: Index
    x: np.ndarray
    dy: np.ndarray
    bias: np.ndarray
    values: np.ndarray
    weight: np.ndarray

    def exact(self, name: str) -> np.ndarray:
        return decode(getattr(self, name), self.shape.dtype)


def problem(shape: Shape, density: float, seed: int = 0) -> Problem:
    """Skewed block rows, some of them empty, unless everything or nothing survives."""
    rng = np.random.default_rng([seed, *shape.struct(0)])
    dense = rng.standard_normal((shape.outputs, shape.inputs // shape.groups, *shape.kernel))
    inside = blocks(np.ones_like(dense), shape)
    chance = np.full(inside.shape[:2], float(density))
    if 0 < density < 1:
        chance *= rng.choice([0, 0.5, 1, 1, 2], size=(len(chance), 1))
    alive = rng.random(chance.shape) < chance
    kept = blocks(decode(encode(dense, shape.dtype), shape.dtype), shape) * alive[..., None, None]
    weight = unblocks(kept, shape)
    values = encode(kept[alive], shape.dtype)
    x = encode(rng.standard_normal((shape.batch, shape.height, shape.width, shape.inputs)), shape.dtype)
    dy = encode(rng.standard_normal((shape.batch, *shape.size(), shape.outputs)), shape.dtype)
    bias = encode(rng.standard_normal(shape.outputs), shape.dtype)
    return Problem(shape, alive, index(alive, shape), x, dy, bias, values, weight)


def close(got: np.ndarray, reference: np.ndarray, dtype: str, what: str) -> None:
    exact = plain(got, dtype)
    assert exact.shape == reference.shape, f"{what}: {exact.shape} instead of {reference.shape}"
    error = relative_error(exact, reference)
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error}"


def check_forward(kernels, p: Problem, bias: bool = True, activation: str = "none") -> None:
    y = call_forward(kernels, p.shape, p.x, p.values, p.lists, p.bias if bias else None, activation)
    reference = forward(p.exact("x"), p.weight, p.shape) + (plain(p.bias, p.shape.dtype) if bias else 0)
    close(y, activate(reference, activation), p.shape.dtype, "y")


def check_input_gradient(kernels, p: Problem) -> None:
    dx = call_input_gradient(kernels, p.shape, p.dy, p.values, p.lists)
    close(dx, input_gradient(p.exact("dy"), p.weight, p.shape), p.shape.dtype, "dx")


def check_weight_gradient(kernels, p: Problem) -> None:
    dvalues = call_weight_gradient(kernels, p.shape, p.dy, p.x, p.lists)
    reference = blocks(weight_gradient(p.exact("dy"), p.exact("x"), p.shape), p.shape)[p.alive]
    close(dvalues, reference, p.shape.dtype, "dvalues")
    outside = blocks(np.ones_like(p.weight), p.shape)[p.alive] == 0
    assert not dvalues[outside].any(), "gradients of what sticks out are 0"


def check(kernels, p: Problem, bias: bool = True, activation: str = "none") -> None:
    check_forward(kernels, p, bias, activation)
    check_weight_gradient(kernels, p)
    if p.shape.block[1] >= 8:
        check_input_gradient(kernels, p)


def case(shape: Shape, density: float, bias: bool = True, activation: str = "none"):
    return lambda kernels: check(kernels, problem(shape, density), bias, activation)


def any_order(kernels) -> None:
    """Not a bit depends on the order in which blocks and warps run, shares of a sum included."""
    shape = linear(70, 60, 70, block=(8, 8), chunk=16, split=2)
    p = problem(shape, 0.5)
    results = []
    for seed in (0, 1, 7):
        kernels.seed(seed)
        y = call_forward(kernels, shape, p.x, p.values, p.lists, p.bias)
        dx = call_input_gradient(kernels, shape, p.dy, p.values, p.lists)
        results.append((y, dx, call_weight_gradient(kernels, shape, p.dy, p.x, p.lists)))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def not_finite(kernels, shape: Shape, density: float) -> None:
    """An Inf and a NaN reach exactly the outputs whose survivors read them, as in the dense product."""
    p = problem(shape, density)
    for tensor, value, part in ((p.x, np.inf, 2), (p.dy, -np.inf, 2), (p.x, np.nan, 1), (p.dy, np.nan, 1)):
        spot = tuple((side - 1) // part for side in tensor.shape)  # in the middle, and at the ragged end
        tensor[spot] = encode(np.full(1, value), shape.dtype)[0]
    y = call_forward(kernels, shape, p.x, p.values, p.lists)
    dvalues = call_weight_gradient(kernels, shape, p.dy, p.x, p.lists)
    tolerance = dict(rtol=TOLERANCE[shape.dtype] * 4, atol=TOLERANCE[shape.dtype] * 40)
    with np.errstate(invalid="ignore"):
        stored = blocks(np.ones_like(p.weight), p.shape) * p.alive[..., None, None]
        reads = forward(np.where(np.isfinite(p.exact("x")), 0, 1.0), unblocks(stored, shape), shape) > 0
        exact = plain(y, shape.dtype)
        assert np.array_equal(~np.isfinite(exact), reads), "y"
        gradient = blocks(weight_gradient(p.exact("dy"), p.exact("x"), shape), shape)[p.alive]
        np.testing.assert_allclose(plain(dvalues, shape.dtype), gradient, **tolerance)
        assert not np.isfinite(gradient).all()
    if shape.block[1] >= 8:
        dx = plain(call_input_gradient(kernels, shape, p.dy, p.values, p.lists), shape.dtype)
        reads = input_gradient(np.where(np.isfinite(p.exact("dy")), 0, 1.0), unblocks(stored, shape), shape) > 0
        assert np.array_equal(~np.isfinite(dx), reads), "dx"


def shares(kernels) -> None:
    """Few tokens on a device with many multiprocessors: sums are split without being asked to be."""
    shape = linear(9, 200, 24, block=(8, 4), dtype="float16", chunk=32)
    p = problem(shape, 0.5)
    kernels.library.sparsekit_emulate_device(40, 232448)
    check(kernels, p, activation="silu")
    many = work_space(kernels, "panel_conv2d", shape.struct(len(p.lists.col))).size
    kernels.library.sparsekit_emulate_device(1, 232448)
    assert work_space(kernels, "panel_conv2d", shape.struct(len(p.lists.col))).size < many
    check(kernels, p, activation="silu")


def little_shared_memory(kernels) -> None:
    """A device whose blocks have 99 KiB: smaller tiles, the same product."""
    kernels.library.sparsekit_emulate_device(3, 99 << 10)
    check(kernels, problem(linear(3, 300, 290, block=(8, 8)), 0.1))
    check(kernels, problem(linear(3, 300, 290, block=(16, 1), dtype="float32"), 0.05))
    kernels.library.sparsekit_emulate_device(3, 232448)


def nothing(kernels) -> None:
    """No tokens, no survivors."""
    for shape in (linear(0, 20, 30, block=(8, 8)), Shape(2, 12, 0, 9, 16, stride=(2, 2), block=(16, 8))):
        p = problem(replace(shape, height=max(shape.height, 1), width=max(shape.width, 1)), 0.5)
        struct = shape.struct(len(p.lists.col))
        assert kernels.size("sparsekit_cuda_panel_conv2d_workspace", struct) == 0
        empty = np.empty(0, np.uint16)
        lists = p.lists
        kernels("sparsekit_cuda_panel_conv2d", struct, *(empty, p.values, lists.crow, lists.col, None), int32(0),
                *(empty, empty, None))  # fmt: skip
        back = (lists.t_crow, lists.t_row, lists.t_perm)
        kernels("sparsekit_cuda_panel_conv2d_t", struct, empty, p.values, *back, empty, empty, None)
        assert not call_weight_gradient(kernels, shape, empty, empty, lists).any()
    p = problem(linear(5, 20, 30, block=(8, 8)), 0)
    check(kernels, p, activation="relu")


def refusals(kernels) -> None:
    """Sentences about shapes that the kernels do not take; nothing runs."""
    good = linear(3, 16, 16, block=(8, 8))
    for change, sentence in (
        ({"block": (4, 8)}, "blocks of 8 or 16 rows"),
        ({"block": (8, 3)}, "blocks of 1, 4, 8 or 16 columns"),
        ({"dtype": "float64"}, "float16, bfloat16 or float32"),
        ({"groups": 3}, "groups that divide"),
        ({"inputs": 0}, "sizes from 1"),
        ({"kernel": (3, 3)}, "at least as large as the kernel"),
        ({"padding": (-1, 0)}, "padding from 0"),
        ({"height": 0, "padding": (1, 1)}, "an image with pixels"),
        ({"chunk": 24}, "a chunk of 16, 32"),
        ({"stages": 5}, "2 to 4 stages"),
        ({"split": 65}, "split of at most 64"),
        ({"warps": 5}, "4, 8, 12 or 16 warps"),
        ({"inputs": 2048, "chunk": 1024, "stages": 4}, "bytes of shared memory"),
        ({"inputs": 900000, "block": (8, 1)}, "at most 800000 blocks"),
    ):
        shape = replace(good, **change)
        struct = shape.struct(4)
        none = np.empty(0, np.uint16)
        try:
            kernels("sparsekit_cuda_panel_conv2d", struct, *(none,) * 4, None, int32(0), none, none, None)
        except RuntimeError as error:
            assert sentence in str(error), error
            assert "panel_conv2d: Expected" in str(error), error
        else:
            raise AssertionError(f"{change} was taken")
        if "memory" not in sentence:
            assert kernels.size("sparsekit_cuda_panel_conv2d_workspace", struct) == -1
            assert kernels.size("sparsekit_cuda_panel_conv2d_sddmm_workspace", struct) == -1
    narrow = replace(good, block=(8, 4)).struct(4)
    assert kernels.size("sparsekit_cuda_panel_conv2d_t_workspace", narrow) == -1
    try:
        kernels("sparsekit_cuda_panel_conv2d_t", narrow, *(None,) * 7, None)
    except RuntimeError as error:
        assert "columns for an input gradient" in str(error)
    else:
        raise AssertionError("an input gradient of 4 columns was taken")


SHAPES = [(8, 1), (8, 4), (8, 8), (8, 16), (16, 1), (16, 4), (16, 8), (16, 16)]
UNEVEN = Shape(1, 9, 4, 8, 18, (2, 2), groups=3, block=(16, 1))
STRIDED = Shape(2, 11, 9, 10, 13, (3, 3), (2, 1), (1, 2), (1, 2), dtype="float16")

CASES = {
    # every block, ragged on all sides, several chunks and more than one tile
    **{f"{r}x{c}": case(linear(70, 50, 75, block=(r, c), chunk=16, warps=4), 0.3) for r, c in SHAPES},
    **{f"{r}x{c} float32": case(linear(9, 50, 75, block=(r, c), chunk=16, dtype="float32"), 0.3) for r, c in SHAPES},
    "one token": case(linear(1, 33, 17, block=(16, 4)), 0.5, activation="gelu"),
    "aligned": case(linear(64, 64, 64, block=(8, 8), dtype="float16"), 0.5, bias=False, activation="silu"),
    "dense": case(linear(65, 40, 24, block=(8, 1), dtype="float16", stages=4), 1, activation="relu"),
    "sparse": case(linear(20, 400, 90, block=(8, 1), chunk=32, stages=3), 0.02),
    "32 outputs a warp": case(linear(7, 30, 270, block=(8, 8), chunk=16), 0.3),
    "32 outputs a warp 16 high": case(linear(7, 30, 270, block=(16, 1), dtype="float16"), 0.2),
    "split": case(linear(70, 90, 20, block=(16, 8), chunk=16, split=3), 0.4, activation="gelu"),
    "split float32": case(linear(3, 60, 20, block=(8, 4), chunk=16, split=5, dtype="float32"), 0.4),
    "several passes": case(linear(40, 144, 40, block=(8, 1), chunk=144), 1),
    "1x1 convolution": case(Shape(2, 10, 3, 7, 12, block=(8, 8), stride=(2, 3)), 0.5),
    "3x3": case(Shape(2, 5, 7, 9, 18, (3, 3), padding=(1, 1), block=(8, 8), chunk=16), 0.3, activation="relu"),
    "5x5": case(Shape(1, 3, 8, 6, 9, (5, 5), padding=(2, 2), block=(8, 1), dtype="float32"), 0.2),
    "strided and dilated": case(replace(STRIDED, block=(8, 16)), 0.4),
    "groups": case(Shape(1, 12, 6, 5, 36, (3, 1), (1, 2), (0, 1), groups=3, block=(8, 8)), 0.4),
    "depthwise": case(Shape(1, 4, 6, 9, 8, (3, 3), padding=(1, 1), groups=4, block=(8, 4)), 0.5),
    "more padding than kernel": case(Shape(1, 4, 2, 1, 8, (2, 2), padding=(3, 2), block=(16, 16)), 1),
    "no finite input": lambda kernels: not_finite(kernels, linear(20, 21, 19, block=(8, 8)), 0.4),
    "no finite image": lambda kernels: not_finite(kernels, UNEVEN, 1),
    "any order": any_order,
    "shares": shares,
    "little shared memory": little_shared_memory,
    "nothing": nothing,
    "refusals": refusals,
}
SMALLEST = ["8x1", "16x16", "one token", "split", "split float32", "several passes", "depthwise"]


def random_case(seed: int):
    """A random shape, block, dtype, density and way to run."""
    rng = np.random.default_rng(seed)
    pick = lambda *of: of[rng.integers(len(of))]  # noqa: E731
    options = {"block": pick(*SHAPES), "dtype": pick(*CODES), "chunk": pick(0, 16, 32, 64), "stages": pick(0, 2, 3, 4)}
    options |= {"split": pick(0, 1, 2, 3), "warps": pick(0, 4, 8)}
    if rng.random() < 0.4:
        shape = linear(*map(int, rng.integers(1, (140, 90, 90))), **options)
    else:
        groups = pick(1, 1, 2, 3)
        kernel, stride = (pick(1, 2, 3, 5), pick(1, 2, 3, 5)), (pick(1, 2, 3), pick(1, 2, 3))
        padding, dilation = (pick(0, 1, 2, 3), pick(0, 1, 2, 3)), (pick(1, 2), pick(1, 2))
        least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
        high, wide = (side + int(rng.integers(0, 12)) for side in least)
        inputs, outputs = (groups * int(side) for side in rng.integers(1, (24, 30)))
        conv = (kernel, stride, padding, dilation, groups)
        shape = Shape(pick(1, 2, 3), inputs, high, wide, outputs, *conv, **options)
    return case(shape, pick(0, 0.05, 0.3, 0.6, 1), pick(True, False), pick(*ACTIVATIONS))


LONG = {f"random {seed}": random_case(seed) for seed in range(300)}
