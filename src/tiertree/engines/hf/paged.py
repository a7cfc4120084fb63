"""What a model of transformers takes for its cache, with keys, values and states in the device pools.

One forward pass over rows of different length sees a *frame* of columns that ends alike for all:

    row a  start 6    · · a a a a a a│A          ·  a column before the row's first token: reads a token of
    row b  start 8    b b b b b b b b│B             the row's own and is masked
    columns           0 1 2 3 4 5 6 7│8          the pass begins at the longest start; one row has no ·
    a window of 4     ─ ─ ─ ─ ─ 5 6 7│8          the last min(start, window − 1) columns, and the new ones

A layer first writes what is new into its pool, then reads its columns from there. Which tokens of a pool
these are is the same for all layers of a kind and is found once per pass. When they lie side by side, one
row reads them where they are, without a copy. States are read when a layer first asks for them, worked on
apart, and written to their targets after the pass. The classes say of themselves what those of transformers'
own dynamic cache would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ...pools.group import KindPools, PoolGroup
from ...types import MAMBA, Kind
from ..row import Row, Table
from .plan import CONV, RECURRENT, LayerPlan, Plan, StateShape
from .probe import UnsupportedModel

Where = slice | torch.Tensor
"""Tokens of a pool: a run of them, or one index per token."""


class Planes:
    """The device pools as layers of tokens and of states, made once."""

    def __init__(self, plan: Plan, pools: PoolGroup) -> None:
        self.plan: Final = plan
        self.kv: Final = {kind: _token_planes(pools[kind]) for kind in plan.shapes}
        """By kind and layer: one tensor [tokens, heads, size] per plane."""
        self.states: Final = _state_planes(plan, pools[MAMBA]) if plan.states else {}
        """By name, RECURRENT and CONV, and state of the model: [slots, elements]."""
        self.page_size: Final = {kind: pools[kind].main.layout.entries for kind in plan.shapes}
        self.device: Final = next(iter(self.kv.values()))[0][0].device


def _token_planes(pools: KindPools) -> list[tuple[torch.Tensor, ...]]:
    memory = pools.main.tensor  # layer_first: [layer, plane, page, entry, head, size]
    return [tuple(plane.flatten(0, 1) for plane in layer) for layer in memory]


def _state_planes(plan: Plan, pools: KindPools) -> dict[str, list[torch.Tensor]]:
    names = {RECURRENT: plan.recurrent, CONV: plan.conv}
    found = [name for name, shape in names.items() if shape is not None]
    memory = (pools.main, *(pools.sidecars[name] for name in found[1:]))
    return {
        name: [layer.view(pool.pages, -1) for layer in pool.tensor]
        for name, pool in zip(found, memory, strict=True)
    }


class Columns:
    """The columns of the frame that layers of one kind see, and where their tokens are in a pool."""

    __slots__ = ("first", "length", "read", "write")

    def __init__(self, planes: Planes, rows: Sequence[Row], kind: Kind) -> None:
        start = max(row.start for row in rows)
        window = planes.plan.shapes[kind].window
        past = start if window is None else min(start, window - 1)
        new = len(rows[0].tokens)
        self.first: Final = start - past
        """The frame's column that is the first one seen."""
        self.length: Final = past + new
        """How many are seen."""
        size = planes.page_size[kind]
        self.read: Where
        self.write: Where
        if (
            len(rows) == 1
            and (first := _run(rows[0].tables[kind], size, start - past, start + new)) is not None
        ):
            self.read = slice(first, first + self.length)
            self.write = slice(first + past, first + self.length)
        else:
            tokens = np.stack(
                [_tokens(row.tables[kind], size, row.start - past, row.start + new) for row in rows]
            )
            self.read = _index(tokens, planes.device)
            self.write = _index(tokens[:, past:], planes.device)


def _run(table: Table, page_size: int, start: int, stop: int) -> int | None:
    """The token of a pool at position `start`, if those for the positions up to `stop` follow one another."""
    first, last = start // page_size - table.first, (stop - 1) // page_size - table.first
    slots = table.slots[first : last + 1]
    if slots[-1] - slots[0] != last - first or (np.diff(slots) != 1).any():
        return None
    return int(slots[0]) * page_size + start % page_size


