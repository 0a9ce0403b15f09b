"""A profile as text for people: every number with its unit and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from ...config import format_size
from .schema import ANY, Costs, DeviceProfile, Figure, Record


def report(profile: DeviceProfile) -> str:
    """The profile as tables."""
    return "\n".join(_lines(profile)) + "\n"


def _lines(profile: DeviceProfile) -> Iterator[str]:
    mode = f", power mode {profile.power_mode.name}" if profile.power_mode else ""
    yield f"{profile.name}: {profile.device.name} ({profile.device.architecture}){mode}, {profile.date}"
    yield "made with " + ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    yield ""
    yield "memory"
    yield from _table(profile.memory)
    for name, record in profile.models.items():
        yield ""
        yield "any model" if name == ANY else f"model {name}"
        yield from _record(record)


def _record(record: Record) -> Iterator[str]:
    yield from _table(record.costs)
    yield from _table(record.peaks)
    if record.budgets:
        yield "  budgets"
        yield from _table(record.budgets)
    for phase, fit in record.fit.items():
        yield (
            f"  fit of {phase}: {fit.fitted_points} points; error on {fit.held_out_points} others "
            f"{fit.median_error_percent:.1f} % in the median, {fit.worst_error_percent:.1f} % at worst"
        )
    if record.samples:
        yield f"  {len(record.samples)} samples"


def _table(part: object) -> Iterator[str]:
    """The figures of a dataclass, one a line."""
    for each in fields(part):  # type: ignore[arg-type]
        figure = getattr(part, each.name)
        if isinstance(figure, Figure):
            name, value = _spoken(each.name, figure.value, isinstance(part, Costs))
            yield f"  {name:<38} {value:>16}  {figure.basis:<8}  {figure.origin}"


def _spoken(name: str, value: float, cost: bool) -> tuple[str, str]:
    """A field's name without its unit, and its value with it."""
    if cost:
        phase, unit, _, what = name.split("_", 3)
        return (
            f"{phase}, per {what.replace('gb', 'GB').replace('tflop', 'TFLOP').replace('_', ' ')}",
            _time(value, unit),
        )
    if name.endswith("_bytes_per_s"):
        return name.removesuffix("_bytes_per_s").replace("_", " "), f"{value / 1e9:.4g} GB/s"
    if name.endswith("_percent"):
        return name.removesuffix("_percent").replace("_", " "), f"{value:.4g} %"
    return name.removesuffix("_bytes").replace("_", " "), format_size(int(value))


def _time(value: float, unit: str) -> str:
    """In a unit in which people read it: nothing below a thousandth of a nanosecond, and no powers of ten."""
    units = ("ns", "us", "ms", "s")
    at = units.index(unit)
    while at and 0 < value < 0.1:
        at, value = at - 1, value * 1000
    return f"{value:.4g} {units[at]}" if value >= 0.001 else f"0 {unit}"
