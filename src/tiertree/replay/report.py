"""What a replay found: counts of pages, as one JSON object and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..metrics import KindStats, Stats
from ..types import FULL, Kind

TIERS = ("device", "host", "storage")
MOVES = ("backed_up", "loaded_back", "persisted", "prefetched")
"""Ways between tiers, as the statistics of each kind name them."""


@dataclass(slots=True)
class KindTally:
    """The share of one kind in a tally, in its pages."""

    saved: int = 0
    """Pages that requests brought to the cache."""
    uncached: int = 0
    """Pages that requests would have brought if there had been room."""
    verified: int = 0
    mismatched: int = 0


@dataclass(slots=True)
class Tally:
    """Counts of a replay so far. Lists are by tier: device, host, storage."""

    requests: int = 0
    pages: int = 0
    hits: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Pages hit, by the tier in which the request found them."""
    verified: int = 0
    mismatched: int = 0
    loads_refused: int = 0
    """Load-backs that were refused or failed."""
    corrupted: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Different pages of which a byte was flipped."""
    lost: int = 0
    """Pages of FULL in memory behind the last boundary that every kind could continue from."""
    kinds: dict[Kind, KindTally] = field(default_factory=lambda: {FULL: KindTally()})
    """What there is to say of each kind, FULL first."""

    @property
    def uncached(self) -> int:
        """Pages of FULL at the end of requests for which there was no room."""
        return self.kinds[FULL].uncached

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
    page_bytes: Mapping[Kind, int] = field(default_factory=dict)
    """Bytes of a page of each kind; nothing where pages have none."""

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
            **self._kinds(),
            "settings": self.settings,
            "seconds": self.seconds,
        }

    def _kinds(self) -> dict[str, Any]:
        """What there is to say where FULL is not alone."""
        if not self.stats.kinds:
            return {}
        kinds = {kind: self._kind(kind, tally) for kind, tally in self.tally.kinds.items()}
        return {"lost_pages": self.tally.lost, "kinds": kinds}

    def _kind(self, kind: Kind, tally: KindTally) -> dict[str, Any]:
        stats: Stats | KindStats = self.stats if kind == FULL else self.stats.kinds[kind]
        held = {"device": stats.device.resident, "host": stats.host.resident}
        moved = {name: getattr(stats, name) for name in MOVES}
        page = self.page_bytes.get(kind)
        in_bytes = None
        if page is not None:
            in_bytes = {"page": page, **{name: page * count for name, count in (held | moved).items()}}
        return {
            "held_pages": held,
            "saved_pages": tally.saved,
            "evicted_pages": {"device": stats.device.evicted, "host": stats.host.evicted},
            **{f"{name}_pages": count for name, count in moved.items()},
            "recovered_pages": 0 if isinstance(stats, Stats) else stats.recovered,
            "declined_pages": 0 if isinstance(stats, Stats) else stats.declined,
            "dropped_pages": stats.dropped,
            "uncached_pages": tally.uncached,
            "verified_pages": tally.verified,
            "mismatched_pages": tally.mismatched,
            "bytes": in_bytes,
        }
