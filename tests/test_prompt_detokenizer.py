"""The incremental detokenizer, on tiny tokenizers of the kinds that language models have (built here)."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from avl_edge.prompt import Detokenizer

CORPUS = [
    "USER: What is in this picture? ASSISTANT: A cat sits on the mat, and a dog looks at it.",
    "How many people are there? There are two people in the street.",
    "naïve café über Größe 世界",
] * 4
IMAGE = AddedToken("<image>", special=True, normalized=False)


@cache
def byte_level() -> Tokenizer:
    """As GPT-2 and Qwen: bytes as characters, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", IMAGE])
    return tokenizer


@cache
def llama(legacy: bool = False) -> Tokenizer:
    """As Llama 2: word starts marked by ▁, <0x..> tokens for unknown characters, BOS by the post-processor.

    ``legacy`` marks words by a normalizer, which also puts a ▁ after every special token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("世界", "") for text in CORPUS], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in byte_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([IMAGE, AddedToken("<pad>", special=True, normalized=False)])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@cache
def unigram() -> Tokenizer:
    """A SentencePiece Unigram with compatibility normalization, BOS and EOS by the post-processor."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def llama_legacy() -> Tokenizer:
    return llama(legacy=True)


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
