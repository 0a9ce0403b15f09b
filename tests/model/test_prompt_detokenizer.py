"""The incremental detokenizer, on tiny tokenizers of the kinds that language models have (built here)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from avl_edge.model.prompt import Detokenizer
from tests.equipment.small_tokenizers import byte_level, llama, llama_legacy, unigram

TOKENIZERS = {"byte-level": byte_level, "llama": llama, "llama, legacy": llama_legacy, "unigram": unigram}


def detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    return Detokenizer(tokenizer, [i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special])


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_concatenation_equals_the_full_decoding_of_any_ids(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]()
    any_id = st.integers(0, tokenizer.get_vocab_size() - 1)
    some_bytes = st.integers(3, 258)  # where the llama tokenizers have their byte tokens
    ids = data.draw(st.lists(any_id | some_bytes, max_size=30))
    detok = detokenizer(tokenizer)
    pieces = [detok.push(token_id) for token_id in ids]
    assert "".join(pieces) + detok.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert detok.finish() == ""


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("ab cat é世界😀👩‍👩‍👧 \n\ufffd"), max_size=25))
def test_concatenation_equals_the_full_decoding_of_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text).ids
    detok = detokenizer(tokenizer)
    assert "".join(map(detok.push, ids)) + detok.finish() == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_an_emoji_comes_whole_and_no_replacement_character_before_it(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode("a cat 😀 and a dog", add_special_tokens=False).ids
    detok = detokenizer(tokenizer)
    pieces = [detok.push(token_id) for token_id in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces.count("") >= 3
    assert sum("😀" in piece for piece in pieces) == 1
    assert "".join(pieces) + detok.finish() == "a cat 😀 and a dog"


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_plain_text_is_not_held_back(kind: str) -> None:
    """A detokenizer that waits for more than it must would make the answer jerky."""
    tokenizer = TOKENIZERS[kind]()
    detok = detokenizer(tokenizer)
    ids = tokenizer.encode("cat, there are two people", add_special_tokens=False).ids
    expected = [tokenizer.decode(ids[:i]) for i in range(1, len(ids) + 1)]
    text = ""
    for token_id, so_far in zip(ids, expected, strict=True):
        text += detok.push(token_id)
        assert text == so_far


def test_sequences_do_not_share_state() -> None:
    tokenizer = byte_level()
    one, two = detokenizer(tokenizer), detokenizer(tokenizer)
    ids = tokenizer.encode("two dogs").ids
    texts = [(one.push(first), two.push(second)) for first, second in zip(ids, reversed(ids), strict=True)]
    assert "".join(first for first, _ in texts) == "two dogs"
