"""transformers' LLaVA with kvpress' presses, as :mod:`tools.compare_kvpress` asks it."""

from __future__ import annotations

import contextlib
import importlib
import logging
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from avl_edge.config import require
from avl_edge.errors import BadInput
from avl_edge.kv.methods.notation import Notation, parse
from avl_edge.request import Prompt

INSTALL = "pip install -e '.[dev,peers]' && pip install --no-deps kvpress==0.5.5"
PRESSES = {
    "observed": "ObservedAttentionPress",
    "snapkv": "SnapKVPress",
    "tova": "TOVAPress",
    "streaming": "StreamingLLMPress",
    "expected": "ExpectedAttentionPress",
    "keydiff": "KeyDiffPress",
    "knorm": "KnormPress",
}


def load_kvpress() -> Any:
    """The module; :class:`BadInput`, saying what to install, where it or what it imports is missing.

    Importing kvpress wraps every attention function of transformers, for presses that hide keys of single heads. None
    of those is compared, so the functions are put back: what runs without a press is transformers as it is.
    """
    try:
        functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        before = dict(functions.items())
        module = importlib.import_module("kvpress")
    except ImportError as error:
        raise BadInput(f"the comparison needs kvpress ({error}): {INSTALL}") from None
    for name, function in before.items():
        functions[name] = function
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # it warns of LLaVA at every answer
    return module


def rows_of(share: float, length: int) -> int:
    """How many of a prompt's ``length`` rows a share allows: the decimal share that was given, rounded down."""
    return max(1, Fraction(str(share)) * length // 1)


def ratio_of(rows: int, length: int) -> float:
    """The ``compression_ratio`` at which a press keeps exactly ``rows`` of ``length``: it takes int(length * (1 - r)),
    so r aims half a row higher. 0, which makes a press do nothing, for all of them."""
    return 0.0 if rows >= length else 1 - (rows + 0.5) / length


@dataclass(frozen=True)
class Press:
    """A press by name with the parameters that stay as they are, as in ``snapkv:window_size=8``."""

    kvpress: Any
    notation: Notation

    @classmethod
    def read(cls, kvpress: Any, text: str) -> Press:
        """:class:`BadInput` for what is no press, or a parameter that it does not have."""
        press = cls(kvpress, parse(text))
        require(press.notation.name in PRESSES, f"unknown press {text!r}: choose of {', '.join(PRESSES)}")
        require(press.notation.formats is None, f"the press {text!r} has no formats: give parameters of its own")
        try:
            press.at(1, 1)
        except TypeError as error:
            raise BadInput(f"the press {text!r} cannot be made ({error})") from None
        return press

    def at(self, rows: int, length: int) -> Any:
        """kvpress' object that keeps ``rows`` of a prompt's ``length``."""
        make = getattr(self.kvpress, PRESSES[self.notation.name])
        return make(compression_ratio=ratio_of(rows, length), **self.notation.parameters)


@dataclass
class Watch:
    """Looks at a cache when the prompt is in it: a logits processor, which is called first at that moment.

    ``prompt_rows`` are the rows of each layer then, the same number in every head, ``prompt_elements`` all numbers.
    """

    cache: Any
    prompt_rows: tuple[int, ...] = ()
    prompt_elements: int = 0

    def __call__(self, _token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.prompt_rows:
            self.prompt_rows = tuple(layer.keys.shape[2] for layer in self.cache.layers)
            self.prompt_elements = self.elements()
        return scores

    def elements(self) -> int:
        """Numbers in the cache now."""
        return sum(layer.keys.numel() + layer.values.numel() for layer in self.cache.layers)


@dataclass(frozen=True)
class Reply:
    """What transformers answered: tokens, text, rows per layer at the end of the prompt, numbers cached there and at
    the answer's end."""

    token_ids: tuple[int, ...]
    text: str
    prompt_rows: tuple[int, ...]
    prompt_elements: int
    end_elements: int

    def read_fraction(self, length: int) -> float:
        """Rows that the steps after a prompt of ``length`` attended, of full attention's; 1 where there were none."""
        held = sum(self.prompt_rows) / len(self.prompt_rows)
        steps = range(1, len(self.token_ids))
        return sum(held + step for step in steps) / sum(length + step for step in steps) if steps else 1.0


class Peer:
    """transformers' LLaVA of a checkpoint, with eager attention, answering with or without a press."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        hf: Any = importlib.import_module("transformers")
        hf.utils.logging.disable_progress_bar()
        self._new_cache = hf.DynamicCache
        self._model = hf.LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager"
        ).eval()
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        for layer in self._model.model.language_model.layers:
            layer.self_attn.register_forward_pre_hook(_tell_position, with_kwargs=True)

    @property
    def dtype(self) -> str:
        """What it computes in, like ``bfloat16``."""
        return str(self._model.dtype).removeprefix("torch.")

    def answer(self, prompt: Prompt, press: Any | None, max_new_tokens: int) -> Reply:
        """The greedy answer to a prompt with pictures as the runtime made it: the same ids and pixels."""
        token_ids = torch.tensor([prompt.token_ids])
        watch = Watch(self._new_cache(config=self._model.config.text_config))
        assert prompt.pixel_values is not None
        pixels = torch.stack([torch.from_numpy(each.values) for each in prompt.pixel_values.pictures])
        with torch.inference_mode(), press(self._model) if press else contextlib.nullcontext():
            output = self._model.generate(
                input_ids=token_ids,
                attention_mask=torch.ones_like(token_ids),
                pixel_values=pixels.to(self._model.dtype),
                past_key_values=watch.cache,
                logits_processor=[watch],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        said = output[0, len(prompt) :].tolist()
        text = self._tokenizer.decode(said, skip_special_tokens=True)
        return Reply(tuple(said), text, watch.prompt_rows, watch.prompt_elements, watch.elements())


def _tell_position(_layer: Any, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Add what a press asks an attention layer for; a step's positions go on after the prompt's, evicted or not."""
    return arguments, {**options, "cache_position": options["position_ids"][0]}
