"""Criteria of pruning: functions from what is known of a layer to a score for each of its weights."""

from . import weights as weights
from . import with_data as with_data
from .base import CRITERIA as CRITERIA
from .base import Layer as Layer
from .base import criterion as criterion
from .base import find as find
from .base import name_of as name_of
from .facts import Facts as Facts
from .facts import batches_of as batches_of
from .facts import call as call
