"""A process that uses a directory of the disk tier from several threads until it is killed.

    python disk_victim.py SOURCES PATH CAPACITY DURABILITY FIRST SEED

It writes what it does to its standard output, a line before and a line after each call, so that whoever
reads it knows what was acknowledged, and what was under way when it died:

    open, opened            the directory                p G, s G N…    a put of the pages of group G; the
    c, C                    a clear                                     numbers of those that it evicted
    f N                     a page was damaged           x …            what must never be

It imports the disk tier alone, and is up at once: the package itself would bring torch along.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
import types

SEGMENT_BYTES = 16 << 10
GROUP = 4
"""Pages of one put."""

PAGE_BYTES_MAX = 3000


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "little") * 6


def number_of(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")


def content_of(number: int) -> bytes:
    length = 500 + number * 7 % (PAGE_BYTES_MAX - 500)
    return hashlib.shake_128(number.to_bytes(8, "little")).digest(length)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write(storage, groups, rng) -> None:  # type: ignore[no-untyped-def]
    """Put one group after the other; now and then damage a page, or clear all of them."""
    from tiertree.storage.tamper import flip_byte

    for group in groups:
        say("p", group)
        numbers = range(group * GROUP, group * GROUP + GROUP)
        pages = [memoryview(content_of(n)) for n in numbers]
        result = storage.put([key_of(n) for n in numbers], pages)
        if any(outcome.value != "stored" for outcome in result.outcomes):
            say("x", "refused", group)
        say("s", group, *map(number_of, result.evicted))
        if rng.random() < 0.03:
            say("f", numbers[0])
            flip_byte(storage, key_of(numbers[0]), 9)
            storage.get([key_of(numbers[0])], [memoryview(bytearray(len(pages[0])))])
        if rng.random() < 0.002:
            say("c")
            storage.clear()
            say("C")


def read(storage, first, rng) -> None:  # type: ignore[no-untyped-def]
    """Get pages, old and new, so that some are written again when their segment goes."""
    while True:
        keys = storage.keys()
        if keys:
            key = rng.choice(keys)
            content = content_of(number_of(key))
            into = memoryview(bytearray(len(content)))
            (got,) = storage.get([key], [into])
            if got.value == "hit" and into != content:
                say("x", "wrong bytes", number_of(key))


def give_up(failure: threading.ExceptHookArgs) -> None:
    """A thread has failed: the process ends, and nobody waits for it."""
    say("x", repr(failure.exc_value).replace("\n", " "))
    os._exit(1)


def main() -> None:
    threading.excepthook = give_up
    sources, path, capacity, durability, first, seed = sys.argv[1:]
    package = types.ModuleType("tiertree")
    package.__path__ = [sources]
    sys.modules["tiertree"] = package
    from tiertree.storage.disk import DiskStorage

    say("open")
    storage = DiskStorage(path, int(capacity), SEGMENT_BYTES, durability)
    say("opened")
    rngs = [random.Random(f"{seed} {i}") for i in range(3)]
    workers = [
        threading.Thread(target=write, args=(storage, range(int(first) + i, 1 << 40, 2), rngs[i]))
        for i in range(2)
    ]
    workers.append(threading.Thread(target=read, args=(storage, int(first), rngs[2])))
    for worker in workers:
        worker.daemon = True
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
