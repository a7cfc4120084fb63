"""`tiertree serve`: an OpenAI-compatible HTTP server over the cache."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..types import ConfigError, WritePolicy
from .common import numbers

EXTRA = ("fastapi", "pydantic", "starlette", "transformers", "uvicorn")
"""What the extra `serve` brings."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as the OpenAI API does",
        description="Serve a model of transformers over HTTP, compatible with the OpenAI API: completions "
        "and chat, streaming, with the cached tokens of each tier in `usage`. Prints one line when it takes "
        "requests. SIGTERM or Ctrl-C lets what runs finish and storage have what is on its way to it; a "
        "second one does not wait. There is no authentication. Needs the extra: "
        'pip install "tiertree[serve]".',
    )
    parser.set_defaults(run=_run)
    number = numbers(parser)
    parser.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help="directory of a checkpoint, nothing is downloaded; or a small model with random weights: tiny, "
        "tiny-llama, tiny-gemma3, …",
    )
    _text(
        parser,
        "--served-model-name",
        "NAME",
        None,
        "what it is called in the API (default: the last part of --model)",
    )
    _text(parser, "--host", "ADDRESS", "127.0.0.1", "address to listen at")
    number("--port", "N", 8000, "port to listen at; 0: any free one")
    _text(
        parser, "--device-memory", "SIZE", "256MiB", "memory of the device tier, all kinds of pages together"
    )
    _text(parser, "--host-memory", "SIZE", "1GiB", "memory of the host tier; 0: none")
    _text(parser, "--disk", "DIR", None, "directory of the disk tier (default: none)")
    _text(parser, "--disk-size", "SIZE", "10GiB", "what the disk tier may take")
    number("--page-size", "N", 16, "tokens per page")
    parser.add_argument(
        "--write-policy",
        choices=[str(each) for each in WritePolicy],
        default=str(WritePolicy.WRITE_THROUGH),
        help="when a page goes to host (default: %(default)s)",
    )
    number("--max-running", "N", 16, "requests that compute at the same time")
    number("--max-waiting", "N", 256, "requests that wait; more get status 429")
    number("--chunk-tokens", "N", 1024, "tokens of a prompt that one forward pass computes at most")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)"
    )
    _text(parser, "--torch-device", "DEVICE", "cpu", "where the model computes")
    number("--seed", "N", 0, "of the weights of a tiny model")
    _seconds(parser, "--request-seconds", 600, "how long one request may take")
    _seconds(parser, "--drain-seconds", 30, "how long what runs may take to finish when the server ends")


def _text(parser: argparse.ArgumentParser, name: str, metavar: str, default: str | None, text: str) -> None:
    shown = "" if default is None else " (default: %(default)s)"
    parser.add_argument(name, metavar=metavar, default=default, help=text + shown)


def _seconds(parser: argparse.ArgumentParser, name: str, default: float, text: str) -> None:
    parser.add_argument(
        name, metavar="S", type=_number, default=default, help=f"{text} (default: %(default)s)"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """SIGINT and SIGTERM end the process, with one line and a shell's status, where the server itself does
    not listen to them: while modules and a model are loaded, which may swallow an exception or turn it into
    another. Elsewhere than in the main thread, where signals do not arrive, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> NoReturn:
        word = b"interrupted" if number == signal.SIGINT else b"terminated"
        with contextlib.suppress(OSError):
            os.write(2, b"tiertree serve: " + word + b"\n")
        os._exit(128 + number)

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)


def _run(arguments: argparse.Namespace) -> int:
    with _ends_at_once():
        return _serve(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    _check(arguments)
    try:
        from ..server.load import Options
        from ..server.run import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        print('tiertree serve needs the extra: pip install "tiertree[serve]"', file=sys.stderr)
        return 2
    options = Options(
        model=arguments.model,
        served_model_name=arguments.served_model_name,
        device_memory=arguments.device_memory,
        host_memory=arguments.host_memory,
        disk=arguments.disk,
        disk_size=arguments.disk_size,
        page_size=arguments.page_size,
        write_policy=arguments.write_policy,
        max_running=arguments.max_running,
        max_waiting=arguments.max_waiting,
        chunk_tokens=arguments.chunk_tokens,
        dtype=arguments.dtype,
        torch_device=arguments.torch_device,
        seed=arguments.seed,
    )
    return serve(options, arguments.host, arguments.port, arguments.request_seconds, arguments.drain_seconds)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what is known to be wrong before anything is loaded."""
    for name in ("max_running", "max_waiting", "chunk_tokens", "page_size"):
        if (value := getattr(arguments, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} is not allowed; allowed: at least 1")
    if not 0 <= arguments.port <= 65535:
        raise ConfigError(f"--port: {arguments.port} is not allowed; allowed: 0 to 65535")
    if not 0 < arguments.request_seconds < 1e9:
        raise ConfigError(f"--request-seconds: {arguments.request_seconds} is not allowed; allowed: above 0")
    if not 0 <= arguments.drain_seconds < 1e9:
        raise ConfigError(f"--drain-seconds: {arguments.drain_seconds} is not allowed; allowed: 0 or more")
    if arguments.seed < 0:
        raise ConfigError(f"--seed: {arguments.seed} is not allowed; allowed: 0 or more")
    if arguments.disk is not None and arguments.host_memory == "0":
        raise ConfigError("--disk: pages reach disk through host; allowed: only with --host-memory")
