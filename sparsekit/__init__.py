"""sparsekit: sparse kernels for PyTorch, so that pruned networks and lottery tickets really run faster."""

from importlib import import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING

if _find_spec(f"{__name__}.kernels") is None:
    raise ModuleNotFoundError(
        "sparsekit: Expected an installed package, got a source tree; run pip install --no-build-isolation -e ."
    )

from . import ops as _ops  # noqa: F401 - registers the operators
from ._version import __version__ as __version__
from .memory import keep_memory as keep_memory
from .overlap import overlap as overlap
from .pattern import Pattern as Pattern
from .prune import criterion as criterion
from .prune import prunable as prunable
from .prune import prune as prune
from .refill import refill as refill
from .schedule import schedule as schedule

if TYPE_CHECKING:  # imported when first asked for, so that sparsekit.serve loads no code that trains
    from .export import load as load
    from .export import save as save
    from .functional import sparse_conv2d as sparse_conv2d
    from .functional import sparse_linear as sparse_linear
    from .nn import SparseConv2d as SparseConv2d
    from .nn import SparseLinear as SparseLinear
    from .nn import compact as compact
    from .nn import convert as convert
    from .nn import fuse as fuse
    from .nn import masks_of as masks_of
    from .nn import quantize as quantize
    from .nn import regroup as regroup
    from .nn import to_dense as to_dense
    from .plan import explain as explain
    from .ticket import instability as instability
    from .ticket import tickets as tickets

__all__ = [
    "Pattern",
    "SparseConv2d",
    "SparseLinear",
    "compact",
    "convert",
    "criterion",
    "explain",
    "fuse",
    "instability",
    "keep_memory",
    "load",
    "masks_of",
    "overlap",
    "prunable",
    "prune",
    "quantize",
    "refill",
    "regroup",
    "save",
    "schedule",
    "sparse_conv2d",
    "sparse_linear",
    "tickets",
    "to_dense",
]

_HOME = {"load": "export", "save": "export", "sparse_conv2d": "functional", "sparse_linear": "functional"}
_HOME |= {"explain": "plan", "instability": "ticket", "tickets": "ticket"}
_HOME |= dict.fromkeys(
    ("SparseConv2d", "SparseLinear", "compact", "convert", "fuse", "masks_of", "quantize", "regroup", "to_dense"), "nn"
)  # fmt: skip
_PACKAGES = ("export", "format", "kernels", "mask", "models", "nn", "plan", "serve", "ticket")


def __getattr__(name: str):
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
