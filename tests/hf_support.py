"""What the tests of `tiertree.engines.hf` share: prompts on the pools of a runner, and in transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from tiertree.config import MemoryOrder
from tiertree.engines.hf import HFRunner, make_plan, tiny
from tiertree.engines.hf.sizing import layouts_of
from tiertree.engines.row import Embeds, Move, Row, Table
from tiertree.pools.group import PoolGroup
from tiertree.types import FULL, MAMBA, Kind, Slots

PAGE = 4
PAGES = 160
"""Slots of each kind."""
NONE = -1


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """A tiny model that all tests share: none may change it."""
    return tiny(name)


def tokens_of(seed: int, count: int) -> list[int]:
    """A prompt."""
    return [int(each) for each in np.random.default_rng(seed).integers(0, 512, count)]


class Plain:
    """One prompt in transformers itself, on a `DynamicCache`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.done = 0

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Logits of the last of `tokens`."""
        positions = torch.arange(self.done, self.done + len(tokens))[None]
        self.done += len(tokens)
        with torch.no_grad():
            return self.model(
                input_ids=torch.tensor([tokens]),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]


class World:
    """A runner on pools of its own. Whatever nobody has been given is poison (NaN)."""

    def __init__(self, model: PreTrainedModel, seed: int = 0, scattered: bool = True) -> None:
        self.plan = make_plan(model)
        layouts = layouts_of(self.plan, PAGE)
        self.pools = PoolGroup.build(
            layouts,
            self.plan.sidecars(),
            order=MemoryOrder.LAYER_FIRST,
            pages=dict.fromkeys(layouts, PAGES),
        )
        rng = np.random.default_rng(seed)
        self.free: dict[Kind, list[int]] = {}
        for kind in layouts:
            self.pools[kind].poison(np.arange(PAGES))
            order = rng.permutation(PAGES) if scattered else np.arange(PAGES)
            self.free[kind] = [int(each) for each in order]
        self.runner = HFRunner(model, self.plan, self.pools)

    def take(self, kind: Kind, count: int) -> Slots:
        """Slots that nobody else has."""
        taken, self.free[kind] = self.free[kind][:count], self.free[kind][count:]
        return np.array(taken, np.int64)

    def give(self, kind: Kind, slots: Slots) -> None:
        """`slots` are nobody's again."""
        self.pools[kind].poison(slots)
        self.free[kind] += [int(each) for each in slots]

    def clean(self) -> bool:
        """Whether what nobody was given is as it was."""
        return all(
            self.pools[kind].stain(np.array(sorted(slots), np.int64)) is None
            for kind, slots in self.free.items()
        )


class Prompt:
    """One prompt in a world: its pages, its states, how far it is."""

    def __init__(self, world: World, pages: int = 48) -> None:
        self.world = world
        self.done = 0
        self.slots = {kind: world.take(kind, pages) for kind in world.plan.shapes}
        self.state = NONE
        self.embeds: tuple[Embeds, ...] = ()
        self.ready: Callable[[int], None] | None = None

    def row(self, tokens: list[int], target: int | None = None) -> Row:
        """Its next tokens; the state goes into a new slot, or into `target`."""
        end = -(-(self.done + len(tokens)) // PAGE)
        tables = {}
        for kind, shape in self.world.plan.shapes.items():
            needed = 0 if kind == FULL or shape.window is None else max(0, self.done - shape.window + 1)
            first = needed // PAGE
            tables[kind] = Table(first, self.slots[kind][first:end])
        states = {}
        if self.world.plan.states:
            new = int(self.world.take(MAMBA, 1)[0]) if target is None else target
            states[MAMBA] = Move(self.state, new)
        return Row(self.done, tokens, tables, states, self.ready, self.embeds)

    def passed(self, row: Row) -> None:
        """The pass with `row` is over."""
        self.done += len(row.tokens)
        if MAMBA in row.states:
            self.state = row.states[MAMBA].target

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Logits of the last of `tokens`, computed in a pass of their own."""
        row = self.row(tokens)
        logits = self.world.runner.forward([row])
        self.passed(row)
        return logits

    def move_away(self) -> None:
        """Have everything that is still needed elsewhere, and poison where it was."""
        pools = self.world.pools
        for kind, shape in self.world.plan.shapes.items():
            old, end = self.slots[kind], -(-self.done // PAGE)
            first = 0 if kind == FULL else max(0, self.done - (shape.window or 1) + 1) // PAGE
            new = self.world.take(kind, len(old))
            pools.clone(kind, old[first:end], new[first:end])
            self.world.give(kind, old)
            self.slots[kind] = new
        if self.state != NONE:
            new = self.world.take(MAMBA, 1)
            pools.clone(MAMBA, np.array([self.state], np.int64), new)
            self.world.give(MAMBA, np.array([self.state], np.int64))
            self.state = int(new[0])

    def kept(self) -> list[torch.Tensor]:
        """What it has in the pools, as `kept_plain` has it: per layer keys, values, states."""
        plan, pools, found = self.world.plan, self.world.pools, []
        for each in plan.layers:
            if each.place is not None:
                kind, layer = each.place
                shape = plan.shapes[kind]
                past = self.done if shape.window is None else min(self.done, shape.window - 1)
                at = np.arange(self.done - past, self.done)
                tokens = torch.from_numpy(self.slots[kind][at // PAGE] * PAGE + at % PAGE)
                memory = pools[kind].main.tensor[layer].flatten(1, 2)[:, tokens]
                parts = (
                    [*memory] if shape.split else [*memory[0].split((shape.key_size, shape.value_size), -1)]
                )
                found += [part.transpose(0, 1) for part in parts]
            for state in each.states:
                found += [pool.tensor[state, 0, self.state].flatten() for pool in pools[MAMBA]]
        return found


def kept_plain(cache: DynamicCache) -> list[torch.Tensor]:
    """What transformers keeps: per layer keys and values [head, token, size], states flat, the recurrent one
    first."""
    found = []
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            found += [layer.keys[0], layer.values[0]]
        if hasattr(layer, "conv_states"):
            for number in layer.conv_states:
                both = (layer.recurrent_states[number], layer.conv_states[number])
                found += [state[0].flatten() for state in both if state is not None]
    return found
