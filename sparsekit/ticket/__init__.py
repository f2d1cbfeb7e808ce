"""The laboratory: searches for winning tickets, controls and verdicts, stability, transfer, supermasks."""

from .early import EarlyBird as EarlyBird
from .loop import TicketSearch as TicketSearch
from .loop import tickets as tickets
from .rewind import Rewind as Rewind
from .round import Round as Round
from .stability import Branches as Branches
from .stability import Instability as Instability
from .stability import find_rewind as find_rewind
from .stability import instability as instability
from .stability import rewind_point as rewind_point
from .supermask import harvest as harvest
from .supermask import supermask as supermask
from .tangent import Tangent as Tangent
from .train import Training as Training
from .transfer import transfer as transfer
from .verdict import judge as judge
from .verdict import study as study

__all__ = [
    "Branches",
    "EarlyBird",
    "Instability",
    "Rewind",
    "Round",
    "Tangent",
    "TicketSearch",
    "Training",
    "find_rewind",
    "harvest",
    "instability",
    "judge",
    "rewind_point",
    "study",
    "supermask",
    "tickets",
    "transfer",
]
