"""What ``avl-edge run`` says beside answers: the plan, why that one, what was cut, and the table of ``--stats``."""

from __future__ import annotations

import sys
from dataclasses import asdict

from rich.table import Table

from ..config import format_size
from ..kv import quality
from ..kv.cache import prompt_shape
from ..kv.methods import Choice
from ..request import Result
from ..serving.requests import Request
from ..serving.runtime import Runtime
from .reserve import spoken


def say_cut(request: Request) -> None:
    """Of an answer that is no whole one."""
    tokens = request.max_new_tokens
    cure = "raise --max-new-tokens" if tokens == request.options.max_new_tokens else "the model's context is full"
    print(f"avl-edge: the answer was cut after {tokens} token{'s' if tokens > 1 else ''}: {cure}", file=sys.stderr)


def say_notes(request: Request) -> None:
    """What was noticed about the pictures."""
    for note in request.prompt.notes:
        print(f"avl-edge: {note}", file=sys.stderr)


def say_plan(request: Request) -> None:
    """What was picked to fit the budget."""
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


def say_choice(runtime: Runtime, request: Request, *, asked: bool) -> None:
    """Which method, and why; ``asked``: somebody named it."""
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


def table_of(result: Result) -> Table:
    """The statistics of an answer, for people."""
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
