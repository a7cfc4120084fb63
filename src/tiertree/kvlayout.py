"""What the bytes of one page are, and what a size is in bytes and in pages.

`config` gives all of this on; import it from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import StrEnum
from typing import Final

from .types import FULL, ConfigError, Kind
from .validate import (
    LARGEST,
    Reader,
    a_name,
    an_instance,
    an_integer,
    as_enum,
    from_table,
    one_of,
    shown,
    table,
)

_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE_TEXT: Final = re.compile(r"([0-9]{1,25}(?:\.[0-9]{1,25})?) ?([A-Za-z]+)")
_ITEM_BYTES: Final = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
_BYTES_ALLOWED: Final = f'a number and a unit, as in "40GiB" (units: {", ".join(_UNITS)})'


class MemoryOrder(StrEnum):
    """How a pool lays out its memory, outermost axis first. All three hold the same values."""

    LAYER_FIRST = "layer_first"
    """[layer, plane, page, entry, head, dim]: one layer is contiguous; what attention kernels read."""
    PAGE_FIRST = "page_first"
    """[page, entry, layer, plane, head, dim]: one page is contiguous, entry by entry."""
    PAGE_FIRST_DIRECT = "page_first_direct"
    """[page, layer, plane, entry, head, dim]: one page is contiguous, and each layer inside it."""

    @property
    def page_order(self) -> MemoryOrder:
        """The order of one page's bytes once it has left its pool (a layer_first page is regrouped)."""
        return MemoryOrder.PAGE_FIRST if self is MemoryOrder.PAGE_FIRST else MemoryOrder.PAGE_FIRST_DIRECT


class Attention(StrEnum):
    """What an entry consists of: MHA a K and a V plane, MLA one latent plane."""

    MHA = "mha"
    MLA = "mla"


def parse_bytes(value: int | str, name: str = "size") -> int:
    """Bytes of `value`: an int as it is, or text such as "40GiB", "1.5TiB", "512 MiB", "100B", fractions of a
    byte dropped. Raises `ConfigError` starting with `name` for anything else, and for less than one byte."""
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        parts = _SIZE_TEXT.fullmatch(value.strip()) if isinstance(value, str) else None
        if parts is None or parts[2] not in _UNITS:
            raise ConfigError(f"{name}: {shown(value)} is not a size in bytes; allowed: {_BYTES_ALLOWED}")
        count = int(Decimal(parts[1]) * _UNITS[parts[2]])
    if not 1 <= count <= LARGEST:
        raise ConfigError(f"{name}: {shown(value)} is out of range; allowed: 1 to {LARGEST} bytes")
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """What one page of one kind is: its shape and element type, not how a pool orders it."""

    layers: int
    """Attention layers that the page covers."""
    kv_heads: int
    """Key/value heads per layer, on this shard (MLA: normally 1)."""
    head_size: int
    """Elements per head and entry (MLA: latent plus rope size)."""
    dtype: str = "bfloat16"
    """Element type by its torch name: float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, uint8."""
    attention: Attention = Attention.MHA
    """Planes per layer: "mha" two (K, V), "mla" one."""
    page_size: int = 16
    """Token units per page; must equal the cache's."""
    tokens_per_entry: int = 1
    """Token units that share one entry (a compressed pool); must divide `page_size`."""

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_size", "page_size", "tokens_per_entry"):
            an_integer(self, name, 1)
        one_of(self, "dtype", tuple(_ITEM_BYTES))
        as_enum(self, "attention", Attention)
        if self.page_size % self.tokens_per_entry:
            allowed = f"a divisor of page_size {self.page_size}"
            raise ConfigError(f"tokens_per_entry: {self.tokens_per_entry} is not allowed; allowed: {allowed}")

    @property
    def planes(self) -> int:
        """Tensors per layer: 2 for MHA (K and V), 1 for MLA."""
        return 2 if self.attention is Attention.MHA else 1

    @property
    def entries(self) -> int:
        """Entries per page."""
        return self.page_size // self.tokens_per_entry

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEM_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers and planes."""
        return self.layers * self.planes * self.entries * self.kv_heads * self.head_size * self.itemsize

    def descriptor(self, order: MemoryOrder = MemoryOrder.PAGE_FIRST_DIRECT) -> bytes:
        """Everything that makes the bytes of a page differ, as stable text, for storage keys. `order` is that
        of the pool which the page leaves or enters; only its `page_order` counts."""
        values = [f"{each.name}={getattr(self, each.name)}" for each in fields(self)]
        return ";".join(["kv1", *values, f"order={order.page_order}"]).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayout:
    """What one recurrent state is: so many elements for each layer, whatever their shape. A slot holds one
    state, so to a pool it is a page with a single entry of a single plane."""

    layers: int
    """Layers that the state covers."""
    elements: int
    """Elements per layer, on this shard."""
    dtype: str = "float32"
    """Element type by its torch name, as for KVLayout."""

    def __post_init__(self) -> None:
        for name in ("layers", "elements"):
            an_integer(self, name, 1)
        one_of(self, "dtype", tuple(_ITEM_BYTES))

    @property
    def planes(self) -> int:
        """One tensor per layer."""
        return 1

    @property
    def entries(self) -> int:
        """One state per slot."""
        return 1

    @property
    def kv_heads(self) -> int:
        """All elements are one row."""
        return 1

    @property
    def head_size(self) -> int:
        """`elements`."""
        return self.elements

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEM_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of one state, all layers."""
        return self.layers * self.elements * self.itemsize

    def descriptor(self, order: MemoryOrder = MemoryOrder.PAGE_FIRST_DIRECT) -> bytes:
        """As for KVLayout. A state lies in the same way in every order, so `order` does not count."""
        return f"state1;layers={self.layers};elements={self.elements};dtype={self.dtype}".encode()


