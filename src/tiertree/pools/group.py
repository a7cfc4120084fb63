"""All pools of one tier.

    kind   main pool          sidecars that ride on its slots
    full   KV of the model    draft: KV of a draft model · indexer: keys of a sparse-attention indexer
    …      its own slots      state of a short convolution, beside the recurrent states of its layers

A slot number means the same page in the main pool and in each of its sidecars, so one ledger serves
them all and whatever copies a page copies its sidecars along. Slots of different kinds have nothing to
do with each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..config import Layout, MemoryOrder, SidecarConfig
from ..types import ConfigError, Kind, Slots
from .paged import POISON, Pool


@dataclass(frozen=True, slots=True)
class KindPools:
    """The pools that share the slots of one kind. Raises `ConfigError` if they differ in size."""

    main: Pool
    sidecars: Mapping[str, Pool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, pool in self.sidecars.items():
            if pool.pages != self.main.pages:
                raise ConfigError(
                    f"sidecars.{name}: {pool.pages} pages ride on {self.main.pages} slots; allowed: as many"
                )

    def __iter__(self) -> Iterator[Pool]:
        """The main pool, then the sidecars."""
        return iter((self.main, *self.sidecars.values()))

    def poison(self, slots: Slots) -> None:
        """Make these pages poison in every pool (see `Pool.poison`)."""
        for pool in self:
            pool.poison(slots)

    def stain(self, slots: Slots) -> str | None:
        """Where the first byte of these pages is that is not poison; None if there is none."""
        for name, pool in {"main": self.main, **self.sidecars}.items():
            found = pool.stain(slots)
            if found is not None:
                slot, offset, byte = found
                return f"slot {slot}, pool {name!r}, byte {offset} is {byte:#04x}, not {POISON:#04x}"
        return None


class PoolGroup:
    """The pools of one tier by kind."""

    def __init__(self, kinds: Mapping[Kind, KindPools]) -> None:
        self._kinds = dict(kinds)

    @classmethod
    def build(
        cls,
        layouts: Mapping[Kind, Layout],
        sidecars: Sequence[SidecarConfig] = (),
        *,
        order: MemoryOrder,
        pages: Mapping[Kind, int],
        device: str | torch.device = "cpu",
        pinned: bool = False,
    ) -> PoolGroup:
        """A main pool per kind of `layouts`, and each sidecar beside that of its kind, with the number of
        `pages` of that kind; all in the same order, on the same device."""
        for sidecar in sidecars:
            if sidecar.kind not in layouts:
                raise ConfigError(f"sidecars.{sidecar.name}: kind {sidecar.kind!r} has no pool to ride on")

        def pool(kind: Kind, layout: Layout) -> Pool:
            return Pool(layout, order, pages[kind], device, pinned)

        return cls(
            {
                kind: KindPools(
                    pool(kind, layout),
                    {each.name: pool(kind, each.layout) for each in sidecars if each.kind == kind},
                )
                for kind, layout in layouts.items()
            }
        )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that have pools."""
        return tuple(self._kinds)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pools in self._kinds.values() for pool in pools)

    def __getitem__(self, kind: Kind) -> KindPools:
        """The pools of `kind`; KeyError if there are none."""
        return self._kinds[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._kinds

    def clone(self, kind: Kind, source: Slots, target: Slots) -> None:
        """Copy pages of `kind` with all their sidecars inside this tier (see `Pool.clone`)."""
        for pool in self[kind]:
            pool.clone(source, target)

    def pairs(self, kind: Kind, other: PoolGroup) -> list[tuple[Pool, Pool]]:
        """(pool here, same pool of `other`) for the main pool of `kind` and every sidecar. Raises
        `ConfigError` unless both groups have the same sidecars."""
        here, there = self[kind], other[kind]
        if here.sidecars.keys() != there.sidecars.keys():
            raise ConfigError(
                f"sidecars: {sorted(here.sidecars)} and {sorted(there.sidecars)} differ; allowed: the same"
            )
        sidecars = [(pool, there.sidecars[name]) for name, pool in here.sidecars.items()]
        return [(here.main, there.main), *sidecars]
