"""Page hashes: SHA-256 chained from the parent's, computed when first asked for, once per page.

    root hash  = SHA-256("tiertree page hash 1" | len(fingerprint) | fingerprint | page shape | namespace)
    page hash  = SHA-256(hash of the page before | units of this page)

The fingerprint covers the model, its revision and whatever else makes KV differ, so that any
difference gives other hashes. Equal hash means equal prefix, namespace, model and page size.
"""

from __future__ import annotations

import hashlib

from .key import Key, KeyMaker
from .node import Node, Root, fragments

SIZE = 32


class PageHashes:
    """Computes and remembers page hashes of one cache."""

    __slots__ = ("_keys", "fingerprint")

    def __init__(self, keys: KeyMaker, fingerprint: bytes) -> None:
        self._keys = keys
        self.fingerprint = fingerprint

    def root(self, namespace: str) -> bytes:
        """What the first page of `namespace` is chained from."""
        shape = f"{self._keys.page_size},{self._keys.unit_bytes},{int(self._keys.bigram)}"
        parts = (
            b"tiertree page hash 1",
            self.fingerprint,
            shape.encode(),
            namespace.encode("utf-8", "surrogatepass"),
        )
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()

    def chain(self, before: bytes, units: bytes) -> bytes:
        """The hashes of the pages of `units`, joined, chained from `before`. O(pages)."""
        size, hashes = self._keys.page_bytes, []
        for at in range(0, len(units), size):
            before = hashlib.sha256(before + units[at : at + size]).digest()
            hashes.append(before)
        return b"".join(hashes)

    def of_key(self, key: Key) -> tuple[bytes, ...]:
        """The hash of every page of `key`. O(pages)."""
        return pieces(self.chain(self.root(key.namespace), key.units))

    def of_node(self, node: Node) -> bytes:
        """The hashes of the pages of `node`, joined. Only pages not hashed before are hashed."""
        missing: list[Node] = []
        at = node
        while len(at.hashes) < at.pages * SIZE:
            missing.append(at)
            assert at.parent is not None
            at = at.parent
        for late in reversed(missing):
            before = late.hashes[-SIZE:] or self.before(late)
            late.hashes += self.chain(before, late.edge[len(late.hashes) // SIZE * self._keys.page_bytes :])
        return node.hashes

    def before(self, node: Node) -> bytes:
        """The hash that the first page of `node` is chained from; the parent's own are known."""
        parent = node.parent
        if isinstance(parent, Root):
            return self.root(parent.namespace)
        assert parent is not None
        return parent.hashes[-SIZE:]

    def behind(self, end: Node, first: int, key: Key) -> tuple[bytes, ...]:
        """The hashes of the pages of `key` from `first` on, where `end` is on its path and reaches there."""
        before = self.of_range(end, first - 1, 1)[0]
        return pieces(self.chain(before, key.units[first * self._keys.page_bytes :]))

    def of_range(self, end: Node, first: int, count: int) -> tuple[bytes, ...]:
        """The hash of each of the pages `first .. first+count` on the path that ends in `end`."""
        self.of_node(end)
        parts = [node.hashes[low * SIZE : high * SIZE] for node, low, high in fragments(end, first, count)]
        return pieces(b"".join(reversed(parts)))


def pieces(joined: bytes) -> tuple[bytes, ...]:
    """Joined hashes as a tuple of single ones."""
    return tuple(joined[at : at + SIZE] for at in range(0, len(joined), SIZE))
