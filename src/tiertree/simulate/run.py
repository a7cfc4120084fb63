"""One run: a phase in which anything goes wrong, and one in which nothing does any more.

    phase 1   faults on      whatever happens, no wrong page, no broken invariant, no call that is late
    phase 2   faults off     what hangs is answered or dead; every request must end, everything must drain,
                             every pool be entirely free, and nothing be left of the cache

`simulate` is a pure function of the plan, whatever the machine, its speed, or the hash seed.
"""

from __future__ import annotations

import gc
import threading
import traceback
import weakref
from dataclasses import dataclass

from ..cache import PrefixCache
from ..config import CacheConfig
from ..testing.fakedisk import After
from ..types import FULL, Tier
from .content import Contents, wrong_in_tree
from .dice import Dice
from .engine import Engine
from .executor import SimExecutor
from .faults import Faults
from .loop import Diary, Loop
from .plan import Plan
from .recovery import recovers
from .report import RunReport, Violation
from .request import draw_asks
from .store import Backend, FaultyStore
from .verifier import Found

HORIZON_SECONDS = 30.0
"""How long phase 1 goes on after the last arrival, if requests cannot end."""
AUDIT_STEPS = 25
"""Steps between two looks at every invariant and every page."""
DRAIN_SECONDS = 600.0
CALM_STEPS = 500
"""Steps after which a calm world loses what is in memory."""


def simulate(plan: Plan, lines_max: int = 0) -> RunReport:
    """Run `plan` once. The report has the last `lines_max` lines of what was decided. Raises nothing: what
    goes wrong is a violation in it."""
    world = _World(plan, lines_max)
    try:
        world.live()
    except Found as found:
        world.violate(found.kind, found.detail)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{each.name}:{each.lineno}" for each in reversed(frames))
        world.violate(f"error {type(error).__name__}", f"{error} (in {where})")
    return world.report()


@dataclass(slots=True)
class _Life:
    """One process: a cache, and what it was made of."""

    cache: PrefixCache
    executor: SimExecutor


