"""The steps of `World`, drawn by a seeded generator: one world after another, each with its own habits."""

from __future__ import annotations

import random
from collections.abc import Callable

from draws import FORKS, HABITS, NAMESPACES, Habits, draw_options, prompt
from engine import Request
from world import World

from tiertree import FULL, Tier
from tiertree.tree.actions import Copy, Get, Put, Query
from tiertree.types import Kind

Step = Callable[[World, random.Random], bool | None]
"""Something that happens; False: it could not, and nothing has."""


def some_line(world: World, rng: random.Random) -> tuple[list[int], str]:
    """Tokens and a namespace: often those of a prompt that was computed not long ago."""
    if world.computed and rng.random() < 0.4:
        return rng.choice(world.computed)
    tokens = prompt(rng.choice(FORKS), rng.choice([1, 2, 3, 3, 4, 5]), world.page_size, rng.randrange(2))
    return tokens, rng.choice([NAMESPACES[0], *NAMESPACES])


def some_deadline(rng: random.Random) -> float:
    return rng.choice([0.0, 0.2])


def some_kind(world: World, rng: random.Random) -> Kind:
    return rng.choice([FULL, *world.kinds])


def some_habits(world: World, rng: random.Random) -> Habits:
    return [rng.choice(HABITS) if rng.random() < 0.5 else HABITS[0] for _ in world.kinds]


def of_a_request(act: Callable[[World, Request, random.Random], None]) -> Step:
    def step(world: World, rng: random.Random) -> bool:
        if world.requests:
            act(world, rng.choice(world.requests), rng)
        return bool(world.requests)

    return step


def of_a_window(act: Callable[[World, Request, Kind, random.Random], None]) -> Step:
    def step(world: World, rng: random.Random) -> bool:
        possible = bool(world.requests and world.kinds)
        if possible:
            act(world, rng.choice(world.requests), rng.choice(list(world.kinds)), rng)
        return possible

    return step


def of_an_operation(act: Callable[[World, int, random.Random], None]) -> Step:
    def step(world: World, rng: random.Random) -> bool:
        possible = bool(world.executor.pending)
        if possible:
            act(world, rng.choice(list(world.executor.pending)), rng)
        return possible

    return step


def compute(world: World, request: Request, rng: random.Random) -> None:
    """A request computes; it may stall when it has the slots of some kinds and not of the others."""
    if request.draft is None:
        more = [1] * rng.randrange(2 * world.page_size + 2)
        world.draft(request, more, some_habits(world, rng))
    world.work(request, some_deadline(rng), stall=rng.choice([9, 9, 9, 9, 0, 1, 2]))


def look_after(world: World, rng: random.Random) -> bool:
    possible = bool(world.fetches)
    if possible:
        world.look_after(rng.choice(world.fetches), cancel=rng.random() < 0.1)
    return possible


def rush(world: World, rng: random.Random) -> None:
    """Several requests for the same prompt arrive at once, and all of them want its host pages."""
    tokens, namespace = some_line(world, rng)
    for _ in range(2):
        world.begin(tokens, namespace)
        world.load_back(world.requests[-1], deadline=0.0)


def duplicate(world: World, rng: random.Random) -> bool:
    possible = bool(world.executor.answers)
    if possible:
        world.executor.duplicate(rng.choice(list(world.executor.answers)))
    return possible


def answer_all(world: World, *kinds: type) -> None:
    """Whatever is pending of these kinds of action ends well, and takes effect."""
    for op in [op for kind in kinds for op in world.running(kind)]:
        world.answer(op, well=True, pages=0)
    world.cache.poll()


def store_all(world: World, rng: random.Random) -> None:
    """More often than not, what is on its way to storage gets there."""
    if rng.random() < 0.7:
        answer_all(world, Copy)
        answer_all(world, Put)


def reload(world: World, rng: random.Random) -> None:
    """A prompt has left device, or one kind of it has, and somebody wants it back."""
    tokens, namespace = some_line(world, rng)
    answer_all(world, Copy)
    world.evict(16, Tier.DEVICE, some_kind(world, rng))
    answer_all(world, Copy)
    world.begin(tokens, namespace)
    world.load_back(world.requests[-1], deadline=0.0)
    if rng.random() < 0.5:
        answer_all(world, Copy)


