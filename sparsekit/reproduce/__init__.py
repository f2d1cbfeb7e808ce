"""The papers' experiments as recipes that end in a verdict: ``sparsekit reproduce NAME``."""

from . import collapse as collapse
from . import grokking as grokking
from . import imp as imp
from . import noise as noise
from . import strong as strong
from . import transfers as transfers
from . import zhou as zhou
from .base import RECIPES as RECIPES
from .base import Check as Check
from .base import reproduce as reproduce
from .base import table as table
