"""The transfer engine of a CUDA device: two streams of its own, one per direction.

    caller's stream  ──forward──┬───────────────────────wait_layer(op, 0)── layer 0 ── …
                                │ waits for what was queued before submit      ▲
    load stream                 └─▶ layer 0 ●── layer 1 ●── layer 2 ●          │   ● an event each
                                            └──────────────────────────────────┘
    backup stream    the same from device to host
    watcher thread   looks at the events, moves the finished to the results, calls notify()

`submit` launches everything and returns; so `cancel` always comes too late, and a transfer finishes as
it would have. The bytes of one step go one of two ways:

    runs of ≥ DMA_BYTES, same page_first* order    one asynchronous copy (DMA) per run
    all else                                       a kernel on the device gathers, another scatters

Host pools are pinned, so the kernels read and write them in place over the bus, however scattered the
slots: two launches per step, where a copy call per 64 KiB page would cost more than its bytes.

Index tensors and buffers are made on the stream that uses them; a flight keeps them and its pools alive
until its last event. Nothing here blocks the caller but the launches.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..pools.paged import Pool
from ..types import CacheClosed, Slots
from .copy import Step, chunks, copy_tensors, plan, run_starts, step_words
from .op import Transfer, Transferred

_log = logging.getLogger(__name__)
DMA_BYTES: Final = 1 << 20
"""Bytes from which a copy call of its own is worth its launch; also of a page that a step takes at least,
where layers are slices of a page (see `copy`)."""
_BUFFER_BYTES: Final = 64 << 20
_WATCH_S: Final = 0.0005
_IDLE_S: Final = 1.0


@dataclass(slots=True, eq=False)
class _Flight:
    """A transfer that has been launched: events in order, each with the layers that it completes."""

    transfer: Transfer
    events: list[tuple[int, torch.cuda.Event]] = field(default_factory=list)
    landed: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    keep: list[torch.Tensor] = field(default_factory=list)
    error: str | None = None
    finished: bool = False


class CudaEngine:
    """`TransferEngine` between pools on `device` and pinned host pools (or pools on the same device).

    All moves of one transfer go in one direction. Beyond the protocol there is `wait_layer`."""

    def __init__(
        self, device: str | torch.device, notify: Callable[[], None], *, capacity: int = 4096
    ) -> None:
        chosen = torch.device(device)
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        self._device = torch.device(chosen.type, index)
        self._notify = notify
        self._capacity = capacity
        self._load = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._backup = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._changed = threading.Condition()
        self._flights: dict[int, _Flight] = {}
        self._results: deque[Transferred] = deque()
        self._windows: WeakKeyDictionary[Pool, torch.Tensor] = WeakKeyDictionary()
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, name="tiertree-transfer-cuda", daemon=True)
        self._watcher.start()

    def submit(self, transfer: Transfer) -> bool:
        """See `TransferEngine`. The copies wait for what the caller's current stream holds now (it may be
        writing a source, or still reading a target) and nothing later. O(steps) launches.

        Raises ValueError for a host pool that is not pinned, and for moves in both directions."""
        stream = self._stream(transfer)
        with self._changed:
            if self._closed:
                raise CacheClosed("the transfer engine is closed")
            if transfer.op in self._flights:
                raise ValueError(f"op {transfer.op} is already in flight")
            if len(self._flights) >= self._capacity:
                return False
        flight = _Flight(transfer)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            self._launch(flight)
            flight.landed.record(stream)
        with self._changed:
            self._flights[transfer.op] = flight
            self._changed.notify_all()
        return True

    def wait_layer(self, op: int, layer: int) -> None:
        """Make the caller's current stream wait until `layer` of `op` has arrived; the host does not wait.
        Does nothing for an op that is not held: what was polled has arrived."""
        with self._changed:
            flight = self._flights.get(op)
        if flight is not None:
            arrives = (event for done, event in flight.events if done > layer)
            torch.cuda.current_stream(self._device).wait_event(next(arrives, flight.landed))

    def poll(self) -> list[Transferred]:
        """See `TransferEngine`."""
        self._collect()
        with self._changed:
            results = list(self._results)
            self._results.clear()
            for result in results:
                del self._flights[result.op]
        return results

    def cancel(self, op: int) -> None:
        """See `TransferEngine`. Always too late: all that was submitted has been launched."""

    def layers_done(self, op: int) -> int:
        """See `TransferEngine`."""
        with self._changed:
            flight = self._flights.get(op)
        if flight is None:
            return 0
        try:
            return max((done for done, event in flight.events if _passed(event)), default=0)
        except RuntimeError:  # the device failed: this transfer ends as an error
            return 0

    def drain(self, deadline_s: float) -> tuple[int, ...]:
        """See `TransferEngine`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._flying(), deadline_s)
            return tuple(flight.transfer.op for flight in self._flying())

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """See `TransferEngine`. What is abandoned keeps its memory until this engine is collected."""
        abandoned = self.drain(deadline_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._watcher.join(_IDLE_S)
        return abandoned

    def _stream(self, transfer: Transfer) -> torch.cuda.Stream:
        """The stream of the transfer's direction; refuses what this engine cannot do."""
        for pool in (pool for move in transfer.moves for pool in (move.source, move.target)):
            if pool.device != self._device and not pool.pinned:
                raise ValueError(f"a pool on {pool.device} is neither on {self._device} nor pinned")
        to_host = {move.target.on_cpu for move in transfer.moves}
        if len(to_host) > 1:
            raise ValueError(f"the moves of op {transfer.op} go in both directions")
        return self._backup if True in to_host else self._load

    def _launch(self, flight: _Flight) -> None:
        """Launch every step on the current stream, with an event wherever leading layers are complete."""
        indices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        try:
            for move in flight.transfer.moves:
                source_index = _slot_indices(move.source_slots, self._device, flight.keep)
                indices[id(move)] = source_index, _slot_indices(move.target_slots, self._device, flight.keep)
            for step in plan(flight.transfer.moves, DMA_BYTES):
                self._launch_step(step, *indices[id(step.move)])
                if step.arrived > step.first:
                    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    event.record()
                    flight.events.append((step.arrived, event))
        except Exception as error:
            flight.error = f"{type(error).__name__}: {error}"

    def _launch_step(self, step: Step, s: torch.Tensor, t: torch.Tensor) -> None:
        source, target = step_words(step)
        if _copy_runs(step, source, target):
            return
        source = self._reachable(step.move.source, source)
        target = self._reachable(step.move.target, target)
        for pages in chunks(step, _BUFFER_BYTES):
            copy_tensors(source, target, s[pages], t[pages])

    def _reachable(self, pool: Pool, view: torch.Tensor) -> torch.Tensor:
        """`view` of `pool` as a tensor of the device, for a pinned pool a window on host memory."""
        if pool.device == self._device:
            return view
        if pool not in self._windows:
            window = torch.as_tensor(_Mapped(pool.words), device=self._device)
            if window.data_ptr() != pool.tensor.data_ptr():
                raise RuntimeError(f"{self._device} cannot address the host pool in place")
            self._windows[pool] = window
        return self._windows[pool].as_strided(view.shape, view.stride(), view.storage_offset())

    def _flying(self) -> list[_Flight]:
        return [flight for flight in self._flights.values() if not flight.finished]

    def _collect(self) -> bool:
        """Move flights whose last event has passed to the results; whether there were any."""
        with self._changed:
            landed = [flight for flight in self._flying() if _has_landed(flight)]
            for flight in landed:
                flight.finished = True
                flight.keep.clear()
                self._results.append(Transferred(flight.transfer.op, flight.error))
            if landed:
                self._changed.notify_all()
        return bool(landed)

    def _watch(self) -> None:
        """The life of the watcher: until the engine is closed."""
        torch.cuda.set_device(self._device)
        while True:
            if self._collect():
                try:
                    self._notify()
                except Exception:
                    _log.exception("notify of a transfer engine failed; the transfer itself is not affected")
            with self._changed:
                if self._closed:
                    return
                self._changed.wait(_WATCH_S if self._flying() else _IDLE_S)


def _has_landed(flight: _Flight) -> bool:
    """Whether everything launched for `flight` is over. A device that failed ends its flights as errors."""
    try:
        return _passed(flight.landed)
    except RuntimeError as error:
        flight.error = f"{type(error).__name__}: {error}"
        return True


def _passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


class _Mapped:
    """Pinned host memory as the device sees it: at the same address (unified addressing)."""

    def __init__(self, words: torch.Tensor) -> None:
        self._words = words
        size = words.element_size()
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (words.data_ptr(), False),
            "shape": (words.numel(),),
            "typestr": "|u1" if size == 1 else f"<i{size}",
            "version": 3,
        }


def _slot_indices(slots: Slots, device: torch.device, keep: list[torch.Tensor]) -> torch.Tensor:
    """`slots` on the device, copied on the current stream without waiting for it."""
    pinned = torch.from_numpy(slots).pin_memory()
    index = pinned.to(device, non_blocking=True)
    keep += (pinned, index)
    return index


def _copy_runs(step: Step, source: torch.Tensor, target: torch.Tensor) -> bool:
    """Copy a step run by run on the current stream, if its pieces are contiguous and long enough."""
    move = step.move
    if move.source.order is not move.target.order or move.source.rows is None:
        return False
    s, t = move.source_slots, move.target_slots
    starts = run_starts(s, t) if source is move.source.rows else np.arange(s.size)
    if source[:1].nbytes * s.size < DMA_BYTES * starts.size:
        return False
    lengths = np.diff(starts, append=s.size)
    for i, j, n in zip(s[starts].tolist(), t[starts].tolist(), lengths.tolist(), strict=True):
        target[j : j + n].copy_(source[i : i + n], non_blocking=True)
    return True
