"""What a cache is told of its tiers, one by one; `config.py` puts them together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from os import PathLike, fspath

from .kvlayout import MemoryOrder, a_size, parse_bytes
from .types import StopRule
from .validate import a_text, an_integer, as_enum, refused, seconds


class Durability(StrEnum):
    """What an acknowledged persist has survived: NONE a killed process, BATCH a power cut too."""

    NONE = "none"
    BATCH = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """One in-memory tier."""

    size: int | str
    """Capacity of FULL: pages (int), or bytes of all its pools together as text ("40GiB"), rounded down to
    pages. Other kinds have capacities of their own."""
    order: MemoryOrder = MemoryOrder.PAGE_FIRST_DIRECT
    """Memory order of its pools."""

    def __post_init__(self) -> None:
        a_size(self, "size")
        as_enum(self, "order", MemoryOrder)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig(TierConfig):
    """L1: where attention reads."""

    order: MemoryOrder = MemoryOrder.LAYER_FIRST
    """Memory order of its pools."""
    torch_device: str = "cpu"
    """Any torch device: "cpu", "cuda:0"."""

    def __post_init__(self) -> None:
        TierConfig.__post_init__(self)
        a_text(self, "torch_device", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig(TierConfig):
    """L2: main memory, pinned where CUDA is present."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """L3: one directory on disk, of this cache alone."""

    path: str
    """Directory, made when missing; a relative one is relative to the working directory."""
    size: int | str
    """Capacity in bytes (int, or text as "1TiB"): everything the directory holds."""
    segment_size: int | str | None = None
    """Bytes per data file, at most `size`; None lets the backend choose."""
    durability: Durability = Durability.BATCH
    """"none": an acknowledged page survives a killed process; "batch": synced before the acknowledgement."""

    def __post_init__(self) -> None:
        if isinstance(self.path, PathLike):
            object.__setattr__(self, "path", fspath(self.path))
        a_text(self, "path", 1)
        as_enum(self, "durability", Durability)
        if (self.segment_bytes or 1) > self.size_bytes:
            raise refused("segment_size", self.segment_size, f"at most size {self.size!r}")

    @property
    def size_bytes(self) -> int:
        """`size` in bytes."""
        return parse_bytes(self.size)

    @property
    def segment_bytes(self) -> int | None:
        """`segment_size` in bytes."""
        return None if self.segment_size is None else parse_bytes(self.segment_size, "segment_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchConfig:
    """Reading pages from storage into host ahead of a request."""

    stop_rule: StopRule = StopRule.TIMEOUT
    """When to stop waiting: "best_effort" at once, "wait_complete" never, "timeout" after the time below."""
    min_tokens: int = 256
    """Token units below which a prefetch is refused: not worth the reads."""
    base_seconds: float = 1.0
    """"timeout": seconds that every prefetch gets."""
    per_1024_tokens_seconds: float = 0.25
    """"timeout": further seconds per 1,024 token units asked for."""
    max_pages_in_flight: int = 65_536
    """Pages that all prefetches under way may hold together; more are refused."""

    def __post_init__(self) -> None:
        as_enum(self, "stop_rule", StopRule)
        an_integer(self, "min_tokens", 0)
        seconds(self, "base_seconds")
        seconds(self, "per_1024_tokens_seconds")
        an_integer(self, "max_pages_in_flight", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    """When a tier that fails is left alone: copies to host, storage writes, storage reads, each by itself."""

    failures: int = 3
    """Failures in a row after which it is not asked any more; one operation that is late is enough."""
    base_seconds: float = 1.0
    """Seconds for which it is left alone at first; twice as long after each further failure."""
    max_seconds: float = 60.0
    """Seconds for which it is left alone at most; then one operation tries whether it is well again."""

    def __post_init__(self) -> None:
        an_integer(self, "failures", 1)
        seconds(self, "base_seconds", above_zero=True)
        seconds(self, "max_seconds", above_zero=True)
        if self.max_seconds < self.base_seconds:
            raise refused("max_seconds", self.max_seconds, f"at least base_seconds, {self.base_seconds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBackConfig:
    """Copying pages from host back to device."""

    min_tokens: int = 10
    """Token units below which recomputing is better than loading."""
    max_pages: int | None = None
    """Pages that one load-back may bring at most; None: what there is room for."""

    def __post_init__(self) -> None:
        an_integer(self, "min_tokens", 0)
        if self.max_pages is not None:
            an_integer(self, "max_pages", 1)
