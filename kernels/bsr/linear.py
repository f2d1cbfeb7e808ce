"""Block-sparse linear layers on CUDA: tokens on the matrix unit's long side, surviving blocks on the other.

Operators, their index tensors and their shapes are those of the schemas; the naive twins say the same in
torch. All of them add in fp32 and in a fixed order: two runs agree bit for bit.

``y = x Wᵀ`` and ``dx = dy W`` are one kernel: a program makes a tile of tokens by one block row (for dx: block
column) and walks its blocks, each a product of depth ``BK``. A block deeper than BK takes several products, a
product deeper than a block gathers several blocks. Few tokens: the walk is split, fp32 partial sums, second
pass. ``dW`` gathers J neighbouring blocks of a row into one product over tokens, split in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference, tuning
from . import common
from . import linear_kernels as kernels

__all__ = ["linear", "linear_backward", "linear_t", "offline_cases", "sddmm"]

RUN = 256  # inputs that one entry of ``runs`` spans


# Tiles: tokens (dW: inputs), depth of a product, warps, stages; the first of each list is the default for many
# tokens, and each list is for blocks that are so wide across the sum (dW: have so many outputs).
_PRODUCT = {
    "sm_90": {
        128: ((256, 64, 8, 4), (128, 64, 8, 3), (128, 64, 4, 3)),
        64: ((256, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 4)),
        32: ((256, 64, 4, 3), (128, 64, 4, 3), (256, 32, 4, 4)),
    },
    "sm_80": {
        128: ((128, 32, 8, 4), (128, 64, 8, 3), (64, 64, 4, 3)),
        64: ((128, 64, 4, 3), (128, 32, 4, 4), (64, 64, 4, 3)),
        32: ((128, 64, 4, 3), (256, 32, 4, 4), (64, 64, 4, 4)),
    },
    "tf32": {
        128: ((64, 32, 4, 3), (64, 32, 4, 4)),
        64: ((128, 32, 4, 3), (64, 32, 4, 3)),
        32: ((128, 32, 4, 3), (64, 32, 4, 4)),
    },
    "ieee": {
        128: ((64, 16, 8, 3), (32, 16, 4, 3)),
        64: ((64, 16, 4, 3), (128, 16, 8, 3)),
        32: ((64, 16, 4, 3), (32, 16, 4, 3)),
    },
    "interpreter": {side: ((32, 32, 4, 2),) for side in (128, 64, 32)},
}
_FEW = {  # the same without tokens: at most 64 of them make one tile
    "sm_90": {side: ((64, 4, 4), (128, 4, 3), (32, 4, 5)) for side in (128, 64, 32)},
    "sm_80": {128: ((32, 4, 5), (64, 8, 4)), 64: ((64, 4, 4), (32, 4, 5)), 32: ((64, 4, 4), (128, 4, 3))},
    "tf32": {side: ((32, 4, 4), (64, 4, 3)) for side in (128, 64, 32)},
    "ieee": {side: ((16, 4, 3),) for side in (128, 64, 32)},
    "interpreter": {side: ((32, 4, 2),) for side in (128, 64, 32)},
}
_SDDMM = {
    "sm_90": {side: ((256, 64, 8, 3), (128, 64, 4, 3)) for side in (128, 64, 32)},
    "sm_80": {
        128: ((128, 32, 8, 4), (128, 64, 8, 3)),
        64: ((128, 64, 4, 3), (128, 32, 4, 4)),
        32: ((128, 64, 4, 3), (256, 64, 8, 3)),
    },
    "tf32": {128: ((128, 32, 8, 3),), 64: ((128, 32, 4, 3),), 32: ((128, 32, 4, 3),)},
    "ieee": {128: ((128, 16, 8, 3),), 64: ((64, 16, 4, 3), (128, 16, 8, 3)), 32: ((64, 16, 4, 3),)},
    "interpreter": {side: ((64, 32, 4, 2),) for side in (128, 64, 32)},
}


def _kind(capability: tuple[int, int], dtype: torch.dtype, precision: str) -> str:
    if capability == (0, 0):
        return "interpreter"
    if dtype == torch.float32:
        return precision
    return "sm_90" if capability >= (9, 0) else "sm_80"


def _product_tiles(kind: str, across: int, tokens: int | None) -> list[tuple[int, int, int, int]]:
    if tokens is not None and tokens <= 64:
        return [(max(16, common.bucket(tokens)), *rest) for rest in _FEW[kind][max(across, 32)]]
    return list(_PRODUCT[kind][max(across, 32)])


def _product_configs(kind, side, across, tokens, rows, nnzb, width, processors) -> list[dict]:
    """Configurations of a product for ``rows`` rows of blocks ``across`` wide, ``nnzb`` in all."""
    tiles = _product_tiles(kind, across, tokens)
    sparse = 20 * nnzb * side <= rows * width  # 5 %: short walks, for which two programs to a processor hide waits

    def programs(tile):
        return rows * -(-common.bucket(tokens) // tile)

    def unfit(tile):
        if tokens is None:
            return tile[0] != 128
        return tile[0] > 128 and (sparse or programs(tile[0]) < 2 * processors)

    configs = []
    for tile, depth, warps, stages in sorted(tiles, key=unfit):
        split = 1
        if tokens is not None:  # few tokens wait for memory, which takes several programs to a processor
            wanted = processors * (4 if tokens <= 64 else 1)
            steps = common.bucket(nnzb) * side // (rows * depth)
            split = _floor(min(8, wanted // programs(tile), steps // 4))
        configs.append({"BM": tile, "BK": depth, "SPLIT": split, "num_warps": warps, "num_stages": stages})
    return configs


def _sddmm_configs(kind, block, tokens, rows, nnzb, runs, processors) -> list[dict]:
    """Configurations of a weight gradient whose ``nnzb`` blocks make so many ``runs`` in ``rows`` rows."""
    r, c = block
    run = max(1, RUN // c)
    tiles = list(_SDDMM[kind][max(r, 32)])
    if 2 * nnzb <= rows * run:  # most runs are less than half full
        tiles.sort(key=lambda tile: tile[0])
    configs = []
    for tile, depth, warps, stages in tiles:
        j = min(max(tile // c, 1), run)
        split = 4 * processors // (common.bucket(runs) * (run // j))
        split = min(16, split if tokens is None else min(split, common.bucket(tokens) // (8 * depth)))
        configs.append({"J": j, "BT": depth, "SPLIT": _floor(split), "num_warps": warps, "num_stages": stages})
    more = configs[0] | {"SPLIT": min(16, 2 * configs[0]["SPLIT"])}
    return configs if kind == "interpreter" or more in configs else [*configs, more]


def _floor(n: int) -> int:
    """The power of two at or below n; 1 below 1."""
    return 1 << max(n, 1).bit_length() - 1


def _product_constants(block, transposed, width, outs, wide, has_bias, activation, precision) -> dict:
    """What the product kernel is compiled for; ``width`` is that of the rows it reads, ``outs`` of those it writes."""
    r, c = block
    side, across = (r, c) if transposed else (c, r)
    return {
        "R": r, "C": c, "TRANSPOSED": transposed, "X_UNIT": common.unit(width), "Y_UNIT": common.unit(outs),
        "RAGGED_IN": width % side != 0, "RAGGED_OUT": outs % across != 0, "WIDE": wide,
        "HAS_BIAS": has_bias, "ACTIVATION": activation, "PRECISION": precision,
    }  # fmt: skip


def _sddmm_constants(block, dy_row, x_row, ragged, precision) -> dict:
    """What the weight gradient's kernel is compiled for."""
    r, c = block
    return {
        "R": r, "C": c, "G": max(1, RUN // c), "DY_UNIT": common.unit(dy_row), "X_UNIT": common.unit(x_row),
        "RAGGED": ragged, "PRECISION": precision,
    }  # fmt: skip


def linear(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, row_order: Tensor, bias: Tensor | None,
    out_features: int, activation: str, config: dict | None = None,
) -> Tensor:  # fmt: skip
    """``y [N, out_features] = activation(x Wᵀ + bias)``; ``config`` overrides the choice of :mod:`tuning`."""
    index = (crow_indices, col_indices, None, row_order)
    return _run_product("bsr_linear", x, values, index, bias, out_features, activation, config)


def linear_t(
    dy: Tensor, values: Tensor, t_crow: Tensor, t_row: Tensor, t_perm: Tensor, t_order: Tensor, in_features: int,
    config: dict | None = None,
) -> Tensor:  # fmt: skip
    """``dx [N, in_features] = dy W``."""
    index = (t_crow, t_row, t_perm, t_order)
    return _run_product("bsr_linear_t", dy, values, index, None, in_features, "none", config)


def _run_product(name, x, values, index, bias, outs, activation, config):
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"Expected an activation of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    common.check(x, values, bias)
    starts, partner, perm, order = index
    tokens, rows, (nnzb, *block) = x.shape[0], int(order.shape[0]), map(int, values.shape)
    if nnzb == 0 or rows == 0 or _known(tokens) == 0:
        return _without_blocks(x, (tokens, outs), bias, activation)
    x, values = common.aligned(x), values.contiguous()
    width, precision, wide = int(x.shape[1]), common.input_precision(x.dtype), nnzb * block[0] * block[1] >= 2**31
    args = (block, perm is not None, width, outs, wide, bias is not None, activation, precision)
    constants = _product_constants(*args)

    def launch(config):
        split = config["SPLIT"]
        shape, dtype = ((tokens, outs), x.dtype) if split == 1 else ((split, tokens, outs), torch.float32)
        y = torch.empty(shape, dtype=dtype, device=x.device)
        common.traceable(kernels.product)[(rows * ((tokens + config["BM"] - 1) // config["BM"]), split)](
            x, values, x if bias is None else bias.contiguous(), y,
            starts, partner, partner if perm is None else perm, order,
            tokens, rows, width // constants["X_UNIT"], outs // constants["Y_UNIT"], **constants, **config,
        )  # fmt: skip
        return y if split == 1 else common.sum_splits(y, x.dtype, bias, activation)

    if config is None:
        side, across = block if perm is not None else block[::-1]
        kind = _kind(common.capability(x.device), x.dtype, precision)
        known, processors = _known(tokens), common.processors(x.device)
        configs = _product_configs(kind, side, across, known, rows, nnzb, width, processors)
        key = (kind, x.dtype, side, across, width, outs, common.bucket(nnzb))
        config = _choose(name, key, configs, launch, known, x.device)
    return launch(config)


def sddmm(
    dy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, runs: Tensor, block: list[int],
    config: dict | None = None,
) -> Tensor:  # fmt: skip
    """``dvalues [nnzb, R, C] = dyᵀ x`` at the surviving blocks, exactly 0 where a block sticks out."""
    common.check(dy, x)
    tokens, outs, ins, nnzb, r, c = dy.shape[0], *map(int, (dy.shape[1], x.shape[1], col_indices.shape[0], *block))
    if nnzb == 0 or _known(tokens) == 0:
        return dy.new_zeros(nnzb, r, c)
    dy, x = common.aligned(dy), common.aligned(x)
    precision, ragged = common.input_precision(x.dtype), bool(outs % r or ins % c)
    constants = _sddmm_constants((r, c), int(dy.shape[1]), int(x.shape[1]), ragged, precision)

    def launch(config):
        split = config["SPLIT"]
        shape, dtype = ((nnzb, r, c), x.dtype) if split == 1 else ((split, nnzb, r, c), torch.float32)
        dvalues = torch.empty(shape, dtype=dtype, device=x.device)
        common.traceable(kernels.sddmm)[(runs.shape[0] * (constants["G"] // config["J"]), split)](
            dy, x, crow_indices, col_indices, runs, dvalues, tokens, outs, ins, nnzb,
            dy.shape[1] // constants["DY_UNIT"], x.shape[1] // constants["X_UNIT"], **constants, **config,
        )  # fmt: skip
        return dvalues if split == 1 else common.sum_splits(dvalues, x.dtype)

    if config is None:
        kind = _kind(common.capability(x.device), x.dtype, precision)
        known, processors = _known(tokens), common.processors(x.device)
        rows, many = int(crow_indices.shape[0]) - 1, int(runs.shape[0])
        configs = _sddmm_configs(kind, (r, c), known, rows, nnzb, many, processors)
        key = (kind, x.dtype, r, c, outs, ins, common.bucket(nnzb), common.bucket(many))
        config = _choose("bsr_sddmm", key, configs, launch, known, x.device)
    return launch(config)


def linear_backward(
    dy: Tensor, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, runs: Tensor, t_crow: Tensor,
    t_row: Tensor, t_perm: Tensor, t_order: Tensor, need_dx: bool, need_dvalues: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dvalues, dbias)``; what is not needed is an empty tensor and costs nothing."""
    dy = dy.contiguous()
    dx = linear_t(dy, values, t_crow, t_row, t_perm, t_order, x.shape[1]) if need_dx else dy.new_empty(0)
    dvalues, dbias = dy.new_empty(0), dy.new_empty(0)
    if need_dvalues:
        dvalues = sddmm(dy, x, crow_indices, col_indices, runs, values.shape[1:])
    if need_dbias:
        dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype)
    return dx, dvalues, dbias


def _without_blocks(x: Tensor, shape: tuple[int, int], bias: Tensor | None, activation: str) -> Tensor:
    """The output where no block survived, or without tokens."""
    if bias is None:
        return x.new_zeros(shape)  # every activation maps 0 to 0
    return reference.activate(bias.float(), activation).to(x.dtype).expand(shape).contiguous()


def _known(extent) -> int | None:
    """The number of tokens, or None where torch.compile keeps it open: asking about it would close it."""
    return extent if type(extent) is int else None


def _choose(name, key, configs, launch, tokens, device) -> dict:
    """A configuration for so many tokens; the first of the list where the number is open."""
    if tokens is None:
        return configs[0]
    return tuning.choose(name, (*key, common.bucket(tokens)), configs, launch, device)


def offline_cases() -> Iterator[dict]:
    """Configurations above as ``benchmarks/offline.py`` compiles them: 4096 x 4096, a tenth of the blocks left."""
    square = ((128, 128), (64, 64), (16, 16))
    for arch in (90, 80):
        for kind, element, precision, blocks in (
            (f"sm_{arch}", "*bf16", "ieee", (*square, (32, 32), (8, 8), (128, 16), (64, 32))),
            ("tf32", "*fp32", "tf32", square),
            ("ieee", "*fp32", "ieee", square),
        ):
            for block in blocks:
                size = f"{block[0]}x{block[1]}{'' if element == '*bf16' else ' ' + precision}"
                rows, nnzb = 4096 // block[0], 4096 * 4096 // (10 * block[0] * block[1])
                for transposed, tokens, width in itertools.product((False, True), (16384, 16), (4096, 4088)):
                    side, across = block if transposed else block[::-1]
                    ragged = width % side != 0
                    if width == 4088 and (not ragged or tokens == 16):
                        continue
                    count = 4096 // across
                    configs = _product_configs(kind, side, across, tokens, count, nnzb, width, 132)
                    activation = "none" if transposed else "gelu"
                    constants = _product_constants(
                        block, transposed, width, width, False, not transposed, activation, precision
                    )
                    name = f"linear{'_t' * transposed} {size}{' few' * (tokens == 16)}{' ragged' * ragged}"
                    for config in configs if tokens > 64 and not ragged else configs[:1]:
                        yield _case(kernels.product, name, arch, constants, config, element)
                for width in (4096, 4088):
                    ragged = width % block[0] != 0 or width % block[1] != 0
                    configs = _sddmm_configs(kind, block, 16384, rows, nnzb, nnzb * block[1] // 128, 132)
                    constants = _sddmm_constants(block, width, width, ragged, precision)
                    tiles = {(config["J"], config["BT"]): config for config in reversed(configs)}
                    for config in tiles.values() if width == 4096 else configs[:1] * ragged:
                        name = f"sddmm {size}{' ragged' * ragged}"
                        yield _case(kernels.sddmm, name, arch, constants, config, element)
        constants = {"SPLIT": 8, "HAS_BIAS": True, "ACTIVATION": "gelu"}
        config = {"BLOCK": common._BLOCK, "num_warps": 4, "num_stages": 3}
        yield _case(common._sum, "sum of splits", arch, constants, config, "*bf16")


def _case(kernel, name: str, arch: int, constants: dict, config: dict, element: str) -> dict:
    """One kernel for the offline compiler; every pointer of ours is a multiple of 16 bytes."""
    constants, floats = constants | config, ("x", "dy", "values", "bias")
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
    result = "*fp32" if constants["SPLIT"] > 1 and kernel is not common._sum else element
    types = dict.fromkeys(("starts", "partner", "perm", "order", "crow", "col", "runs"), "*i32")
    types |= dict.fromkeys(floats, element) | dict.fromkeys(("y", "dvalues", "result"), result)
    types |= {"partials": "*fp32", "total": "i64"}
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names if arg not in constants}
    return {
        "name": " ".join([name, *(f"{key}{value}" for key, value in config.items() if key.isupper())]),
        "kernel": kernel, "signature": signature, "constexprs": constants, "arch": arch, **options,
        "divisible": [arg for arg, kind in signature.items() if kind.startswith("*")],
    }  # fmt: skip
