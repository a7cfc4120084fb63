"""`PrefixCache`: the tree, its pools and its executor behind one object that an engine drives.

    key ─▶ match ─▶ acquire ─▶ (load_back) ─▶ allocate ─▶ the engine computes ─▶ insert ─▶ release
                                       poll() between steps: only there does finished work take effect

A cache belongs to the thread that opened it. Only `wake` and `fileno` may be used by another thread; a
child process must open a cache of its own. Lengths are pages unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from .build import fingerprint
from .driver import Evicted
from .events import Event
from .guard import count, deadline, optional_deadline, text
from .lifecycle import Lifecycle
from .metrics import Stats, snapshot
from .policy.prefetch import patience_seconds
from .tree.check import audit
from .tree.core import NOTHING
from .tree.insert import Inserted
from .tree.key import Key, Tokens, check_namespace
from .tree.lease import Lease, Match
from .tree.load import LoadBack, Progress
from .tree.prefetch import Prefetch, Stage
from .tree.radix import DEVICE, HOST
from .tree.stuck import Stuck, stuck
from .treeview import TreeView, view
from .types import (
    FULL,
    InvalidSlots,
    Kind,
    NoRoom,
    Refused,
    Slots,
    Tier,
)


class PrefixCache(Lifecycle):
    """A hierarchical prefix cache. Open it with `with`, or by `open` and `close`.

    `executor` and `clock` (seconds, never going back) are for simulators and tests; without them the
    cache builds the pools and workers that `config` describes and uses the monotonic clock.

    Every method but `key` and `extend_key` raises CacheClosed before open and after close, WrongThread
    from another thread and ForkedCache in a child process, and ForeignObject for another cache's objects;
    it then changes nothing.
    """

    # -- keys and lookups --------------------------------------------------------------------------

    def key(self, tokens: Tokens, namespace: str = "") -> Key:
        """The key of `tokens` (any flat integer sequence or array); only whole pages are part of it.
        Keys of different namespaces never share a page. O(tokens). Raises InvalidTokens,
        InvalidNamespace."""
        return self._core.radix.keys.make(tokens, namespace)

    def extend_key(self, key: Key, tokens: Tokens) -> Key:
        """`key` with the whole pages of `tokens` behind it. O(pages). Raises InvalidTokens."""
        return self._core.radix.keys.extend(key, tokens)

    def match(self, key: Key) -> Match:
        """Longest usable prefix of `key`. O(pages + nodes on the path). Refreshes recency; may split a
        node and start a backup that was owed. Valid until the next call that changes the cache."""
        driver = self._enter()
        self._guard.key(key)
        found = self._core.match(key, self._clock())
        if self._core.operations.outbox:
            driver.submit()
        return found

    def peek(self, key: Key) -> Match:
        """`match` that changes neither recency nor the tree."""
        self._enter()
        self._guard.key(key)
        return self._core.peek(key)

    def acquire(self, match: Match) -> Lease:
        """Lock what `match` found until the lease is released. O(nodes on the path). Raises StaleMatch
        if the cache has changed since."""
        self._enter()
        self._guard.match(match)
        return self._core.acquire(match, self._release)

    def _release(self, lease: Lease) -> None:
        self._enter()
        self._core.release(lease)

    def release_window(self, lease: Lease, kind: Kind) -> None:
        """Give the part of `lease` that is of a partial kind back early: a decoding request has moved past
        its window, reads none of its slots any more and does not load back. Exactly once until the lease
        moves (every insert pins the window at its end): raises LeaseReleased the second time, and
        ForeignObject for a kind that the cache does not have."""
        self._enter()
        self._guard.lease(lease)
        self._core.release_window(lease, kind)

    # -- a request's pages -------------------------------------------------------------------------

    def allocate(
        self, pages: int, lease: Lease | None = None, deadline_s: float | None = None, kind: Kind = FULL
    ) -> Slots | NoRoom:
        """`pages` device slots of `kind` for a request to compute into; evicts, and waits for pages being
        copied away, for at most `deadline_s` seconds (default: op_deadline_seconds). With a lease they go
        back when it is released, unless inserted before. NoRoom when they cannot be had: nothing is
        taken."""
        driver = self._enter()
        if lease is not None:
            self._guard.lease(lease)
        pages, limit = count("pages", pages), optional_deadline(deadline_s)
        core, pending = self._core, 0
        ledger = core.ledger(kind, DEVICE)
        if ledger.free < pages <= ledger.free + core.within_reach(DEVICE, kind):
            pending = driver.make_room(DEVICE, pages, limit, kind).pending
        slots = core.take(pages, lease, kind)
        if slots is not None:
            return slots
        return NoRoom(pages, ledger.free, core.reclaimable(DEVICE, kind), pending)

    def copy_on_write(self, lease: Lease, kind: Kind, deadline_s: float | None = None) -> Slots | NoRoom:
        """Slots of the request's own that hold a copy of `lease.window(kind)`: what it writes to when it
        goes on from a cached state; none at boundary 0, where there is no state. Copied on device, in order
        with the caller's own work there. NoRoom as `allocate`; raises LeaseReleased, ForeignObject, and
        InvalidSlots when a page of the window is not there."""
        driver = self._enter()
        self._guard.lease(lease)
        while True:
            boundary, source = lease.device_boundary, lease.window(kind).slots
            if len(source) and source.min() < 0:
                raise InvalidSlots(
                    f"{kind!r} is not whole before page {boundary}, nothing to copy: it was not inserted "
                    "there, or is off the kind's grid or above its number per path"
                )
            target = self.allocate(len(source), lease, deadline_s, kind)
            if isinstance(target, NoRoom):
                return target
            if lease.device_boundary == boundary:
                driver.executor.clone(kind, source, target)
                return target
            self.free(target, lease, kind)  # a load-back of the lease came in while room was made

    def free(self, slots: Slots, lease: Lease | None = None, kind: Kind = FULL) -> None:
        """Give back slots of `kind` that were allocated for `lease` (None: for none) and not inserted.
        Raises InvalidSlots."""
        self._enter()
        if lease is not None:
            self._guard.lease(lease)
        self._core.give_back(slots, lease, kind)

    def insert(
        self,
        key: Key,
        slots: Slots,
        lease: Lease | None = None,
        partial: Mapping[Kind, Slots] = NOTHING,
    ) -> Inserted | Refused:
        """Pages that a request has computed become part of the cache.

        With a lease (a request that goes on: chunked prefill, decode): `key` extends the lease's prefix,
        `slots` are for its pages from `lease.device_boundary` on, and the lease grows to the whole key;
        `lease.slots` are then the slots to use. Without: `slots` are for all pages of `key`. Slots of
        pages that the cache had already are freed.

        `partial` has an array like `slots` for each partial kind, of the same length, −1 for pages of which
        the request has none (let go already, or no state was saved there). They fill what is missing; others
        are freed, and so is what is off the kind's grid.

        Refused, nothing changed and the slots still the request's, if the leased prefix was cleared.
        Raises InvalidSlots, and ForeignObject for a key that does not extend the lease's or an unknown
        kind. O(pages + nodes)."""
        driver = self._enter()
        self._guard.key(key)
        if lease is not None:
            self._guard.lease(lease)
        done = self._core.insert(key, slots, lease, self._clock(), partial)
        if self._core.operations.outbox:
            driver.submit()
        return done

    def load_back(self, lease: Lease, deadline_s: float | None = None) -> LoadBack | Refused:
        """Start copying to device what the lease's memory boundary lacks there: of FULL every page, of
        each partial kind what continuing at the boundary needs. The deepest boundary that fits the quota
        and the room, all of it or nothing. Makes room for at most `deadline_s` seconds. When its `state`
        is DONE, after some `poll`, the lease's device boundary has moved."""
        driver, limit = self._enter(), optional_deadline(deadline_s)
        self._guard.lease(lease)
        plan = self._core.loads.plan(lease)
        if isinstance(plan, Refused):
            return plan
        for kind, pages in plan.cargo:
            if kind.ledgers[DEVICE].free + self._core.within_reach(DEVICE, kind.kind) < len(pages):
                return Refused(f"no room on device for {kind.kind}")
        end = self._clock() + (self.config.op_deadline_seconds if limit is None else limit)
        driver.make_room(DEVICE, plan.boundary - plan.missing, limit)
        for kind, pages in plan.cargo:
            driver.make_room(DEVICE, len(pages), end - self._clock(), kind.kind)
        load = self._core.load_back(lease, self._clock())
        driver.submit()
        return load

    def layers_ready(self, load_back: LoadBack) -> int:
        """How many leading layers of `load_back.slots` may be read already: all when it is DONE, none when
        it has FAILED. A layer that was ready stays so for as long as the load-back is PENDING or DONE."""
        executor = self._enter().executor
        self._guard.load_back(load_back)
        layers = self.config.layout.layers if self.config.layout is not None else 0
        if load_back.state is not Progress.PENDING:
            return layers if load_back.state is Progress.DONE else 0
        arrived = {op for op in load_back.waiting if self._core.has_arrived(op)}
        return min((executor.layers_done(op) for op in load_back.waiting - arrived), default=layers)

    # -- storage -----------------------------------------------------------------------------------

    def prefetch(self, key: Key) -> Prefetch | Refused:
        """Start reading what memory lacks of `key` from storage into host. O(pages)."""
        driver = self._enter()
        self._guard.key(key)
        started = self._core.prefetch(key, self._clock())
        driver.submit()
        return started

    def settle(self, prefetch: Prefetch) -> int | None:
        """Ask whether `prefetch` is over by the configured stop rule: None while it is not, and else how
        many pages it brought into host. What has arrived when the rule says stop is used."""
        driver = self._enter()
        self._guard.prefetch(prefetch)
        rules, now = self.config.prefetch, self._clock()
        patience = patience_seconds(
            rules.stop_rule,
            rules.base_seconds,
            rules.per_1024_tokens_seconds,
            prefetch.wanted * self.config.page_size,
        )
        if prefetch.stage is not Stage.SETTLED and now - prefetch.started >= patience:
            self._core.fetches.stop(prefetch, now)
            self._core.radix.version += 1
            driver.submit()
        return prefetch.landed if prefetch.stage is Stage.SETTLED else None

    # -- room --------------------------------------------------------------------------------------

    def evict(
        self, pages: int, tier: Tier = DEVICE, deadline_s: float | None = None, kind: Kind = FULL
    ) -> Evicted:
        """Free `pages` slots of `kind` on `tier` beyond those that are free; counts what is free by then.
        Under write_back it waits for the copies to host, for at most `deadline_s` seconds."""
        driver = self._enter()
        pages, limit = count("pages", pages), optional_deadline(deadline_s)
        if not isinstance(tier, int) or tier not in (DEVICE, HOST):
            raise InvalidSlots("only DEVICE and HOST can be evicted from")
        ledger = self._core.ledger(kind, tier)
        return driver.make_room(tier, min(ledger.free + pages, ledger.capacity), limit, kind)

    # -- progress ----------------------------------------------------------------------------------

    def poll(self) -> int:
        """Let finished work take effect. Never waits. Returns how many completions there were."""
        return self._enter().poll()

    def drain(self, deadline_s: float = 10.0) -> bool:
        """Poll until nothing is in flight, for at most `deadline_s` seconds. Returns whether it is so."""
        return self._enter().drain(deadline(deadline_s))

    def cancel(self, what: Lease | LoadBack | Prefetch) -> None:
        """What an aborted request calls. A lease: stop its load-back and release it. A load-back: the
        request goes on from its device boundary. A prefetch: whatever arrives is freed. Cancelling what
        is over does nothing, except that a lease is released only once (LeaseReleased)."""
        driver = self._enter()
        if isinstance(what, Lease):
            self._guard.lease(what)
            self._core.release(what)
        elif isinstance(what, LoadBack):
            self._guard.load_back(what)
            self._core.loads.abandon(what)
        else:
            self._guard.prefetch(what)
            self._core.fetches.forget(what, self._clock())
        driver.submit()

    # -- everything --------------------------------------------------------------------------------

    def clear(self, namespace: str | None = None) -> None:
        """Forget every page of `namespace` (None: of all) in device and host memory; storage keeps its
        own (`clear_storage`). Leases stay good for reading their slots until they are released. O(nodes).
        Raises InvalidNamespace."""
        driver = self._enter()
        if namespace is not None:
            check_namespace(namespace)
        self._core.clear(namespace, self._clock())
        driver.submit()

    def invalidate(self, revision: str) -> None:
        """The model's weights are `revision` from now on: clear memory, and never again hit what was
        computed by others, here or in storage. What a lease of before has computed is refused by `insert`;
        slots allocated without a lease carry no such mark: do not insert them."""
        driver = self._enter()
        self._core.invalidate(fingerprint(self.config, text("revision", revision)), self._clock())
        self.revision = revision
        driver.submit()

    def take_events(self) -> list[Event]:
        """The KV events since the last call, oldest first. Empty unless config.events."""
        self._enter()
        return self._core.take_events()

    def stats(self) -> Stats:
        """Counters and gauges. O(capacity), vectorised. Waits for a storage that hangs no longer than half a
        second, once; what it said last is shown meanwhile."""
        driver, now = self._enter(), self._clock()
        storage = (None, None) if self._gauge is None else self._gauge.read(now)
        return snapshot(self._core, now, storage, driver.storage_error, driver.executor.stuck_threads())

    def stuck(self) -> tuple[Stuck, ...]:
        """Operations that are past their deadline and have not come home, oldest first: what each was to do,
        for whom, and which slots it keeps. O(in flight)."""
        self._enter()
        return stuck(self._core.operations, self._clock())

    def tree(self) -> TreeView:
        """Which page is where, who holds it and what is in flight, as plain data. O(nodes + pages +
        capacity); changes nothing."""
        self._enter()
        return view(self._core, self._clock())

    def check(self) -> None:
        """Verify every invariant (I1 to I12), and with debug poison that nobody has written to a free page.
        O(everything). Raises InvariantViolated: a bug in tiertree, or a write where the writer had no
        slots."""
        self._enter()
        audit(self._core)
        if self._poison is not None:
            self._poison.check()
