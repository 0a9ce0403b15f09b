"""The times of `bench attention` as a picture: latency over batch size."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...optional import optional
from .plots import FORMATS

_CURVES = {  # of a case's `ms`: label, colour (distinct for colour-blind eyes), marker
    "native": ("ours, where the rows lie", "#0072b2", "o"),
    "slice_then_multiply": ("slice, then multiply", "#d55e00", "s"),
    "contiguous": ("contiguous, gathered before", "#009e73", "^"),
    "full": ("all rows", "#555555", "D"),
}
_DPI = 150


def require_plot(path: Path) -> None:
    """Raise :class:`BadInput`, before any work is done, where matplotlib or the folder of ``path`` is missing."""
    optional("matplotlib", "--plot")
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise BadInput(f"--plot {path} must end in {' or '.join(f'.{suffix}' for suffix in FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"--plot {path}: there is no folder {path.absolute().parent}")


def draw_attention(document: Mapping[str, Any], path: Path) -> None:
    """``machine`` and ``cases`` of the command's document as the picture ``path``, a panel for each number of key/value
    heads. A file that is there is replaced once the picture is drawn."""
    panels: dict[int, list[Mapping[str, Any]]] = {}
    for case in document["cases"]:
        panels.setdefault(case["kv_heads"], []).append(case)
    content = io.BytesIO()
    attention_figure(document, panels).savefig(content, format=path.suffix.lower().removeprefix("."), dpi=_DPI)
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror})") from None


def attention_figure(document: Mapping[str, Any], panels: Mapping[int, Sequence[Mapping[str, Any]]]) -> Any:
    """The picture as matplotlib's ``Figure``; ``panels`` are the document's cases by key/value heads."""
    # Figure alone: pyplot would keep global state.
    figure = optional("matplotlib.figure", "--plot").Figure(figsize=(1.6 + 4 * len(panels), 4.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (kv_heads, cases) in zip(all_axes, panels.items(), strict=True):
        _draw(axes, sorted(cases, key=lambda case: int(case["batch"])))
        axes.set_title(f"{kv_heads} key/value heads", fontsize="medium")
    all_axes[0].set_ylabel("ms per layer and step")
    lines, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2)
    figure.suptitle(_title(document), fontsize="medium")
    return figure


def _draw(axes: Any, cases: Sequence[Mapping[str, Any]]) -> None:
    """Both axes are logarithmic: equal distances are equal ratios."""
    batches = [case["batch"] for case in cases]
    for way, (label, colour, marker) in _CURVES.items():
        axes.plot(batches, [case["ms"][way] for case in cases], color=colour, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(optional("matplotlib.ticker", "--plot").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("batch size, in sequences")
    axes.grid(alpha=0.3)


def _title(document: Mapping[str, Any]) -> str:
    machine, case = document["machine"], document["cases"][0]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    shape = f"{case['heads']} heads of {case['head_dim']}, {case['dtype']}"
    rows = f"{100 * case['core_fraction']:g} % of {case['rows']} rows"
    return f"decode attention: {shape}, {rows}\n{machine['cpu'] or 'unknown processor'}, {threads}"
