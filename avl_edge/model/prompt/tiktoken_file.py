"""A vocabulary in tiktoken's form: a token's bytes and its rank, line by line."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ...errors import BadModel, refusing
from ...files import TOKENIZER_BYTES, read_text


def read_tiktoken(directory: Path, name: str, pattern: str, special: Sequence[str]) -> Tokenizer | None:
    """The tokenizer of the file ``name`` in a model's directory; None without one. Text is normalized (NFC) and cut by
    ``pattern``; ``special`` tokens have the ids behind the file's. :class:`BadModel` for a broken file."""
    path = directory / name
    text = read_text(path, TOKENIZER_BYTES)
    if text is None:
        return None
    with refusing(lambda reason: BadModel(f"{path} is broken ({reason}): download it again")):
        ranks = {}
        for line in filter(None, text.splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([each]) not in ranks for each in range(256)):
            raise BadModel(f"{path} is broken (ranks or bytes are missing): download it again")
        return _tokenizer(ranks, pattern, special)


def _tokenizer(ranks: dict[bytes, int], pattern: str, special: Sequence[str]) -> Tokenizer:
    spelled = _spellings()
    vocabulary = {"".join(map(spelled.__getitem__, token)): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = _parts(token, ranks)
            merges.append(tuple("".join(map(spelled.__getitem__, part)) for part in parts))
    tokenizer = Tokenizer(models.BPE(vocabulary, [pair for pair in merges if len(pair) == 2]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    return tokenizer


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens of which this one is merged last: what lower ranks make of its bytes."""
    parts, most = [bytes([each]) for each in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, most) for left, right in pairwise(parts)]
        best = min(pairs)
        if best >= most:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _spellings() -> dict[int, str]:
    """GPT-2's character for each byte: printable ones stand for themselves, the others are moved beyond 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in plain]
    return {each: chr(each) for each in plain} | {each: chr(256 + at) for at, each in enumerate(others)}
