"""The tokenizer of a model directory, loaded as transformers loads it for LLaVA, and checked against the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from ...errors import BadInput, BadModel, refusing
from ...files import TOKENIZER_BYTES, read_json, read_text
from .own_words import NOTHING, Escaped, RenamedTokenizer, ReservedWords


@dataclass(frozen=True)
class TextTokenizer:
    """``named`` holds the special tokens by name (bos_token, ...); ``special`` the text of every special token by id;
    ``also_reserved``: what else no person may write but as text.

    A named token that the vocabulary lacks has no id, and stands in ``named`` only.
    """

    tokenizer: Tokenizer
    named: Mapping[str, str]
    special: Mapping[int, str]
    also_reserved: frozenset[str] = frozenset()

    @classmethod
    def open(cls, directory: Path, vocab_size: int) -> TextTokenizer:
        """Raises BadModel if tokenizer.json is missing or broken, or has ids of ``vocab_size`` and more."""
        tokenizer = _load(directory / "tokenizer.json")
        config = read_json(directory / "tokenizer_config.json") or {}
        named = _named_tokens(directory, config)
        settings = directory / "tokenizer_config.json"
        with refusing(lambda reason: BadModel(f"{settings} describes its tokens wrongly: {reason}")):
            _add_tokens(tokenizer, config, named)
        _check_ids(tokenizer, vocab_size, directory)
        special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        return cls(tokenizer, named, special)

    @cached_property
    def reserved(self) -> ReservedWords:
        """What a person cannot write but as plain text."""
        return ReservedWords((*self.special.values(), *self.named.values(), *self.also_reserved))

    @cached_property
    def _renamed(self) -> RenamedTokenizer:
        return RenamedTokenizer(self.tokenizer, self.reserved.tokens)

    def encode(self, text: str, escaped: Escaped = NOTHING) -> tuple[int, ...]:
        """Token ids of a whole prompt, made of ``escaped`` texts: what special tokens these spell is text. What the
        tokenizer adds around a text is left out if BOS is there already.

        Raises BadModel where the tokenizer fails.
        """
        bos = self.named.get("bos_token")
        adds = not (bos is not None and text.startswith(bos))
        spelled = self.reserved.count(text)
        with refusing(lambda reason: BadModel(f"the model's tokenizer failed: {reason}")):
            if not escaped.spelled:
                encoding = self.tokenizer.encode(text, add_special_tokens=adds)
                # A normalizer may turn other spellings into a special token.
                if not self._surplus(encoding, spelled):
                    return tuple(encoding.ids)
            named = escaped.restore(self.reserved.replace(text, self._renamed.names))
            encoding = self._renamed.tokenizer.encode(named, add_special_tokens=adds)
        surplus = self._surplus(encoding, spelled)
        if surplus:
            raise BadInput(f"the prompt contains {surplus}, which the model reserves for itself: remove it")
        return tuple(encoding.ids)

    def _surplus(self, encoding: Encoding, spelled: Counter[str]) -> str | None:
        """A special token that came out more often than it was ``spelled``."""
        added = encoding.special_tokens_mask
        own = (i for i, is_added in zip(encoding.ids, added, strict=True) if i in self.special and not is_added)
        came_out = Counter(self.special[i] for i in own)
        # The unknown token is what any unknown character becomes.
        return next((each for each in came_out - spelled if each != self.named.get("unk_token")), None)

    def token_text(self, token_id: int) -> str:
        """A single token as it reads in a text: with its space, a special one by its name, part of a character as the
        replacement character."""
        if token_id in self.special:
            return self.special[token_id]
        name = self.tokenizer.id_to_token(token_id) or ""
        if "\u2581" in name:  # SentencePiece's space, of which a decoder drops the first
            return name.replace("\u2581", " ")
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))


def _load(path: Path) -> Tokenizer:
    text = read_text(path, TOKENIZER_BYTES)
    if text is None:
        raise BadModel(f"{path} is missing: download the model's tokenizer.json")
    with refusing(lambda reason: BadModel(f"{path} is broken ({reason}): download it again")):
        tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _named_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    named = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= {key: _content(value) for key, value in extra.items()}
    if "added_tokens_decoder" not in config:  # only older models keep their special tokens apart
        legacy = read_json(directory / "special_tokens_map.json") or {}
        named |= {key: _content(value) for key, value in legacy.items() if key.endswith("_token")}
    return {key: token for key, token in named.items() if token is not None}


def _content(value: Any) -> str | None:
    """The text of a token that is written as a string or as an object with flags; None for anything else."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens and flags that tokenizer_config.json has beyond tokenizer.json, in the order of transformers.

    A named token outside of the vocabulary is not given an id: the model has no embedding for it.
    """
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    described = sorted((int(i), AddedToken(**flags)) for i, flags in config.get("added_tokens_decoder", {}).items())
    tokens = [token for _, token in described if repr(token) not in known]
    present = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *tokens)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = [token for value in extra if (token := _content(value))] if isinstance(extra, list) else []
    for text in dict.fromkeys((*named.values(), *listed)):
        if text not in present and tokenizer.token_to_id(text) is not None:
            tokens.append(AddedToken(text, special=True))
    tokenizer.add_tokens(tokens)


def _check_ids(tokenizer: Tokenizer, vocab_size: int, directory: Path) -> None:
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest < 0:
        raise BadModel(f"{directory / 'tokenizer.json'} has no tokens: download it again")
    if highest >= vocab_size:
        raise BadModel(
            f"{directory / 'tokenizer.json'} does not belong to this model: it has token ids up to {highest}, "
            f"but the model's vocabulary has {vocab_size} entries"
        )
