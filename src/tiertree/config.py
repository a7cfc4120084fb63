"""The one configuration of a cache: frozen, validated once, readable from TOML.

    CacheConfig ─┬─ layout: KVLayout          what the bytes of one page are (None: metadata only)
                 ├─ kinds: KindConfig…        kinds of attention state beside FULL
                 ├─ sidecars: SidecarConfig…  pools that ride on another kind's slots
                 ├─ device: DeviceConfig      L1, always there
                 ├─ host: HostConfig | None   L2
                 ├─ storage: StorageConfig | None   L3, needs L2
                 ├─ prefetch, load_back       when to move pages up, and how many
                 └─ breaker                   when a tier that fails is left alone

Sizes are whole pages (`int`) or bytes (`"40GiB"`); durations are seconds. Whatever cannot work raises
`ConfigError`, whose message starts with the field (`device.size: …`) and says what is allowed.
"""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, Final, Self

from .kindconfig import KindConfig, check_kinds, check_sidecars, kinds_reader
from .kvlayout import (
    Attention,
    KVLayout,
    Layout,
    MemoryOrder,
    SidecarConfig,
    StateLayout,
    layout_reader,
    pages_of,
    parse_bytes,
    slot_bytes,
)
from .tierconfig import (
    BreakerConfig,
    DeviceConfig,
    Durability,
    HostConfig,
    LoadBackConfig,
    PrefetchConfig,
    StorageConfig,
    TierConfig,
)
from .types import FULL, ConfigError, Kind, Tier, WritePolicy
from .validate import (
    Reader,
    a_text,
    an_instance,
    an_integer,
    as_enum,
    from_table,
    list_of,
    one_of,
    refused,
    seconds,
    table,
)

