"""What every backend does to one page: view it as bytes, take its digest; and checks of what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash

from ..types import StorageError
from .base import KEY_BYTES, Buffer


def flat(buffer: Any) -> Buffer:
    """`buffer` as a one-dimensional view of bytes, without copying. It must be contiguous."""
    view = buffer if type(buffer) is memoryview else memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def page_digest(key: bytes, payload: Buffer) -> bytes:
    """XXH3-128 over key then payload, canonical (big-endian) 16 bytes. Releases the GIL on large payloads."""
    state = xxhash.xxh3_128(key)
    state.update(payload)
    return state.digest()


def checked_call(keys: Sequence[bytes], buffers: Sequence[Any]) -> list[Buffer]:
    """The buffers of one put or get as flat views. `StorageError` if keys and buffers do not fit together."""
    if len(keys) != len(buffers):
        raise StorageError(f"{len(keys)} keys with {len(buffers)} pages; each key needs one")
    for key in keys:
        if len(key) != KEY_BYTES:
            raise StorageError(f"a storage key has {KEY_BYTES} bytes, not {len(key)}")
    return [flat(buffer) for buffer in buffers]
