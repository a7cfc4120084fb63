"""The seam between an engine and a model: what one forward pass is told, in slots and positions.

    position   0 ············· start ·········· start + n
    tokens     computed before │ n new ones     │
    FULL       ████████████████████████████████████        a table from page 0 on
    a window   ············ ████████████████████████        a table from the first page it still reads on
    a state    source: the state after `start` tokens  ──▶  target: the state after start + n

A runner owns the weights and reads and writes the device pools where these tables say. It knows no tree,
no lease and no request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..types import Kind, Slots


class Table(NamedTuple):
    """The device slots of pages `first ..` of one request, one slot per page, without gaps. It covers every
    page that the forward pass reads or writes of the kind."""

    first: int
    slots: Slots


class Move(NamedTuple):
    """Where a recurrent state is read (`source`, −1: there is none, start with the empty state) and where the
    new one is written (`target`; may be the same slot)."""

    source: int
    target: int


class Embeds(NamedTuple):
    """Positions `start ..` of the prompt are computed from these vectors [n, hidden size] instead of from
    their tokens' own embeddings: an image's, say."""

    start: int
    vectors: torch.Tensor


@dataclass(slots=True)
class Row:
    """One request's part of a forward pass."""

    start: int
    """Tokens before the new ones. Their state is in the pools."""
    tokens: list[int]
    """The new tokens, at least one."""
    tables: Mapping[Kind, Table]
    """FULL and every windowed kind."""
    states: Mapping[Kind, Move]
    """Every recurrent kind."""
    ready: Callable[[int], None] | None = None
    """Before layer `i` of any kind's pool is read (`i` counts the layers of that pool), this must be called
    with `i`: it returns once the layer has been loaded back, and raises what stops the pass."""
    embeds: tuple[Embeds, ...] = ()
    """All of the request's, in order; only those that fall on new tokens matter."""


class Runner(Protocol):
    """A model that computes on the device pools."""

    @property
    def vocab_size(self) -> int:
        """Logits per token; tokens are below it."""
        ...

    @property
    def hidden_size(self) -> int:
        """Elements of the vector that a token is embedded as."""
        ...

    def forward(self, rows: Sequence[Row], adapter: str = "") -> torch.Tensor:
        """Compute the new tokens of `rows`, all with the LoRA `adapter` ("": none). Writes their state into
        the slots of `tables` and the targets of `states`, and nowhere else; returns the logits of each row's
        last token, float32 [len(rows), vocab_size] in main memory. A row of several tokens comes alone; rows
        of one token each come together. An exception leaves what it wrote undefined, in these slots only."""
        ...
