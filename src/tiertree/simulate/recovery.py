"""Whether a storage that is well again is used again: a page goes all the way there and back.

compute ─▶ (host) ─▶ storage ─▶ memory is emptied ─▶ prefetch ─▶ load back ─▶ compare
   └──────────── tried again for longer than any breaker stays open ───────────┘
"""

from __future__ import annotations

import numpy as np

from ..cache import PrefixCache
from ..tree.lease import Lease
from ..tree.load import LoadBack, Progress
from ..tree.prefetch import Prefetch
from ..types import FULL, NoRoom, Tier
from .content import Contents
from .executor import SimExecutor
from .loop import Loop
from .plan import Plan
from .verifier import Found

TRIES = 60
TRY_SECONDS = 5.0
"""Together more than twice the longest wait of a breaker."""


def recovers(plan: Plan, cache: PrefixCache, executor: SimExecutor, loop: Loop, contents: Contents) -> None:
    """Raise Found unless what is computed now can be had from storage within TRIES tries. Nobody else uses
    the cache, and storage is attached."""
    pages = max(each.rules.grid(plan.page_tokens) for each in plan.config.kinds) if plan.config.kinds else 1
    for attempt in range(TRIES):
        tokens = [1000 + attempt] * (pages * plan.page_tokens)
        if _there_and_back(plan, cache, executor, contents, tokens, pages):
            return
        loop.wait(TRY_SECONDS, lambda: False)
        cache.poll()
    raise Found("no recovery", f"storage is well, and not used: {cache.stats().breakers}")


def _there_and_back(
    plan: Plan,
    cache: PrefixCache,
    executor: SimExecutor,
    contents: Contents,
    tokens: list[int],
    pages: int,
) -> bool:
    key = cache.key(tokens)
    digests = contents.chain(tokens, "", cache.revision, pages)
    _compute(plan, cache, executor, contents, tokens, digests)
    for _ in range(plan.config.selective_hits):
        cache.match(key)
    cache.drain(1.0)
    for tier in (Tier.DEVICE, Tier.HOST):
        _empty(plan, cache, tier)
    started = cache.prefetch(key)
    if not isinstance(started, Prefetch) or not cache.drain(1.0):
        return False
    with cache.acquire(cache.match(key)) as lease:
        if lease.memory_boundary < pages:
            return False
        load = cache.load_back(lease, 1.0)
        cache.drain(1.0)
        if not isinstance(load, LoadBack) or load.state is not Progress.DONE:
            return False
        _compare(executor, contents, lease, digests)
    return True


def _compute(
    plan: Plan,
    cache: PrefixCache,
    executor: SimExecutor,
    contents: Contents,
    tokens: list[int],
    digests: list[bytes],
) -> None:
    slots = cache.allocate(len(digests))
    if isinstance(slots, NoRoom):
        raise Found("no recovery", f"nobody uses the cache, and there is no room: {slots}")
    contents.write(executor.device, FULL, slots, digests)
    partial = {}
    for each in plan.config.kinds:
        low = each.rules.since(len(digests), plan.page_tokens)
        theirs = cache.allocate(len(digests) - low, kind=each.kind)
        if isinstance(theirs, NoRoom):
            raise Found("no recovery", f"nobody uses the cache, and there is no room: {theirs}")
        contents.write(executor.device, each.kind, theirs, digests[low:])
        partial[each.kind] = np.concatenate([np.full(low, -1, np.int64), theirs])
    cache.insert(cache.key(tokens), slots, partial=partial)


def _empty(plan: Plan, cache: PrefixCache, tier: Tier) -> None:
    for kind in (FULL, *(each.kind for each in plan.config.kinds)):
        cache.evict(1 << 20, tier, 1.0, kind)
        cache.drain(1.0)


def _compare(executor: SimExecutor, contents: Contents, lease: Lease, digests: list[bytes]) -> None:
    wrong = contents.wrong(executor.device, FULL, lease.slots, digests[: lease.device_boundary])
    if wrong:
        raise Found("wrong page", f"what came back from storage: pages {wrong}")
