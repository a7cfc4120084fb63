"""What a replay looks like: a progress bar on a terminal, tables and sentences at the end."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .report import TIERS, Report, Tally

SECONDS_BETWEEN_LOOKS = 0.1
RATE_SECONDS_MIN = 0.1
KIND_ROWS = (
    ("on device", "held_pages", "device"),
    ("on host", "held_pages", "host"),
    ("computed and saved", "saved_pages", None),
    ("evicted from device", "evicted_pages", "device"),
    ("evicted from host", "evicted_pages", "host"),
    ("backed up", "backed_up_pages", None),
    ("loaded back", "loaded_back_pages", None),
    ("persisted", "persisted_pages", None),
    ("prefetched", "prefetched_pages", None),
    ("recovered", "recovered_pages", None),
    ("declined", "declined_pages", None),
)
"""Title, measure of a kind, tier."""


class ProgressBar:
    """A bar with the hit ratio so far. Watches a replay of `requests`; nothing stays of it."""

    def __init__(self, console: Console, requests: int) -> None:
        self._bar = Progress(
            TextColumn("replaying"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("hit ratio {task.fields[ratio]:.4f}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=requests, ratio=0.0)
        self._due = _Every(SECONDS_BETWEEN_LOOKS)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, tally: Tally) -> None:
        if self._due():
            self._bar.update(self._task, completed=tally.requests, ratio=tally.hit_ratio)


class _Every:
    """True at most once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


def results(report: Report) -> Table:
    """The final table: hits, writes and evictions by tier."""
    found, tally = report.as_dict(), report.tally
    disk = report.stats.storage
    pages_now = (report.stats.device.resident, report.stats.host.resident, disk.pages if disk else 0)
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("tier", "holds", "pages hit", "of all", "written", "evicted"):
        table.add_column(title, justify="left" if title == "tier" else "right")
    for name, now, hit in zip(TIERS, pages_now, tally.hits, strict=True):
        written = found["written_pages"].get(name, tally.pages - sum(tally.hits) - tally.uncached)
        evicted = found["evicted_pages"][name]
        share = f"{hit / max(tally.pages, 1):.4f}"
        table.add_row(name, f"{now:,}", f"{hit:,}", share, f"{written:,}", f"{evicted:,}")
    table.add_row("together", "", f"{sum(tally.hits):,}", f"{tally.hit_ratio:.4f}", "", "")
    return table


def kinds(report: Report) -> Table | None:
    """What each kind holds, has let go and has moved, in pages and where they have any in bytes; None where
    FULL is alone."""
    found = report.as_dict().get("kinds")
    if found is None:
        return None
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("pages")
    for name in found:
        table.add_column(name, justify="right")
    for title, measure, tier in KIND_ROWS:
        cells = []
        for each in found.values():
            count = each[measure] if tier is None else each[measure][tier]
            size = "" if each["bytes"] is None or not count else f" ({_size(count * each['bytes']['page'])})"
            cells.append(f"{count:,}{size}")
        table.add_row(title, *cells)
    return table


def sentences(report: Report, real_bytes: bool) -> list[str]:
    """What else there is to say, one sentence a line; the verdict on the bytes comes last."""
    found, tally = report.as_dict(), report.tally
    lines = [
        f"{_some(tally.requests, 'request')}, {_some(tally.pages, 'page')}, {report.unique_pages:,} of them "
        f"different, in {_duration(report.seconds, tally.requests)}"
    ]
    for name, noun, what in (
        ("dropped_pages", "page", "dropped because host had no room"),
        ("uncached_pages", "page", "without room on device"),
        ("failed_operations", "operation", "failed or late"),
    ):
        if found[name]:
            lines.append(f"{_some(found[name], noun)} {what}")
    if tally.lost:
        lines.append(f"FULL reached {_some(tally.lost, 'page')} beyond where every kind could continue")
    if sum(tally.corrupted):
        flipped = ", ".join(f"{count} on {name}" for name, count in zip(TIERS, tally.corrupted, strict=True))
        lines.append(f"flipped a byte in pages on purpose: {flipped}")
    if real_bytes:
        shares = ", ".join(f"{each.verified:,} {kind}" for kind, each in tally.kinds.items())
        lines.append(
            f"verified {_some(tally.verified, 'page')}{f' ({shares})' if len(tally.kinds) > 1 else ''}, "
            f"{_some(tally.mismatched, 'mismatch', 'mismatches')}, "
            f"{_some(found['checksum_failures'], 'checksum failure')}"
        )
    return lines


def _size(count: int) -> str:
    """Bytes in the largest unit of which there is at least one."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:,.0f} {units[0]}" if units[0] == "B" else f"{size:,.1f} {units[0]}"


def _duration(seconds: float, requests: int) -> str:
    """How long it took, and how fast that was unless it is too short to tell."""
    if seconds < RATE_SECONDS_MIN:
        return f"{max(round(1000 * seconds), 1)} ms"
    return f"{seconds:.1f} s ({requests / seconds:,.0f} requests/s)"


def _some(count: int, one: str, many: str | None = None) -> str:
    """A count and its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
