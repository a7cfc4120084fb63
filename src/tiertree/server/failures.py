"""What a client is told when something cannot be done, in the form of the official API.

{"error": {"message": …, "type": …, "param": …, "code": …}}
"""

from __future__ import annotations

from typing import Any

RETRY_SECONDS = 1
"""What `Retry-After` says when the server is full or going down."""


class ApiError(Exception):
    """An answer that is an error: HTTP `status`, what is wrong, and the field it is about, if it is one."""

    def __init__(
        self, status: int, message: str, param: str | None = None, *, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def headers(self) -> dict[str, str]:
        """Headers that the answer needs."""
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON. Text that is no UTF-8, as a client may send, is escaped."""
        message = self.message.encode("utf-8", "backslashreplace").decode()
        kind = {429: "rate_limit_error", 404: "not_found_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def refused(param: str, message: str) -> ApiError:
    """400: a field with a value that is not allowed."""
    return ApiError(400, f"{param}: {message}", param, code="invalid_value")


def unsupported(param: str, allowed: str) -> ApiError:
    """400: a field that asks for what this server does not do."""
    return ApiError(400, f"{param}: is not supported; allowed: {allowed}", param, code="unsupported_value")


def overloaded(message: str) -> ApiError:
    """429: come back later."""
    return ApiError(429, message, code="rate_limit_exceeded")


def leaving() -> ApiError:
    """503: the server is going down."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def broken(message: str) -> ApiError:
    """500: the engine failed at this request."""
    return ApiError(500, message, code="engine_error")


def gone() -> ApiError:
    """503: there is no engine any more."""
    return ApiError(503, "the engine has failed; the server must be restarted", code="engine_dead")


def unheard(seconds: float) -> ApiError:
    """503: the engine's thread is at something long."""
    return ApiError(503, f"the engine has not answered within {seconds:g} s", code="busy")


def too_late(seconds: float) -> ApiError:
    """504: the request took longer than any may."""
    return ApiError(504, f"the request was not done within {seconds:g} s", code="timeout")
