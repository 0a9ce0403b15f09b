"""Token ids back to text, one at a time."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer

from ...errors import BadModel, refusing

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one sequence as it grows. What was given out is final: the concatenation of everything that `push`
    and `finish` return is the tokenizer's decoding of all ids, special tokens skipped.

    Text is held back while its last character is incomplete, and, with byte-fallback tokens (``<0xE4>``), until
    the run of such tokens ends: a single invalid byte turns every byte of its run into a replacement character, so
    that no text of the run is final before. (This is also why a stream that gives out each valid prefix, as
    `tokenizers.decoders.DecodeStream` does, fails on such runs.)

    Each step decodes a short window: the ids of the last text given out, as context for the spaces between words,
    and those since.
    """

    def __init__(self, tokenizer: Tokenizer, special_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(special_token_ids)
        byte_tokens = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte_tokens = frozenset(i for i in byte_tokens if i is not None)
        self._context: list[int] = []
        self._context_length = 0
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token makes final; "" for special tokens and while it may still change."""
        if token_id in self._special:
            return ""  # skipped in decoding, so it does not even end a run of byte tokens
        self._new.append(token_id)
        if token_id in self._byte_tokens:
            return ""
        text = self._decode(self._context + self._new)
        if len(text) <= self._context_length or text.endswith(_REPLACEMENT):
            return ""
        return self._give_out(text)

    def finish(self) -> str:
        """What was held back; nothing follows it. A second call returns ""."""
        return self._give_out(self._decode(self._context + self._new)) if self._new else ""

    @property
    def pending(self) -> str:
        """What :meth:`finish` would return now."""
        return self._decode(self._context + self._new)[self._context_length :] if self._new else ""

    def _give_out(self, text: str) -> str:
        final = text[self._context_length :]
        self._context, self._new = self._new, []
        self._context_length = len(self._decode(self._context))
        return final

    def _decode(self, ids: list[int]) -> str:
        with refusing(lambda reason: BadModel(f"the model's tokenizer failed: {reason}")):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
