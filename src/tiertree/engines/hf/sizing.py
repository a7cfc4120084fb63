"""From a plan and sizes to the configuration of a cache: what the bytes of a tier are spent on.

FULL        ██████████████████████▒▒▒▒▒▒   every kind gets an equal share of the bytes,
a window    ████████████                   but no more slots than FULL has pages:
states      ██████████████████             ▒ the rest goes to FULL
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeVar

import torch
from transformers import PreTrainedModel

from ...components import Component, Mamba, SlidingWindow
from ...config import (
    CacheConfig,
    DeviceConfig,
    HostConfig,
    KindConfig,
    Layout,
    MemoryOrder,
    SidecarConfig,
    StorageConfig,
    TierConfig,
    pages_of,
    parse_bytes,
    slot_bytes,
)
from ...types import FULL, MAMBA, ConfigError, Kind
from ..checks import STATES_MIN
from .adapters import unwrapped
from .fingerprint import fingerprint
from .plan import Plan, make_plan

Size = int | str
"""Pages of FULL (int), or bytes of all kinds together ("64MiB")."""
_DEVICE_SIZE: Final = "64MiB"
_FAR: Final = 1 << 20
_DERIVED: Final = ("device", "host", "layout", "kinds", "sidecars", "model", "revision", "unit_bits")


@dataclass(frozen=True, slots=True)
class Identity:
    """What has been read of a model: what it keeps, where it is, and what it is told apart by."""

    plan: Plan
    device: torch.device
    model: str
    revision: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> Identity:
        """Read `model`. Raises UnsupportedModel. O(bytes of the weights)."""
        return cls(make_plan(model), model.device, *fingerprint(model))


def cache_config(
    model: Any,
    /,
    *,
    device: Size | DeviceConfig = _DEVICE_SIZE,
    host: Size | HostConfig | None = None,
    storage: StorageConfig | None = None,
    page_size: int = 16,
    kinds: Sequence[KindConfig] = (),
    **others: Any,
) -> CacheConfig:
    """The configuration of a cache for `model`, also if peft has wrapped it: layout, kinds, sidecars, model
    and revision are read from it. A size in bytes is that of all kinds together on that tier; one in pages is
    that of FULL, and the other kinds get as many bytes each, but no more slots. `storage` needs a `host`. A
    window is kept at the ends of conversations; with SlidingWindow(checkpoint_tokens=…) in `kinds` also
    inside them, for prompts that branch there. `kinds` stand instead of those of the same name and need no
    layout. `others` are fields of CacheConfig. Raises ConfigError, UnsupportedModel. O(bytes of the
    weights)."""
    known = Identity.of(unwrapped(model))
    if not isinstance(device, DeviceConfig):
        device = DeviceConfig(size=device, torch_device=str(known.device))
    if host is not None and not isinstance(host, HostConfig):
        host = HostConfig(size=host)
    return complete(known, device, host, tuple(kinds), {"storage": storage, "page_size": page_size} | others)


def by_default(known: Identity) -> CacheConfig:
    """What `cache_config` gives for a model when nothing else is said."""
    return complete(known, DeviceConfig(size=_DEVICE_SIZE, torch_device=str(known.device)), None, (), {})


def filled(known: Identity, config: CacheConfig) -> CacheConfig:
    """`config`, which has no layout, as the configuration of a cache for a model. Its sizes are in pages
    of FULL (CacheConfig takes bytes only with a layout); its `unit_bits` become 64."""
    others = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _DERIVED}
    if config.model:
        others["model"] = config.model
    return complete(known, config.device, config.host, config.kinds, others)


def complete(
    known: Identity,
    device: DeviceConfig,
    host: HostConfig | None,
    kinds: tuple[KindConfig, ...],
    others: Mapping[str, Any],
) -> CacheConfig:
    """A configuration of these tiers for a model; `kinds` and `others` as for `cache_config`."""
    page_size = others.get("page_size", 16)
    plan, sidecars = known.plan, known.plan.sidecars()
    layouts, rules = layouts_of(plan, page_size), rules_of(plan)
    own = {each.kind: each for each in kinds}
    if strange := own.keys() - rules.keys():
        allowed = ", ".join(map(repr, rules)) or "none, the model has no kind beside FULL"
        raise ConfigError(f"kinds: {sorted(strange)} are not the model's; allowed: {allowed}")
    own = {kind: replace(each, layout=each.layout or layouts[kind]) for kind, each in own.items()}
    rules |= {kind: each.rules for kind, each in own.items()}
    parts = [
        Part(kind, layouts[kind], sidecars, _least(rules.get(kind), page_size), own.get(kind))
        for kind in layouts
    ]
    slots = {
        name: share(name, tier.size, parts)
        for name, tier in (("device", device), ("host", host))
        if tier is not None
    }
    made = (
        own.get(kind)
        or KindConfig(
            rules=rules[kind],
            layout=layouts[kind],
            **{name: each[kind] for name, each in slots.items()},
        )
        for kind in rules
    )
    identity: dict[str, Any] = {"model": known.model, "revision": known.revision, "unit_bits": 64}
    return CacheConfig(
        **identity | dict(others),
        device=_sized(device, slots["device"][FULL]),
        host=None if host is None else _sized(host, slots["host"][FULL]),
        layout=plan.layout(FULL, page_size),
        kinds=tuple(made),
        sidecars=sidecars,
    )


T = TypeVar("T", bound=TierConfig)


def _sized(tier: T, pages: int) -> T:
    return replace(tier, size=pages)


def layouts_of(plan: Plan, page_size: int) -> dict[Kind, Layout]:
    """What the pages of each kind of a model are, FULL first."""
    states = plan.state_layout()
    return {
        **{kind: plan.layout(kind, page_size) for kind in plan.shapes},
        **({MAMBA: states} if states is not None else {}),
    }


def rules_of(plan: Plan) -> dict[Kind, Component]:
    """The rules of each partial kind: a window needs what its next query sees beside itself."""
    windows = {
        kind: SlidingWindow(window=(shape.window or 0) - 1, name=kind) for kind, shape in plan.windows.items()
    }
    return {**windows, **({MAMBA: Mamba()} if plan.states else {})}


def _least(rules: Component | None, page_size: int) -> int:
    """Slots with which one request gets on."""
    if rules is None:
        return 2
    needed = _FAR - rules.since(_FAR, page_size)
    return STATES_MIN if isinstance(rules, Mamba) else needed + 2


class Part:
    """One kind's part of a tier."""

    def __init__(
        self,
        kind: Kind,
        layout: Layout,
        sidecars: Sequence[SidecarConfig],
        least: int,
        own: KindConfig | None,
    ) -> None:
        self.kind: Final = kind
        self.layout: Final = layout
        self.riding: Final = [each for each in sidecars if each.kind == kind]
        self.bytes: Final = slot_bytes(layout, self.riding)
        """Of one slot."""
        self.least: Final = least
        """Slots with which one request gets on."""
        self.own: Final = own
        """What the caller wants of it."""

    def fixed(self, tier: str) -> int | None:
        """The slots that the caller wants on `tier`."""
        size = getattr(self.own, tier, None)
        return None if size is None else pages_of(size, self.layout, self.riding, f"kinds.{tier}")


