"""A profile as a picture: what was measured against what the costs say, one panel a phase."""

from __future__ import annotations

import math
from collections.abc import Iterable
from xml.sax.saxutils import escape

from .schema import ANY, DeviceProfile, Record

_SIDE, _MARGIN, _GAP = 300, 64, 96
_COLOURS = ("#0072b2", "#d55e00")  # fitted, held out; distinct for colour-blind eyes
_DERIVED_GB = (0.25, 0.5, 1, 2, 4, 8, 16)

Point = tuple[float, float, str, str]  # predicted ms, measured ms, label, colour


def svg(profile: DeviceProfile) -> str:
    """An SVG document. A profile without measurements is drawn as what its costs say, and says that."""
    panels = [
        (f"{phase}, {'any model' if name == ANY else name}", points)
        for name, record in profile.models.items()
        for phase in ("attention", "linear", "decode", "prefill", "vision")
        if (points := _points(record, phase))
    ]
    drawn = [_panel(title, points, index) for index, (title, points) in enumerate(panels)] or [_roofline(profile)]
    width = _MARGIN + len(drawn) * (_SIDE + _GAP)
    height = _SIDE + 2 * _MARGIN + 24
    title = escape(f"{profile.name}, {profile.date}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_MARGIN}" y="24" font-size="15">{title}</text>{"".join(drawn)}</svg>\n'
    )


def _points(record: Record, phase: str) -> list[Point]:
    return [
        (max(record.costs.milliseconds(sample.amounts), 1e-6), sample.ms, sample.label, _COLOURS[sample.held_out])
        for sample in record.samples
        if sample.phase == phase
    ]


def _panel(title: str, points: list[Point], index: int) -> str:
    """Measured over predicted milliseconds, both logarithmic; on the line the costs are right."""
    low, high = _bounds(value for x, y, _, _ in points for value in (x, y))
    left = _MARGIN + index * (_SIDE + _GAP)

    def place(value: float) -> float:
        return _SIDE * (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))

    dots = "".join(
        f'<circle cx="{left + place(x):.1f}" cy="{_MARGIN + _SIDE - place(y):.1f}" r="3.5" fill="{colour}" '
        f'fill-opacity=".75"><title>{escape(label)}: {y:.3g} ms, predicted {x:.3g}</title></circle>'
        for x, y, label, colour in points
    )
    diagonal = (
        f'<line x1="{left}" y1="{_MARGIN + _SIDE}" x2="{left + _SIDE}" y2="{_MARGIN}" stroke="#999" '
        f'stroke-dasharray="4 3"/>'
    )
    return _frame(left, title, "predicted ms", "measured ms", low, high) + diagonal + dots


def _roofline(profile: DeviceProfile) -> str:
    """Milliseconds to read a step's weights or rows, from the costs alone."""
    costs = profile.models[ANY].costs
    points = [
        (gb, max(gb * costs.decode_ms_per_gb_of_weights.value, 1e-6), f"{gb} GB", _COLOURS[0]) for gb in _DERIVED_GB
    ]
    low, high = _bounds(value for x, y, _, _ in points for value in (x, y))
    span = math.log10(high) - math.log10(low)
    path = " ".join(
        f"{_MARGIN + _SIDE * math.log10(x / low) / span:.1f},{_MARGIN + _SIDE * (1 - math.log10(y / low) / span):.1f}"
        for x, y, _, _ in points
    )
    basis = costs.decode_ms_per_gb_of_weights.basis
    title = f"a decode step, {basis}{', not measured' if basis == 'derived' else ''}"
    line = f'<polyline points="{path}" fill="none" stroke="{_COLOURS[0]}" stroke-dasharray="6 4"/>'
    return _frame(_MARGIN, title, "GB read", "ms", low, high) + line


def _bounds(values: Iterable[float]) -> tuple[float, float]:
    """The powers of ten around ``values``, at least one apart."""
    found = list(values)
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _frame(left: int, title: str, x_name: str, y_name: str, low: float, high: float) -> str:
    bottom = _MARGIN + _SIDE
    ticks = ""
    decades = round(math.log10(high / low))
    for step in range(decades + 1):
        at, value = _SIDE * step / decades, f"{low * 10**step:g}"
        ticks += f'<text x="{left + at:.0f}" y="{bottom + 16}" text-anchor="middle">{value}</text>'
        ticks += f'<text x="{left - 6}" y="{bottom - at + 4:.0f}" text-anchor="end">{value}</text>'
    middle = left + _SIDE / 2
    return (
        f'<rect x="{left}" y="{_MARGIN}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#333"/>{ticks}'
        f'<text x="{left}" y="{_MARGIN - 10}">{escape(title)}</text>'
        f'<text x="{middle:.0f}" y="{bottom + 36}" text-anchor="middle">{x_name}</text>'
        f'<text x="{left - 44}" y="{_MARGIN + _SIDE / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 {left - 44} {_MARGIN + _SIDE / 2:.0f})">{y_name}</text>'
    )
