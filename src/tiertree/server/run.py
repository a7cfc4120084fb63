"""One server from start to end.

bind ─▶ load the model ─▶ open the engine ─▶ accept ══ serve ══▶ signal ─▶ drain ─▶ close
                                                                 new requests: 503
a second signal: out, at once; what storage has acknowledged is safe all the same
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..types import ConfigError
from .app import make_app
from .load import Options, load, open_engine
from .routes import Service
from .worker import Worker

CLOSE_SECONDS = 30.0
"""How long what is on its way to storage may take to get there when the server ends."""
FLUSH_SECONDS = 5
"""How long the last answers may take to reach their clients."""
BACKLOG = 2048
"""Connections that wait to be taken."""
_log = logging.getLogger(__name__)


def serve(options: Options, host: str, port: int, request_seconds: float, drain_seconds: float) -> int:
    """Serve until a signal comes. Returns the exit status: 0, or 1 if the engine had failed. Raises
    ConfigError, StorageError."""
    listener = bind(host, port)
    try:
        model, tokenizer = load(options)
        worker = Worker(lambda: open_engine(model, options))
        worker.start()
        service = Service(
            worker=worker,
            tokenizer=tokenizer,
            name=options.name,
            vocab_size=model.config.get_text_config(decoder=True).vocab_size,
            request_seconds=request_seconds,
        )
        server = Server(service, drain_seconds, lambda: _say_where(listener))
        _quiet()
        try:
            asyncio.run(server.serve([listener]))
        finally:
            worker.stop(0)
            ended = worker.join(CLOSE_SECONDS + FLUSH_SECONDS)
    finally:
        listener.close()
    if not ended:
        _log.critical("the engine does not end")
        sys.stderr.flush()
        os._exit(1)  # a thread inside a forward pass cannot be stopped, and would outlive the interpreter
    return 0 if worker.error is None else 1


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port` (0: any free one) that listens: it is nobody else's while the model is
    loaded, and clients that come by then wait. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"--host, --port: {host}:{port} cannot be used: {error}") from None
    return listener


def _quiet() -> None:
    """What clients do is no news: garbage and hang-ups would let anybody write to stderr, and stop the server
    if nobody reads that. What fails here is logged here."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def _say_where(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        print(
            "tiertree serve: warning: --host: there is no authentication; whoever reaches this address can "
            "use the server",
            file=sys.stderr,
        )
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


class Server(uvicorn.Server):
    """uvicorn, with a shutdown of our own: signals drain the worker first, while requests that come get
    503. `ready` is called once connections are taken."""

    def __init__(self, service: Service, drain_seconds: float, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._worker = service.worker
        self._drain_seconds = drain_seconds
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving = False
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one drains, the second one does not wait for that."""
        if self._signalled or self._loop is None:
            os._exit(128 + sig)
        self._signalled = True
        _log.warning("%s: finishing what runs", signal.Signals(sig).name)
        self._loop.call_soon_threadsafe(self.leave)  # what was interrupted here may hold a lock

    def leave(self) -> None:
        """Drain, then end. From any thread; returns at once. The second time does nothing."""
        if self._leaving:
            return
        self._leaving = True
        self._worker.stop(self._drain_seconds, CLOSE_SECONDS)
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def _drain(self) -> None:
        await asyncio.to_thread(self._worker.join, self._drain_seconds + CLOSE_SECONDS + FLUSH_SECONDS)
        self.should_exit = True
