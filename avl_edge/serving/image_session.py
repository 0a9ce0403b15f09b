"""A picture that several questions are asked about, as its caller sees it: its rows are computed and held once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol

from ..config import Formats, Options, PromptShape, checked_options, require
from ..errors import BadInput
from ..kv import quality
from ..kv.budget import KvPlan, first_within, kv_plan, plan_after
from ..kv.cache import prompt_shape
from ..kv.layout import Format
from ..kv.methods import Choice, Distinct, Full, Method, candidates, sharing_methods
from ..model.prompt import Message, Processor, Turn, asked, check_messages, shown_in, turns_of
from ..planning.request_planner import RequestPlanner
from ..request import ImageSessionStats
from .generation import Generation
from .picture_reader import PictureReader
from .requests import Request, SharedPrefix
from .scheduler import SESSION_CLOSED


class SessionRuntime(Protocol):
    """The runtime that an image session belongs to."""

    @property
    def home(self) -> object: ...

    @property
    def read_pictures(self) -> PictureReader: ...

    def submit(self, request: Request) -> Generation: ...

    def free_image_sessions(self, *, wait: bool = True) -> None: ...


class ImageSession:
    """Pictures to ask about: :meth:`ask` as often as you like, at once or one after another.

    Everything up to the end of the last picture is encoded, run and held once: all its rows, or, with ``secondary`` of
    ``distinct``, ``coarse`` or ``avl`` (with ``by_values=1``), those whose values stand out. A question runs and holds
    its own text alone, and picks its own core of the shared rows. Closing the session, or dropping it, frees them when
    the last question that is on its way has ended.

    The options that the session was made with hold for its questions too, but for ``kv_budget``: that is what the
    session's own rows may take, and without ``formats`` or a preset they are packed (exact, int8, int8/int4, int4) as
    far as it asks. A device's profile that the runtime follows plans no image sessions: give a budget.
    """

    def __init__(
        self,
        runtime: SessionRuntime,
        processor: Processor,
        planner: RequestPlanner,
        prefix: SharedPrefix,
        turns: Sequence[Turn],
        options: Options,
    ) -> None:
        """:meth:`of` plans the ``prefix``; ``turns`` end with the one that shows the pictures."""
        self._runtime, self._processor, self._planner = runtime, processor, planner
        self._prefix = prefix
        self._turns = turns
        self._options = options

    @classmethod
    def of(
        cls,
        runtime: SessionRuntime,
        processor: Processor,
        planner: RequestPlanner,
        messages: Sequence[Message],
        options: Options,
        *,
        spare: bool = False,
    ) -> ImageSession:
        """Check and plan, holding nothing: :class:`BadInput` where the model, the ``options`` or its target do
        not let questions share rows, :class:`TooLarge` beyond the budget, :class:`Busy` while other requests' pixels
        take the memory for them. ``spare``: others who need its rows may close it between two questions."""
        images = shown_in(messages)
        require(len(images) > 0, "an image session needs a picture: give one or more images")
        processor = processor.within(options)
        pictures = runtime.read_pictures.measure(processor, images)
        turns = turns_of(messages, pictures)
        laid_out = processor.lay_out_images(turns)
        planner.new_tokens(len(laid_out), options)
        plan = _plan_session(options, prompt_shape(len(laid_out), laid_out.spans), planner)
        prompt = runtime.read_pictures(processor, images, pictures, laid_out)
        prefix = SharedPrefix(replace(prompt, pixel_values=None), plan, runtime.home, prompt.pixel_values)
        prefix.is_spare = spare
        return cls(runtime, processor, planner, prefix, turns, options)

    def load(self) -> ImageSessionStats:
        """Encode and run the pictures now, while a person still types, say, instead of with the first question.

        Waits for the pool as a question does. What it raises leaves the session as it was.
        """
        prefix = self._prefix
        nothing: KvPlan[Method] = KvPlan(Full(), prefix.plan.formats, 0, 0, None, 0)
        prompt = replace(prefix.prompt, pixel_values=prefix.pixels)
        workspace = self._planner.workspace(_head(prefix), 0)
        self._runtime.submit(Request(prompt, Options(), nothing, 0, prefix=prefix, workspace=workspace)).result()
        return self.stats

    def ask(self, prompt: str | Sequence[Message], options: Options | None = None) -> Generation:
        """Ask about the pictures. ``prompt``: a question, or several turns, the first of which goes on where the
        pictures end. The question is queued at once; those that are open together are decoded together.

        ``options`` None: the session's. ``kv_budget`` is for the question's own rows; ``formats``, if given, have to be
        the session's. Raises as :meth:`prepare` and :meth:`avl_edge.Runtime.submit`.
        """
        return self._runtime.submit(self.prepare(prompt, options))

    def prepare(self, prompt: str | Sequence[Message], options: Options | None = None) -> Request:
        """Check a question and plan its memory, holding nothing: for :meth:`avl_edge.Runtime.submit`.

        Raises :class:`BadInput` for what cannot be answered from the session's rows, or once it is closed, and
        :class:`TooLarge` for what exceeds its budget.
        """
        prefix, planner, shape = self._prefix, self._planner, self._planner.shape
        require(not prefix.is_closed, SESSION_CLOSED)
        options = checked_options(replace(self._options, kv_budget=None) if options is None else options)
        resized, own = ((each.min_pixels, each.max_pixels) for each in (options, self._options))
        require(
            resized in (own, (None, None)),
            "the pictures of a session keep their size: give their pixels to open_images",
        )
        turns = self._continued(prompt)
        laid_out = self._processor.lay_out(turns)
        require(
            laid_out.up_to_images().token_ids == prefix.prompt.token_ids,
            "this model's chat template writes something else before the pictures now: open them again",
        )
        max_new_tokens = planner.new_tokens(len(laid_out), options)
        whole, shared = prompt_shape(len(laid_out), laid_out.spans), len(prefix.prompt)
        planner.target.check_prompt(PromptShape(0, 0, len(laid_out) - shared), planner.spec, "question")
        (method, formats), share = _choice(options, _head(prefix), planner, prefix.plan.formats)
        planner.target.check(Choice(method, formats), whole, planner.spec)
        require(
            share >= prefix.share,
            f"the session stores {prefix.share:g} % of the picture's rows, and questions may read any of them: give "
            f"the question secondary={prefix.share:g}",
        )
        require(
            formats == prefix.plan.formats,
            "a question's rows have the formats of its session: give formats, or a preset that packs, to open_images",
        )
        budget = options.kv_budget_bytes
        plan = plan_after(method, formats, shape, whole, shared, max_new_tokens - 1, budget)
        what = f"{len(laid_out) - shared} tokens of the question and {max_new_tokens} new ones"
        first_within(budget, [plan], what, "raise --kv-budget or lower --max-new-tokens")
        asked = replace(laid_out, spans=prefix.prompt.spans, pixel_values=prefix.pixels, notes=prefix.prompt.notes)
        pictures = [picture for each in turns for picture in each.pictures]
        workspace = planner.workspace(whole, max_new_tokens - 1, pictures)
        return Request(asked, options, plan, max_new_tokens, prefix=prefix, workspace=workspace)

    def _continued(self, prompt: str | Sequence[Message]) -> list[Turn]:
        if isinstance(prompt, str):
            return asked(self._turns, prompt)
        check_messages(prompt)
        require(not shown_in(prompt), "a question about an image session shows no pictures: open another session")
        first, *others = turns_of(prompt, ()) or [Turn("user", ())]
        require(first.role == "user", "what is asked about an image session begins with a message of the user")
        return [*asked(self._turns, *first.texts), *others]

    @property
    def is_open(self) -> bool:
        """Whether it takes questions."""
        return not self._prefix.is_closed

    @property
    def is_ready(self) -> bool:
        """Whether its rows are there."""
        return self._prefix.is_ready

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the pixels of its pictures."""
        return tuple(span.digest for span in self._prefix.prompt.spans)

    @property
    def peak_bytes(self) -> int:
        """The pages of the pool that the session's rows take, in bytes; each question adds its own."""
        return self._prefix.plan.peak_bytes

    @property
    def share(self) -> float:
        """The percentage of image rows that are stored."""
        return self._prefix.share

    @property
    def stats(self) -> ImageSessionStats:
        """What the session's tokens are and what their rows hold now."""
        prefix, cache = self._prefix, self._prefix.cache
        lease = cache.rows.lease if cache else None
        return ImageSessionStats(
            tokens=len(prefix.prompt),
            image_tokens=sum(span.length for span in prefix.prompt.spans),
            formats=prefix.plan.formats.by_tier(),
            bytes_stored=lease.nbytes if lease else 0,
            bytes_peak=prefix.plan.peak_bytes if lease else 0,
            bytes_budget=prefix.plan.budget,
            encode_ms=1000 * prefix.encode_seconds,
            prefill_ms=1000 * prefix.prefill_seconds,
        )

    def close(self) -> None:
        """Take no more questions; the rows are free when the last one on its way has ended. Closing twice is safe."""
        self._prefix.is_closed, self._prefix.pixels = True, None
        self._runtime.free_image_sessions()

    def __enter__(self) -> ImageSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._prefix.is_closed, self._prefix.pixels = True, None
        self._runtime.free_image_sessions(wait=False)


