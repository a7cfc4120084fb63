"""What the tree decides by."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import WritePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Everything the tree decides by. Lengths in pages, times in seconds."""

    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    selective_hits: int = 1
    load_back_pages_min: int = 1
    load_back_pages_max: int | None = None
    prefetch_pages_min: int = 1
    prefetch_pages_in_flight_max: int = 65_536
    op_deadline_seconds: float = 30.0
    operations_max: int = 4096
    breaker_failures: int = 3
    breaker_base_seconds: float = 1.0
    breaker_max_seconds: float = 60.0