def fetch_now(world: World, rng: random.Random, tokens: list[int], namespace: str) -> None:
    """A prompt is read from storage without delay, as far as storage still has what it says it holds."""
    world.prefetch(tokens, namespace)
    answer_all(world, Query)
    for op in world.running(Get):
        world.answer(op, rng.random() < 0.8, rng.randrange(8))
    world.cache.poll()
    world.match(tokens, namespace)


def comeback(world: World, rng: random.Random) -> None:
    """Host loses everything, or one kind of it, and device a tail; then it is read again."""
    tokens, namespace = some_line(world, rng)
    kind = FULL if rng.random() < 0.6 else some_kind(world, rng)
    store_all(world, rng)
    world.evict(16, Tier.HOST, kind)
    world.evict(rng.choice([1, 2]), Tier.DEVICE, kind)
    fetch_now(world, rng, tokens, namespace)


def restart(world: World, rng: random.Random) -> None:
    """A new process over the same storage, and somebody asks for what was there before."""
    tokens, namespace = some_line(world, rng)
    store_all(world, rng)
    world.restart()
    fetch_now(world, rng, tokens, namespace)


def evict(world: World, rng: random.Random) -> None:
    tier = rng.choice([Tier.DEVICE, Tier.DEVICE, Tier.DEVICE, Tier.HOST])
    world.evict(rng.choice([1, 2, 4, 9]), tier, some_kind(world, rng), some_deadline(rng))


def poll(world: World, rng: random.Random) -> None:
    world.clock.advance(rng.choice([0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.3, 2.0]))
    world.cache.poll()


STEPS: dict[str, tuple[float, Step]] = {
    "match": (2, lambda w, r: w.match(*some_line(w, r))),
    "begin": (16, lambda w, r: w.begin(*some_line(w, r), r.random() < 0.2)),
    "insert": (6, lambda w, r: w.insert(*some_line(w, r), some_habits(w, r), r.random() < 0.1)),
    "compute": (28, of_a_request(compute)),
    "rush": (3, rush),
    "reload": (4, reload),
    "comeback": (4, comeback),
    "hoard": (1, of_a_request(lambda w, q, r: w.hoard(q, r.randrange(3), some_kind(w, r)))),
    "release window": (4, of_a_window(lambda w, q, k, r: w.release_window(q, k))),
    "copy on write": (3, of_a_window(lambda w, q, k, r: w.copy_on_write(q, k, some_deadline(r)))),
    "load back": (14, of_a_request(lambda w, q, r: w.load_back(q, some_deadline(r)))),
    "stop loading": (1, of_a_request(lambda w, q, r: w.stop_loading(q))),
    "finish": (8, of_a_request(lambda w, q, r: w.finish(q, r.random() < 0.3))),
    "prefetch": (12, lambda w, r: w.prefetch(*some_line(w, r))),
    "look after": (3, look_after),
    "evict": (10, evict),
    "clear": (0.7, lambda w, r: w.clear(r.choice([None, *NAMESPACES]), None)),
    "invalidate": (0.3, lambda w, r: w.clear(None, f"weights {r.random()}")),
    "restart": (0.5, restart),
    "switch storage": (0.3, lambda w, r: w.switch_storage()),
    "succeed": (24, of_an_operation(lambda w, op, r: w.answer(op, True, 0))),
    "fail": (3, of_an_operation(lambda w, op, r: w.answer(op, False, r.randrange(8)))),
    "progress": (2, of_an_operation(lambda w, op, r: w.progress(op, r.randrange(8), r.random() < 0.7))),
    "duplicate": (1, duplicate),
    "poll": (14, poll),
}
"""What can happen, and how often it is tried."""


def live(seed: int, steps: int, count: bool = False) -> tuple[World, int]:
    """One world from `seed`, from its first step to its end, and how many of its steps changed its books
    (0 unless asked to `count`). Each world has its own habits: what is rare in one is common in another."""
    rng = random.Random(seed)
    world = World(**draw_options(rng))
    names = list(STEPS)
    weights = [usual * rng.choice([0.1, 1, 1, 3]) for usual, _ in STEPS.values()]
    moved, pulse = 0, world.pulse() if count else None
    try:
        for _ in range(steps):
            while STEPS[rng.choices(names, weights)[0]][1](world, rng) is False:
                pass
            world.examine()
            if count:
                before, pulse = pulse, world.pulse()
                moved += before != pulse
        world.farewell()
    except BaseException as error:
        error.add_note(f"repeat with: live(seed={seed}, steps={steps})")
        raise
    return world, moved
