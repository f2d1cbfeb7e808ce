"""sparsekit: sparse kernels for PyTorch, so that pruned networks and lottery tickets really run faster."""

from . import ops as _ops  # noqa: F401 - registers the operators
from ._version import __version__ as __version__
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
from .nn import regroup as regroup
from .nn import to_dense as to_dense
from .overlap import overlap as overlap
from .pattern import Pattern as Pattern
from .plan import explain as explain
from .prune import criterion as criterion
from .prune import prunable as prunable
from .prune import prune as prune
from .refill import refill as refill
from .schedule import schedule as schedule
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
    "load",
    "masks_of",
    "overlap",
    "prunable",
    "prune",
    "refill",
    "regroup",
    "save",
    "schedule",
    "sparse_conv2d",
    "sparse_linear",
    "tickets",
    "to_dense",
]
