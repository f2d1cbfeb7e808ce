"""The search for winning tickets: rounds, rewinding, run directories, the ledger."""

from .loop import Round as Round
from .loop import TicketSearch as TicketSearch
from .loop import tickets as tickets
from .rewind import Rewind as Rewind
