"""How fast prompts are run here, by those that were: what says beforehand that a deadline cannot be met."""

from __future__ import annotations

from ..errors import DeadlineExceeded
from .answer import Answer

_WEIGHT = 0.2
_LEAST_TOKENS = 32
"""Shorter prompts say little of what a token takes."""


class Pace:
    """``ms_per_prompt_token``: an average of lately, 0 while nothing was run."""

    def __init__(self) -> None:
        self.ms_per_prompt_token = 0.0

    def add(self, answer: Answer) -> None:
        """What an answer that has ended took."""
        tokens = len(answer.handle.request.prompt) - answer.cached_tokens
        if tokens >= _LEAST_TOKENS and answer.token_times:
            measured = answer.prompt_ms / tokens
            before = self.ms_per_prompt_token or measured
            self.ms_per_prompt_token = before + _WEIGHT * (measured - before)

    def require(self, tokens: int, left: float) -> None:
        """Raise :class:`DeadlineExceeded` where a prompt of so many tokens, alone, takes longer than is ``left``
        (seconds)."""
        needed = tokens * self.ms_per_prompt_token / 1000
        if needed > left:
            raise DeadlineExceeded(
                f"the deadline cannot be met: the prompt alone takes {needed:.2f} s, and {left:.2f} s are left; give "
                "more time, show smaller pictures, or ask to have it begun in any case (late: drop)"
            )
