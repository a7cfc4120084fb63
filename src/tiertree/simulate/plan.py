"""What one seed stands for: sizes, kinds, policies, workload, and which faults there are.

Swarm testing (Groce et al., ISSTA 2012): each seed leaves out most of what could happen, because a run
in which everything happens at once seldom gets deep into anything. A plan is plain data and a pure
function of its arguments; leaving a fault or a request out of it changes nothing about the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..components import Component, Mamba, SlidingWindow
from ..config import (
    CacheConfig,
    DeviceConfig,
    HostConfig,
    KindConfig,
    LoadBackConfig,
    MemoryOrder,
    PrefetchConfig,
    SidecarConfig,
)
from ..replay.payload import layout_of, state_layout_of
from ..types import FULL, MAMBA, ConfigError, StopRule, WritePolicy
from .dice import Dice

COPY_FAULTS = ("copy_error", "copy_slow", "copy_hang", "copy_twice", "copy_refused")
STORE_FAULTS = (
    *("store_error", "store_short", "store_flips", "store_slow", "store_hang", "store_twice"),
    *("store_full", "store_forgets", "store_liar", "store_outage"),
)
DEATHS = ("process_death", "power_loss")
FAULTS = (*COPY_FAULTS, *STORE_FAULTS, "cancel_deaf", *DEATHS)
"""Every fault by name; docs/simulate.md says what each does."""

HABITS = (
    *("abort", "evict", "empty", "clear", "invalidate", "clear_storage", "switch_storage", "restart"),
    *("peek", "release_window", "copy_on_write", "impatient", "cancel_prefetch"),
)
"""What engines and operators do besides serving requests to their end."""

STOP_RULES = (*(StopRule.TIMEOUT, StopRule.WAIT_COMPLETE) * 2, StopRule.BEST_EFFORT)
RATES = (0.005, 0.02, 0.1, 0.3)
PAGE_BYTES = 32
LONGEST_PAGES = 12
"""Pages of the longest request, its output included."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `faults` and `habits` are those that are on, with how often they strike (of 1)."""

    seed: int
    requests: int
    only: tuple[int, ...] | None
    """The requests that arrive; None: all of them."""
    faults: Mapping[str, float]
    habits: Mapping[str, float]
    config: CacheConfig
    storage: str | None
    """What L3 is: "memory", "disk" (the disk tier on a file system in memory), None: there is none."""
    storage_bytes: int
    durable: bool
    """Whether the disk tier syncs before it acknowledges."""
    arrivals_s: float
    """Mean seconds between two requests."""
    running_max: int
    chunk_pages: int
    allocate_s: float
    """How long a request waits for room in one call."""
    compute_s: float
    """Seconds to compute one token."""
    streams: int
    namespaces: int
    calm: bool = False
    """A world for comparing latencies (see `compare`)."""

    @property
    def page_tokens(self) -> int:
        """Token units of a page."""
        return self.config.page_size

    def numbers(self) -> Sequence[int]:
        """The requests that arrive."""
        return range(self.requests) if self.only is None else self.only


def draw_plan(
    seed: int,
    requests: int = 100,
    faults: Sequence[str] | None = None,
    only: Sequence[int] | None = None,
    without: Sequence[str] = (),
    three_tiers: bool = False,
) -> Plan:
    """The plan of `seed`. `faults` are those that are on (None: those that the seed draws); "all" stands for
    every fault at once, "storage" for all of storage, "none" for none. Faults and habits in `without` are
    left out, and so are requests that are not in `only`; `three_tiers`: whatever the seed says, there is
    host and storage. Raises ConfigError for what cannot be."""
    _check(requests, faults, only, without)
    dice = Dice(seed)
    has_host = three_tiers or dice.chance(0.9, "host")
    return Plan(
        seed=seed,
        requests=requests,
        only=None if only is None else tuple(sorted(set(only))),
        faults={name: rate for name, rate in _faults(dice, faults).items() if name not in without},
        habits={
            name: dice.pick((0.02, 0.1, 0.3), "how often", name)
            for name in HABITS
            if dice.chance(0.4, "habit", name) and name not in without
        },
        config=_config(dice, has_host),
        storage=dice.pick(("memory", "disk", "disk"), "storage") if has_host else None,
        storage_bytes=dice.pick((10_000, 50_000, 400_000), "storage bytes"),
        durable=dice.chance(0.5, "durable"),
        arrivals_s=dice.pick((0.002, 0.02, 0.2), "arrivals"),
        running_max=dice.pick((1, 2, 4, 8), "running"),
        chunk_pages=dice.pick((1, 2, 3, 8), "chunk"),
        allocate_s=dice.pick((0.0, 0.1, 1.0), "allocate"),
        compute_s=dice.pick((0.0005, 0.005), "compute"),
        streams=dice.pick((3, 10, 30), "streams"),
        namespaces=dice.pick((1, 1, 2, 3), "namespaces"),
    )


