"""What a replay is told, checked for what cannot work, and the configuration that follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from ..config import CacheConfig, DeviceConfig, HostConfig, LoadBackConfig, PrefetchConfig
from ..types import ConfigError, StopRule, WritePolicy
from .paging import Paging
from .payload import layout_of

PAGES_MAX: Final = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """The shape of the cache, in pages, and what to do with it. Raises ConfigError, naming the option."""

    device_pages: int | None = None
    """Device tier; None: unbounded, one page for every different page of the trace."""
    host_pages: int = 0
    """Host tier; 0: none."""
    disk_pages: int = 0
    """Disk tier; 0: none. Needs a host tier."""
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    """When pages go to host."""
    selective_hits: int = 1
    """write_through_selective: at which hit."""
    eviction: str = "lru"
    """Which pages leave first."""
    prefetch: StopRule = StopRule.WAIT_COMPLETE
    """When a prefetch from disk stops waiting."""
    load_back_min: int = 0
    """Tokens below which host pages are computed again instead of loaded."""
    block_tokens: int = 512
    """Tokens of a block of the trace."""
    page_tokens: int | None = None
    """Tokens of a page, a divisor of `block_tokens`; None: the same."""
    page_bytes: int | None = None
    """Bytes of a page; None: metadata only."""
    corrupt: int = 0
    """Different pages of each tier to flip a byte of while the replay runs; needs bytes."""
    disk_dir: str | None = None
    """Directory of the disk tier, new or empty, kept afterwards; None: a temporary one."""
    seed: int = 0
    """Of the payloads and of `corrupt`."""

    def __post_init__(self) -> None:
        lows = {"device_pages": 1, "block_tokens": 1, "page_tokens": 1, "selective_hits": 1, "page_bytes": 8}
        names = ("device_pages", "host_pages", "disk_pages", "selective_hits", "load_back_min")
        for name in (*names, "block_tokens", "page_tokens", "page_bytes", "corrupt", "seed"):
            value, low = getattr(self, name), lows.get(name, 0)
            if value is not None and not low <= value <= PAGES_MAX:
                raise _refused(name, f"{value} is not allowed; allowed: {low} to {PAGES_MAX}")
        if self.block_tokens % self.tokens_per_page:
            raise _refused("page_tokens", f"{self.page_tokens} does not divide {self.block_tokens}")
        if self.disk_pages and not self.host_pages:
            raise _refused("disk_pages", "pages reach disk through host; allowed: only with --host-pages")
        if self.disk_dir is not None and not (self.disk_pages and self.real_bytes):
            raise _refused("disk_dir", "allowed: only with --disk-pages and --bytes real")
        if self.corrupt and not self.real_bytes:
            raise _refused("corrupt", "there are no bytes to flip; allowed: only with --bytes real")

    @property
    def tokens_per_page(self) -> int:
        """Tokens of a page."""
        return self.block_tokens if self.page_tokens is None else self.page_tokens

    @property
    def real_bytes(self) -> bool:
        """Whether pages have bytes."""
        return self.page_bytes is not None

    def settings(self) -> dict[str, Any]:
        """Every option as JSON-ready data, with the value that counts where it was left open. Only what has
        no value stays None: an unbounded device, the bytes of pages without, a temporary directory."""
        bytes_of_pages = "real" if self.real_bytes else "none"
        return {**asdict(self), "page_tokens": self.tokens_per_page, "bytes": bytes_of_pages}

    def cache_config(self, paging: Paging) -> CacheConfig:
        """The cache that these options describe, for the requests of `paging`. The disk tier is not part of
        it: the replay attaches its own. One worker per kind of transfer, so that their order is fixed."""
        size = self.tokens_per_page
        device = paging.unique_pages if self.device_pages is None else self.device_pages
        return CacheConfig(
            page_size=size,
            layout=None if self.page_bytes is None else layout_of(self.page_bytes, size),
            device=DeviceConfig(size=max(device, 1)),
            host=HostConfig(size=self.host_pages) if self.host_pages else None,
            write_policy=self.write_policy,
            selective_hits=self.selective_hits,
            eviction=self.eviction,
            prefetch=PrefetchConfig(
                stop_rule=self.prefetch, min_tokens=0, max_pages_in_flight=max(paging.longest, 1)
            ),
            load_back=LoadBackConfig(min_tokens=self.load_back_min),
            transfer_threads=1,
            storage_threads=1,
        )


def _refused(name: str, why: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')}: {why}")
