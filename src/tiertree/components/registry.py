"""Which rules a TOML file means: names and what makes the rules.

[kinds.rules]
kind = "swa"        the name, looked up here
window = 4096       all else goes to what makes the rules, by name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ..types import MAMBA, SWA, ConfigError
from ..validate import from_table, shown, suggestion
from .base import Component
from .mamba import Mamba
from .sliding_window import SlidingWindow

Factory = Callable[..., Component]
"""Makes rules from named arguments: a dataclass, or any function."""

_FACTORIES: Final[dict[str, Factory]] = {SWA: SlidingWindow, MAMBA: Mamba}


def register_kind(name: str, factory: Factory) -> None:
    """From now on `kind = "name"` in TOML or JSON is what `factory` makes of the keys beside it, each of
    them an argument that it names. Rules that are made in Python need no registration. Raises ConfigError
    for a name that stands for another factory already."""
    if _FACTORIES.setdefault(name, factory) is not factory:
        raise ConfigError(f"kind: {name!r} is registered already; allowed: any other name")


def read_rules(value: object, where: str) -> object:
    """The rules that a table names (see `validate.Reader`)."""
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    name = fields.pop("kind", None)
    factory = _FACTORIES.get(name) if isinstance(name, str) else None
    if factory is None:
        names = sorted(_FACTORIES)
        wrong = f"{shown(name)} is not known{suggestion(name, names)}" if "kind" in value else "is missing"
        raise ConfigError(f"{where}.kind: {wrong}; allowed: {', '.join(names)}")
    return from_table(factory, fields, where=where)
