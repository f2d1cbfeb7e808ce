"""What ``gpu.py`` runs, as data, most valuable first."""

from __future__ import annotations

from dataclasses import dataclass

WORKS = ("forward", "dx", "dw", "step")


@dataclass(frozen=True)
class Layer:
    """A layer and its input: ``out`` x ``inputs`` weights (convolutions: 3x3, padding 1), ``batch``, image ``size``."""

    kind: str
    out: int
    inputs: int
    batch: int
    size: int = 0

    def tiny(self) -> Layer:
        """The same kind of layer for a dry run."""
        side = 256 if self.kind == "linear" else 64
        return Layer(self.kind, side, side, min(self.batch, 32) if self.kind == "linear" else 2, self.size and 6)

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return 9 if self.kind == "conv" else 1

    @property
    def positions(self) -> int:
        """Outputs per output channel: tokens or pixels."""
        return self.batch * (self.size * self.size or 1)

    @property
    def input(self) -> tuple[int, ...]:
        """Shape of the input."""
        return (self.batch, self.inputs, *([self.size] * 2 if self.kind == "conv" else []))


LAYERS = {
    "linear-4096": Layer("linear", 4096, 4096, 16384),
    "linear-8192-few": Layer("linear", 8192, 8192, 16),
    "conv-256-28": Layer("conv", 256, 256, 64, 28),
    "conv-256-14": Layer("conv", 256, 256, 128, 14),
    "conv-512-14": Layer("conv", 512, 512, 128, 14),
}


@dataclass(frozen=True)
class Case:
    """One layer under one mask, with a row for each of ``works``; ceilings and experiments say ``what`` they are.

    Masks are of whole ``block``s, 1 x 1 where single weights survive; those of ``nm`` are 2:4.
    ``rivals`` beyond the plain dense layer take seconds to set up: ``compiled`` (kept for later cases of the
    layer), ``2:4`` and ``torch bsr``.
    """

    suite: str
    layer: str = ""
    format: str = "bsr"
    block: tuple[int, int] = (0, 0)
    density: float = 1.0
    dtype: str = "bfloat16"
    works: tuple[str, ...] = WORKS
    rivals: tuple[str, ...] = ()
    what: str = ""
    config: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        """``layers/linear-4096-64x64-d0.1-bfloat16``."""
        parts = [self.what] if self.what else []
        if self.layer:
            pattern = "x".join(map(str, self.block))
            if self.format != "bsr":
                pattern = f"{self.format}-{pattern}" if self.format == "panel" else self.format
            parts += [self.layer, pattern, f"d{self.density:g}", self.dtype]
        parts += [f"{key}{value}" for key, value in self.config]
        return f"{self.suite}/" + "-".join(parts)


CEILINGS = tuple(
    Case("ceilings", what=what)
    for what in ("copy", "gemm-bfloat16", "l2-read", "l2-copy", "gemm-tf32", "gemm-float32", "conv-256", "conv-512")
)


def _linear(side: int | tuple[int, int], density: float, *rivals: str, **more) -> Case:
    block = side if isinstance(side, tuple) else (side, side)
    return Case("layers", "linear-4096", block=block, density=density, rivals=rivals, **more)


def _conv(layer: str, side: int, density: float, *rivals: str) -> Case:
    return Case("layers", layer, block=(side, side), density=density, rivals=rivals)


def _panels() -> list[Case]:
    """Small blocks in training, vectors and single weights in the forward product."""
    linear, forward = "linear-4096", ("forward", "dw")
    found = [Case("layers", linear, "panel", (8, 8), 0.1), Case("layers", linear, "panel", (16, 16), 0.1)]
    found += [Case("layers", linear, "panel", (rows, 1), 0.1, works=forward) for rows in (8, 16)]
    found += [Case("layers", linear, "panel", (1, 1), d, works=("forward",)) for d in (0.02, 0.05, 0.01)]
    found += [Case("layers", name, "panel", (8, 1), 0.1, works=forward) for name in ("conv-256-28", "conv-512-14")]
    for d in (0.2, 0.05, 0.02):
        found += [Case("layers", linear, "panel", block, d) for block in ((8, 8), (16, 16))]
        found += [Case("layers", linear, "panel", (rows, 1), d, works=forward) for rows in (8, 16)]
    return found


