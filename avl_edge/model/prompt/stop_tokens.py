"""Which tokens end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import BadModel, quoted
from ...files import read_json
from .text_tokenizer import TextTokenizer


def read_eos_token_ids(directory: Path, text: TextTokenizer, vocab_size: int) -> frozenset[int]:
    """The tokenizer's eos_token, and ids from generation_config.json, else config.json, else its text_config.

    Empty if a model names none, or an empty list of them. Raises BadModel for anything that is no token id below
    ``vocab_size``.
    """
    model = read_json(directory / "config.json") or {}
    inner = model.get("text_config")
    sources = (read_json(directory / "generation_config.json") or {}, model, inner if isinstance(inner, dict) else {})
    eos = text.named.get("eos_token")
    token_id = None if eos is None else text.tokenizer.token_to_id(eos)
    own = frozenset() if token_id is None else frozenset({token_id})
    named = next((source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None), None)
    if named is None:
        return own
    found = _checked(named, directory, vocab_size)
    return found | own if found else found


def _checked(value: Any, directory: Path, vocab_size: int) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            raise BadModel(f"{directory}: eos_token_id {quoted(i)} is no token id of a vocabulary of {vocab_size}")
    return frozenset(ids)
