"""The description of the service as OpenAPI 3.1, whose requests are the types of :mod:`.wire`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from .wire import ChatRequest

_REFERENCE = "#/components/schemas/{model}"
_STATUSES = {
    400: "a field that cannot be served, by its name",
    401: "no API key of this service",
    403: "a Host header of another host",
    404: "no such model, picture or path",
    408: "the body came too slowly",
    413: "more than fits, ever",
    415: "a body that is no JSON by its type",
    422: "a picture that cannot be read",
    429: "too many are on their way: Retry-After says when to ask again",
    500: "the service's fault; its log says why",
    503: "not ready, ending, or no memory now",
    504: "the deadline passed",
}


@cache
def openapi() -> dict[str, Any]:
    """The document."""
    _, schemas = models_json_schema([(ChatRequest, "validation")], ref_template=_REFERENCE)
    return {
        "openapi": "3.1.0",
        "info": {"title": "avl-edge", "version": version("avl-edge"), "description": __doc__.split("\n")[0]},
        "paths": _paths(),
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _paths() -> dict[str, Any]:
    chat = {"$ref": _REFERENCE.format(model="ChatRequest")}
    answer = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
    found = {"type": "object"}
    by_name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/chat/completions": {
            "post": {
                "operationId": "chat",
                "summary": "An answer, whole or as server-sent events.",
                "requestBody": {"required": True, "content": {"application/json": {"schema": chat}}},
                "responses": {"200": {"description": "the answer", "content": answer}, **_refusals(*_STATUSES)},
            }
        },
        "/v1/models": _get("models", "The model, by each of its names.", found),
        "/v1/models/{name}": _get("model", "One name of the model.", found, by_name, also=(404,)),
        "/health": _get("health", "Whether the process is alive.", found),
        "/health/ready": _get("ready", "Whether the model is loaded and warm.", found, also=(503,)),
        "/metrics": _get("metrics", "Counts for Prometheus.", {"type": "string"}, kind="text/plain"),
        "/openapi.json": _get("description", "This document.", found),
    }


def _get(
    name: str,
    summary: str,
    schema: dict[str, Any],
    *parameters: dict[str, Any],
    kind: str = "application/json",
    also: tuple[int, ...] = (),
) -> dict[str, Any]:
    responses = {"200": {"description": "it", "content": {kind: {"schema": schema}}}, **_refusals(401, 403, *also)}
    return {"get": {"operationId": name, "summary": summary, "parameters": list(parameters), "responses": responses}}


def _refusals(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    return {str(each): {"description": _STATUSES[each], "content": content} for each in statuses}


_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
