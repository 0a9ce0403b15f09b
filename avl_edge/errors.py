"""Named errors. Each carries the exit code of the command line and the HTTP status of a service.

A message is one sentence for the person who caused the error: what is wrong and what to do.
"""

from __future__ import annotations


class AvlEdgeError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1
    http_status = 500


class BadInput(AvlEdgeError):
    """An argument, option or prompt that cannot be served as given."""

    exit_code = 2
    http_status = 400


class BadImage(BadInput):
    """A picture that cannot be read, or that is refused before decoding."""

    http_status = 422


class BadModel(BadInput):
    """A model directory that is missing, incomplete, inconsistent or of an unsupported kind."""


class DoesNotFit(AvlEdgeError):
    """The request cannot be served within the memory budget."""

    exit_code = 3
    http_status = 503


class PoolExhausted(AvlEdgeError):
    """The row pool or a lease was asked for more rows than it has: a fault of the caller's accounting."""


class StepFailed(AvlEdgeError):
    """A request whose computation failed; its cause says why. Others go on."""


class DeadlineExceeded(AvlEdgeError):
    """A request whose deadline passed before its answer was complete."""

    http_status = 504


class EngineClosed(AvlEdgeError):
    """A request, or a question about one, for a runtime that was closed."""

    http_status = 503
