"""The seam for kinds of attention state: what the tree asks of each before it lets a match end."""

from __future__ import annotations

from typing import Protocol

from ..types import Kind
from .node import Node


class Component(Protocol):
    """The rules of one kind. Pure: reads nodes and ledgers, changes nothing."""

    kind: Kind

    def reach(self, path: list[Node], inside: int) -> tuple[int, int]:
        """How far a request could continue from on device, and in memory at large (pages), if only
        this kind mattered; of the last node of `path` only the first `inside` pages count."""
        ...
