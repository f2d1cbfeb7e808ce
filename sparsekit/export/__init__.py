"""The harvest: files that train again and files that serve."""

from .dense import save_dense as save_dense
from .dense import save_prune as save_prune
from .dense import to_prune as to_prune
from .files import export_file as export_file
from .graph import save_aoti as save_aoti
from .graph import save_pt2 as save_pt2
from .inspect import describe as describe
from .onnx import save_onnx as save_onnx
from .packed import load as load
from .packed import read_portable as read_portable
from .packed import save as save
