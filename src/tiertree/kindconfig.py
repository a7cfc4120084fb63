"""The part of the configuration that says which kinds of attention state there are beside FULL.

`config` gives all of this on; import it from there.
"""

from __future__ import annotations

from dataclasses import dataclass

from .components import Component
from .components.registry import read_rules
from .kvlayout import KVLayout, Layout, SidecarConfig, StateLayout, a_size, layout_reader
from .types import FULL, ConfigError, Kind
from .validate import Reader, a_name, an_instance, list_of, refused, table


@dataclass(frozen=True, slots=True, kw_only=True)
class KindConfig:
    """One further kind: its rules and its own pools, which share nothing with those of FULL."""

    rules: Component
    """What the kind needs at a boundary: SlidingWindow, Mamba, or rules of your own. In TOML a table whose
    `kind` names them (see `register_kind`)."""
    device: int | str
    """Capacity on device: pages (int), or bytes of all its pools together as text ("4GiB")."""
    host: int | str | None = None
    """Capacity on host in the same way; given exactly if the cache has a host tier."""
    layout: Layout | None = None
    """What the pages of this kind are; given exactly if the cache has a layout. In TOML a table with
    `elements` is a StateLayout."""

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Component) or isinstance(self.rules, type):
            raise refused("rules", self.rules, "a Component, as SlidingWindow or Mamba (in TOML: a table)")
        try:
            a_name(self.rules, "kind")
        except ConfigError as error:
            raise ConfigError(f"rules.{error}") from None
        a_size(self, "device")
        if self.host is not None:
            a_size(self, "host")
        if self.layout is not None:
            an_instance(self, "layout", KVLayout, StateLayout)

    @property
    def kind(self) -> Kind:
        """The name of the kind: that of its rules."""
        return self.rules.kind


def kinds_reader(page_size: object) -> Reader:
    """Reads a list of tables as KindConfigs; layouts that name no page size get this one."""
    readers = {"rules": read_rules, "layout": layout_reader(page_size)}
    return list_of(table(KindConfig, readers))


def check_kinds(kinds: tuple[KindConfig, ...], page_size: int, has_host: bool, has_layout: bool) -> None:
    """Refuse kinds that repeat, that do not fit the page size, or that lack what the cache has."""
    taken = {FULL}
    for index, each in enumerate(kinds):
        where = f"kinds[{index}]"
        if each.kind in taken:
            raise ConfigError(
                f"{where}.rules.kind: {each.kind!r} is taken; allowed: each kind once, FULL apart"
            )
        taken.add(each.kind)
        if (misfit := each.rules.fits(page_size)) is not None:
            raise ConfigError(f"{where}.rules.{misfit}")
        for name, tier, there in (("host", "host tier", has_host), ("layout", "layout", has_layout)):
            given = getattr(each, name) is not None
            if given and not there:
                raise ConfigError(f"{where}.{name}: the cache has no {tier}; allowed: only with one")
            if there and not given:
                raise ConfigError(f"{where}.{name}: is missing; required: the cache has a {tier}")


def check_sidecars(sidecars: tuple[SidecarConfig, ...], kinds: tuple[Kind, ...]) -> None:
    """Refuse sidecars that repeat, that are named as a kind, or that ride on nothing."""
    names = [each.name for each in sidecars]
    for index, each in enumerate(sidecars):
        where = f"sidecars[{index}]"
        if each.name in names[:index]:
            raise ConfigError(f"{where}.name: {each.name!r} is used twice; allowed: each name once")
        if each.name in kinds:
            raise ConfigError(f"{where}.name: {each.name!r} is the name of a kind; allowed: any other name")
        if each.kind not in kinds:
            raise refused(f"{where}.kind", each.kind, ", ".join(kinds))
