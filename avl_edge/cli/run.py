"""``avl-edge run``"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, TypeAlias

import torch
import typer
from rich.table import Table

from ..backends.targets import TARGETS
from ..config import Options, format_size, require
from ..kv import quality
from ..kv.cache import prompt_shape
from ..kv.methods import Choice
from ..kv.methods.notation import format_names
from ..model.images import Source
from ..model.prompt import Message
from ..request import Result
from ..serving.requests import Request
from ..serving.runtime import Runtime
from . import memory, several
from .conversation import Fps, History, System, VideoFrames, said_before, video
from .memory import MaxMemory
from .options import (
    METHOD,
    Core,
    CoreFormat,
    FrequencyPenalty,
    HeadFormat,
    Json,
    KvBudget,
    KvFormat,
    LogitBias,
    MaxNewTokens,
    MaxPixels,
    Method,
    MinP,
    MinPixels,
    Parameters,
    PrefillKeep,
    PresencePenalty,
    Refresh,
    RepetitionPenalty,
    Secondary,
    SecondaryFormat,
    Seed,
    Stop,
    Temperature,
    TextFormat,
    TextKeep,
    Threads,
    TopK,
    TopP,
    Transparency,
    WeightsFormat,
    WithExplanation,
    WithLogprobs,
    WithStats,
    given_biases,
    given_parameters,
)
from .progress import progress, stderr
from .reserve import Reserve, reserve_bytes, spoken
from .sources import check_stdin, pictures, questions
from .terminal import Debug, readers_may_leave

Prompts: TypeAlias = Annotated[
    list[str],
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="The question, - for stdin or @FILE; given several times, the pictures are read once and all are asked "
        "together.",
    ),
]
Images: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--image", metavar="FILE", help="A picture (JPEG, PNG, WebP, BMP), or - for stdin; may be given several times."
    ),
]
AnyModel: TypeAlias = Annotated[
    str, typer.Option(help="'demo', the directory of a checkpoint, or one that avl-edge build has made.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(help=f"Where to compute: {', '.join(TARGETS)}.", show_default="cpu; tensorrt for a built package"),
]
PresetName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"A measured setting instead of method, formats and budget: {', '.join(quality.PRESETS)}.",
        rich_help_panel=METHOD,
    ),
]


def run(
    prompt: Prompts,
    image: Images = None,
    frames: VideoFrames = None,
    fps: Fps = 2.0,
    system: System = None,
    history: History = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    model: AnyModel = "demo",
    max_new_tokens: MaxNewTokens = Options.max_new_tokens,
    transparency: Transparency = None,
    device: Device = None,
    threads: Threads = None,
    temperature: Temperature = Options.temperature,
    top_k: TopK = Options.top_k,
    top_p: TopP = Options.top_p,
    min_p: MinP = Options.min_p,
    repetition_penalty: RepetitionPenalty = Options.repetition_penalty,
    frequency_penalty: FrequencyPenalty = Options.frequency_penalty,
    presence_penalty: PresencePenalty = Options.presence_penalty,
    logit_bias: LogitBias = None,
    seed: Seed = Options.seed,
    stop: Stop = None,
    preset: PresetName = None,
    method: Method = None,
    prefill_keep: PrefillKeep = None,
    secondary: Secondary = None,
    core: Core = None,
    refresh: Refresh = None,
    text_keep: TextKeep = None,
    parameters: Parameters = None,
    kv_budget: KvBudget = None,
    max_memory: MaxMemory = None,
    reserve: Reserve = None,
    weights: WeightsFormat = None,
    head: HeadFormat = None,
    kv_format: KvFormat = None,
    text_format: TextFormat = None,
    core_format: CoreFormat = None,
    secondary_format: SecondaryFormat = None,
    explain: WithExplanation = False,
    stats: WithStats = False,
    logprobs: WithLogprobs = Options.logprobs,
    as_json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Answer questions about one or more images. The answer to a single one streams to stdout."""
    options = Options(
        parameters=given_parameters(parameters, prefill_keep, secondary, core, refresh, text_keep),
        formats=format_names(text_format, core_format, secondary_format, kv_format),
        logit_bias=given_biases(logit_bias),
        stop=stop or (),
        method=method,
        preset=preset,
        kv_budget=kv_budget,
        max_new_tokens=max_new_tokens,
        transparency=transparency,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
        logprobs=logprobs,
    )
    runtime = _open(model, device, threads, reserve, max_memory, weights, head)
    before, show = said_before(system, history), Show(as_json, stats, explain)
    _ask(runtime, video(frames, fps), image or [], prompt, before, options, show)


