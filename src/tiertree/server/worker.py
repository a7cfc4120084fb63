"""The one thread that owns the engine and its cache.

    event loop                              worker thread
    submit, abort, stats ──commands──▶  obey · step · deliver · wait   …until it is told to stop
    Ticket.updates  ◀──call_soon_threadsafe, once per step──┘

A step that raises is logged and fails the requests that it was computing, or everybody if it cannot say whom.
After several of the latter in a row, or when the books of the cache are wrong, the thread ends: everybody is
told, nobody waits for it.
Whatever is submitted ends with exactly one `Update` that has a `finish`, unless it is aborted first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from ..cache import PrefixCache
from ..engines.request import NOTHING_CACHED, Cached, Finish, Limits, Overloaded, Reply, Request
from ..types import InvariantViolated, TiertreeError
from .failures import ApiError, broken, gone, leaving, overloaded

FAILURES_MAX = 3
"""Steps in a row that may fail without saying at whose request before the engine is given up."""
BUSY_SECONDS = 0.05
"""How long the thread sleeps at most while requests are open and there is nothing to compute."""
IDLE_SECONDS = 1.0
"""How long it sleeps at most while there are none."""
_log = logging.getLogger(__name__)


class Served(Protocol):
    """What the worker needs of an engine. All of it is called in the worker's thread."""

    cache: PrefixCache
    limits: Limits
    idle: bool
    """Whether the last step had nothing to compute."""

    @property
    def busy(self) -> bool:
        """Whether anybody waits or runs."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        ...

    @property
    def running(self) -> int:
        """Requests that compute."""
        ...

    def submit(self, request: Request) -> Reply:
        """Take a request. Raises InvalidRequest, Overloaded."""
        ...

    def step(self) -> list[Reply]:
        """One round."""
        ...

    def abort(self, reply: Reply) -> None:
        """End a reply."""
        ...

    def wait(self, seconds: float) -> None:
        """Sleep until something has come home, `cache.wake()`, or for `seconds`."""
        ...

    def close(self, deadline_s: float = 10.0) -> object:
        """Let everything go, close the cache."""
        ...


class Update(NamedTuple):
    """What a step has added to one answer; `number` counts those handed in together."""

    number: int
    tokens: tuple[int, ...]
    finish: Finish | None
    error: str | None
    cached: Cached


@dataclass(slots=True, eq=False)
class Ticket:
    """One request as the event loop sees it; `updates` is that of all handed in together."""

    number: int
    updates: asyncio.Queue[Update]


class Health(StrEnum):
    """How the worker is."""

    OK = "ok"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True, eq=False)
class _Open:
    ticket: Ticket
    reply: Reply
    sent: int = 0


class _Command(NamedTuple):
    """What to do in the thread, and what to say when there is no thread any more."""

    do: Callable[[Served], None]
    refuse: Callable[[], None]


class Worker:
    """Runs the engine that `make` opens. `start` it, use it from one event loop, `stop` and `join` it."""

    def __init__(self, make: Callable[[], Served], clock: Callable[[], float] = time.monotonic) -> None:
        self._make = make
        self._clock = clock
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._open: dict[Reply, _Open] = {}
        self._by_ticket: dict[Ticket, _Open] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._cache: PrefixCache | None = None
        self.longest = 0
        """Tokens that a prompt and its answer may have together."""
        self.requests_max = 0
        """Requests that can be handed in at once."""
        self._stop_at: float | None = None
        self._close_seconds = 10.0
        self._dead = False
        self._draining = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tiertree-engine", daemon=True)

    # -- from outside ------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the engine; returns when it is, or raises why it could not be."""
        self._thread.start()
        self._ready.wait()
        if self.error is not None:
            raise self.error

    @property
    def health(self) -> Health:
        """From any thread."""
        if self._draining and self.error is None:
            return Health.DRAINING
        return Health.DEAD if self._dead else Health.OK

    async def submit(self, requests: Sequence[Request]) -> list[Ticket]:
        """Hand in `requests`, all or none. Raises ApiError: 400, 429, 503. Who is cancelled in here leaves
        nothing behind."""
        if self._draining:
            raise leaving()
        updates: asyncio.Queue[Update] = asyncio.Queue()
        tickets = [Ticket(number, updates) for number in range(len(requests))]
        try:
            await self._ask(lambda engine: self._submit(engine, requests, tickets))
        except asyncio.CancelledError:
            self.abort(tickets)
            raise
        return tickets

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """Nobody wants these any more. From the event loop; does nothing for those that have ended."""
        self._put(_Command(lambda engine: self._abort(engine, tickets), lambda: None))

    async def stats(self) -> dict[str, Any]:
        """Statistics of the cache, and how many requests wait and run. Raises ApiError 503."""
        found: dict[str, Any] = await self._ask(_stats)
        return found

    def stop(self, drain_seconds: float, close_seconds: float = 10.0) -> None:
        """Take nothing new; let what is open finish for `drain_seconds`, abort the rest, and close the cache
        when what is on its way to storage has got there, for at most `close_seconds`. Returns at once.
        From any thread."""
        self._draining = True
        self._close_seconds = close_seconds
        until = self._clock() + drain_seconds

        def stop(engine: Served) -> None:
            self._stop_at = until

        self._put(_Command(stop, lambda: None))

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end, for at most `seconds`. Returns whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def _ask(self, question: Callable[[Served], Any]) -> Any:
        """What `question` returns in the thread."""
        loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def answer(engine: Served) -> None:
            try:
                self._post(_settle, future, question(engine), None)
            except Exception as error:
                self._post(_settle, future, None, _as_api_error(error))

        self._put(_Command(answer, lambda: self._post(_settle, future, None, self._why_not())))
        return await future

    def _put(self, command: _Command) -> None:
        """A thread that ends marks itself dead, then refuses what is in the queue: one of the two sees it."""
        self._commands.put(command)
        if self._dead:
            self._refuse_all()
        elif self._cache is not None:
            self._cache.wake()

    def _why_not(self) -> ApiError:
        return gone() if self.error is not None else leaving()

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Let the event loop call. One that is closed has nobody left who would listen."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call, *arguments)

    # -- in the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self._make()
        except BaseException as error:
            self.error, self._dead = error, True
            self._ready.set()
            return
        config, limits = engine.cache.config, engine.limits
        self.longest = min(limits.max_tokens, config.device_pages * config.page_size)
        self.requests_max = limits.max_waiting
        self._cache = engine.cache
        self._ready.set()
        try:
            self._serve(engine)
            self._end_all(Finish.ABORT, None)
            engine.close(self._close_seconds)
        except BaseException as error:
            self.error = error
            _log.critical("the engine has failed and serves no more", exc_info=error)
        finally:
            self._dead = True
            self._end_all(Finish.ERROR, "the engine has failed")
            self._refuse_all()

    def _serve(self, engine: Served) -> None:
        """Until told to stop, and nothing is open or the time for it is over."""
        failures = 0
        while True:
            self._obey(engine)
            if self._stop_at is not None and (
                self._clock() >= self._stop_at or not (self._open or engine.busy)
            ):
                return
            try:
                self._deliver(engine.step())
                failures = 0
            except InvariantViolated:
                raise
            except Exception as error:
                failures = 0 if self._failed(engine, error) else failures + 1
                if failures >= FAILURES_MAX:
                    raise
            if self._commands.empty() and engine.idle:
                engine.wait(BUSY_SECONDS if engine.busy else IDLE_SECONDS)

    def _failed(self, engine: Served, error: Exception) -> bool:
        """Tell those whose requests a step has failed at; everybody, if it has ended none. Returns whether
        it had ended any."""
        ended = sum(each.finish is Finish.ERROR for each in self._open)
        _log.error("a step has failed at %s requests", ended or "unknown", exc_info=error)
        self._deliver(list(self._open))
        if not ended:
            for each in list(self._open):
                engine.abort(each)
            self._end_all(Finish.ERROR, f"the engine failed: {type(error).__name__}")
        return ended > 0

    def _obey(self, engine: Served) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command.do(engine)

    def _refuse_all(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command.refuse()

    def _submit(self, engine: Served, requests: Sequence[Request], tickets: Sequence[Ticket]) -> None:
        taken: list[Reply] = []
        try:
            taken.extend(map(engine.submit, requests))
        except BaseException:
            for reply in taken:
                engine.abort(reply)
            raise
        for reply, ticket in zip(taken, tickets, strict=True):
            self._open[reply] = self._by_ticket[ticket] = _Open(ticket, reply)

    def _abort(self, engine: Served, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if (each := self._by_ticket.pop(ticket, None)) is not None:
                del self._open[each.reply]
                engine.abort(each.reply)

    def _deliver(self, changed: Sequence[Reply]) -> None:
        """Tell the event loop what is new, in one call."""
        news: list[tuple[Ticket, Update]] = []
        for reply in changed:
            if (each := self._open.get(reply)) is None:
                continue
            new = tuple(reply.tokens[each.sent :])
            each.sent += len(new)
            if new or reply.finish is not None:
                news.append(
                    (each.ticket, Update(each.ticket.number, new, reply.finish, reply.error, reply.cached))
                )
            if reply.finish is not None:
                del self._open[reply], self._by_ticket[each.ticket]
        if news:
            self._post(_hand_out, news)

    def _end_all(self, finish: Finish, error: str | None) -> None:
        tickets = [each.ticket for each in self._open.values()]
        news = [(each, Update(each.number, (), finish, error, NOTHING_CACHED)) for each in tickets]
        self._open.clear()
        self._by_ticket.clear()
        if news:
            self._post(_hand_out, news)


def _hand_out(news: Sequence[tuple[Ticket, Update]]) -> None:
    for ticket, update in news:
        ticket.updates.put_nowait(update)


def _settle(future: asyncio.Future[Any], value: Any, error: ApiError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _as_api_error(error: Exception) -> ApiError:
    """A refusal in the API's words. What is wrong with a value is the client's doing, the rest is ours."""
    if isinstance(error, Overloaded):
        return overloaded(str(error))
    if isinstance(error, TiertreeError) and isinstance(error, ValueError):
        return ApiError(400, str(error), code="invalid_request")
    _log.error("the engine could not do what was asked", exc_info=error)
    return broken(f"the engine failed: {type(error).__name__}")


def _stats(engine: Served) -> dict[str, Any]:
    return {
        "waiting": engine.waiting,
        "running": engine.running,
        "cache": engine.cache.stats().as_dict(),
    }