def _check(
    requests: int, faults: Sequence[str] | None, only: Sequence[int] | None, without: Sequence[str]
) -> None:
    if requests < 1:
        raise ConfigError(f"--requests: {requests} is not allowed; allowed: at least 1")
    for name in faults or ():
        if name not in (*FAULTS, "all", "none", "storage"):
            allowed = ", ".join(("all", "none", "storage", *FAULTS))
            raise ConfigError(f"--faults: {name!r} is not known; allowed: {allowed}")
    for name in without:
        if name not in (*FAULTS, *HABITS):
            raise ConfigError(f"--without: {name!r} is not known; allowed: {', '.join((*FAULTS, *HABITS))}")
    for number in only or ():
        if not 0 <= number < requests:
            raise ConfigError(f"--only: there is no request {number}; allowed: 0 to {requests - 1}")


def _faults(dice: Dice, allowed: Sequence[str] | None) -> dict[str, float]:
    """The faults that are on, with their rates. The rate of a fault does not depend on what else is on."""
    density = dice.pick((0.1, 0.3, 0.6), "density")
    drawn = [name for name in FAULTS if dice.chance(density, "fault", name)]
    if allowed is not None:
        groups = {"all": FAULTS, "none": (), "storage": (*STORE_FAULTS, "cancel_deaf")}
        chosen = {each for name in allowed for each in groups.get(name, (name,))}
        drawn = [name for name in FAULTS if name in chosen]
    return {name: dice.pick(RATES, "rate", name) for name in drawn}


def _config(dice: Dice, has_host: bool) -> CacheConfig:
    size = dice.pick((1, 2, 3, 4), "page size")
    host = dice.pick((4, 8, 16, 40), "host pages") if has_host else 0
    sidecars = (
        (SidecarConfig(name="draft", kind=FULL, layout=layout_of(16, size)),)
        if dice.chance(0.3, "sidecar")
        else ()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a host smaller than the device is part of the game
        return CacheConfig(
            device=DeviceConfig(
                size=LONGEST_PAGES + dice.pick((0, 2, 8, 30), "device pages"),
                order=dice.pick(list(MemoryOrder), "device order"),
            ),
            host=HostConfig(size=host, order=dice.pick(list(MemoryOrder), "host order")) if host else None,
            page_size=size,
            layout=layout_of(PAGE_BYTES, size),
            kinds=_kinds(dice, size, host),
            sidecars=sidecars,
            write_policy=dice.pick(list(WritePolicy), "write policy"),
            selective_hits=1 + dice.below(3, "selective hits"),
            prefetch=PrefetchConfig(
                min_tokens=0,
                stop_rule=dice.pick(STOP_RULES, "stop rule"),
                base_seconds=dice.pick((0.02, 0.1, 0.5), "patience"),
                max_pages_in_flight=dice.pick((6, 1000), "prefetch pages"),
            ),
            load_back=LoadBackConfig(min_tokens=0, max_pages=dice.pick((None, None, 2), "load back pages")),
            model="made up",
            op_deadline_seconds=dice.pick((1.0, 5.0), "deadline"),
            max_operations=dice.pick((4, 64, 1024, 1024), "operations"),
            events=dice.chance(0.5, "events"),
            debug_poison=True,
        )


def _kinds(dice: Dice, size: int, host: int) -> tuple[KindConfig, ...]:
    """A set of partial kinds; one request alone always has room."""
    window = 1 + dice.below(3 * size, "window")
    grid = dice.pick((None, None, 1, 2), "grid")
    rules: tuple[Component, ...] = (
        SlidingWindow(window=window, checkpoint_tokens=dice.pick((None, size, 2 * size), "checkpoint")),
        Mamba(
            grid_tokens=None if grid is None else grid * size,
            states_per_path=dice.pick((None, 2, 3), "states per path"),
        ),
    )
    return tuple(
        KindConfig(
            rules=each,
            device=2 * LONGEST_PAGES + dice.pick((0, 8, 30), "device", str(each.kind)),
            host=dice.pick((3, 8, 20, 50), "host", str(each.kind)) if host else None,
            layout=state_layout_of(24) if each.kind == MAMBA else layout_of(PAGE_BYTES, size),
        )
        for each in rules
        if dice.chance(0.4, "kind", str(each.kind))
    )