def _open(
    model: str,
    device: str | None,
    threads: int | None,
    reserve: str | None,
    max_memory: str | None,
    weights: str | None,
    head: str | None,
) -> Runtime:
    if threads is not None:
        torch.set_num_threads(threads)
    runtime = Runtime.open(model, device=device, max_memory=max_memory, weights=weights, head=head)
    # Where rows cannot give memory back, a profile's reserve is no default.
    left = reserve_bytes(reserve) if reserve is not None or runtime.can_keep_free else None
    if left is not None:
        runtime.keep_free(left)
    return runtime


@dataclass(frozen=True)
class Show:
    """What is printed, and how."""

    as_json: bool
    stats: bool
    explain: bool


def _ask(
    runtime: Runtime,
    shown: list[Source],
    names: list[str],
    prompts: list[str],
    before: list[Message],
    options: Options,
    show: Show,
) -> None:
    check_stdin(names, prompts)
    images, prompts = [*shown, *pictures(names, runtime.max_pixels)], questions(prompts)
    require(show.as_json or options.logprobs is None, "log-probabilities are printed with --json: give both")
    if len(prompts) > 1:
        _ask_several(runtime, several.plan(runtime, images, prompts, options, before), options, show)
    else:
        _ask_one(runtime, runtime.prepare(images, prompts[0], options, before), show)


def _ask_one(runtime: Runtime, request: Request, show: Show) -> None:
    _say_notes(request)
    if request.options.kv_budget is not None:
        _say_plan(request)
    if show.explain:
        _explain(runtime, request, asked=request.options.method is not None or request.plan.budget is None)
    _load(runtime, request.plan.peak_bytes)
    with readers_may_leave():
        result = _answer(runtime, request, quiet=show.as_json)
        if result.finish_reason == "length" and not show.as_json:
            _say_cut(request)
        if show.as_json:
            print(json.dumps({**result.to_dict(), "memory": asdict(runtime.memory())}))
    if show.stats:
        stderr.print(_table(result))
        print(_memory(runtime), file=sys.stderr)


def _ask_several(runtime: Runtime, asked: several.Several, options: Options, show: Show) -> None:
    budget = options.kv_budget_bytes
    _say_notes(asked.requests[0])
    if budget is not None:
        several.say_plan(asked, budget)
    if show.explain:
        _explain(runtime, asked.requests[0], asked=options.method is not None or budget is None)
    _load(runtime, asked.peak_bytes)
    with readers_may_leave(), asked.session as session:
        results = asked.answer(runtime, quiet=show.as_json)
        for request, result in zip(asked.requests, results, strict=True) if not show.as_json else ():
            if result.finish_reason == "length":
                _say_cut(request)
        if show.as_json:
            print(json.dumps({**asked.document(results), "memory": asdict(runtime.memory())}))
        held = several.describe(session.stats)
    if show.stats:
        print(held, file=sys.stderr)
        for prompt, result in zip(asked.prompts, results, strict=True):
            print(prompt, file=sys.stderr)
            stderr.print(_table(result))
        print(_memory(runtime), file=sys.stderr)


def _load(runtime: Runtime, pool_bytes: int) -> None:
    with progress("loading") as report:
        runtime.load_weights(pool_bytes=pool_bytes, progress=report)