def suite() -> list[Case]:
    """Ceilings, then one row of every kind, then the rest of the tables."""
    first = [
        _linear(64, 0.1, "compiled", "2:4", "torch bsr"),
        _linear(128, 0.1),
        _linear(64, 0.25),
        _conv("conv-256-28", 64, 0.25, "compiled"),
        _linear(32, 0.1, "torch bsr"),
        _linear(128, 0.25),
        _conv("conv-512-14", 64, 0.1, "compiled"),
        _linear((128, 16), 0.1),
        _linear(16, 0.1, "torch bsr"),
    ]
    rest = [_linear(side, density) for density in (0.05, 0.25, 0.5, 0.1) for side in (64, 128, 32, (128, 16), 16)]
    rest += [_conv(name, side, d) for name in LAYERS if "conv" in name for side in (64, 128, 32) for d in (0.1, 0.25)]
    rest += [_linear(64, 0.1, dtype="float16"), _linear(64, 0.1, dtype="tf32"), _linear(128, 0.25, "torch bsr")]
    rest += [Case("layers", "linear-4096", format="nm", density=0.5, rivals=("2:4",))]
    single = {"block": (1, 1)}
    rest += [
        Case("layers", "linear-8192-few", format="bitmap", density=d, works=("forward",), **single)
        for d in (0.5, 0.3, 0.1)
    ]
    rest += [Case("layers", "linear-4096", format="csr", density=d, dtype="float32", **single) for d in (0.1, 0.05)]
    rest += _panels()
    seen: set[str] = set()
    return [c for c in (*CEILINGS, *first, *rest) if not (c.name in seen or seen.add(c.name))]


def quick(cases: list[Case]) -> list[Case]:
    """The few that tell most: the first ceilings and layers."""
    ceilings = [case for case in cases if case.suite == "ceilings"][:4]
    return ceilings + [case for case in cases if case.suite != "ceilings"][:6]


def _try(work: str, layer: str, block: tuple[int, int], density: float, **config: object) -> Case:
    return Case("experiments", layer, block=block, density=density, works=(work,), what=work,
                config=tuple(config.items()))  # fmt: skip


def experiments() -> list[Case]:
    """Questions to one card, in order: what L2 gives, stages, tiles, gathers, weight gradients, convolutions."""
    small, large, tall = (64, 64), (128, 128), (128, 16)
    linear = "linear-4096"
    found = [case for case in CEILINGS if case.what in ("copy", "gemm-bfloat16", "l2-read")]
    found += [_try("forward", linear, block, density) for block in (small, large) for density in (1.0, 0.25, 0.1)]
    found += [_try("forward", linear, block, 0.1, num_stages=n) for block in (small, tall) for n in (2, 3, 4, 5)]
    found += [
        _try("forward", linear, block, d, BM=bm, num_warps=warps)
        for block in (small, large) for d in (0.25, 0.1, 0.05) for bm, warps in ((128, 4), (128, 8), (256, 8))
    ]  # fmt: skip
    found += [_try("forward", linear, tall, 0.1, BK=depth) for depth in (16, 32, 64)]  # 1, 2, 4 blocks gathered
    found += [_try("dx", linear, block, d) for block in (small, large, tall) for d in (0.25, 0.1)]
    found += [_try("dw", linear, small, 0.1, J=j, SPLIT=s) for j in (1, 2, 4) for s in (4, 8, 16)]
    found += [_try("dw", linear, large, 0.1, J=j) for j in (1, 2)]
    for layer in ("conv-256-28", "conv-256-14", "conv-512-14"):
        found += [_try("forward", layer, small, 0.1, padded=padded) for padded in (False, True)]
        found += [_try(work, layer, small, 0.1) for work in ("dx", "dw")]
    return found
