"""Closed-loop clients: a user says the next thing as soon as the answer before it is complete.

ready ──at most `parallel` in flight──▶ submit ─▶ step … step ─▶ answered ─▶ ready, for the next turn
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..engines.request import Finish, Reply, Request
from ..types import TiertreeError
from .course import Course, Served
from .workload import Workload

IDLE_SECONDS = 0.05
"""How long clients sleep at most while the engine has nothing to do."""

Namespace = Callable[[int, int], str]
"""The namespace of a user's (from 0) request at a turn (from 1)."""
Watch = Callable[[Course, int], None]
"""Told after every step: the course so far, and how many requests are in flight."""


class ConversationFailed(TiertreeError):
    """A request ended without the answer; the message says whose and why."""


class Serving(Protocol):
    """What clients ask of an engine."""

    idle: bool
    """Whether the last step found nothing to do."""

    def submit(self, request: Request) -> Reply:
        """Take a request on."""
        ...

    def step(self) -> list[Reply]:
        """Go on a little. Returns the replies that got tokens or ended."""
        ...

    def wait(self, seconds: float) -> None:
        """Sleep until there may be something to do, for `seconds` at most."""
        ...


def together(user: int, turn: int) -> str:
    """Everybody shares."""
    return ""


def apart(user: int, turn: int) -> str:
    """Nobody shares, not even a user with himself: every prompt is computed from its first token."""
    return f"user {user} turn {turn}"


def alone(user: int, turn: int) -> str:
    """Each user shares with himself only."""
    return f"user {user}"


def converse(
    workload: Workload,
    engine: Serving,
    *,
    parallel: int | None = None,
    namespace: Namespace = together,
    watch: Watch | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Course:
    """Have all conversations of `workload` with `engine`, greedily sampled, at most `parallel` of them in
    flight at a time (None: all); whoever has waited longest goes first. Raises ConversationFailed when a
    request ends in any other way than by its length; the others are then still in the engine."""
    ready = deque(range(workload.users))
    answers: list[list[list[int]]] = [[] for _ in ready]
    running: dict[Reply, int] = {}
    most = workload.users if parallel is None else parallel
    course, begin = Course(), clock()
    while ready or running:
        while ready and len(running) < most:
            user = ready.popleft()
            request = Request(
                tokens=workload.prompt(user, answers[user]),
                max_new_tokens=workload.answer_tokens,
                namespace=namespace(user, len(answers[user]) + 1),
            )
            running[engine.submit(request)] = user
        for reply in engine.step():
            if reply.finish is not None:
                user = running.pop(reply)
                answers[user].append(reply.tokens)
                course.served.append(_served(reply, user, len(answers[user])))
                if len(answers[user]) < workload.turns:
                    ready.append(user)
        course.seconds = clock() - begin
        if watch is not None:
            watch(course, len(running))
        if engine.idle and running:
            engine.wait(IDLE_SECONDS)
    return course


def _served(reply: Reply, user: int, turn: int) -> Served:
    if reply.finish is not Finish.LENGTH or reply.ttft is None or reply.finished is None:
        why = f": {reply.error}" if reply.error else ""
        raise ConversationFailed(f"user {user + 1}, turn {turn}: ended by {reply.finish}{why}")
    return Served(
        user=user,
        turn=turn,
        ttft=reply.ttft,
        seconds=reply.finished - reply.arrived,
        prompt_tokens=len(reply.request.tokens),
        cached=reply.cached,
        answer=tuple(reply.tokens),
    )
