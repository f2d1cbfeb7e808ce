"""Block-sparse convolution on CUDA: an implicit matrix product over the blocks that survived, NHWC.

Operators, their index tensors and their shapes are those of the schemas; the naive twins say the same in
torch. Images are brought to ``channels_last`` first. Sums are fp32 and in a fixed order: two runs agree
bit for bit. A 1 x 1 convolution of stride 1 without padding and groups is the linear kernel over pixels.

The input gradient walks the transposed list, whose ``t_row`` holds ``tap * block rows of a group + block
row``. The weight gradient is split over pixels where its blocks alone do not fill a GPU: fp32 partial
sums, added in order. Kernels skip the padding by one bit per pixel and tap; a configuration may pad the
image instead, and windows of more than 64 taps always do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .. import tuning
from . import conv_kernels as kernels
from . import linear
from .common import bucket, capability, check, input_precision, sum_splits, traceable

_FILL = 256  # programs under which smaller tiles serve a GPU of some hundred multiprocessors better
_TABLE = 256  # pixels that one program of the table's kernel fills; every BP divides it
_SLICE = 24 << 20  # bytes of images that a split of the weight gradient reads: about half of a big GPU's L2
_STRIDE = ("SH", "SW", "STEP_H", "STEP_W")


def conv2d(
    x, values, crow_indices, col_indices, row_order, bias, out_channels, kernel_size,
    stride, padding, dilation, groups, activation, config=None,
):  # fmt: skip
    """``y [N, out_channels, OH, OW]`` in channels_last, ``activation`` applied after the bias."""
    if _is_linear(kernel_size, stride, padding, groups):
        args = (values, crow_indices, col_indices, row_order, bias, out_channels, activation)
        return _image(linear.linear(_rows(x), *args, config=config), x)
    check(x, values, bias)
    x, values = _nhwc(x), values.contiguous()
    n, channels, h, w = x.shape
    oh, ow = (
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, s, p, d in zip((h, w), kernel_size, stride, padding, dilation, strict=True)
    )
    _, r, c = values.shape
    y = torch.empty((n, out_channels, oh, ow), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels, rows = n * oh * ow, row_order.shape[0]
    if _known(pixels) and pixels == 0:
        return y
    window = (*kernel_size, *stride, *dilation)
    multiply = input_precision(x.dtype, conv=True)

    def launch(config):
        image, (top, left) = x, padding
        if (config["padded"] or _many(kernel_size)) and (top or left):
            image, top, left = _nhwc(F.pad(x, (left, left, top, top))), 0, 0
        traceable(kernels.forward)[(rows * _cdiv(pixels, config["BM"]),)](
            image, values, crow_indices, col_indices, row_order, x if bias is None else bias, y,
            rows, pixels, image.shape[2], image.shape[3], oh, ow, top, left,
            channels, channels // groups, out_channels, out_channels // groups, r, c, *window,
            config["BM"], config["BK"], bool(top or left), multiply, bias is not None, activation,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip

    if config is None:
        configs = _configs(r, pixels, rows, kernel_size, any(padding), multiply, x)
        key = (multiply, r, c, channels, h, w, out_channels, *window, *padding, groups)
        config = _choose("bsr_conv2d", configs, (pixels, values.shape[0]), key, launch, x)
    launch(config)
    return y


def conv2d_t(
    dy, values, t_crow, t_row, t_perm, t_order, in_channels, input_size,
    kernel_size, stride, padding, dilation, groups, config=None,
):  # fmt: skip
    """The input gradient ``dx [N, in_channels, *input_size]`` in channels_last."""
    if _is_linear(kernel_size, stride, padding, groups):
        dx = linear.linear_t(_rows(dy), values, t_crow, t_row, t_perm, t_order, in_channels, config=config)
        return _image(dx, dy)
    check(dy, values)
    dy, values = _nhwc(dy), values.contiguous()
    n, channels, oh, ow = dy.shape
    h, w = input_size
    _, r, c = values.shape
    dx = torch.empty((n, in_channels, h, w), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    columns, classes = t_order.shape[0], stride[0] * stride[1]
    alike = n * _cdiv(h, stride[0]) * _cdiv(w, stride[1])  # at most so many pixels of a class
    if _known(alike) and alike == 0:
        return dx
    steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    window = (*kernel_size, *stride, *dilation)
    multiply = input_precision(dy.dtype, conv=True)
    # How far the windows of the first and last pixels reach beyond dy: (above, below), (left, right)
    vertical, horizontal = (
        (max(0, (taps - 1) * d // s - p // s), max(0, (size - 1 + p) // s - out + 1))
        for taps, s, p, d, size, out in zip(kernel_size, stride, padding, dilation, (h, w), (oh, ow), strict=True)
    )
    reaches = bool(any(vertical) or any(horizontal))

    def launch(config):
        image, masked, top, left = dy, reaches, 0, 0
        if (config["padded"] or _many(kernel_size)) and reaches:
            image, masked, top, left = _nhwc(F.pad(dy, (*horizontal, *vertical))), False, vertical[0], horizontal[0]
        tiles = _cdiv(alike, config["BM"])
        traceable(kernels.backward)[(columns * tiles * classes,)](
            image, values, t_crow, t_row, t_perm, t_order, dx,
            columns, tiles, n, h, w, image.shape[2], image.shape[3], *padding, top, left,
            in_channels, in_channels // groups, channels, channels // groups, r, c, *window,
            config["BM"], config["BK"], masked, multiply, *steps,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip

    if config is None:
        configs = _configs(c, alike, columns * classes, kernel_size, reaches, multiply, dy)
        key = (multiply, r, c, in_channels, h, w, channels, *window, *padding, groups)
        config = _choose("bsr_conv2d_t", configs, (alike, values.shape[0]), key, launch, dy)
    launch(config)
    return dx


def conv2d_sddmm(
    dy, x, crow_indices, col_indices, runs, block, kernel_size, stride, padding, dilation, groups, config=None
):
    """The weight gradient at the surviving blocks ``[nnzb, R, C]``, exactly 0 where a block sticks out."""
    if _is_linear(kernel_size, stride, padding, groups):
        return linear.sddmm(_rows(dy), _rows(x), crow_indices, col_indices, runs, block, config=config)
    check(dy, x)
    dy, x = _nhwc(dy), _nhwc(x)
    (n, outs, oh, ow), channels, nnzb, (r, c) = dy.shape, x.shape[1], col_indices.shape[0], block
    pixels = n * oh * ow
    if nnzb == 0 or _known(pixels) and pixels == 0:
        return dy.new_zeros(nnzb, r, c)
    (top, left), window = padding, (*kernel_size, *stride, *dilation)
    if _many(kernel_size):
        x, top, left = _nhwc(F.pad(x, (left, left, top, top))), 0, 0
    h, w = x.shape[2:]
    masked, multiply = bool(top or left), input_precision(x.dtype, conv=True)
    length = (_cdiv(pixels, _TABLE) + 1) * _TABLE  # kernels read one step ahead
    base = torch.empty(length, dtype=torch.int32, device=x.device)
    bits = torch.empty(length, dtype=torch.int64 if math.prod(kernel_size) > 32 else torch.int32, device=x.device)
    traceable(kernels.pixel_table)[(length // _TABLE,)](
        base, bits, pixels, h, w, oh, ow, top, left, *window, masked, _TABLE
    )

    def launch(config):
        parts = runs.shape[0] * (_run(c) // config["J"])
        splits = config["splits"] or _splits(pixels, parts, (outs + channels * math.prod(stride)) * x.element_size())
        span = _cdiv(_cdiv(pixels, splits), config["BP"]) * config["BP"]
        dtype = torch.float32 if splits > 1 else x.dtype
        out = torch.empty((splits, nnzb, r, c), dtype=dtype, device=x.device)
        traceable(kernels.weight)[(parts * splits,)](
            dy, x, crow_indices, col_indices, runs, base, bits, out,
            parts, pixels, span, nnzb, w, channels, channels // groups, outs, outs // groups, r, c,
            kernel_size[1], *dilation, config["J"], config["BP"], masked, multiply,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        return sum_splits(out, x.dtype) if splits > 1 else out.view(nnzb, r, c)

    if config is None:
        key = (multiply, r, c, channels, h, w, outs, *window, *padding, groups)
        configs = _weight_configs(r, c, multiply, x)
        config = _choose("bsr_conv2d_sddmm", configs, (pixels, nnzb), key, launch, x)
    return launch(config)


def conv2d_backward(
    dy, x, values, crow_indices, col_indices, runs, t_crow, t_row, t_perm, t_order,
    kernel_size, stride, padding, dilation, groups, need_dx, need_dvalues, need_dbias,
):  # fmt: skip
    """``(dx, dvalues, dbias)``; those not needed are empty."""
    dy, conv = _nhwc(dy), (kernel_size, stride, padding, dilation, groups)
    transposed, index, block = (t_crow, t_row, t_perm, t_order), (crow_indices, col_indices, runs), values.shape[1:]
    return (
        conv2d_t(dy, values, *transposed, x.shape[1], x.shape[2:], *conv) if need_dx else dy.new_empty(0),
        conv2d_sddmm(dy, x, *index, block, *conv) if need_dvalues else dy.new_empty(0),
        dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype) if need_dbias else dy.new_empty(0),
    )


def _cdiv(a, b):
    return (a + b - 1) // b


def _known(extent):
    """Whether an extent is fixed; asking more about one that torch.compile keeps open would close it."""
    return type(extent) is int


def _nhwc(x):
    return x.contiguous(memory_format=torch.channels_last)


def _is_linear(kernel_size, stride, padding, groups):
    return groups == 1 and math.prod(kernel_size) == math.prod(stride) == 1 and not any(padding)


def _rows(x):
    """``[N * H * W, C]``, a view of a channels_last image."""
    return _nhwc(x).permute(0, 2, 3, 1).flatten(0, 2)


def _image(rows, like):
    """``[N, C, H, W]`` in channels_last, a view of ``rows``."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)