def share(tier: str, size: Size, parts: Sequence[Part]) -> dict[Kind, int]:
    """Slots of each kind (FULL is the first of `parts`) in `size`. Raises ConfigError where it is too small
    for one request."""
    full, *others = parts
    slots = {each.kind: fixed for each in others if (fixed := each.fixed(tier)) is not None}
    free = [each for each in others if each.kind not in slots]
    if isinstance(size, int):
        slots |= {each.kind: max(each.least, min(size, size * full.bytes // each.bytes)) for each in free}
        return {full.kind: size, **{each.kind: slots[each.kind] for each in others}}
    least = sum(each.bytes * slots.get(each.kind, each.least) for each in parts)
    total = parse_bytes(size, f"{tier}.size")
    if total < least:
        raise ConfigError(
            f"{tier}.size: {size!r} is too small for one request; allowed: at least {least} bytes"
        )
    left = total - sum(each.bytes * slots[each.kind] for each in others if each.kind in slots)
    equal = left // (1 + len(free))
    # The widest slots are the fewest: once a kind gets less than FULL, all wider ones do.
    for each in sorted(free, key=lambda each: -each.bytes):
        narrower = sum(other.bytes for other in free if other.bytes <= each.bytes and other.kind not in slots)
        most = left // (full.bytes + narrower)  # if this one and all narrower ones have as many as FULL
        slots[each.kind] = max(each.least, min(equal // each.bytes, most))
        left -= slots[each.kind] * each.bytes
    pages = max(full.least, left // full.bytes)
    return {full.kind: pages, **{each.kind: slots[each.kind] for each in others}}


def check_fit(known: Identity, config: CacheConfig) -> None:
    """Refuse a configuration that is not one for this model. Raises ConfigError naming the field."""
    plan = known.plan
    if config.device.order is not MemoryOrder.LAYER_FIRST:
        raise ConfigError(f"device.order: {config.device.order} is not allowed; allowed: layer_first")
    if torch.device(config.device.torch_device) != known.device:
        raise ConfigError(
            f"device.torch_device: {config.device.torch_device!r} is not where the model is; allowed: "
            f"{str(known.device)!r}"
        )
    if config.bigram:
        raise ConfigError("bigram: True is not allowed; allowed: False")
    wanted, rules = layouts_of(plan, config.page_size), rules_of(plan)
    if [*config.layouts] != [*wanted]:
        raise ConfigError(f"kinds: {[*config.layouts]} are not the model's; allowed: {[*wanted]}")
    for index, kind in enumerate(wanted):
        where = f"kinds[{index - 1}]" if index else ""
        _check_layout(f"{where}.layout".lstrip("."), config.layouts[kind], wanted[kind])
        if index and (given := config.kinds[index - 1].rules) != rules[kind]:
            _check_rules(f"{where}.rules", given, rules[kind], config.page_size)
    if config.sidecars != plan.sidecars():
        raise ConfigError(f"sidecars: {config.sidecars} are not the model's; allowed: {plan.sidecars()}")
    if config.revision != known.revision:
        raise ConfigError(
            f"revision: {config.revision!r} is not that of the weights; allowed: {known.revision!r}"
        )


def _check_layout(where: str, given: Layout, wanted: Layout) -> None:
    if type(given) is not type(wanted):
        raise ConfigError(f"{where}: a {type(given).__name__} is not allowed; allowed: {wanted}")
    for each in fields(wanted):
        if getattr(given, each.name) != getattr(wanted, each.name):
            raise ConfigError(
                f"{where}.{each.name}: {getattr(given, each.name)!r} is not the model's; allowed: "
                f"{getattr(wanted, each.name)!r}"
            )


def _check_rules(where: str, given: Component, wanted: Component, page_size: int) -> None:
    """Rules may need more than the model does, never less."""
    for boundary in (1, 2, 3, _FAR // page_size, _FAR):
        if given.since(boundary, page_size) > wanted.since(boundary, page_size):
            raise ConfigError(f"{where}: {given} needs less than the model; allowed: as {wanted}")
