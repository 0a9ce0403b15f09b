"""The whole way from images and a prompt to what the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...config import read_json
from ...errors import BadInput, BadModel, TooLarge, quoted
from ...request import ImageSpan, Prompt
from ..spec import ModelSpec
from .detokenizer import Detokenizer
from .image_config import ImageProcessorConfig
from .images import MAX_PIXELS, ImageSource, open_image
from .preprocess import digest, preprocess
from .stop_tokens import read_eos_token_ids
from .template import ChatTemplate, open_template
from .text_tokenizer import TextTokenizer

CHARACTERS_PER_TOKEN = 64
"""No text of more characters than this for each token of the context is tokenized. Words have 2 to 5 a token; tokens of
more characters are runs of one."""


@dataclass(frozen=True)
class Processor:
    """Everything of a model directory that stands between a person and the model. Read-only; threads may share it."""

    image_config: ImageProcessorConfig
    text: TextTokenizer
    template: ChatTemplate
    image_token_id: int
    image_token: str
    tokens_per_image: int
    context: int
    eos_token_ids: frozenset[int]

    @classmethod
    def of(cls, spec: ModelSpec, directory: Path) -> Processor:
        """:meth:`open` for the model that ``spec`` describes."""
        return cls.open(
            directory,
            image_token_id=spec.image_token_id,
            tokens_per_image=spec.tokens_per_image,
            context=spec.text.context,
            vocab_size=spec.text.vocab_size,
            image_size=spec.vision.image_size,
        )

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        image_token_id: int,
        tokens_per_image: int,
        context: int,
        vocab_size: int,
        image_size: int | None = None,
    ) -> Processor:
        """Reads the processor's files and checks them against the model.

        ``context`` is the model's, in tokens, ``vocab_size`` the number of rows of the embedding, ``image_size`` the
        edge in pixels of the square that the vision tower takes (None: not checked). Raises BadModel for files that are
        missing, broken or mismatched.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise BadModel(f"{directory} is not a directory: give the directory of a model")
        if tokens_per_image < 1:
            raise BadModel(f"{directory}: an image must have at least 1 token, not {tokens_per_image}")
        text = TextTokenizer.open(directory, vocab_size)
        image_token = _image_token(directory, text, image_token_id)
        image_config = ImageProcessorConfig.open(directory)
        _check_output_size(image_config, image_size, directory)
        return cls(
            image_config=image_config,
            text=text,
            template=open_template(directory, text.named, image_token),
            image_token_id=image_token_id,
            image_token=image_token,
            tokens_per_image=tokens_per_image,
            context=context,
            eos_token_ids=read_eos_token_ids(directory, text, vocab_size),
        )

    def __call__(self, images: Sequence[ImageSource], prompt: str, system: str | None = None) -> Prompt:
        """One user turn, the images before the text, ready for the answer: :meth:`lay_out`, then :meth:`read`."""
        return self.read(images, *self.lay_out(len(images), prompt, system))

    def lay_out(
        self, images: int, prompt: str, system: str | None = None
    ) -> tuple[tuple[int, ...], tuple[ImageSpan, ...]]:
        """The token ids of a turn with that many images, and where each image stands (digests still empty).

        Each image stands as ``tokens_per_image`` placeholder ids. Raises BadInput for a prompt that is empty or holds
        special tokens, TooLarge for more images or text than the context can hold, which is said before anything is
        tokenized, BadModel if the chat template fails. No picture is touched.
        """
        texts = {"prompt": prompt} if system is None else {"prompt": prompt, "system text": system}
        for what, text in texts.items():
            if not isinstance(text, str):
                raise BadInput(f"the {what} must be a string, not {type(text).__name__}")
        self._check_room(images, sum(map(len, texts.values())))
        for what, text in texts.items():
            self._check_text(what, text)
        if not prompt.strip():
            raise BadInput("the prompt is empty: ask something about the picture")
        token_ids = self._tokenize(images, prompt, system)
        starts = self._image_starts(token_ids, images)
        return token_ids, tuple(ImageSpan("", start, self.tokens_per_image) for start in starts)

    def lay_out_images(self, images: int) -> tuple[tuple[int, ...], tuple[ImageSpan, ...]]:
        """The token ids of a turn up to the end of its last image, and where each image stands.

        They are the same whatever is asked: the image placeholder is a token that merges with nothing. Raises BadInput
        where they are not, as with a template that writes the question first.
        """
        heads = [self.head(*self.lay_out(images, probe)) for probe in ("What is it?", "0")]
        if heads[0] != heads[1]:
            raise BadInput("this model's chat template writes the question before the pictures: ask one at a time")
        return heads[0]

    @staticmethod
    def head(token_ids: tuple[int, ...], spans: tuple[ImageSpan, ...]) -> tuple[tuple[int, ...], tuple[ImageSpan, ...]]:
        """Of a turn that was laid out, the token ids up to the end of its last image, and the spans."""
        return token_ids[: spans[-1].start + spans[-1].length], spans

    def pixel_bytes(self, images: int) -> int:
        """Of the pixels of so many pictures, preprocessed: float32."""
        height, width = self.image_config.output_size or (0, 0)
        return images * 3 * height * width * 4

    def read(
        self,
        images: Sequence[ImageSource],
        token_ids: tuple[int, ...],
        spans: tuple[ImageSpan, ...],
        max_pixels: int = MAX_PIXELS,
    ) -> Prompt:
        """Decode and preprocess the pictures of a turn that was laid out, one after the other. Raises BadImage for one
        that is no use, or has more than ``max_pixels``."""
        pixels = [preprocess(open_image(image, max_pixels), self.image_config, max_pixels) for image in images]
        named = (replace(span, digest=digest(each)) for span, each in zip(spans, pixels, strict=True))
        return Prompt(token_ids, tuple(named), np.stack(pixels) if pixels else None)

    def detokenizer(self) -> Detokenizer:
        """A new one for each sequence."""
        return Detokenizer(self.text.tokenizer, self.text.special)

    def _check_room(self, images: int, characters: int) -> None:
        least = images * self.tokens_per_image
        if least >= self.context:
            raise TooLarge(
                f"{images} images take {least} tokens, but the model's context ends at {self.context}: give fewer"
            )
        most = CHARACTERS_PER_TOKEN * (self.context - least)
        if characters >= most:
            raise TooLarge(
                f"the prompt has {characters} characters, {images} images beside it, but the model's context ends at "
                f"{self.context} tokens, for which {most} characters are more than any text has: ask a shorter question"
            )

    def _check_text(self, what: str, text: str) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadInput(f"the {what} is not valid Unicode: give it as UTF-8") from None
        token = self.image_token if self.image_token in text else self.text.special_token_in(text)
        if token is not None:
            raise BadInput(f"the {what} contains {token}, which the model reserves for itself: remove it")

    def _tokenize(self, images: int, prompt: str, system: str | None) -> tuple[int, ...]:
        text = self.template.render(images, prompt, system)
        written = text.count(self.image_token)
        if written != images:
            raise BadInput(f"the chat template wrote {written} image placeholders for {images} images")
        self._check_room(images, len(text) - images * len(self.image_token))
        return self.text.encode(text.replace(self.image_token, self.image_token * self.tokens_per_image))

    def _image_starts(self, token_ids: tuple[int, ...], images: int) -> list[int]:
        """Where each image's placeholders begin. Images may touch, so they are told apart by their number of tokens."""
        length = self.tokens_per_image
        places = [i for i, token_id in enumerate(token_ids) if token_id == self.image_token_id]
        starts = places[::length]
        if places != [start + i for start in starts for i in range(length)] or len(starts) != images:
            raise BadInput(f"{len(places)} image tokens came out for {images} images of {length}: change the prompt")
        return starts


