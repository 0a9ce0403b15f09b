"""What a client is told when it does not get an answer, in the shape of OpenAI's errors."""

from __future__ import annotations

import math
from typing import Any

from ..errors import AvlEdgeError, BadInput, Busy, DeadlineExceeded, EngineClosed, TooLarge

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_SOON = 1.0


class Refusal(AvlEdgeError):
    """An answer with a ``status`` of its own; ``param`` is the field that is to blame, ``code`` a word for programs.

    ``retry_after`` seconds are what the client is asked to wait; ``retries`` False tells clients that would send the
    same again not to. ``allowed``: the methods that a path is for, where it is not for the one that was used.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        retries: bool = True,
        allowed: str | None = None,
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.param, self.code, self.retry_after, self.retries = param, code, retry_after, retries
        self.allowed = allowed

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document."""
        usual = "invalid_request_error" if self.http_status < 500 else "server_error"
        kind = _TYPES.get(self.http_status, usual)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What says whether to send the same again, and when."""
        headers = {}
        if not self.retries:
            headers["x-should-retry"] = "false"
        if self.retry_after is not None:
            headers["retry-after"] = str(max(math.ceil(self.retry_after), 1))
            headers["retry-after-ms"] = str(max(math.ceil(1000 * self.retry_after), 1))
        if self.allowed:
            headers["allow"] = self.allowed
        if self.http_status == 401:
            headers["www-authenticate"] = 'Basic realm="avl-edge", charset="UTF-8"'
        return headers


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of ``error``: an error of this package in its own words, any other without any of its own,
    which may quote what is none of the client's business."""
    if isinstance(error, Refusal):
        return error
    if not isinstance(error, AvlEdgeError):
        return Refusal(500, "the service failed at this request; its log says why", code="internal_error")
    status, said = error.http_status, str(error)
    if isinstance(error, DeadlineExceeded):
        return Refusal(status, said, param="avl_edge.deadline_ms", code="deadline_exceeded", retries=False)
    if isinstance(error, TooLarge):
        return Refusal(status, said, code="too_large", retries=False)
    if isinstance(error, Busy):
        return Refusal(status, said, code="busy", retry_after=_SOON)
    if isinstance(error, EngineClosed):
        return Refusal(status, "the service is ending: ask another one", code="closing", retry_after=_SOON)
    if isinstance(error, BadInput):
        return Refusal(status, said, code="invalid_value" if status == 400 else "invalid_image")
    # Its words are for whoever runs the service: a model's file, a step that failed.
    return Refusal(status, "the service failed at this request; its log says why", code="internal_error")
