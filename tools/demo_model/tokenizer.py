"""The tokenizer: byte-level BPE trained on questions and answers, with the special tokens and template of LLaVA."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools.demo_model.questions import KINDS, ask
from tools.demo_model.scenes import TRAINING_SEEDS, facts_of

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE)
VOCAB_SIZE = 1024
HEAD = "USER: "
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | upper }}: {% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}<image>{{ '\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}</s>{%- else -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""


def corpus(pictures: int, seed: int = TRAINING_SEEDS.start) -> Iterator[str]:
    """Questions and answers of ``pictures`` scenes as the model meets them."""
    for number in range(seed, seed + pictures):
        facts, rng = facts_of(number), random.Random(number)
        for kind in KINDS:
            question = ask(facts, kind, rng)
            yield turn(question.text)
            yield f" {question.answer}"


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token."""
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return int(number)


def turn(question: str) -> str:
    """What follows the picture in the prompt, up to the answer."""
    return f"\n{question} ASSISTANT:"


def train_tokenizer(pictures: int = 3000, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train the tokenizer.

    Merges are learned inside words and never join two digits, so numbers are spelled digit by digit; the pre-tokenizer
    that is stored is GPT-2's own, which gives the same pieces because no such merge exists.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(pictures), trainer)
    return _finish(tokenizer)


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    """GPT-2 pre-tokenizer, BOS in front, and a decoder that drops the space in front of an answer."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    bos = special_id(tokenizer, BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of ``path``; it is trained and written first if there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))
