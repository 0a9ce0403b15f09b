"""Errors: whose fault they are, how long their messages may be, and that ``python -O`` takes no guard away."""

from __future__ import annotations

import subprocess
import sys

import pytest

import avl_edge
from avl_edge import AvlEdgeError, BadImage, BadInput, BadModel, Busy, DoesNotFit, TooLarge
from avl_edge.errors import MESSAGE_LENGTH, PoolExhausted, quoted, reason, refusing, shortened
from tests import ROOT


@pytest.mark.parametrize(
    ("kind", "exit_code", "http_status"),
    [
        (BadInput, 2, 400),
        (BadImage, 2, 422),
        (BadModel, 2, 500),  # who runs the server chose the model; its clients did not
        (DoesNotFit, 3, 503),
        (TooLarge, 3, 413),
        (Busy, 3, 503),
        (PoolExhausted, 1, 500),
    ],
)
def test_exit_codes_and_statuses(kind: type[AvlEdgeError], exit_code: int, http_status: int) -> None:
    error = kind("why")
    assert (error.exit_code, error.http_status, str(error)) == (exit_code, http_status, "why")


def test_a_model_is_not_the_callers_input() -> None:
    assert not issubclass(BadModel, BadInput)
    assert issubclass(TooLarge, DoesNotFit)
    assert issubclass(Busy, DoesNotFit)
    assert {"BadModel", "Busy", "TooLarge"} <= set(avl_edge.__all__)


def test_messages_are_bounded_and_keep_their_end() -> None:
    for kind in (AvlEdgeError, BadInput, BadImage, BadModel, TooLarge, Busy):
        message = str(kind(f"{'x' * 10**6} cannot be read: copy the checkpoint again"))
        assert len(message) <= MESSAGE_LENGTH
        assert message.startswith("xxx")
        assert message.endswith(" cannot be read: copy the checkpoint again")
    assert shortened("x" * 60, 60) == "x" * 60
    assert len(shortened("x" * 61, 60)) == 60


def test_what_is_quoted_is_short_before_it_is_written() -> None:
    nested: list[object] = [1]
    for _ in range(60):  # written out it would have 2^60 parts
        nested = [nested, nested]
    for value in (nested, "x" * 10**7, {i: i for i in range(10**5)}, b"x" * 10**6, 10**4000):
        assert len(quoted(value)) <= 60
    assert quoted(1 << 10**6) == "a number of 1000001 bits"
    assert quoted("int9") == "'int9'"
    assert reason(ValueError("one\n two <object at 0x7f0012345678>  three")) == "one two the data three"
    assert len(reason(ValueError("<" * 10**6))) <= 200


class PanicException(BaseException):
    """As PyO3 raises a Rust panic."""


def test_only_what_libraries_raise_becomes_a_refusal() -> None:
    def becomes(error: BaseException) -> BaseException:
        with pytest.raises(BaseException) as caught, refusing(lambda why: BadModel(f"broken ({why})")):  # noqa: PT011
            raise error
        return caught.value

    for error in (ValueError("why"), RecursionError("why"), SystemError("why"), PanicException("why")):
        assert isinstance(becomes(error), BadModel)
        assert str(becomes(error)) == "broken (why)"
    assert isinstance(becomes(MemoryError()), Busy)
    for error in (BadImage("ours"), KeyboardInterrupt(), SystemExit(3)):
        assert becomes(error) is error


def test_optimized_python_takes_no_guard_away() -> None:
    """pytest rewrites the asserts of tests, so these hold under ``-O``; those of the package are gone. Without the
    conftest, and so without torch."""
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"]
    command += ["-k", "refused or guard", "tests/kv/test_guards.py", "tests/model/test_image_bounds.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
