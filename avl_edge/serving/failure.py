"""What ends a request before its time, kept for its caller without what the computation held."""

from __future__ import annotations

import copy
from types import FrameType, TracebackType

from ..errors import AvlEdgeError, StepFailed


class Failure:
    """Keeps an error, and gives an exception of its own to each who asks: one that is raised twice would collect the
    traces of both, and one that several requests share those of all.

    The error's trace keeps its lines. What the frames of it held, rows and requests and pixels, is let go: an error is
    kept for as long as its request is, and would otherwise keep these in a circle of references.
    """

    def __init__(self, error: BaseException) -> None:
        _let_go(error)
        self._error = error

    def exception(self) -> AvlEdgeError:
        """An error that this package raises on purpose as it is; any other as the cause of a :class:`StepFailed`."""
        error = self._error
        if isinstance(error, AvlEdgeError):
            own = copy.copy(error)
            own.__cause__ = error.__cause__
            return own.with_traceback(error.__traceback__)
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        failed = StepFailed(f"the request ended with a step that failed: {said}")
        failed.__cause__ = error
        return failed


def _let_go(error: BaseException) -> None:
    """Empty the frames of an error's traces; of its own those that are still running are taken out."""
    error.__traceback__ = _emptied(error.__traceback__)
    chain: list[BaseException | None] = [error.__cause__, error.__context__]
    seen = {id(error)}
    while chain:
        each = chain.pop()
        # Caught by somebody who is still running, it is what that one is about, and not this error's own.
        if each is None or id(each) in seen or _emptied(each.__traceback__) is not each.__traceback__:
            continue
        seen.add(id(each))
        chain += [each.__cause__, each.__context__]


def _emptied(trace: TracebackType | None) -> TracebackType | None:
    """A trace whose frames hold nothing, from the first one that is not running on."""
    while trace is not None and not _empty(trace.tb_frame):
        trace = trace.tb_next
    start = trace
    while trace is not None:
        _empty(trace.tb_frame)
        trace = trace.tb_next
    return start


def _empty(frame: FrameType) -> bool:
    try:
        frame.clear()
    except RuntimeError:
        return False
    return True