class _World:
    def __init__(self, plan: Plan, lines_max: int) -> None:
        self._plan = plan
        self._dice = Dice(plan.seed)
        self._loop = Loop()
        self._diary = Diary(self._loop, lines_max)
        self._faults = Faults(self._dice, plan.faults)
        self._contents = Contents(plan.page_tokens)
        self._asks = draw_asks(plan)
        self._engine = Engine(plan, self._asks, self._loop, self._diary, self._contents)
        self._threads = set(threading.enumerate())
        self._violations: list[Violation] = []
        self._operations: dict[str, int] = {}
        self._attached = False
        self._lives = 0
        self._backend: Backend | None = None
        self._store: FaultyStore | None = None
        if plan.storage is not None:
            self._backend = Backend(plan.storage, plan.storage_bytes, plan.durable)
            self._store = FaultyStore(self._backend, self._faults, self._loop)

    # -- two phases -------------------------------------------------------------------------------

    def live(self) -> None:
        """Both phases."""
        life = self._begin()
        last = self._asks[-1].arrives if self._asks else 0.0
        while self._engine.busy and self._loop.now < last + HORIZON_SECONDS:
            life = self._operate(life)
            self._step(life)
        self._diary.note("the faults are over")
        self._faults.heal()
        life.executor.heal()
        most = self._engine.steps + 2000 + 200 * len(self._asks)
        while self._engine.busy:
            self._step(life)
            if self._engine.steps > most:
                raise Found("hang", f"{self._left()} cannot be served though nothing goes wrong any more")
        self._end(life)
        remains: list[weakref.ref[object]] = [weakref.ref(life.cache), weakref.ref(life.executor)]
        del life
        self._engine.leave()
        self._loop.forget()
        gc.collect()
        if any(each() is not None for each in remains):
            raise Found("leak", "the cache is closed and nobody has it, and it is still there")

    def _left(self) -> str:
        left = [*self._engine.running, *self._engine.waiting]
        return ", ".join(
            f"request {each.number} ({each.lease}, {each.load}, {each.prefetch})" for each in left
        )

    def _begin(self) -> _Life:
        """A new process."""
        self._lives += 1
        config: CacheConfig = self._plan.config
        executor = SimExecutor(config, self._loop, self._faults, self._diary, self._lives)
        cache = PrefixCache(config, executor=executor, clock=self._loop).open()
        if self._store is not None:
            cache.attach_storage(self._store)
        self._attached = self._store is not None
        self._engine.adopt(cache, executor)
        return _Life(cache, executor)

    def _step(self, life: _Life) -> None:
        """One step of the engine, and the time until the next one."""
        pause = self._engine.step()
        for event in life.cache.take_events():
            self._diary.note(type(event).__name__)
        if self._engine.steps % AUDIT_STEPS == 0:
            self._audit(life)
        woken = [False]

        def wake() -> None:
            woken[0] = True

        self._loop.at(self._loop.now + pause, wake)
        while not woken[0]:
            self._loop.step()

    def _audit(self, life: _Life) -> None:
        life.cache.check()
        if self._backend is not None and self._backend.used_bytes > self._plan.storage_bytes:
            raise Found("bound", f"storage takes {self._backend.used_bytes} bytes")
        revision = life.cache.revision
        for wrong in wrong_in_tree(life.cache._core, life.executor.pools, self._contents, revision):
            raise Found("wrong page", wrong)

    # -- what operators do, and what happens to machines --------------------------------------------

    def _operate(self, life: _Life) -> _Life:
        steps, cache, dice = self._engine.steps, life.cache, self._dice
        if self._does("evict", 5):
            tier = dice.pick((Tier.DEVICE, Tier.HOST), "evicts", steps)
            kind = dice.pick((FULL, *(each.kind for each in self._plan.config.kinds)), "kind", steps)
            if tier is Tier.DEVICE or self._plan.config.host is not None:
                cache.evict(dice.pick((1, 3, 100), "pages", steps), tier, 0.0, kind)
        if self._does("clear", 20):
            self._clear(cache, dice.pick((None, "", "tenant 0"), "clears", steps))
        if self._does("invalidate", 15):
            if dice.chance(0.5, "stops", steps):
                self._engine.stop_all()
            self._engine.forget(None)
            cache.invalidate(f"weights {steps}")
        if self._does("clear_storage", 40) and self._attached:
            cache.clear_storage()
        if self._does("switch_storage", 30) and self._store is not None:
            self._switch(cache, self._store)
        if self._does("empty", 3) or (self._plan.calm and steps % CALM_STEPS == 0):
            self._empty(cache)
        if self._does("restart", 50):
            return self._restart(life)
        for death in ("process_death", "power_loss"):
            if steps % 30 == 29 and self._faults.strikes(death, steps):
                return self._die(life, death)
        return life

    def _does(self, habit: str, every: int) -> bool:
        rate, steps = self._plan.habits.get(habit), self._engine.steps
        if rate is None or steps % every or not self._dice.chance(rate, habit, steps):
            return False
        self._diary.note(habit)
        self._engine.counts[habit] += 1
        return True

    def _clear(self, cache: PrefixCache, namespace: str | None) -> None:
        self._engine.forget(namespace)
        cache.clear(namespace)

    def _switch(self, cache: PrefixCache, store: FaultyStore) -> None:
        """Detach the storage, or attach it again."""
        if self._attached:
            cache.detach_storage(deadline_s=0.0)
        else:
            cache.attach_storage(store)
        self._attached = not self._attached

    def _empty(self, cache: PrefixCache) -> None:
        """Memory is needed for something else: what it held is on storage, or computed again."""
        for each in (FULL, *(kind.kind for kind in self._plan.config.kinds)):
            cache.evict(1 << 20, Tier.DEVICE, 0.0, each)
            cache.evict(1 << 20, Tier.HOST, 0.0, each)

    def _restart(self, life: _Life) -> _Life:
        """The engine stops in good order, and another one begins with what is on storage."""
        self._engine.stop_all()
        self._count(life)
        life.cache.close(deadline_s=1.0)
        if self._backend is not None:
            self._backend.reopen(None, self._lives)
        return self._begin()

    def _die(self, life: _Life, how: str) -> _Life:
        """The process is gone between two instructions; a new one takes over what is on storage."""
        self._diary.note(how)
        self._count(life)
        life.executor.close(0.0)
        if self._backend is not None:
            self._backend.reopen(After.MIXED if how == "power_loss" else After.KILLED, self._lives)
        return self._begin()

    # -- the end ----------------------------------------------------------------------------------

    def _end(self, life: _Life) -> None:
        """Nobody is served any more: nothing may be left."""
        cache, core = life.cache, life.cache._core
        if not cache.drain(DRAIN_SECONDS):
            raise Found("hang", f"operations {list(core.operations.in_flight)} never end")
        if cache.stuck():
            raise Found("hang", "; ".join(map(str, cache.stuck())))
        if core.leases:
            raise Found("leak", f"leases {list(core.leases)} are still out")
        self._audit(life)
        if self._attached:
            recovers(self._plan, cache, life.executor, self._loop, self._contents)
        tiers = [Tier.DEVICE] + [Tier.HOST] * (self._plan.config.host is not None)
        pools = [(kind, tier) for kind in (FULL, *core.kinds) for tier in tiers]
        before = -1
        while before != (before := sum(core.ledger(*pool).free for pool in pools)):
            for kind, tier in pools:
                cache.evict(core.ledger(kind, tier).capacity, tier, DRAIN_SECONDS, kind)
                cache.drain(DRAIN_SECONDS)
        for kind, tier in pools:
            ledger = core.ledger(kind, tier)
            if ledger.free != ledger.capacity:
                raise Found(
                    "leak", f"{ledger.capacity - ledger.free} slots of {kind} on {tier.name} are not free"
                )
        cache.check()
        if core.radix.nodes or core.radix.roots or core.fetches.pages_in_flight:
            raise Found(
                "leak", f"{core.radix.nodes} nodes are left, {core.fetches.pages_in_flight} pages under way"
            )
        self._count(life)
        abandoned = cache.close()
        if abandoned:
            raise Found("leak", f"close abandons operations {abandoned}")
        threads = set(threading.enumerate()) - self._threads
        if threads:
            raise Found("leak", f"threads are left: {sorted(each.name for each in threads)}")

    def _count(self, life: _Life) -> None:
        for name, count in life.executor.actions.items():
            self._operations[name] = self._operations.get(name, 0) + count
        for name, count in life.cache.stats().as_dict().items():
            if isinstance(count, int) and name not in ("nodes", "namespaces", "leases"):
                self._engine.counts[f"cache_{name}"] += count

    def violate(self, kind: str, detail: str) -> None:
        """Something is wrong."""
        self._diary.note(f"violation: {kind}")
        self._violations.append(Violation(kind, detail, round(self._loop.now, 6)))

    def report(self) -> RunReport:
        """What has come of it."""
        return RunReport(
            seed=self._plan.seed,
            requests=len(self._asks),
            operations=dict(sorted(self._operations.items())),
            faults=dict(sorted(self._faults.injected.items())),
            pages_verified=self._contents.verified,
            violations=tuple(self._violations),
            counts=dict(sorted(self._engine.counts.items())),
            digest=self._diary.digest,
            seconds=round(self._loop.now, 6),
            lines=tuple(self._diary.lines),
            latencies={
                each.number: round(each.ended - each.ask.arrives, 9)
                for each in sorted(self._engine.ended, key=lambda request: request.number)
                if each.ended is not None
            },
        )
