"""Answers that satisfy a JSON schema: which tokens may come next, by llguidance's parser."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ...errors import BadInput, StepFailed, reason
from ...optional import optional


class SchemaTokens:
    """The tokens of ``tokenizer`` as the parser knows them; an answer ends with one of ``ends``. Making it takes up to
    a second for a large vocabulary."""

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[int]) -> None:
        self._library: Any = optional("llguidance", "an answer by a JSON schema", "serve")
        self._size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._tokens = self._library.LLTokenizer(tokenizer.to_str(), n_vocab=self._size, eos_token=sorted(ends))

    def matcher(self, schema: str) -> SchemaMatcher:
        """For one answer that satisfies ``schema``, JSON; :class:`BadInput` for one that cannot be obeyed."""
        matchers, limits = self._library.LLMatcher, self._library.LLParserLimits(verbose_errors=False)
        try:
            grammar = matchers.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            matcher = matchers(self._tokens, grammar, log_level=0, limits=limits)
        except ValueError as error:
            raise BadInput(f"the JSON schema cannot be obeyed: {reason(error)}") from None
        if matcher.is_error():
            raise BadInput(f"the JSON schema cannot be obeyed: {' '.join(matcher.get_error().split())[:200]}")
        return SchemaMatcher(matcher, self._size)


class SchemaMatcher:
    """Follows one answer; :meth:`allowed` and :meth:`accept` take turns."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def allowed(self) -> npt.NDArray[np.int64]:
        """The ids that may come next, ascending; never none. Raises :class:`StepFailed`."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        ids = np.nonzero(np.unpackbits(mask, bitorder="little")[: self._size])[0]
        if self._matcher.is_error() or not len(ids):
            raise StepFailed("the answer cannot go on by its JSON schema: ask by a simpler one")
        return ids

    def accept(self, token: int) -> None:
        """``token``, which was allowed, comes next."""
        if not self._matcher.consume_token(token):
            raise StepFailed("the answer left its JSON schema: ask by a simpler one")


def check_schema(text: str) -> None:
    """:class:`BadInput` for what is no JSON object, or nested beyond reason."""
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"a JSON schema must be JSON: {reason(error)}") from None
    if not is_object:
        raise BadInput("a JSON schema must be a JSON object")
