"""The harvest: files that train again and files that serve."""

from .dense import save_dense as save_dense
from .files import export_file as export_file
from .packed import load as load
from .packed import read_portable as read_portable
from .packed import save as save