Layout = KVLayout | StateLayout
"""What one slot of a pool holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarConfig:
    """A pool that rides on another kind's slots: draft-model KV, a sparse-attention indexer, the short
    convolution's state beside a recurrent one."""

    name: str
    """Unique among the sidecars and kinds; lower-case letters, digits, '_' and '-', at most 64 characters."""
    layout: Layout
    """What one of its pages is; same page_size as the cache."""
    kind: Kind = FULL
    """The kind whose slots it shares."""

    def __post_init__(self) -> None:
        a_name(self, "name")
        an_instance(self, "layout", KVLayout, StateLayout)
        a_name(self, "kind")


def layout_reader(page_size: object) -> Reader:
    """Reads a table as a layout: as a StateLayout if it has `elements`, and otherwise as a KVLayout, which
    gets `page_size` (None: nothing to get) where it names none."""
    preset = {} if page_size is None else {"page_size": page_size}

    def read(value: object, where: str) -> object:
        if isinstance(value, Mapping) and "elements" in value:
            return from_table(StateLayout, value, where=where)
        if isinstance(value, StateLayout):
            return value
        return table(KVLayout)({**preset, **value} if isinstance(value, Mapping) else value, where)

    return read


def a_size(owner: object, name: str) -> None:
    """Refuse field `name` unless it is a number of pages or, as text, of bytes."""
    value = getattr(owner, name)
    if isinstance(value, str):
        parse_bytes(value, name)
    else:
        an_integer(owner, name, 1, f"pages as an int of at least 1, or bytes: {_BYTES_ALLOWED}")


def slot_bytes(layout: Layout, sidecars: Sequence[SidecarConfig] = ()) -> int:
    """Bytes that one slot takes: a page of `layout` and one of each sidecar."""
    return layout.page_bytes + sum(sidecar.layout.page_bytes for sidecar in sidecars)


def pages_of(
    size: int | str, layout: Layout | None, sidecars: Sequence[SidecarConfig] = (), name: str = "size"
) -> int:
    """Pages in `size`: an int as it is; text is bytes, divided by those of one page with its sidecars and
    rounded down. Raises `ConfigError` starting with `name` without a layout or with less than one page."""
    if isinstance(size, int):
        return size
    if layout is None:
        raise ConfigError(
            f"{name}: {shown(size)} is in bytes but there is no layout; allowed: pages as an int, or add a "
            "layout"
        )
    page = slot_bytes(layout, sidecars)
    if parse_bytes(size, name) < page:
        raise ConfigError(f"{name}: {size!r} is less than one page; allowed: at least {page} bytes")
    return parse_bytes(size, name) // page
