"""What has happened so far, counted in pages unless the name says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Running totals of one tree since it was made."""

    evicted: list[int] = field(default_factory=lambda: [0, 0])
    """Pages that left device, host."""
    dropped: int = 0
    """Pages lost from memory because host had no room for them (write_back)."""
    backed_up: int = 0
    """Pages whose copy on host became READY, by backup or demotion."""
    backups_dropped: int = 0
    """Pages not backed up for want of host room or of a free operation; offered again when touched."""
    backups_skipped: int = 0
    """Pages not backed up because the breaker of copies to host was open; offered again when touched."""
    loaded_back: int = 0
    offered: int = 0
    """Pages offered to storage."""
    persisted: int = 0
    """Pages that storage took and did not have before."""
    persists_refused: int = 0
    """Pages that storage was asked to take and did not: no room there, or it failed."""
    persists_crowded: int = 0
    """Pages dropped because as many operations wait for storage as may, or because its queue was full."""
    persists_dropped: int = 0
    """Pages not offered to storage because the breaker of storage writes was open."""
    prefetched: int = 0
    """Pages that came from storage and are in the tree."""
    prefetch_discarded: int = 0
    """Pages that came from storage and found no place."""
    prefetch_vanished: int = 0
    """Pages of any kind that storage had said it holds and then did not bring: evicted there meanwhile,
    damaged, or never there."""
    failed_operations: int = 0
    """Copies between device and host that brought nothing: failed, late, or behind one that did."""
    late_operations: int = 0
    """Operations of any kind that have passed their deadline."""
    stray_completions: int = 0
    """Completions that answered no operation in flight."""
