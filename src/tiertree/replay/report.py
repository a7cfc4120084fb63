"""What a replay found: counts of pages, as one JSON object and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..metrics import Stats

TIERS = ("device", "host", "storage")


@dataclass(slots=True)
class Tally:
    """Counts of a replay so far. Lists are by tier: device, host, storage."""

    requests: int = 0
    pages: int = 0
    hits: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Pages hit, by the tier in which the request found them."""
    verified: int = 0
    mismatched: int = 0
    uncached: int = 0
    """Pages at the end of requests for which there was no room."""
    loads_refused: int = 0
    """Load-backs that were refused or failed."""
    corrupted: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Different pages of which a byte was flipped."""

    @property
    def hit_ratio(self) -> float:
        """Pages hit ÷ all pages; 0 where there are none."""
        return sum(self.hits) / self.pages if self.pages else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """The end of a replay. `seconds` is the time of the replay loop, the making of keys and payloads and
    the comparing of bytes included."""

    tally: Tally
    stats: Stats
    unique_pages: int
    settings: dict[str, Any]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data. Two runs with the same settings and requests differ in `seconds`
        alone, but with real bytes where time decides: under stop rules other than wait_complete, and
        under write_back when host is short of room while it writes to disk."""
        tally, stats, disk = self.tally, self.stats, self.stats.storage
        return {
            "requests": tally.requests,
            "pages": tally.pages,
            "hit_pages": dict(zip(TIERS, tally.hits, strict=True)),
            "hit_ratio": tally.hit_ratio,
            "unique_pages": self.unique_pages,
            "written_pages": {"host": stats.backed_up, "storage": stats.persisted},
            "prefetched_pages": stats.prefetched,
            "loaded_back_pages": stats.loaded_back,
            "evicted_pages": {
                "device": stats.device.evicted,
                "host": stats.host.evicted,
                "storage": disk.evicted if disk is not None else 0,
            },
            "dropped_pages": stats.dropped,
            "uncached_pages": tally.uncached,
            "load_backs_refused": tally.loads_refused,
            "failed_operations": stats.failed_operations + stats.late_operations,
            "verified_pages": tally.verified,
            "mismatched_pages": tally.mismatched,
            "checksum_failures": disk.checksum_failures if disk is not None else 0,
            "corrupted_pages": dict(zip(TIERS, tally.corrupted, strict=True)),
            "settings": self.settings,
            "seconds": self.seconds,
        }
