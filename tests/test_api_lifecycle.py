"""Before open, after close, from another thread, in a child process: a named error, and nothing changes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rig import Rig, books

from tiertree import CacheClosed, CacheConfig, DeviceConfig, PrefixCache, TiertreeError, WrongThread
from tiertree.storage.memory import KeyStorage

PROMPT = [1, 2, 3]


@pytest.fixture
def rig() -> Rig:
    """Three pages on device and host, and a storage that has them."""
    rig = Rig(device=6, host=6, storage=100)
    rig.put(PROMPT)
    rig.settle()
    return rig


def every_call(cache: PrefixCache, key: Any, match: Any, lease: Any) -> list[Callable[[], object]]:
    """Every method that needs an open cache."""
    nothing = np.empty(0, np.int64)
    return [
        lambda: cache.match(key),
        lambda: cache.peek(key),
        lambda: cache.acquire(match),
        lambda: cache.allocate(0, lease),
        lambda: cache.free(nothing, lease),
        lambda: cache.insert(key, nothing, lease),
        lambda: cache.load_back(lease),
        lambda: cache.prefetch(key),
        lambda: cache.cancel(lease),
        lambda: cache.evict(0),
        lambda: cache.poll(),
        lambda: cache.drain(),
        lambda: cache.clear(),
        lambda: cache.invalidate("x"),
        lambda: cache.take_events(),
        lambda: cache.stats(),
        lambda: cache.tree(),
        lambda: cache.check(),
        lambda: cache.attach_storage(KeyStorage(1)),
        lambda: cache.detach_storage(),
        lambda: cache.clear_storage(),
    ]


def test_nothing_works_before_open_or_after_close() -> None:
    cache = PrefixCache(CacheConfig(device=DeviceConfig(size=4), page_size=1))
    key = cache.key([1])
    for call in every_call(cache, key, None, None):
        with pytest.raises(CacheClosed):
            call()
    with cache:
        match = cache.match(key)
        lease = cache.acquire(match)
    for call in [*every_call(cache, key, match, lease), cache.open]:
        with pytest.raises(CacheClosed):
            call()
    assert cache.close() == ()


def test_nothing_works_from_another_thread_but_wake_and_fileno(rig: Rig) -> None:
    key = rig.cache.key(PROMPT)
    match = rig.cache.match(key)
    lease = rig.cache.acquire(match)
    caught: list[object] = []

    def elsewhere() -> None:
        for call in [*every_call(rig.cache, key, match, lease), rig.cache.close, lease.release]:
            try:
                caught.append(call())
            except TiertreeError as error:
                caught.append(type(error))
        rig.cache.wake()
        rig.cache.fileno()

    before = books(rig)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert set(caught) == {WrongThread}
    assert books(rig) == before
    lease.release()


def test_a_child_process_is_told_to_open_a_cache_of_its_own() -> None:
    script = """
        import os, sys
        from tiertree import CacheConfig, DeviceConfig, ForkedCache, PrefixCache
        with PrefixCache(CacheConfig(device=DeviceConfig(size=4), page_size=1)) as cache:
            key = cache.key([1])
            cache.insert(key, cache.allocate(1))
            lease = cache.acquire(cache.match(key))
            before = cache.stats()
            child = os.fork()
            if child == 0:
                caught = 0
                for call in (lambda: cache.match(key), lambda: cache.allocate(1), cache.poll, cache.close,
                             cache.check, lambda: cache.evict(1), lease.release):
                    try:
                        call()
                    except ForkedCache:
                        caught += 1
                os._exit(caught)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            assert cache.stats() == before
            cache.check()
            lease.release()
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, timeout=120)
