"""Pictures of an evaluation: what a method's bytes buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...optional import optional
from .attention import draw

FORMATS = ("svg", "png")
_PLOTS = {"quality": "score", "latency": "ms_per_token"}
_DPI = 150
_FEW = 6  # more methods than that have their legend beside the axes
_MARKERS = ("o", "s", "^")


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
            figure = _figure(report, key)
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


def _figure(report: Mapping[str, Any], key: str) -> Any:
    """A line per method over the bytes that it stored. ``Figure`` alone: pyplot would keep global state."""
    methods = _by_method(report["results"], key)
    many = len(methods) > _FEW
    figure = optional("matplotlib.figure", "--plots").Figure(figsize=(10 if many else 6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (method, rows) in enumerate(methods.items()):
        megabytes = [row["bytes_stored"] / 1e6 for row in rows]
        values = [row[key] for row in rows]
        marker = _MARKERS[number // 10 % len(_MARKERS)]  # colours come again after ten
        axes.errorbar(megabytes, values, yerr=_errors(rows, key), marker=marker, capsize=3, label=method)
    axes.set_xlabel("KV memory at the end of an answer (MB)")
    axes.set_ylabel(report["metric"].replace("_", " ") if key == "score" else "ms per token")
    axes.set_title(f"model {report['model']}, {report['questions']} questions of {report['data']}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(**({"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "fontsize": 7} if many else {}))
    return figure


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
