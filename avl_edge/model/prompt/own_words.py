"""Special tokens in a person's own words: they are words, and neither end a turn nor open a picture."""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tokenizers import Tokenizer

from ...errors import BadInput

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Unicode's characters for private use."""


@dataclass(frozen=True)
class Escaped:
    """Texts in which one private character stands for each special token; ``spelled``: for which."""

    texts: tuple[str, ...]
    spelled: Mapping[str, str] = field(default_factory=dict)

    def restore(self, text: str) -> str:
        """``text``, made of the texts, as it would be of the words themselves."""
        return text.translate({ord(stand_in): words for stand_in, words in self.spelled.items()})


NOTHING = Escaped(())
_LONGEST_NESTED = 128
"""Special tokens of more characters have no pattern with a level for each."""


class ReservedWords:
    """The spellings of a model's special tokens."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = sorted(set(filter(None, tokens)), key=len, reverse=True)
        self._longest = max(map(len, self.tokens), default=0)
        short = self._longest <= _LONGEST_NESTED
        self._pattern = re.compile(
            (_any_of(self.tokens) if short else _one_of(self.tokens)) if self.tokens else r"(?!)"
        )
        self._beginnings = frozenset(token[:n] for token in self.tokens for n in range(1, len(token)))
        self._ends = frozenset(token[n:] for token in self.tokens for n in range(1, len(token)))

    def count(self, text: str) -> Counter[str]:
        """How often each stands in a text, the longest where several begin."""
        return Counter(self._pattern.findall(text))

    def replace(self, text: str, names: Mapping[str, str]) -> str:
        """The text with each that has a name by its name."""
        return self._pattern.sub(lambda found: names.get(found[0], found[0]), text)

    def escape(self, texts: Sequence[str]) -> Escaped:
        """Take special tokens out of ``texts``, and also what would become one together with the text before or behind
        it. Raises BadInput where a text uses up all private characters."""
        if not any(map(self._pattern.search, texts)) and not any(any(self._edges(each)) for each in texts):
            return Escaped(tuple(texts))
        used = set("".join(texts))
        free = (chr(each) for block in _PRIVATE for each in block if chr(each) not in used)
        stand_ins: dict[str, str] = {}

        def stand_in(words: str) -> str:
            if words and words not in stand_ins:
                found = next(free, None)
                if found is None:
                    raise BadInput("the prompt has too many private characters beside special tokens: remove some")
                stand_ins[words] = found
            return stand_ins.get(words, "")

        escaped = tuple(self._escape(each, stand_in) for each in texts)
        return Escaped(escaped, {each: words for words, each in stand_ins.items()})

    def _escape(self, text: str, stand_in: Callable[[str], str]) -> str:
        inner = self._pattern.sub(lambda found: stand_in(found[0]), text)
        end, beginning = self._edges(inner)
        if end:
            before, after = inner.split(end, 1)
            inner = before + stand_in(end) + after
            beginning = self._edges(inner)[1]
        if beginning:
            before, after = inner.rsplit(beginning, 1)
            inner = before + stand_in(beginning) + after
        return inner

    def _edges(self, text: str) -> tuple[str, str]:
        """The longest end of a special token with which a text begins, and the longest beginning of one with which it
        ends, white space aside, which templates strip; "" for none."""
        bare = text.strip()
        lengths = range(min(self._longest - 1, len(bare)), 0, -1)
        end = next((bare[:n] for n in lengths if bare[:n] in self._ends), "")
        beginning = next((bare[-n:] for n in lengths if bare[-n:] in self._beginnings), "")
        return end, beginning


def _one_of(words: Collection[str]) -> str:
    """A pattern that finds the first of ``words`` that fits."""
    return "|".join(map(re.escape, words))


def _any_of(words: Collection[str]) -> str:
    """A pattern that finds the longest of ``words``. It looks at each character of a text once for all of them: what
    begins as many of them do would else be compared with each."""
    if len(words) == 1:
        return _one_of(words)
    endings: dict[str, list[str]] = {}
    for word in filter(None, words):
        endings.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + (_any_of(rest) if any(rest) else "") for first, rest in endings.items()]
    joined = branches[0] if len(branches) == 1 and "" not in words else f"(?:{'|'.join(branches)})"
    return f"{joined}?" if "" in words else joined


class RenamedTokenizer:
    """A tokenizer like another one but for the spelling of its ``reserved`` tokens, which nobody can guess; so what
    spells them otherwise is plain text. As large as the other one, so it is made when it is first needed."""

    def __init__(self, tokenizer: Tokenizer, reserved: Collection[str]) -> None:
        self._tokenizer = tokenizer
        nonce = secrets.token_hex(8)
        ids = {token: tokenizer.token_to_id(token) for token in reserved}
        self.names = {token: f"<{nonce}{each}>" for token, each in ids.items() if each is not None}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of :attr:`names`."""
        content = json.loads(self._tokenizer.to_str())
        for token in content["added_tokens"]:
            token["content"] = self._renamed(token["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(token): each for token, each in model["vocab"].items()}
        else:  # Unigram's pieces with their scores
            model["vocab"] = [[self._renamed(token), score] for token, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not self._makes_reserved(pair)]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._renamed(model["unk_token"])
        return Tokenizer.from_str(json.dumps(content))

    def _renamed(self, token: str) -> str:
        return self.names.get(token, token)

    def _makes_reserved(self, pair: str | Sequence[str]) -> bool:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        return not self.names.keys().isdisjoint((left, right, left + right))