def _tokens(table: Table, page_size: int, start: int, stop: int) -> NDArray[np.int64]:
    """The tokens of a pool for the positions `start .. stop` of one row; for those before 0 the last one."""
    since = max(start, 0)
    first, last = since // page_size - table.first, -(-stop // page_size) - table.first
    pages = table.slots[first:last, None] * page_size + np.arange(page_size)
    tokens: NDArray[np.int64] = pages.ravel()[since % page_size :][: stop - since]
    if start < 0:
        tokens = np.concatenate((np.full(-start, tokens[-1]), tokens))
    return tokens


def _index(tokens: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(tokens.ravel()).to(device, non_blocking=True)


class Frame:
    """What all layers share in one forward pass over `rows`."""

    def __init__(self, planes: Planes, rows: Sequence[Row]) -> None:
        self.planes: Final = planes
        self.rows: Final = len(rows)
        self.start: Final = max(row.start for row in rows)
        """The first new column; tokens before it, for the longest row."""
        self.new: Final = len(rows[0].tokens)
        self.columns: Final = {kind: Columns(planes, rows, kind) for kind in planes.plan.shapes}
        self._waits: Final[list[Callable[[int], None]]] = [row.ready for row in rows if row.ready is not None]
        moves = [row.states[MAMBA] for row in rows] if planes.states else []
        self.continues: Final = all(move.source >= 0 for move in moves)
        """Whether states are read. Rows that read one and rows that do not never come together."""
        self.sources: Final = _slots([move.source for move in moves], planes.device)
        self.targets: Final = _slots([move.target for move in moves], planes.device)

    def ready(self, layer: int) -> None:
        """Wait until `layer` of every kind's pool may be read; raises what stops the pass."""
        for wait in self._waits:
            wait(layer)

    def exchange(
        self, planes: Sequence[torch.Tensor], where: Columns, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values [row, head, token, size], return those of all columns alike."""
        if len(planes) == 2:
            return self._plane(planes[0], where, keys), self._plane(planes[1], where, values)
        both = self._plane(planes[0], where, torch.cat((keys, values), dim=-1))
        return both[..., : keys.shape[-1]], both[..., keys.shape[-1] :]

    def _plane(self, plane: torch.Tensor, where: Columns, new: torch.Tensor) -> torch.Tensor:
        if new.dtype != plane.dtype:
            raise UnsupportedModel(f"model: computes {new.dtype}, kept is {plane.dtype}; make a new engine")
        heads, size = plane.shape[1:]
        tokens = new.transpose(1, 2).reshape(-1, heads, size)
        if isinstance(where.write, slice):
            plane[where.write] = tokens
        else:
            plane.index_copy_(0, where.write, tokens)
        found = plane[where.read] if isinstance(where.read, slice) else plane.index_select(0, where.read)
        return found.view(self.rows, where.length, heads, size).transpose(1, 2)

    def state(self, name: str, layer: int, shape: StateShape) -> torch.Tensor:
        """A copy of one state of every row, [row, *shape]; zeros where there is none to go on from."""
        slots = self.planes.states[name][layer]
        if self.continues:
            return slots.index_select(0, self.sources).view(self.rows, *shape.shape)
        return slots.new_zeros(self.rows, *shape.shape)

    def save(self, name: str, layer: int, state: torch.Tensor) -> None:
        """Write one state of every row to its target."""
        self.planes.states[name][layer].index_copy_(0, self.targets, state.reshape(self.rows, -1))


def _slots(slots: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int64, device=device)


class PagedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer."""

    def __init__(self, frame: Frame, kind: Kind, layer: int) -> None:
        self._attend(frame, kind, layer)

    def _attend(self, frame: Frame, kind: Kind, layer: int) -> None:
        self._frame = frame
        self._layer = layer
        self._planes = frame.planes.kv[kind][layer]
        self._columns = frame.columns[kind]
        self._seen = frame.start
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what is new, return all columns that the layer sees."""
        self._frame.ready(self._layer)
        self._seen += key_states.shape[-2]
        return self._frame.exchange(self._planes, self._columns, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns it sees, and the first of them."""
        return self._columns.length, self._columns.first

    def get_seq_length(self) -> int:
        """Columns so far, in the frame."""
        return self._seen


class PagedWindowLayer(PagedLayer, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer with a window."""

    def __init__(self, frame: Frame, kind: Kind, layer: int) -> None:
        self._attend(frame, kind, layer)
        window = frame.planes.plan.shapes[kind].window
        assert window is not None
        self.sliding_window = window
        self.record_past = False

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window


class StateLayer(LinearAttentionLayer):
    """States of one layer. Its tensors are copies: the model changes them in place."""

    def __init__(self, frame: Frame, states: range) -> None:
        self._keep(frame, states)

    def _keep(self, frame: Frame, states: range) -> None:
        LinearAttentionLayer.__init__(self, len(states))
        self._frame = frame
        self._states = states
        self._loaded = False
        self.has_previous_state = dict.fromkeys(range(len(states)), frame.continues)

    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:
        """The convolutions' states by number; read from the pool when first asked for."""
        self._load()
        return self._conv

    @conv_states.setter
    def conv_states(self, states: dict[int, torch.Tensor | None]) -> None:
        self._conv = states

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        """The recurrent states by number; read from the pool when first asked for."""
        self._load()
        return self._recurrent

    @recurrent_states.setter
    def recurrent_states(self, states: dict[int, torch.Tensor | None]) -> None:
        self._recurrent = states

    def _load(self) -> None:
        """Copy the states out of the pools, or make empty ones."""
        if self._loaded:
            return
        self._loaded = True
        plan = self._frame.planes.plan
        for number, layer in enumerate(self._states):
            self._frame.ready(layer)
            if plan.conv is not None:
                self._conv[number] = self._frame.state(CONV, layer, plan.conv)
                self.conv_kernel_size[number] = plan.conv.shape[-1]
                self.is_conv_states_initialized[number] = True
            if plan.recurrent is not None:
                self._recurrent[number] = self._frame.state(RECURRENT, layer, plan.recurrent)
                self.is_recurrent_states_initialized[number] = True

    def save(self) -> None:
        """Write the states to their targets."""
        for number, layer in enumerate(self._states):
            for name, states in ((CONV, self.conv_states), (RECURRENT, self.recurrent_states)):
                if (state := states[number]) is not None:
                    self._frame.save(name, layer, state)


class PagedStateLayer(  # type: ignore[misc, override, no-untyped-call]
    StateLayer, PagedLayer, LinearAttentionAndFullAttentionLayer
):
    """Keys and values, and states, of one layer."""

    def __init__(self, frame: Frame, kind: Kind, layer: int, states: range) -> None:
        self._keep(frame, states)
        self._attend(frame, kind, layer)


class PagedWindowStateLayer(  # type: ignore[misc, override, no-untyped-call]
    StateLayer, PagedWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer
):
    """Keys and values with a window, and states, of one layer."""

    def __init__(self, frame: Frame, kind: Kind, layer: int, states: range) -> None:
        self._keep(frame, states)
        PagedWindowLayer.__init__(self, frame, kind, layer)


class PagedCache(Cache):
    """The cache of one forward pass over `rows`. Rows of several tokens come alone; rows that read a state
    and rows that do not never come together."""

    def __init__(self, planes: Planes, rows: Sequence[Row]) -> None:
        frame = Frame(planes, rows)
        super().__init__(layers=[_layer(frame, each) for each in planes.plan.layers])

    def save(self) -> None:
        """Write the states to their targets, once the pass is over."""
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.save()


def _layer(frame: Frame, plan: LayerPlan) -> Any:
    if plan.place is None:
        return StateLayer(frame, plan.states) if plan.states else DummyLayer()  # type: ignore[no-untyped-call]
    if plan.states:
        hybrid = PagedWindowStateLayer if plan.holds.window else PagedStateLayer
        return hybrid(frame, *plan.place, plan.states)
    return (PagedWindowLayer if plan.holds.window else PagedLayer)(frame, *plan.place)
