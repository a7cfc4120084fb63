"""The routes.

POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /stats
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from .answers import ChatForm, Envelope, Form, TextForm
from .asked import Asked, Chat, Completion, invalid
from .failures import ApiError, unheard
from .routes import Exchange, Service
from .streams import BodyLimit, EventStream, HungUp, unless_hung_up
from .worker import Health

GRACE_SECONDS = 5.0
"""How long a stream that is past its deadline may take to say so."""
STATS_SECONDS = 30.0
"""How long `/stats` waits for the engine's thread, which may be in a long forward pass."""
SALT_HEADER = "x-cache-salt"
_log = logging.getLogger(__name__)


def make_app(service: Service) -> FastAPI:
    """The application. Its worker is started and stopped elsewhere."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(BodyLimit, longest=service.worker.longest)
    _errors(app)
    _questions(app, service)

    @app.post("/v1/completions")
    async def completions(asked: Completion, http: Request) -> Response:
        exchange = await service.of_completion(asked, http.headers.get(SALT_HEADER))
        return await _answer(service, http, asked, exchange, TextForm(bool(asked.stream)))

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, http: Request) -> Response:
        exchange = await service.of_chat(asked, http.headers.get(SALT_HEADER))
        return await _answer(service, http, asked, exchange, ChatForm(bool(asked.stream)))

    return app


async def _answer(service: Service, http: Request, asked: Asked, exchange: Exchange, form: Form) -> Response:
    envelope = Envelope(form, service.name, asked.wants_usage)
    if form.streaming:
        await exchange.submit()
        return EventStream(exchange.events(envelope), exchange.until + GRACE_SECONDS, exchange.close)
    try:
        return JSONResponse(await unless_hung_up(http.receive, exchange.whole(envelope)))
    except HungUp:
        return Response(status_code=499)


def _questions(app: FastAPI, service: Service) -> None:
    """What can be asked about the server itself."""
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "tiertree"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"there is only {service.name!r} here", "model", code="model_not_found")
        return model

    @app.get("/health")
    async def health() -> Response:
        found = service.worker.health
        return JSONResponse({"status": str(found)}, 200 if found is Health.OK else 503)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        try:
            async with asyncio.timeout(STATS_SECONDS):
                return await service.worker.stats()
        except TimeoutError:
            raise unheard(STATS_SECONDS) from None


def _errors(app: FastAPI) -> None:
    """Every error has the API's form."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def misread(_: Request, error: RequestValidationError) -> Response:
        return await refused(_, invalid(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        return await refused(_, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        _log.error("a request has failed", exc_info=error)
        return await refused(_, ApiError(500, f"the server failed: {type(error).__name__}"))