def _memory(runtime: Runtime) -> str:
    return f"memory: {memory.spoken(runtime.memory())}"


def _answer(runtime: Runtime, request: Request, quiet: bool) -> Result:
    with runtime.submit(request) as generation:
        for event in generation:
            if not quiet:
                print(event.text, end="", flush=True)
        if not quiet:
            print()
        return generation.result()


def _say_cut(request: Request) -> None:
    tokens = request.max_new_tokens
    cure = "raise --max-new-tokens" if tokens == request.options.max_new_tokens else "the model's context is full"
    print(f"avl-edge: the answer was cut after {tokens} token{'s' if tokens > 1 else ''}: {cure}", file=sys.stderr)


def _say_notes(request: Request) -> None:
    for note in request.prompt.notes:
        print(f"avl-edge: {note}", file=sys.stderr)


def _say_plan(request: Request) -> None:
    plan = request.plan
    assert plan.budget is not None
    values = asdict(plan.method)
    picked = " ".join(f"{each.symbol} {values[each.name]:g}" for each in plan.method.parameters() if each.symbol)
    print(
        f"avl-edge: {plan.method.name} {picked}".rstrip()
        + ("" if plan.formats.all_exact else f", {_spoken(plan.formats.by_tier())},")
        + f" holds at most {format_size(plan.peak_bytes)} of the {format_size(plan.budget)} budget",
        file=sys.stderr,
    )


def _explain(runtime: Runtime, request: Request, *, asked: bool) -> None:
    plan, preset = request.plan, request.options.preset
    if preset:
        why = runtime.planner.preset(preset, prompt_shape(len(request.prompt), request.prompt.spans)).why
    else:
        why = quality.explain(Choice(plan.method, plan.formats), asked=asked)
    settings = " ".join(f"{name}={value:g}" for name, value in asdict(plan.method).items())
    formats = _spoken(plan.formats.by_tier()) or "rows exact"
    chosen = f"{preset}: {plan.method.name}" if preset else plan.method.name
    print(f"avl-edge: {chosen} ({'; '.join(filter(None, (settings, formats)))}): {why}", file=sys.stderr)


def _spoken(formats: dict[str, str]) -> str:
    """``text int8, core int4``: tiers that are not exact."""
    return ", ".join(f"{tier} {name}" for tier, name in formats.items() if name != "exact")


_ENDS = {"stop": "by the model, or at a stop string", "length": "cut at the longest answer", "cancelled": "cancelled"}


def _table(result: Result) -> Table:
    kv, timings, usage = result.kv, result.timings, result.usage
    settings = " ".join(f"{name}={value:g}" for name, value in result.settings.items())
    rows = (
        ("method", f"{result.method} {settings}".strip()),
        ("formats", _spoken(result.formats) or "exact"),
        ("tokens", f"{usage.prompt_tokens} prompt ({usage.image_tokens} image), {usage.completion_tokens} new"),
        ("ended", _ENDS[result.finish_reason]),
        ("load / encode / prefill", f"{timings.load_ms:.0f} / {timings.encode_ms:.0f} / {timings.prefill_ms:.0f} ms"),
        ("first token", f"{timings.ttft_ms:.0f} ms"),
        ("decode", f"{timings.decode_ms_per_token:.2f} ms per token, {timings.tokens_per_s:.1f} tokens/s"),
        *((("seed", str(result.seed)),) if result.seed is not None else ()),
        ("KV stored / peak / full", " / ".join(map(format_size, (kv.bytes_stored, kv.bytes_peak, kv.bytes_full)))),
        *((("KV shared", format_size(kv.bytes_shared)),) if kv.bytes_shared else ()),
        ("KV rows read", f"{100 * kv.rows_read_fraction:.1f} % of full attention's, {kv.refreshes} refreshes"),
        *((("memory pressure", spoken(kv.pressure)),) if spoken(kv.pressure) else ()),
    )
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table
