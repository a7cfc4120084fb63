"""What a replay is told, checked for what cannot work, and the configuration that follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

from ..components import Component, Mamba, SlidingWindow
from ..config import (
    CacheConfig,
    DeviceConfig,
    HostConfig,
    KindConfig,
    Layout,
    LoadBackConfig,
    PrefetchConfig,
)
from ..types import ConfigError, StopRule, WritePolicy
from .paging import Paging
from .payload import layout_of, state_layout_of

PAGES_MAX: Final = 10**9
KIND_OPTIONS: Final = {
    "swa_window": ("swa_device_pages", "swa_host_pages", "swa_checkpoint", "swa_page_bytes"),
    "mamba_every": ("mamba_device_states", "mamba_host_states", "mamba_per_path", "mamba_state_bytes"),
}
"""What says that the model has a kind, and what more can be said of it then."""
STEPS: Final = ("swa_checkpoint", "mamba_every")
KIND_BYTES: Final = ("swa_page_bytes", "mamba_state_bytes")
KIND_HOST: Final = ("swa_host_pages", "mamba_host_states")


class KindPlan(NamedTuple):
    """A kind beside FULL in a replay: its rules, and how an engine with such layers goes about it."""

    rules: Component
    every: int | None
    """It saves what continuing at multiples of so many tokens needs; None: at no such places."""
    overwrites: bool
    """Whether going on overwrites the state, so that the request needs a copy of its own."""
    device: int | None
    host: int | None
    """Capacities in slots; None: unbounded."""
    layout: Layout | None


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
    swa_window: int | None = None
    """Tokens that sliding-window layers look back; None: the model has none."""
    swa_device_pages: int | None = None
    """Window pages on device; None: unbounded, as many as there are pages of FULL."""
    swa_host_pages: int | None = None
    """Window pages on host; None: unbounded, as many as there are pages of FULL in memory."""
    swa_checkpoint: int | None = None
    """Save a window at every multiple of so many tokens too; None: only where prompts end or part."""
    swa_page_bytes: int | None = None
    """Bytes of a window page; None: as `page_bytes`."""
    mamba_every: int | None = None
    """Save a recurrent state at every multiple of so many tokens; None: the model has none."""
    mamba_device_states: int | None = None
    """States on device; None: unbounded."""
    mamba_host_states: int | None = None
    """States on host; None: unbounded."""
    mamba_per_path: int | None = None
    """States that one path may have on device; None: any number."""
    mamba_state_bytes: int | None = None
    """Bytes of a state; None: as `page_bytes`."""

    def __post_init__(self) -> None:
        lows = {"device_pages": 1, "block_tokens": 1, "page_tokens": 1, "selective_hits": 1, "page_bytes": 8}
        names = ["device_pages", "host_pages", "disk_pages", "selective_hits", "load_back_min"]
        for lead, more in KIND_OPTIONS.items():
            names += [lead, *more]
            lows |= {name: 8 if name in KIND_BYTES else 1 for name in (lead, *more)}
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
        self._check_kinds()

    def _check_kinds(self) -> None:
        for lead, more in KIND_OPTIONS.items():
            for name in more if getattr(self, lead) is None else ():
                if getattr(self, name) is not None:
                    raise _refused(name, f"allowed: only with {_option(lead)}")
        for name in STEPS:
            if (getattr(self, name) or 0) % self.tokens_per_page:
                allowed = f"a multiple of the page's {self.tokens_per_page} tokens"
                raise _refused(name, f"{getattr(self, name)} is not allowed; allowed: {allowed}")
        for name in KIND_HOST:
            if getattr(self, name) is not None and not self.host_pages:
                raise _refused(name, "there is no host tier; allowed: only with --host-pages")
        for name in KIND_BYTES:
            if getattr(self, name) is not None and not self.real_bytes:
                raise _refused(name, "there are no bytes; allowed: only with --bytes real")

    @property
    def tokens_per_page(self) -> int:
        """Tokens of a page."""
        return self.block_tokens if self.page_tokens is None else self.page_tokens

    @property
    def real_bytes(self) -> bool:
        """Whether pages have bytes."""
        return self.page_bytes is not None

    def kinds(self) -> tuple[KindPlan, ...]:
        """The kinds that the model has beside FULL."""
        found = []
        if self.swa_window is not None:
            page = self.swa_page_bytes or self.page_bytes
            found.append(
                KindPlan(
                    SlidingWindow(window=self.swa_window, checkpoint_tokens=self.swa_checkpoint),
                    self.swa_checkpoint,
                    False,
                    self.swa_device_pages,
                    self.swa_host_pages,
                    None if page is None else layout_of(page, self.tokens_per_page),
                )
            )
        if self.mamba_every is not None:
            state = self.mamba_state_bytes or self.page_bytes
            found.append(
                KindPlan(
                    Mamba(states_per_path=self.mamba_per_path),
                    self.mamba_every,
                    True,
                    self.mamba_device_states,
                    self.mamba_host_states,
                    None if state is None else state_layout_of(state),
                )
            )
        return tuple(found)

    def settings(self) -> dict[str, Any]:
        """Every option as JSON-ready data, with the value that counts where it was left open. Only what has
        no value stays None: an unbounded pool, the bytes of pages without, a temporary directory. Options of
        kinds that the model does not have are not there."""
        given = asdict(self)
        for lead, more in KIND_OPTIONS.items():
            if given[lead] is None:
                given = {name: value for name, value in given.items() if name not in (lead, *more)}
        for name in KIND_BYTES:
            if name in given and given[name] is None:
                given[name] = self.page_bytes
        bytes_of_pages = "real" if self.real_bytes else "none"
        return {**given, "page_tokens": self.tokens_per_page, "bytes": bytes_of_pages}

    def cache_config(self, paging: Paging) -> CacheConfig:
        """The cache that these options describe, for the requests of `paging`. The disk tier is not part of
        it: the replay attaches its own. One worker per kind of transfer, so that their order is fixed.

        Where kinds beside FULL end a match before FULL's last page, a request computes pages that are there:
        an unbounded device has room for the longest request twice."""
        size, plans = self.tokens_per_page, self.kinds()
        device = self.device_pages
        if device is None:
            device = max(paging.unique_pages + (paging.longest if plans else 0), 1)
        kinds = tuple(
            KindConfig(
                rules=each.rules,
                device=each.device or device,
                host=(each.host or device + self.host_pages) if self.host_pages else None,
                layout=each.layout,
            )
            for each in plans
        )
        return CacheConfig(
            page_size=size,
            layout=None if self.page_bytes is None else layout_of(self.page_bytes, size),
            kinds=kinds,
            device=DeviceConfig(size=device),
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


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refused(name: str, why: str) -> ConfigError:
    return ConfigError(f"{_option(name)}: {why}")
