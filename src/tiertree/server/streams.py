"""HTTP answers that end early when nobody listens any more.

client hangs up ─▶ receive() says so ─▶ the work is cancelled ─▶ its `finally` aborts the requests
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")
BODY_TOKEN_BYTES = 16
"""Bytes of a body per token that a prompt may have: several times what text and token ids need."""
BODY_SPARE_BYTES = 1 << 20
"""Bytes of a body for everything else, such as many short prompts."""


class HungUp(Exception):
    """The client has closed the connection."""


async def hung_up(receive: Receive) -> None:
    """Returns when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises. Cancelled when the client hangs up, which raises HungUp."""
    task, gone = asyncio.create_task(work), asyncio.create_task(hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUp
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, sent as they come. `until` is when, by the loop's clock, it is cut off even though
    the client does not read; `events` is closed in every case."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], until: float, close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._until = until
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            async with asyncio.timeout_at(self._until):
                await unless_hung_up(receive, self._pump(send))
        except (HungUp, TimeoutError):
            return
        finally:
            self._close()

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for each in events:
                await send({"type": "http.response.body", "body": each, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class BodyLimit:
    """Refuses bodies that are too long for prompts of `longest` tokens, with 413, as they come in: what
    reading a body costs is everybody's time."""

    def __init__(self, app: ASGIApp, longest: int) -> None:
        self._app = app
        self._most = BODY_TOKEN_BYTES * longest + BODY_SPARE_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, counting."""
        had = 0

        async def counting() -> Message:
            nonlocal had
            message = await receive()
            had += len(message.get("body", b""))
            if had > self._most:
                raise HTTPException(413, f"the body is too long; allowed: {self._most} bytes")
            return message

        await self._app(scope, counting, send)
