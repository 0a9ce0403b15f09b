"""``avl-edge eval``"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer

from ..config import require
from ..errors import BadInput
from ..kv.methods import METHODS
from ..measure.evaluate import (
    METRICS,
    REFERENCE,
    AnswerLog,
    Asked,
    Divergence,
    EvaluationRun,
    Questions,
    Setting,
    check_questions,
    describe,
    draw_plots,
    read_questions,
    report,
    require_packages,
    require_plots,
    settings_of,
    watch,
)
from ..measure.perplexity import HEADER, TEXT, WindowLayout
from ..model.demo import DEMO
from ..model.weight_format import WeightFormats
from ..serving.runtime import Runtime
from .memory import MaxMemory
from .options import FORMATS, MEMORY, METHOD, OUTPUT, HeadFormat, Json, Model, Threads, WeightsFormat, checkpoint_of
from .progress import Paper, progress, stderr
from .quality_table import quality_table
from .terminal import Debug, readers_may_leave
from .text import text_document, text_table

TEXTS = "Text options"
_MOST_PROBLEMS = 10


Data: TypeAlias = Annotated[
    str,
    typer.Option(
        help="'demo', a JSONL file of image, question and answers, the folder of DocVQA, TextVQA, OCRBench, "
        "VQAv2, Nocaps or Flickr30k, or text:FILE,FILE for the perplexity of any UTF-8 text."
    ),
]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Chooses the questions.")]
HowMany: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="How many questions.", show_default="200 of the demo's, all others")
]
Metric: TypeAlias = Annotated[
    str | None, typer.Option(help=f"The score, of {', '.join(METRICS)}.", show_default="the data set's own")
]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Methods: TypeAlias = Annotated[
    str,
    typer.Option(
        help=f"Of {', '.join(METHODS)}, with commas between them. Parameters and formats may follow with colons, as in "
        f"avl:refresh=1 or distinct:format=int4. A format is {FORMATS}; format is that of every tier, text_format, "
        "core_format and secondary_format of one.",
        rich_help_panel=METHOD,
    ),
]
KvFraction: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Shares of full attention's memory at the end of the prompt, like 0.5,0.25.",
        show_default="0.5, of texts 1",
        rich_help_panel=MEMORY,
    ),
]
Kl: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--kl",
        help="Also compare the predictions token by token with full's: twice the time.",
        rich_help_panel=OUTPUT,
    ),
]
Attention: TypeAlias = Annotated[
    int,
    typer.Option(
        min=0,
        help="Also watch full attention on so many of the questions: how concentrated it is.",
        rich_help_panel=OUTPUT,
    ),
]
Window: TypeAlias = Annotated[
    int, typer.Option(min=2, help="Tokens of a window, prompt included.", rich_help_panel=TEXTS)
]
PromptTokens: TypeAlias = Annotated[
    int,
    typer.Option(
        "--prompt-tokens",
        min=1,
        help="Tokens of a window that are its prompt; the rest are decoded.",
        rich_help_panel=TEXTS,
    ),
]
Windows: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Windows of each text, from its beginning.", rich_help_panel=TEXTS)
]
AsImage: TypeAlias = Annotated[
    int,
    typer.Option(
        min=0,
        help=f"So many tokens of each prompt, after its first {HEADER}, are held as an image's, for methods that "
        "decide about image rows.",
        rich_help_panel=TEXTS,
    ),
]
Out: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Write the JSON here too. Answers are kept beside it: the same command goes on where it was.",
        rich_help_panel=OUTPUT,
    ),
]
Plots: TypeAlias = Annotated[
    Path | None, typer.Option(help="Draw plots into this folder, as SVG and PNG.", rich_help_panel=OUTPUT)
]
_OF_QUESTIONS = ("questions", "seed", "metric", "max_new_tokens", "kl", "attention", "plots")
_OF_TEXTS = ("window", "prompt_tokens", "windows", "as_image")


def evaluate(
    context: typer.Context,
    data: Data = "demo",
    questions: HowMany = None,
    seed: Seed = 1,
    metric: Metric = None,
    model: Model = "demo",
    max_new_tokens: MaxNewTokens = 160,
    threads: Threads = None,
    methods: Methods = "full,avl",
    kv_fraction: KvFraction = None,
    max_memory: MaxMemory = None,
    weights: WeightsFormat = None,
    head: HeadFormat = None,
    window: Window = 1024,
    prompt_tokens: PromptTokens = 128,
    windows: Windows = 1,
    as_image: AsImage = 0,
    kl: Kl = False,
    attention: Attention = 0,
    out: Out = None,
    plots: Plots = None,
    as_json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Ask the same questions with several methods, or decode the same texts: quality against memory.

    \b
    Example:
      avl-edge eval --methods full,distinct:format=int4 --kv-fraction 0.5,0.25
      avl-edge eval --data text:README.md --methods full:format=int8,h2o:grow=1
    """
    is_text = data.startswith(TEXT)
    _refuse(context, *((_OF_QUESTIONS, "questions") if is_text else (_OF_TEXTS, "texts")))
    packed = WeightFormats.of(weights, head)
    settings = settings_of(_names(methods), _fractions(kv_fraction or ("1" if is_text else "0.5")))
    require(out is None or not (out.is_dir() or not out.name), f"{out} is a folder: give --out the name of a file")
    if threads is not None:
        torch.set_num_threads(threads)
    if is_text:
        layout = WindowLayout(window, prompt_tokens, as_image)
        document = _with_command(text_document(data, model, settings, layout, windows, max_memory, packed))
        _publish(document, out, None, as_json)
        return
    require(metric is None or metric in METRICS, f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}")
    require(not kl or REFERENCE in settings, "--kl compares with full attention: name full in --methods too")
    require(
        max_memory is None or not (kl or attention),
        "--kl and --attention hold more than --max-memory counts: leave them out, or it",
    )
    if kl:
        checkpoint_of(model)
    if plots:
        require_plots(plots)
    document = _with_command(
        _answered(
            data, questions, seed, metric, model, max_new_tokens, settings, kl, attention, out, max_memory, packed
        )
    )
    _publish(document, out, plots, as_json)


