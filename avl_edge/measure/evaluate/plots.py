"""Pictures of an evaluation: what a method's bytes buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...optional import optional
from .attention import draw
from .settings import REFERENCE

FORMATS = ("svg", "png")
_PLOTS = {"quality": "score", "latency": "ms_per_token"}
_DPI = 150
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # for colour-blind eyes too
_OTHERS = "#cccccc"
_SHARES = tuple(100 / 2**power for power in range(-2, 9))
_LINE = 0.06  # between two names, of the height of the axes


def require_plots(folder: Path) -> None:
    """Raise :class:`BadInput` where matplotlib or ``folder`` cannot be used, before any work is done."""
    optional("matplotlib", "--plots")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def draw_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """``quality_bytes``, ``latency_bytes`` and, where it was watched, ``attention`` as SVG and PNG in ``folder``: the
    files that were written."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, key in _PLOTS.items():
            figure = bytes_figure(report, key)
            for suffix in FORMATS:
                written.append(folder / f"{name}_bytes.{suffix}")
                figure.savefig(written[-1], dpi=_DPI)
        if report.get("attention"):
            figure = optional("matplotlib.figure", "--plots").Figure(figsize=(9.6, 4.2), layout="constrained")
            draw(report["attention"], figure)
            for suffix in FORMATS:
                written.append(folder / f"attention.{suffix}")
                figure.savefig(written[-1], dpi=_DPI)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return written


def _unwritable(folder: Path, error: OSError) -> BadInput:
    return BadInput(f"no plots can be written to {folder} ({error.strerror})")


def bytes_figure(report: Mapping[str, Any], key: str) -> Any:
    """A line per method over the share of full attention's bytes that it stored, each named where it ends. ``Figure``
    alone: pyplot would keep global state."""
    methods = _by_method(report["results"], key)
    figure = optional("matplotlib.figure", "--plots").Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    leaders = _leaders(_by_method(report["results"], "score"))
    coloured = {method: colour for method, colour in zip(leaders, _COLOURS, strict=False) if method in methods}
    for method, rows in methods.items():
        colour = coloured.get(method, _OTHERS)
        shares = [100 * row["bytes_stored_fraction"] for row in rows]
        errors = _errors(rows, key) if method in coloured else None
        axes.errorbar(
            shares,
            [row[key] for row in rows],
            yerr=errors,
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            elinewidth=0.7,
            zorder=2 if method in coloured else 1,
        )
    _set_axes(axes, report, key, methods)
    _name_lines(axes, {method: (methods[method], colour) for method, colour in coloured.items()}, key)
    left_over = len(methods) - len(coloured)
    more = f"; in grey {left_over} more" if left_over else ""
    axes.set_title(f"model {report['model']}, {report['questions']} questions of {report['data']}{more}")
    return figure


def _leaders(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The methods that get a colour, in all pictures the same: full attention, and then those whose answers are best at
    most of the shares of memory."""
    shares = sorted({row["kv_fraction"] for rows in methods.values() for row in rows})
    points = dict.fromkeys(methods, 0.0)
    for share in shares:
        at = {method: row["score"] for method, rows in methods.items() for row in rows if row["kv_fraction"] == share}
        for place, method in enumerate(sorted(at, key=lambda each: -at[each])):
            points[method] += 1 / (1 + place)
    reference = [method for method in methods if method == REFERENCE.method]
    others = sorted(methods.keys() - set(reference), key=lambda each: (-points[each], each))
    return [*reference, *others][: len(_COLOURS)]


def _set_axes(axes: Any, report: Mapping[str, Any], key: str, methods: Mapping[str, Any]) -> None:
    axes.set_xscale("log", base=2)
    found = sorted({100 * row["bytes_stored_fraction"] for rows in methods.values() for row in rows})
    least, most = found[0], max(found[-1], 100)
    ticks = [tick for tick in _SHARES if least / 1.5 <= tick <= most * 1.5]
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(least / 1.2, most * 1.2)
    axes.set_xlabel("KV memory at the end of an answer, of full attention's")
    axes.set_ylabel(report["metric"].replace("_", " ") if key == "score" else "ms per token")
    if key != "score":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _name_lines(axes: Any, lines: Mapping[str, tuple[Sequence[Mapping[str, Any]], str]], key: str) -> None:
    """Each line's name right of the axes, as high as the line ends, as far as the names leave each other room."""
    bottom, top = axes.get_ylim()
    ends = {method: (rows[-1][key] - bottom) / (top - bottom) for method, (rows, _) in lines.items()}
    heights: dict[str, float] = {}
    for method in sorted(ends, key=lambda each: ends[each]):
        heights[method] = max(ends[method], *(height + _LINE for height in heights.values()), 0.0)
    beyond = max([*heights.values(), 1.0]) - 1.0
    for method, height in heights.items():
        at = (1.02, height - beyond)
        axes.annotate(
            method, at, xycoords="axes fraction", color=lines[method][1], fontsize=8, va="center", annotation_clip=False
        )


def _by_method(results: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        if row[key] is not None:
            found.setdefault(row["method"], []).append(row)
    return {method: sorted(rows, key=lambda row: row["bytes_stored"]) for method, rows in found.items()}


def _errors(rows: Sequence[Mapping[str, Any]], key: str) -> list[list[float]] | None:
    """Distances from the score down and up to the ends of its interval."""
    if key != "score":
        return None
    ends = [(row["score"], *(row["score_interval"] or [row["score"]] * 2)) for row in rows]
    # The percentiles of a few equal scores may miss their mean by a rounding error.
    return [[max(score - low, 0) for score, low, _ in ends], [max(high - score, 0) for score, _, high in ends]]
