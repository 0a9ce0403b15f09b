"""Which tokens end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import BadModel, quoted
from ...files import read_json
from .text_tokenizer import TextTokenizer


def read_eos_token_ids(directory: Path, text: TextTokenizer, vocab_size: int) -> frozenset[int]:
    """Ids from generation_config.json, else config.json, else its text_config, else the tokenizer's eos_token.

    Empty if a model names none. Raises BadModel for anything that is no token id below ``vocab_size``.
    """
    model = read_json(directory / "config.json") or {}
    inner = model.get("text_config")
    sources = (read_json(directory / "generation_config.json") or {}, model, inner if isinstance(inner, dict) else {})
    for source in sources:
        if source.get("eos_token_id") is not None:
            return _checked(source["eos_token_id"], directory, vocab_size)
    eos = text.named.get("eos_token")
    token_id = None if eos is None else text.tokenizer.token_to_id(eos)
    return frozenset() if token_id is None else frozenset({token_id})


def _checked(value: Any, directory: Path, vocab_size: int) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            raise BadModel(f"{directory}: eos_token_id {quoted(i)} is no token id of a vocabulary of {vocab_size}")
    return frozenset(ids)
