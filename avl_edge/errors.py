"""Named errors. Each carries the exit code of the command line and the HTTP status of a service.

A message is one sentence for the person who caused the error: what is wrong and what to do. However long what it
quotes is, it has at most :data:`MESSAGE_LENGTH` characters.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MESSAGE_LENGTH = 1500
_REASON_LENGTH = 200


class AvlEdgeError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message, MESSAGE_LENGTH))


class BadInput(AvlEdgeError):
    """An argument, option or prompt that cannot be served as given."""

    exit_code = 2
    http_status = 400


class BadImage(BadInput):
    """A picture that cannot be read, or that is refused before decoding."""

    http_status = 422


class BadModel(AvlEdgeError):
    """A model directory that is missing, incomplete, inconsistent or of an unsupported kind. Who runs the program
    chose it: to a client of a service it is the server's fault."""

    exit_code = 2


class DoesNotFit(AvlEdgeError):
    """What was asked for needs more than there is: :class:`TooLarge` or :class:`Busy`."""

    exit_code = 3
    http_status = 503


class TooLarge(DoesNotFit):
    """It never fits: it is more than the model's context, its budget, the pool or the device holds. ``smallest``: the
    least budget that would do, in bytes, where that is why."""

    http_status = 413
    smallest: int | None = None


class Busy(DoesNotFit):
    """It does not fit now: what others hold has to be given back first."""


class InvalidLogits(AvlEdgeError):
    """The model gave NaN or infinite logits, from which no token can be chosen."""

    exit_code = 2
    http_status = 500


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


@contextmanager
def refusing(refusal: Callable[[str], AvlEdgeError]) -> Iterator[None]:
    """Where a library reads foreign data: what it raises becomes ``refusal`` of the reason, which is one short line.

    A panic of a library in Rust is no :class:`Exception` (PyO3 derives it from BaseException), and is caught too; what
    Rust itself prints on stderr meanwhile cannot be held back. Without memory it is :class:`Busy`. Errors of this
    package, interrupts and exits pass.
    """
    try:
        yield
    except AvlEdgeError:
        raise
    except MemoryError as error:
        raise Busy(f"there is not enough memory now ({refusal(reason(error))})") from None
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal(reason(error)) from None


def reason(error: BaseException) -> str:
    """The error's text on one line of at most 200 characters, without the names and addresses of Python objects."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    text = re.sub(r"<[^<>]{0,200}\b0x[0-9a-fA-F]{1,32}[^<>]{0,200}>", "the data", shortened(text, 2 * _REASON_LENGTH))
    return " ".join(re.sub(r"0x[0-9a-fA-F]{6,}", "", text).split())[:_REASON_LENGTH]


def quoted(value: object) -> str:
    """``repr(value)`` for a message: what is long or nested is cut before it is written, to about 60 characters."""
    try:
        return shortened(_REPR.repr(value), 60)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__


def shortened(text: str, length: int) -> str:
    """``text`` with its middle left out where it is longer than ``length`` characters: messages end with what to do."""
    if len(text) <= length:
        return text
    head = length * 2 // 3
    return f"{text[: head - 5]} ... {text[head - length :]}"


_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
