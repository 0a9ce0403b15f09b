"""The text of an answer up to a stop string, as it grows."""

from __future__ import annotations

from collections.abc import Sequence

from .prompt import Detokenizer

_REPLACEMENT = "\ufffd"


class StopMatcher:
    """Gives out text until one of ``stop_strings`` (none of them empty) is in it, and nothing from there on.

    The stop string that is complete first counts, and of several that end at one character the longest: it does not
    matter in which pieces the text comes. Withheld is what may still become one, and no more. ``matched`` is
    the stop string that was found.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        # One that has another inside, before its end, is never complete first.
        self._stop_strings = [
            each for each in dict.fromkeys(stop_strings) if not any(other in each[:-1] for other in stop_strings)
        ]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What ``text`` makes certain to be no part of a stop string; nothing once there was a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        if first := self._first(text):
            self._held, (begin, self.matched) = "", first
            return text[:begin]
        certain = len(text) - self._withheld(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was withheld; nothing follows it. A second call returns ""."""
        held, self._held = self._held, ""
        return held

    def would_match(self, text: str) -> bool:
        """Whether ``text``, were it to follow, completes a stop string."""
        return self._first(self._held + text) is not None

    def _first(self, text: str) -> tuple[int, str] | None:
        """Where the stop string that is complete first begins in ``text``, and which it is. As none has another inside,
        it also begins first."""
        places = ((text.find(each), each) for each in self._stop_strings)
        return min((place for place in places if place[0] >= 0), default=None)

    def _withheld(self, text: str) -> int:
        """How many characters at the end of ``text`` may be the beginning of a stop string."""
        longest = 0
        for each in self._stop_strings:
            lengths = range(min(len(each) - 1, len(text)), longest, -1)
            longest = next((length for length in lengths if text.endswith(each[:length])), longest)
        return longest


class TextStream:
    """The text of one sequence as its caller reads it: what ``detokenizer`` makes of the tokens, up to the first of
    ``stop_strings``."""

    def __init__(self, detokenizer: Detokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop_strings) if stop_strings else None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched if self._matcher else None

    def push(self, token_id: int) -> str:
        """The text that this token makes certain. The sequence ends here where it completes a :attr:`stop_string`."""
        text = self._detokenizer.push(token_id)
        if self._matcher is None:
            return text
        text = self._matcher.push(text)
        # A newline of a Llama model is a byte token, which is held until its run ends: asking for the next token only
        # to see this one would be a step too many.
        pending = self._detokenizer.pending.partition(_REPLACEMENT)[0]
        if pending and self._matcher.would_match(pending):
            text += self._matcher.push(self._detokenizer.finish())
        return text

    def finish(self) -> str:
        """What was held back; nothing follows it. It may complete a :attr:`stop_string` too."""
        text = self._detokenizer.finish()
        return self._matcher.push(text) + self._matcher.finish() if self._matcher else text
