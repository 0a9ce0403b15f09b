"""The whole way from images and a prompt to what the model takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, takewhile
from pathlib import Path

from PIL import Image

from ...config import Options, Picture
from ...errors import BadImage, BadInput, BadModel, TooLarge, quoted
from ...files import read_json
from ...request import ImageSpan, Pixels, PixelValues, Prompt
from ..images.frames import Moment, Shown, take_shown
from ..images.inputs import ImageSource
from ..images.preprocess import digest
from ..images.sources import MAX_PIXELS, image_size, open_flat, picture_name
from ..spec import ModelSpec
from .chat import SYSTEM, USER, Turn, asked, one_question
from .codec import ImageCodec, open_codec
from .detokenizer import Detokenizer
from .schema import SchemaMatcher, SchemaTokens, check_schema
from .stop_tokens import read_eos_token_ids
from .template import ChatTemplate, open_template
from .text_tokenizer import TextTokenizer

CHARACTERS_PER_TOKEN = 64
"""No text of more characters than this for each token of the context is tokenized. Words have 2 to 5 a token; tokens of
more characters are runs of one."""


@dataclass(frozen=True)
class Processor:
    """Everything of a model directory that stands between a person and the model. Read-only; threads may share it."""

    codec: ImageCodec
    pixel_bytes: Callable[[Picture], int]
    text: TextTokenizer
    template: ChatTemplate
    image_token_id: int
    image_token: str
    context: int
    eos_token_ids: frozenset[int]
    video_token_id: int | None = None

    @classmethod
    def of(cls, spec: ModelSpec, directory: Path) -> Processor:
        """:meth:`open` for the model that ``spec`` describes."""
        return cls.open(
            directory,
            partial(open_codec, spec),
            spec.pixel_bytes,
            image_token_id=spec.image_token_id,
            context=spec.text.context,
            vocab_size=spec.text.vocab_size,
        )

    @classmethod
    def open(
        cls,
        directory: Path,
        codec_of: Callable[[Path], ImageCodec],
        pixel_bytes: Callable[[Picture], int],
        *,
        image_token_id: int,
        context: int,
        vocab_size: int,
    ) -> Processor:
        """Reads the processor's files and checks them against the model.

        ``codec_of`` reads what they say of pictures, ``pixel_bytes`` says what the pixels of one weigh. ``context``
        is the model's, in tokens, ``vocab_size`` the number of rows of the embedding. Raises BadModel for files that
        are missing, broken or mismatched.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise BadModel(f"{directory} is not a directory: give the directory of a model")
        codec = codec_of(directory)
        text = TextTokenizer.open(directory, vocab_size, codec.tokenizer)
        image_token = _image_token(directory, text, image_token_id, codec.image_token)
        own_ends = filter(None, map(text.tokenizer.token_to_id, codec.end_tokens))
        eos_token_ids = read_eos_token_ids(directory, text, vocab_size) | frozenset(own_ends)
        # An end token that is an ordinary word of the vocabulary stays one: in a prompt it ends nothing.
        added = text.tokenizer.get_added_tokens_decoder()
        ends = {added[each].content for each in eos_token_ids if each in added}
        reserved = {image_token, codec.video_token, *ends}
        return cls(
            codec=codec,
            pixel_bytes=pixel_bytes,
            text=replace(text, also_reserved=frozenset(filter(None, reserved))),
            template=open_template(directory, text.named, image_token, codec.chat_template),
            image_token_id=image_token_id,
            image_token=image_token,
            context=context,
            eos_token_ids=eos_token_ids,
            video_token_id=text.tokenizer.token_to_id(codec.video_token) if codec.video_token else None,
        )

    def __call__(self, images: Sequence[ImageSource], prompt: str, system: str | None = None) -> Prompt:
        """One user turn, the images before the text, ready for the answer: :meth:`measure`, :meth:`lay_out`,
        :meth:`read`."""
        taken = take_shown(images)
        pictures = self.measure(taken)
        return self.read(taken, pictures, self.lay_out(one_question(pictures, prompt, system)))

    def within(self, options: Options) -> Processor:
        """The same for pictures of the range of pixels that a request asks for; BadInput where the model has none."""
        if options.min_pixels is options.max_pixels is None:
            return self
        return replace(self, codec=self.codec.within(options.min_pixels, options.max_pixels))

    def measure(self, images: Sequence[Shown], max_pixels: int = MAX_PIXELS) -> list[Picture]:
        """What the pictures will be for the model, by their headers, where their size matters.

        Raises BadImage as far as a header tells that one is no use, or has more than ``max_pixels``.
        """
        return [self._measured(image, lambda source: image_size(source, max_pixels)) for image in images]

    def _measured(self, image: Shown, size_of: Callable[[ImageSource], tuple[int, int]]) -> Picture:
        if isinstance(image, Moment):
            one, other = map(size_of, image.frames)
            if one != other:
                raise BadInput(f"the frames of a video must be of one size, not {one} and {other} (width, height)")
            return self.codec.measure_moment(*one, image)
        return self.codec.fixed or self.codec.rule(*size_of(image))

    def lay_out(self, turns: Sequence[Turn]) -> Prompt:
        """A conversation, ready for the answer: token ids, and where each picture stands (digests still empty, no
        pixels).

        Each picture stands as so many placeholder ids as it has tokens; what special tokens the texts spell is text.
        Raises BadInput for a conversation that does not end with a question or that the chat template does not take,
        TooLarge for more images or text than the context can hold, which is said before anything is tokenized, BadModel
        if the chat template fails.
        """
        pictures = [picture for each in turns for picture in each.pictures]
        texts = [text for each in turns for text in each.texts]
        for text in texts:
            if not isinstance(text, str):
                raise BadInput(f"a text must be a string, not {type(text).__name__}")
        if len(turns) > self.context:
            raise TooLarge(f"{len(turns)} turns are more than the tokens of the model's context, {self.context}")
        self._check_room(pictures, sum(map(len, texts)))
        for each in turns:
            _check_unicode(each)
        if not turns or turns[-1].role != USER or not "".join(turns[-1].texts).strip():
            raise BadInput("the prompt is empty: ask something about the picture")
        token_ids = self._tokenize(pictures, turns)
        starts = self._image_starts(token_ids, pictures)
        spans = (ImageSpan("", start, each.tokens) for start, each in zip(starts, pictures, strict=True))
        rope = self.codec.rope(len(token_ids), list(zip(starts, pictures, strict=True)))
        return Prompt(token_ids, tuple(spans), None, rope)

    def lay_out_images(self, turns: Sequence[Turn]) -> Prompt:
        """A conversation up to the end of its last picture; its last turn is a user's, whose question is open.

        It is the same whatever is asked: the image placeholder is a token that merges with nothing. Raises BadInput
        where it is not, as with a template that writes the question first.
        """
        heads = [self.lay_out(asked(turns, probe)).up_to_images() for probe in ("What is it?", "0")]
        if heads[0].token_ids != heads[1].token_ids:
            raise BadInput("this model's chat template writes the question before the pictures: ask one at a time")
        return heads[0]

    def read(
        self,
        images: Sequence[Shown],
        pictures: Sequence[Picture],
        laid_out: Prompt,
        max_pixels: int = MAX_PIXELS,
        transparency: str | None = None,
    ) -> Prompt:
        """Decode and preprocess the images that were measured as ``pictures`` and stand in ``laid_out``, one after the
        other. ``transparency`` None: as the family has it. Raises BadImage for one that is no use, or has more than
        ``max_pixels``."""
        shown, notes = transparency or self.codec.transparency, []
        read = []
        for source, picture in zip(images, pictures, strict=True):
            images_of, shares = zip(*(open_flat(each, max_pixels, shown) for each in _sources(source)), strict=True)
            read.append(self._pixels(images_of, source, picture, max_pixels))
            if max(shares) and transparency is None:
                notes.append(_of_transparency(picture_name(_sources(source)[0]), max(shares), shown))
        named = (replace(span, digest=digest(each)) for span, each in zip(laid_out.spans, read, strict=True))
        pixels = Pixels(tuple(read)) if read else None
        return replace(laid_out, spans=tuple(named), pixel_values=pixels, notes=tuple(notes))

    def _pixels(self, images: Sequence[Image.Image], source: Shown, picture: Picture, max_pixels: int) -> PixelValues:
        """``images``: those of the source, which are two for a moment of a video."""
        if isinstance(source, Moment):
            one, other = images
            unchanged = one.size == other.size and picture == self.codec.measure_moment(*one.size, source)
            values = self.codec.moment_pixels((one, other), picture, max_pixels) if unchanged else None
        else:
            (image,) = images
            unchanged = picture == (self.codec.fixed or self.codec.rule(*image.size))
            values = self.codec.pixels(image, picture, max_pixels) if unchanged else None
        if values is None:
            raise BadImage("a picture was changed while it was read: give it again")
        return PixelValues(values, picture)

    @cached_property
    def _schema_tokens(self) -> SchemaTokens:
        return SchemaTokens(self.text.tokenizer, self.eos_token_ids)

    def schema_matcher(self, schema: str) -> SchemaMatcher:
        """For one answer by a JSON ``schema``; :class:`BadInput` for one that cannot be obeyed."""
        check_schema(schema)
        return self._schema_tokens.matcher(schema)

    def detokenizer(self) -> Detokenizer:
        """A new one for each sequence."""
        return Detokenizer(self.text.tokenizer, self.text.special)

    def _check_room(self, pictures: Sequence[Picture], characters: int) -> None:
        images, least = len(pictures), sum(each.tokens for each in pictures)
        if least >= self.context:
            fewer = "give fewer" if self.codec.fixed else "give fewer or smaller ones"
            raise TooLarge(
                f"{images} images take {least} tokens, but the model's context ends at {self.context}: {fewer}"
            )
        most = CHARACTERS_PER_TOKEN * (self.context - least)
        if characters >= most:
            raise TooLarge(
                f"the prompt has {characters} characters, {images} images beside it, but the model's context ends at "
                f"{self.context} tokens, for which {most} characters are more than any text has: ask a shorter question"
            )

    def _tokenize(self, pictures: Sequence[Picture], turns: Sequence[Turn]) -> tuple[int, ...]:
        images = len(pictures)
        escaped = self.text.reserved.escape([text for each in turns for text in each.texts])
        words = iter(escaped.texts)
        safe = [
            replace(each, parts=tuple(next(words) if isinstance(p, str) else p for p in each.parts)) for each in turns
        ]
        tokens = [self.image_token, *filter(None, [self.codec.video_token])]
        between = re.split("(" + "|".join(map(re.escape, tokens)) + ")", self.template.render(safe))
        placed = self._placeholders(pictures)
        if between[1::2] != [token for token, _ in placed]:
            raise BadInput(
                f"the chat template wrote {len(between) // 2} image placeholders for {len(placed)} images: {images}"
            )
        self._check_room(pictures, sum(map(len, between[::2])))
        between[1::2] = [text for _, text in placed]
        return self.text.encode("".join(between), escaped)

    def _placeholders(self, pictures: Sequence[Picture]) -> list[tuple[str, str]]:
        """What a template writes for each picture or video, and what stands for it in the prompt."""
        placed = []
        for at, each in enumerate(pictures):
            if each.moment is None:
                placed.append((self.image_token, self.codec.placeholder(each, self.image_token)))
            elif each.moment == 0:
                others = takewhile(lambda other: other.moment, pictures[at + 1 :])
                placed.append((self.codec.video_token or "", self.codec.video_placeholder([each, *others])))
        return placed

    def _image_starts(self, token_ids: tuple[int, ...], pictures: Sequence[Picture]) -> list[int]:
        """Where each picture's placeholders begin. Pictures may touch, so they are told apart by their number of
        tokens."""
        ids = {self.image_token_id, self.video_token_id}
        places = [i for i, token_id in enumerate(token_ids) if token_id in ids]
        firsts = list(accumulate((each.tokens for each in pictures), initial=0))
        starts = [places[first] for first in firsts[:-1] if first < len(places)]
        expected = [start + i for start, each in zip(starts, pictures, strict=False) for i in range(each.tokens)]
        if len(starts) != len(pictures) or places != expected:
            lengths = ", ".join(str(each.tokens) for each in pictures)
            raise BadInput(
                f"{len(places)} image tokens came out for {len(pictures)} images of {lengths or 'none'}: change the "
                "prompt"
            )
        return starts


def _sources(shown: Shown) -> tuple[ImageSource, ...]:
    return shown.frames if isinstance(shown, Moment) else (shown,)


def _check_unicode(turn: Turn) -> None:
    try:
        "".join(turn.texts).encode("utf-8")
    except UnicodeEncodeError:
        what = {USER: "prompt", SYSTEM: "system text"}.get(turn.role, "answer")
        raise BadInput(f"the {what} is not valid Unicode: give it as UTF-8") from None


def _of_transparency(name: str, share: float, shown: str) -> str:
    becomes, others = {
        "drop": ("is shown in the colours behind it", "white or black puts it on a background"),
        "white": ("is shown on white", "black or drop shows it otherwise"),
        "black": ("is shown on black", "white or drop shows it otherwise"),
    }[shown]
    return (
        f"{name} is transparent in {max(100 * share, 0.1):.3g} % of its pixels, which {becomes}: transparency {others}"
    )


def _image_token(directory: Path, text: TextTokenizer, image_token_id: int, usual: str) -> str:
    """The image placeholder's text, ``usual`` where no file says it, which must be the token of the id that the model
    replaces."""
    declared = (read_json(directory / "processor_config.json") or {}).get("image_token")
    placeholder = text.named.get("image_token") or declared or usual
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
