"""The seam between the executor and what moves bytes between two tiers of memory.

    owner's thread                          engine
    submit(t) ── False: full, nothing taken
              ── True ───────────────────▶  queued ─▶ running ─▶ finished ─▶ notify()
    cancel(op) ──────────────────────────▶    stops at the next chunk, or is too late
    layers_done(op) ◀──────────────────────   grows while it runs
    poll() ◀── [Transferred, …] ───────────   in order of finishing

One thread, the owner's, calls every method. `notify` is called without any lock held, mostly from the
engine's own threads, whenever something may be there to poll; it must be quick and thread-safe. Nothing
waits without a deadline, and whatever goes wrong inside a copy is the `error` of its `Transferred`.
"""

from __future__ import annotations

from typing import Protocol

from .op import Transfer, Transferred


class TransferEngine(Protocol):
    """Moves pages between pools, several transfers at a time, in no promised order between them."""

    def submit(self, transfer: Transfer) -> bool:
        """Take `transfer`, or return False when as many transfers are held as the engine has room for: a
        transfer counts until `poll` has given its `Transferred`. Raises ValueError for an `op` that is
        held already and `CacheClosed` after `close`."""
        ...

    def poll(self) -> list[Transferred]:
        """What has finished since the last call, in order of finishing. Never waits; works after `close`."""
        ...

    def cancel(self, op: int) -> None:
        """Ask `op` to stop. Its `Transferred` still follows, with the error "cancelled" if it was stopped.
        Does nothing to an op that has finished or is not held."""
        ...

    def layers_done(self, op: int) -> int:
        """How many leading layers of `op` have arrived, in all its moves (a pool with fewer layers counts
        as complete beyond its last). 0 for an op that is not held: never taken, or polled already."""
        ...

    def drain(self, deadline_s: float) -> tuple[int, ...]:
        """Wait up to `deadline_s` seconds until nothing is unfinished. Returns the ops that still are."""
        ...

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """Drain, then cancel what is unfinished and stop. Returns the ops unfinished at the deadline: they
        are abandoned. Idempotent."""
        ...