def _many(kernel_size):
    """Whether a window has more taps than an integer has bits."""
    return math.prod(kernel_size) > 64


def _run(c):
    """Blocks in an entry of ``runs``: 256 inputs."""
    return max(1, 256 // c)


def _splits(pixels, parts, width):
    """In how many slices of pixels, ``width`` bytes each, ``parts`` programs a slice compute the weight gradient."""
    if not _known(pixels):
        return 8
    fill, cache = _cdiv(2 * _FILL, parts), _cdiv(pixels * width, _SLICE)
    return max(1, min(max(fill, cache), pixels // 512, 32))


def _configs(side, pixels, lists, kernel_size, padding, multiply, x):
    """Of the kernels that make BM pixels by ``side`` channels, the default first."""
    tiles = _tiles(side, x.dtype, multiply, capability(x.device))
    if _known(pixels):  # smaller tiles first where larger ones make too few programs for a GPU
        tiles = sorted(tiles, key=lambda tile: tile[0] if lists * _cdiv(pixels, tile[0]) < _FILL else 0)
    configs = [{"BM": bm, "BK": bk, "padded": False, "num_warps": w, "num_stages": s} for bm, bk, w, s in tiles]
    if padding and not _many(kernel_size):
        configs.insert(1, configs[0] | {"padded": True})
    return configs


def _weight_configs(r, c, multiply, x):
    """Of the kernel that makes R by J blocks, BP pixels a step; ``splits`` 0 stands for :func:`_splits`."""
    configs = [
        {"J": min(_run(c), max(1, wide // c)), "BP": bp, "splits": 0, "num_warps": w, "num_stages": s}
        for wide, bp, w, s in _weight_tiles(r, x.dtype, multiply, capability(x.device))
    ]
    return [*configs, configs[0] | {"splits": 4}, configs[0] | {"splits": 16}]


# The tiles of both tables are chosen from compiled code (registers, spills, depth of the pipelines) and from how
# often operands are read again; not yet run on a GPU.


def _tiles(side, dtype, multiply, target):
    """(BM, BK, warps, stages), the first where a GPU is full."""
    if dtype == torch.float32 and multiply == "ieee":
        return [(64, 16, 4, 2)]
    deep = 32 if dtype == torch.float32 else 64
    if side > 64:
        tiles = [(128, deep, 8, 3), (64, deep, 4, 3)]
        return tiles if target < (9, 0) else [*tiles, (256, deep, 8, 3)]
    if side > 32:
        return [(128, deep, 4, 3), (256, deep, 8, 3), (64, deep, 4, 3)]
    return [(128, deep, 4, 3), (256, deep, 4, 3), (64, deep, 4, 3)]


def _weight_tiles(r, dtype, multiply, target):
    """(J * C, BP, warps, stages)"""
    if dtype == torch.float32 and multiply == "ieee":
        return [(64, 16, 4, 2)]
    deep = 32 if dtype == torch.float32 else 64
    if r > 64:
        return [(128, deep, 8, 3)] if target < (9, 0) else [(256, deep, 8, 3), (128, deep, 4, 3)]
    if r > 16:
        return [(256, deep, 8, 3), (128, deep, 4, 3)]
    return [(128, deep, 4, 3), (256, deep, 4, 3)]  # of a narrower dy, eight warps would copy less than 16 bytes each


def _choose(name, configs, counts, shape, launch, x):
    if not all(map(_known, counts)):
        return configs[0]
    return tuning.choose(name, (x.dtype, *map(bucket, counts), *shape), configs, launch, x.device)


def offline_cases() -> Iterator[dict]:
    """The default configurations for a 3 x 3 convolution of 256 channels in bf16, to be compiled without a GPU.

    Dicts ``name``, ``kernel``, ``signature`` (type of each argument), ``constexprs``, ``num_warps``,
    ``num_stages``, ``arch`` (80 or 90) and ``divisible`` (arguments that are multiples of 16).
    """
    types = dict.fromkeys(["x", "dy", "y", "dx", "values", "bias"], "*bf16") | {"out": "*fp32", "base": "*i32"}
    types |= dict.fromkeys(["crow_indices", "col_indices", "row_order", "runs", "bits"], "*i32")
    types |= dict.fromkeys(["t_crow", "t_row", "t_perm", "t_order"], "*i32")
    layer = dict.fromkeys(["IN", "IPG", "OUT", "OPG"], 256) | {"KH": 3, "KW": 3}
    layer |= dict.fromkeys(["SH", "SW", "DH", "DW", "STEP_H", "STEP_W"], 1)
    layer |= {"MASKED": True, "PRECISION": "ieee", "HAS_BIAS": True, "ACTIVATION": "relu"}
    for target in ((9, 0), (8, 0)):
        for r, c in ((128, 128), (64, 64), (32, 32), (16, 16), (128, 16)):
            args = (torch.bfloat16, "ieee", target)
            cases = [(kernels.forward, "conv2d", tile, {}) for tile in _tiles(r, *args)]
            cases += [(kernels.backward, "conv2d_t", tile, {}) for tile in _tiles(c, *args)]
            cases += [(kernels.weight, "conv2d_sddmm", tile, {}) for tile in _weight_tiles(r, *args)]
            # Strided layers walk the list tap by tap, which is another loop
            cases += [(kernels.backward, "conv2d_t stride 2", _tiles(c, *args)[0], dict.fromkeys(_STRIDE, 2))]
            for kernel, name, (wide, deep, warps, stages), other in cases:
                tile = {"BM": wide, "BK": deep, "J": min(_run(c), max(1, wide // c)), "BP": deep, "R": r, "C": c}
                constants = {p.name: (layer | tile | other)[p.name] for p in kernel.params if p.is_constexpr}
                signature = {p.name: types.get(p.name, "i32") for p in kernel.params if not p.is_constexpr}
                size = f"J{tile['J']} BP{deep}" if kernel is kernels.weight else f"BM{wide} BK{deep}"
                yield {
                    "name": f"bsr_{name} {r}x{c} {size}",
                    "kernel": kernel,
                    "signature": signature,
                    "constexprs": constants,
                    "num_warps": warps,
                    "num_stages": stages,
                    "arch": 10 * target[0],
                    "divisible": [key for key in signature if key in types],
                }