__all__ = [
    "Attention",
    "BreakerConfig",
    "CacheConfig",
    "DeviceConfig",
    "Durability",
    "HostConfig",
    "KVLayout",
    "KindConfig",
    "Layout",
    "LoadBackConfig",
    "MemoryOrder",
    "PrefetchConfig",
    "SidecarConfig",
    "StateLayout",
    "StorageConfig",
    "TierConfig",
    "pages_of",
    "parse_bytes",
    "slot_bytes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """All that a `PrefixCache` is told. Raises `ConfigError` for what cannot work, warns where unwise."""

    device: DeviceConfig
    """L1."""
    host: HostConfig | None = None
    """L2; None: no such tier."""
    storage: StorageConfig | None = None
    """L3; None: no such tier until one is attached. Needs `host` and `layout`."""
    page_size: int = 16
    """Token units per page, the unit of every length in the tree."""
    unit_bits: int = 32
    """Width of a token unit: 32 or 64."""
    bigram: bool = False
    """Make each unit of two neighbouring tokens (EAGLE); needs `unit_bits` 64."""
    layout: KVLayout | None = None
    """What the pages of kind FULL are; None: metadata only, no bytes anywhere."""
    kinds: tuple[KindConfig, ...] = ()
    """The kinds of attention state that the model has beside FULL."""
    sidecars: tuple[SidecarConfig, ...] = ()
    """Further pools on the slots of a kind; need `layout`."""
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    """When a page is backed up to host."""
    selective_hits: int = 1
    """write_through_selective: the hit at which a page is backed up. A hit is a match that reaches the page
    after it was inserted (HiCache counts the insert as well: its 2 is our 1)."""
    eviction: str = "lru"
    """Name of the eviction policy; the cache refuses one that it does not know."""
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    """Storage to host."""
    load_back: LoadBackConfig = field(default_factory=LoadBackConfig)
    """Host to device."""
    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    """When a tier that fails is left alone, and for how long."""
    model: str = ""
    """Which model made the bytes; part of every page hash."""
    revision: str = ""
    """Which weights of that model; part of every page hash."""
    shard: str = ""
    """Which part of the model this worker holds ("tp0/2"); part of every storage key."""
    op_deadline_seconds: float = 30.0
    """Seconds after which the slots of an unfinished operation count as LOST."""
    max_operations: int = 4096
    """Operations in flight at most: half of them (at least one) for storage, half for copies."""
    transfer_threads: int = 1
    """Worker threads between device and host (CPU engine)."""
    storage_threads: int = 2
    """Worker threads between host and storage."""
    events: bool = False
    """Record KV events for `take_events()`."""
    events_max: int = 100_000
    """Events kept until they are taken; older ones are dropped and counted."""
    debug_poison: bool | None = None
    """Fill pages that nobody owns with a pattern, and verify it before they are used again: for tests of
    engines (see `poison.py`). None: as the environment variable TIERTREE_DEBUG_POISON says ("1": on)."""

    def __post_init__(self) -> None:
        one_of(self, "unit_bits", (32, 64))
        for name in ("page_size", "selective_hits", "max_operations", "events_max"):
            an_integer(self, name, 1)
        for name in ("transfer_threads", "storage_threads"):
            an_integer(self, name, 1, high=256)
        for name in ("bigram", "events"):
            one_of(self, name, (False, True))
        one_of(self, "debug_poison", (None, False, True))
        for name in ("model", "revision", "shard"):
            a_text(self, name)
        a_text(self, "eviction", 1)
        seconds(self, "op_deadline_seconds", above_zero=True)
        as_enum(self, "write_policy", WritePolicy)
        _nested(self)
        _consistent(self)

    @property
    def layouts(self) -> dict[Kind, Layout]:
        """What the pages of each kind are, FULL first; empty for metadata only."""
        found = {FULL: self.layout, **{each.kind: each.layout for each in self.kinds}}
        return {kind: layout for kind, layout in found.items() if layout is not None}

    @property
    def slot_bytes(self) -> dict[Kind, int]:
        """Bytes of one slot of each kind with all its sidecars, FULL first; empty for metadata only."""
        return {kind: slot_bytes(layout, self._riding(kind)) for kind, layout in self.layouts.items()}

    @property
    def device_pages(self) -> int:
        """Capacity of the device tier in pages of FULL."""
        return self.kind_pages(Tier.DEVICE)[FULL]

    @property
    def host_pages(self) -> int:
        """Capacity of the host tier in pages of FULL; 0 when there is none."""
        return self.kind_pages(Tier.HOST)[FULL]

    def kind_pages(self, tier: Tier) -> dict[Kind, int]:
        """Capacity of an in-memory tier in pages of each kind, FULL first, then in the order of `kinds`; 0
        of each where there is no such tier."""
        name = {Tier.DEVICE: "device", Tier.HOST: "host"}[tier]
        own: TierConfig | None = getattr(self, name)
        sizes: dict[Kind, tuple[str, int | str | None, Layout | None]] = {
            FULL: (f"{name}.size", own.size if own else None, self.layout)
        }
        for index, each in enumerate(self.kinds):
            sizes[each.kind] = (f"kinds[{index}].{name}", getattr(each, name), each.layout)
        return {
            kind: 0 if size is None else pages_of(size, layout, self._riding(kind), where)
            for kind, (where, size, layout) in sizes.items()
        }

    def _riding(self, kind: Kind) -> list[SidecarConfig]:
        return [each for each in self.sidecars if each.kind == kind]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from nested tables, as TOML or JSON give them. `page_size` of a layout may be left
        out: it is the cache's. Unknown keys are refused with a suggestion and the list of those allowed."""
        page_size = values.get("page_size") if isinstance(values, Mapping) else None
        return from_table(cls, values, _readers(page_size))

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> Self:
        """A configuration from a TOML file; every error names the file."""
        try:
            with open(path, "rb") as file:
                text = file.read(_TOML_BYTES_MAX + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no file can have this name"
            raise ConfigError(f"{fspath(path)}: cannot be read: {reason}") from error
        if len(text) > _TOML_BYTES_MAX:
            raise ConfigError(f"{fspath(path)}: is too long; allowed: {_TOML_BYTES_MAX} bytes")
        if any(line.count(b".") > _TOML_DOTS_MAX for line in text.splitlines()):
            raise ConfigError(f"{fspath(path)}: a line has too many dots; allowed: {_TOML_DOTS_MAX}")
        try:
            values = tomllib.loads(text.decode())
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a bomb of brackets
            raise ConfigError(f"{fspath(path)}: is not TOML: {error}") from None
        try:
            return cls.from_mapping(values)
        except ConfigError as error:
            raise ConfigError(f"{fspath(path)}: {error}") from None


_PARTS: Final[dict[str, type]] = {
    "layout": KVLayout,
    "device": DeviceConfig,
    "host": HostConfig,
    "storage": StorageConfig,
    "prefetch": PrefetchConfig,
    "load_back": LoadBackConfig,
    "breaker": BreakerConfig,
}
_TOML_BYTES_MAX: Final = 1 << 16
_TOML_DOTS_MAX: Final = 64
"""A file that is longer, or has more dots in a line, is no configuration; one key of very many parts would
cost its reader their square in time and memory."""
_FAR: Final = 1 << 20
"""A boundary, in pages, behind which a kind needs no more than before it."""
_OPTIONAL: Final = ("layout", "host", "storage")
_LISTS: Final[dict[str, type]] = {"kinds": KindConfig, "sidecars": SidecarConfig}


def _readers(page_size: object) -> dict[str, Reader]:
    """How each nested part is read; layouts that name no page size get this one."""
    layout = layout_reader(page_size)
    parts = {name: table(part) for name, part in _PARTS.items()}
    lists = {"kinds": kinds_reader(page_size), "sidecars": list_of(table(SidecarConfig, {"layout": layout}))}
    return {**parts, "layout": layout, **lists}


def _nested(config: CacheConfig) -> None:
    """Refuse nested parts of the wrong type."""
    for name, part in _LISTS.items():
        values = getattr(config, name)
        if not isinstance(values, tuple):
            raise refused(name, values, f"a tuple of {part.__name__} (in TOML: [[{name}]])")
        for index, each in enumerate(values):
            if not isinstance(each, part):
                raise refused(f"{name}[{index}]", each, f"a {part.__name__} (in TOML: a table)")
    for name, part in _PARTS.items():
        if not (name in _OPTIONAL and getattr(config, name) is None):
            an_instance(config, name, part)


def _consistent(config: CacheConfig) -> None:
    """Refuse parts that are well by themselves but cannot work together."""
    if config.bigram and config.unit_bits != 64:
        raise ConfigError("bigram: two 32-bit tokens make a 64-bit unit; allowed: only with unit_bits 64")
    _consistent_layouts(config)
    if config.storage is not None:
        if not config.model:
            warnings.warn(
                "model: is not given, so storage cannot tell pages of one model from those of another with "
                "the same layout; name the model, and its weights in revision",
                stacklevel=4,
            )
        if config.host is None:
            raise ConfigError("storage: pages reach storage through host; allowed: only with a host")
        if config.layout is None:
            raise ConfigError("storage: without a layout there are no bytes; allowed: only with a layout")
        if config.storage.size_bytes < (least := sum(config.slot_bytes.values())):
            raise ConfigError(f"storage.size: less than a page of each kind; allowed: at least {least} bytes")
    device, host = config.device_pages, config.host_pages
    if config.host is not None and host < device and config.write_policy is not WritePolicy.WRITE_BACK:
        warnings.warn(
            f"host.size: {host} pages are fewer than the device's {device}; under {config.write_policy} host "
            "keeps copies of what device holds, so it adds few hits of its own and pages lose their copies "
            "before device evicts them; make host larger than device, or use write_back",
            stacklevel=4,
        )
    for index, (each, have) in enumerate(
        zip(config.kinds, [*config.kind_pages(Tier.DEVICE).values()][1:], strict=True)
    ):
        need = _FAR - each.rules.since(_FAR, config.page_size)
        if have < need:
            warnings.warn(
                f"kinds[{index}].device: {have} pages are fewer than the {need} that one hit in a long "
                "prompt needs, so none can end there; give it at least as many",
                stacklevel=4,
            )


def _consistent_layouts(config: CacheConfig) -> None:
    """Refuse kinds, sidecars and layouts that do not fit the cache or one another."""
    if config.sidecars and config.layout is None:
        raise ConfigError("sidecars: there is no layout whose slots they share; allowed: only with a layout")
    check_kinds(config.kinds, config.page_size, config.host is not None, config.layout is not None)
    check_sidecars(config.sidecars, (FULL, *(each.kind for each in config.kinds)))
    layouts = {"layout": config.layout}
    for name in _LISTS:
        layouts |= {
            f"{name}[{index}].layout": each.layout for index, each in enumerate(getattr(config, name))
        }
    for where, layout in layouts.items():
        if isinstance(layout, KVLayout) and layout.page_size != config.page_size:
            raise refused(
                f"{where}.page_size", layout.page_size, f"the cache's page_size, {config.page_size}"
            )