def _image_token(directory: Path, text: TextTokenizer, image_token_id: int) -> str:
    """The image placeholder's text, which must be the token of the id that the model replaces."""
    declared = (read_json(directory / "processor_config.json") or {}).get("image_token")
    placeholder = text.named.get("image_token") or declared or "<image>"
    actual = text.tokenizer.id_to_token(image_token_id) if image_token_id >= 0 else None
    if actual != placeholder:
        raise BadModel(
            f"{directory}: the model takes token {image_token_id} as the image placeholder, but the tokenizer has "
            f"{quoted(actual)} there, and {quoted(placeholder)} as token {text.tokenizer.token_to_id(str(placeholder))}"
        )
    if text.tokenizer.encode(placeholder, add_special_tokens=False).ids != [image_token_id]:
        raise BadModel(
            f"{directory}: the tokenizer splits the image placeholder {quoted(placeholder)} into several tokens"
        )
    return str(placeholder)


def _check_output_size(config: ImageProcessorConfig, image_size: int | None, directory: Path) -> None:
    size = config.output_size
    if size is None:
        raise BadModel(f"{directory}: the image processor gives every picture another size; set crop_size or size")
    if image_size is not None and size != (image_size, image_size):
        raise BadModel(
            f"{directory}: the image processor makes pictures of {size[0]} x {size[1]} pixels (height x width), "
            f"but the vision tower takes {image_size} x {image_size}"
        )
