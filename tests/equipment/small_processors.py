"""Small processors of LLaVA models on disk, with every kind of tokenizer and template; and what transformers makes of
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from avl_edge.model.families.llava.codec import SquareCodec
from avl_edge.model.pictures import Fixed
from avl_edge.model.prompt import Processor
from tests.equipment.small_tokenizers import byte_level, llama, llama_legacy, unigram

VOCAB_SIZE = 420
PATCH, EDGE = 14, 56
TOKENS = (EDGE // PATCH) ** 2
CONTEXT = 512
IMAGE_SETTINGS = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": EDGE},
    "crop_size": {"height": EDGE, "width": EDGE},
}
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}\n"
)
BOS_TEMPLATE = (
    "{{ bos_token }}\n{% for message in messages %}\n    {% for part in message.content %}\n"
    "    {% if part.type == 'image' %}<image>{% else %}{{ part.text | trim }}{{ {'n': [1, '<é>']} | tojson }}\n"
    "    {% endif %}\n"
    "    {% if loop.last %}{% break %}{% endif %}\n    {% endfor %}\n{{ eos_token }}{% endfor %}"
    "{% generation %}{{ tools }}{% endgeneration %}{{ strftime_now('%Y') }}"
)
STRING_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}assistant:"
TEMPLATES = {"none": None, "llava": LLAVA_TEMPLATE, "bos": BOS_TEMPLATE}
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
KINDS = {
    "byte-level": (byte_level, {"bos_token": None, "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}),
    "llama": (llama, LLAMA_TOKENS | {"pad_token": "<pad>", "tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama, legacy": (llama_legacy, LLAMA_TOKENS | {"tokenizer_class": "LlamaTokenizerFast"}),
    "unigram": (unigram, LLAMA_TOKENS | {"bos_token": {"content": "<s>", "__type": "AddedToken"}}),
}
PROMPTS = ["What is in this picture?", " Größe, 世界 and 😀?\n\nSecond line  ", "a", "1 < 2 > 0 <imag e>"]


def write(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def model_directory(path: Path, kind: str = "llama", template: str | None = LLAVA_TEMPLATE) -> Path:
    build, tokenizer_config = KINDS[kind]
    path.mkdir(exist_ok=True)
    write(path / "tokenizer.json", build().to_str())
    write(path / "tokenizer_config.json", tokenizer_config)
    write(path / "config.json", {"model_type": "llava", "text_config": {"model_type": "llama"}})
    write(path / "preprocessor_config.json", IMAGE_SETTINGS)
    processor = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "num_additional_image_tokens": 1}
    write(path / "processor_config.json", processor | {"vision_feature_select_strategy": "default"})
    if template is not None:
        write(path / "chat_template.jinja", template)
    return path


def image_id(kind: str = "llama") -> int:
    return KINDS[kind][0]().token_to_id("<image>")


def open_processor(path: Path, kind: str = "llama", **changes: Any) -> Processor:
    arguments = {"image_token_id": image_id(kind), "context": CONTEXT, "vocab_size": VOCAB_SIZE}
    tokens, edge = changes.pop("tokens_per_image", TOKENS), changes.pop("image_size", EDGE)

    def open_codec(directory: Path) -> SquareCodec:
        return SquareCodec.open(directory, Fixed(tokens, tokens), edge)

    return Processor.open(path, open_codec, lambda _: 12 * edge**2, **(arguments | changes))


def pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(number)
    return [Image.fromarray(rng.integers(0, 256, (50 + i, 70, 3), dtype=np.uint8)) for i in range(number)]


def reference(path: Path, images: list[Image.Image], prompt: str, system: str | None, template: bool) -> Any:
    """What transformers makes of the same messages."""
    from transformers import LlavaProcessor

    processor = LlavaProcessor.from_pretrained(path)
    if not template:
        text = f"{system} " * bool(system) + "USER: " + "<image>\n" * len(images) + prompt + " ASSISTANT:"
        return processor(images=images or None, text=text)
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": parts})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
