"""Eviction policies: small pure classes that score a node; the lowest score goes first."""

from __future__ import annotations

from collections.abc import Callable

from ..tree.node import Node
from ..tree.victims import Policy
from ..types import ConfigError


class LRU:
    """Least recently used: the node not touched for the longest time goes first.

    Mattson, Gecsei, Slutz, Traiger, *Evaluation techniques for storage hierarchies*, 1970. Not for
    workloads that scan: one pass over more pages than fit pushes out everything that was worth keeping.
    """

    name = "lru"

    def score(self, node: Node) -> float:
        """When `node` was last used."""
        return node.last_used


POLICIES: dict[str, Callable[[], Policy]] = {LRU.name: LRU}
"""How to make each policy, by name."""


def make_policy(name: str) -> Policy:
    """The policy called `name`. Raises ConfigError naming those there are."""
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError(f"eviction: {name!r} is not known; allowed: {', '.join(sorted(POLICIES))}")
    return policy()
