"""Drop-in modules and whole-model conversion."""

from .attention import SparseMultiheadAttention as SparseMultiheadAttention
from .base import SparseModule as SparseModule
from .compaction import compact as compact
from .conv import SparseConv1d as SparseConv1d
from .conv import SparseConv2d as SparseConv2d
from .convert import dense_state as dense_state
from .convert import masks_of as masks_of
from .convert import to_dense as to_dense
from .fuse import fuse as fuse
from .fuse import streamline as streamline
from .linear import SparseLinear as SparseLinear
from .ordered import convert as convert
from .quantized import QuantizedLinear as QuantizedLinear
from .quantized import quantize as quantize
from .reorder import regroup as regroup
