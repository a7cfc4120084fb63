"""KV events: what happened on each medium, in order, as plain structs (`PrefixCache.take_events`)."""

from __future__ import annotations

from .tree.journal import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventsLost

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "Event", "EventsLost"]
