"""The tokenizer of a model directory, loaded as transformers loads it for LLaVA, and checked against the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ...errors import BadInput, BadModel, refusing
from ...files import TOKENIZER_BYTES, read_json, read_text


@dataclass(frozen=True)
class TextTokenizer:
    """``named`` holds the special tokens by name (bos_token, ...); ``special`` the text of every special token by id.

    A named token that the vocabulary lacks has no id, and stands in ``named`` only.
    """

    tokenizer: Tokenizer
    named: Mapping[str, str]
    special: Mapping[int, str]

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

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a whole prompt. What the tokenizer adds around a text is left out if BOS is there already.

        Raises BadInput for a special token that the text does not spell: a normalizer may turn other spellings into
        one. BadModel where the tokenizer fails.
        """
        bos = self.named.get("bos_token")
        has_bos = bos is not None and text.startswith(bos)
        with refusing(lambda reason: BadModel(f"the model's tokenizer failed: {reason}")):
            encoding = self.tokenizer.encode(text, add_special_tokens=not has_bos)
        ids: list[int] = encoding.ids
        added = encoding.special_tokens_mask
        came_out = Counter(self.special[i] for i, own in zip(ids, added, strict=True) if i in self.special and not own)
        spelled = self._spelled(text)
        for token, count in came_out.items():
            # The unknown token is what any unknown character becomes.
            if count > spelled[token] and token != self.named.get("unk_token"):
                raise BadInput(
                    f"the prompt contains {token} in another spelling, which the model reserves for itself: remove it"
                )
        return tuple(ids)

    def _spelled(self, text: str) -> Counter[str]:
        """How often each special token stands in a text, the longest where several begin."""
        tokens = sorted(filter(None, self.special.values()), key=len, reverse=True)
        return Counter(re.findall("|".join(map(re.escape, tokens)), text) if tokens else ())

    def special_token_in(self, text: str) -> str | None:
        """A special token that a text spells, or None."""
        return next(
            (token for token in (*self.special.values(), *self.named.values()) if token and token in text), None
        )


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