def _refuse(context: typer.Context, options: tuple[str, ...], what: str) -> None:
    """:class:`BadInput` where an option was given that is about ``what`` else."""
    for name in options:
        source = context.get_parameter_source(name)
        require(
            source is None or source.name != "COMMANDLINE", f"--{name.replace('_', '-')} is about {what}: leave it out"
        )


def _with_command(document: dict[str, Any]) -> dict[str, Any]:
    return {"command": shlex.join(["avl-edge", *sys.argv[1:]]), **document}


def _answered(
    data: str,
    count: int | None,
    seed: int,
    metric: str | None,
    model: str,
    max_new_tokens: int,
    settings: list[Setting],
    kl: bool,
    attention: int,
    out: Path | None,
    max_memory: str | None,
    packed: WeightFormats,
) -> dict[str, Any]:
    """The evaluation on questions; its answers are kept beside ``out``."""
    names = packed.named()
    runtime = Runtime.open(model, max_memory=max_memory, weights=names.get("weights"), head=names.get("head"))
    for setting in settings:
        setting.check(runtime.kv_shape)
    with tempfile.TemporaryDirectory(prefix="avl-edge-") as scratch:
        asked_of = read_questions(data, seed, count, Path(scratch))
        metric = metric or asked_of.metric
        check_questions(metric, asked_of.items)
        require_packages(metric)
        directory = DEMO if model == "demo" else Path(model)
        log = AnswerLog(
            out and out.with_suffix(".answers.jsonl"), describe(asked_of, directory, packed, max_new_tokens, kl)
        )
        with progress("loading") as loading:
            runtime.load_weights(progress=loading)
        run = EvaluationRun(runtime, log, max_new_tokens, Divergence(runtime, directory, packed) if kl else None)
        asked = _ask(run, asked_of, settings, log.path)
        seen = _watch(runtime, asked_of, attention, max_new_tokens) if attention else None
    return {**report(runtime, asked_of, asked, metric), **({"attention": seen} if seen else {})}


def _publish(document: dict[str, Any], out: Path | None, plots: Path | None, as_json: bool) -> None:
    """The evaluation's results: into files first, then to stdout."""
    _say_left_out(document)
    if out:
        _write(out, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    if plots:
        draw_plots(document, plots)
    with readers_may_leave():
        if as_json:
            print(json.dumps(document, ensure_ascii=False))
        else:
            Paper().print(text_table(document) if "texts" in document else quality_table(document))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in _names(text)]
    except ValueError:
        raise BadInput(f"cannot read --kv-fraction {text!r}: give numbers with commas, like 0.5,0.25") from None


def _ask(run: EvaluationRun, questions: Questions, settings: list[Setting], kept: Path | None) -> Asked:
    try:
        with progress("asking") as asking:
            return run.ask_all(questions, settings, asking)
    except KeyboardInterrupt:
        if kept:
            _say(f"stopped; the answers are in {kept}, and the same command goes on from there")
        raise


def _watch(runtime: Runtime, questions: Questions, count: int, max_new_tokens: int) -> dict[str, Any]:
    with progress("watching") as watching:
        return watch(runtime, questions, count, max_new_tokens, watching)


def _say_left_out(document: Mapping[str, Any]) -> None:
    problems = [f"{row['where']} was left out: {row['reason']}" for row in document["problems"]]
    rest = len(problems) - _MOST_PROBLEMS
    shown = problems[:_MOST_PROBLEMS] + ([f"{rest} more were left out"] if rest > 0 else [])
    for line in (
        document.get("warnings", [])
        + shown
        + [f"a setting was left out: {row['reason']}" for row in document["unreachable"]]
    ):
        _say(line)


def _say(line: str) -> None:
    stderr.print(f"avl-edge: {line}", markup=False, soft_wrap=True)


def _write(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character, as JSON escapes it
        staged.replace(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}): give --out another place") from None
