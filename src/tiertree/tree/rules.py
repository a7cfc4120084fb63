"""What the tree decides by."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import WritePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Everything the tree decides by. Lengths in pages, times in seconds."""

    write_policy: WritePolicy
    selective_hits: int
    load_back_pages_min: int
    load_back_pages_max: int | None
    prefetch_pages_min: int
    prefetch_pages_in_flight_max: int
    op_deadline_seconds: float
    operations_max: int
    breaker_failures: int
    breaker_base_seconds: float
    breaker_max_seconds: float