def _head(prefix: SharedPrefix) -> PromptShape:
    """The session's own tokens: what a preset's share is taken of, for the session and for its questions."""
    return prompt_shape(len(prefix.prompt), prefix.prompt.spans)


def _plan_session(options: Options, prompt: PromptShape, planner: RequestPlanner) -> KvPlan[Method]:
    """What the session stores, in the first formats that its budget holds."""
    budget = options.kv_budget_bytes
    choice, share = _choice(options, prompt, planner, None)
    planner.target.check_prompt(prompt, planner.spec, "picture")
    planner.target.check(choice, prompt, planner.spec)
    every = [choice.formats, *(planner.packed if budget and not options.formats else ())]
    method: Method = Full() if share == 100 else Distinct(share)
    plans = (kv_plan(method, each, planner.shape, prompt, 0, budget) for each in every)
    what = f"the {prompt.length} tokens of the session"
    return first_within(budget, plans, what, "raise --kv-budget or give fewer images")


def _choice(
    options: Options, prompt: PromptShape, planner: RequestPlanner, formats: Formats | None
) -> tuple[Choice, float]:
    """The method and formats that ``options`` ask for (``formats`` where they leave these out), if they share rows; and
    the percentage of image rows that they store."""
    if options.preset:
        choice, name = _preset(options.preset, prompt, planner), f"the preset {options.preset}"
    else:
        asked = options.formats or formats
        choice = next(candidates(options.method or Full.name, options.parameters, False, asked))
        name = choice.method.name
    stored = _stored(choice.method, name)
    _require_one_format(choice.formats)
    return choice, stored


def _preset(name: str, prompt: PromptShape, planner: RequestPlanner) -> Choice:
    chosen = planner.preset(name, prompt)
    if chosen.share is None:
        return next(chosen.choices())
    settings, what = list(chosen.choices()), f"the preset {name}"
    plan = quality.at_share(settings, chosen.share, prompt, planner.shape, what)
    return Choice(plan.method, plan.formats)


def _stored(method: Method, name: str) -> float:
    """The percentage of image rows that a method stores, whatever is asked; :class:`BadInput` where that depends on the
    question, or rows go later."""
    if method.shared_percent is None:
        drops = f"{name} stores rows for one question alone"
        require(not method.shared_with, f"{drops}: give {method.shared_with}")
        raise BadInput(f"{drops}: choose one of {', '.join(sharing_methods())}")
    return method.shared_percent


def _require_one_format(formats: Formats) -> None:
    require(
        formats.core == formats.secondary and Format(formats.core).rank is None,
        "a shared row is core for one question and secondary for another: give both one format, exact, int8, int8/int4 "
        "or int4",
    )
