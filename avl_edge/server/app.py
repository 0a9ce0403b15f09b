"""The paths of the service."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from .access import Keys, Receive
from .chat import ChatCompletions
from .frame import Application, Frame, Scope, Send
from .monitor import look
from .openapi import openapi
from .refusals import Refusal
from .service import Service

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def application(service: Service, keys: Keys, connections: Callable[[], int] = lambda: 0) -> Application:
    """Everything that ``service`` answers over HTTP, to those who have one of ``keys``. ``connections`` counts the open
    ones."""
    started = int(time.time())

    async def models(request: Request) -> Response:  # noqa: ARG001
        return JSONResponse({"object": "list", "data": [_model(service, name, started) for name in service.names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.names:
            raise Refusal(404, f"there is no model {name[:100]!r} here", param="model", code="model_not_found")
        return JSONResponse(_model(service, name, started))

    async def health(request: Request) -> Response:  # noqa: ARG001
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:  # noqa: ARG001
        service.require_ready()
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:  # noqa: ARG001
        now = await service.in_thread(lambda: look(service, connections()))
        return Response(service.metrics.page(now), media_type=_TEXT)

    async def description(request: Request) -> Response:  # noqa: ARG001
        return JSONResponse(openapi())

    chat = ChatCompletions(service)

    async def completions(request: Request) -> Response:
        return await chat(request)

    routes = [
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", description),
    ]
    router = Router(routes, redirect_slashes=False)

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # whose presence has the router raise what it would answer as plain text
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            raise _nothing_here(scope, error) from None

    return Frame(inside, service.settings, keys, service.metrics)


def _model(service: Service, name: str, started: int) -> dict[str, Any]:
    context = service.runtime.spec.text.context
    return {"id": name, "object": "model", "created": started, "owned_by": "avl-edge", "max_model_len": context}


def _nothing_here(scope: Scope, error: HTTPException) -> Refusal:
    said = f"there is nothing at {scope['path'][:100]}"
    if error.status_code == 405:
        said = f"{scope['path']} is not for {scope['method'][:20]}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    allowed = (error.headers or {}).get("Allow")
    return Refusal(error.status_code, said, code=code, retries=False, allowed=allowed)
