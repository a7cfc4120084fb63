"""Reads pages straight into the caller's buffers and verifies each before it counts.

Records that lie next to each other come with one `preadv`, whose vector alternates between a small
buffer for a record's header and the caller's buffer for its payload:

    file     ┌──────┬─────────┬──────┬─────────┬──────┬─────────┐
             │ head │ payload │ head │ payload │ head │ payload │   one call, READ_BYTES at most, so that
             └──┬───┴────┬────┴──┬───┴────┬────┴──┬───┴────┬────┘   a payload is still in the processor's
    memory    scratch  into[7]  scratch  into[8] scratch into[9]    cache when its digest is taken

A longer page comes in several reads, its digest taken on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import xxhash

from . import format as fmt
from .base import Buffer
from .files import Files, read_fully
from .index import Run
from .page import page_digest
from .segment import Handles, State

READ_BYTES = 1 << 20
CHUNK_BYTES = 512 << 10
"""A page longer than this is read in pieces of it: the kernel reads ahead while a digest is taken."""

READ_RECORDS = 256


class Read(Enum):
    """What became of one page."""

    GOOD = "good"
    BAD = "bad"
    """Not what was written there: the buffer's content is void."""
    GONE = "gone"
    """Its segment was reclaimed meanwhile; the page may live elsewhere by now."""
    SKIPPED = "skipped"
    """Not looked at: its buffer has another length, or no descriptor was left."""


class Reader:
    """Stateless but for the descriptors it shares; any number of threads may read at once."""

    def __init__(self, files: Files, handles: Handles) -> None:
        self._files = files
        self._handles = handles

    def read(self, run: Run, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Read]:
        """Read the page of each of `run.positions` into its buffer."""
        segment, positions = run.segment, run.positions
        lengths = run.lengths()
        if any(len(into[p]) != length for p, length in zip(positions, lengths, strict=True)):
            return self._one_by_one(run, keys, into)
        try:
            fd = self._handles.acquire(segment)
        except OSError:
            return [Read.SKIPPED] * len(positions)
        if fd is None:
            gone = Read.GONE if segment.state is State.RETIRED else Read.BAD
            return [gone] * len(positions)
        results: list[Read] = []
        try:
            for first, last in _batches(lengths):
                part = Run(segment, run.row + first, positions[first:last])
                if lengths[first] > CHUNK_BYTES:
                    results.append(self._read_long(fd, part, keys, into))
                else:
                    results += self._read_batch(fd, part, keys, into)
        finally:
            self._handles.release(segment)
        return results

    def _read_batch(self, fd: int, run: Run, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Read]:
        size, body = fmt.RECORD_HEADER_BYTES, fmt.RECORD_BODY_BYTES
        scratch = bytearray(size * len(run.positions))
        view = memoryview(scratch)
        vector: list[Any] = []
        start = 0
        for position in run.positions:
            vector.append(view[start : start + size])
            vector.append(into[position])
            start += size
        if not self._filled(fd, vector, run.offset()):
            return [Read.BAD] if len(run.positions) == 1 else self._one_by_one(run, keys, into)
        number = run.segment.number
        results = []
        start = 0
        for position in run.positions:
            key, payload = keys[position], into[position]
            digest = page_digest(key, payload)
            intact = scratch[start : start + body] == fmt.record_body(
                fmt.PAGE, key, len(payload), digest, number
            )
            results.append(Read.GOOD if intact else Read.BAD)
            start += size
        return results

    def _read_long(self, fd: int, run: Run, keys: Sequence[bytes], into: Sequence[Buffer]) -> Read:
        key, payload = keys[run.positions[0]], into[run.positions[0]]
        header = bytearray(fmt.RECORD_HEADER_BYTES)
        offset = run.offset()
        state = xxhash.xxh3_128(key)
        for start in range(0, len(payload), CHUNK_BYTES):
            chunk = payload[start : start + CHUNK_BYTES]
            vector = [chunk] if start else [header, chunk]
            if not self._filled(fd, vector, offset):
                return Read.BAD
            state.update(chunk)
            offset += sum(map(len, vector))
        body = fmt.record_body(fmt.PAGE, key, len(payload), state.digest(), run.segment.number)
        return Read.GOOD if header[: len(body)] == body else Read.BAD

    def _filled(self, fd: int, vector: Sequence[Any], offset: int) -> bool:
        try:
            return read_fully(self._files, fd, vector, offset)
        except OSError:
            return False

    def _one_by_one(self, run: Run, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Read]:
        """One record that cannot be read must not take its neighbours along."""
        results: list[Read] = []
        for i, (position, length) in enumerate(zip(run.positions, run.lengths(), strict=True)):
            if len(into[position]) != length:
                results.append(Read.SKIPPED)
            else:
                results += self.read(Run(run.segment, run.row + i, [position]), keys, into)
        return results


def _batches(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut into ranges of at most `READ_BYTES` and `READ_RECORDS`, or of one long record."""
    batches = []
    first = total = 0
    for i, length in enumerate(lengths):
        total += length
        alone = length > CHUNK_BYTES or lengths[first] > CHUNK_BYTES
        if i > first and (alone or total > READ_BYTES or i - first == READ_RECORDS):
            batches.append((first, i))
            first, total = i, length
    batches.append((first, len(lengths)))
    return batches
