"""The byte ledger: what one training step of a network reads and writes in memory, by layer and by level of fusion."""

from .levels import LEVELS, Level
from .recording import Event, Ledger, ledger

__all__ = ["LEVELS", "Event", "Ledger", "Level", "ledger"]
