"""A profile as a picture: what was measured against what the costs say, one panel a phase."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ...optional import optional
from .schema import ANY, DeviceProfile, Record, Sample

_FITTED, _HELD_OUT = "#0072b2", "#d55e00"  # distinct for colour-blind eyes
_DERIVED_GB = (0.25, 0.5, 1, 2, 4, 8, 16)


def svg(profile: DeviceProfile) -> str:
    """An SVG document. A profile without measurements is drawn as what its costs say, and says that.

    Raises BadInput where matplotlib is missing.
    """
    panels = [
        (f"{phase}, {'any model' if name == ANY else name}", record, samples)
        for name, record in profile.models.items()
        for phase in ("attention", "linear", "decode", "prefill", "vision")
        if (samples := [sample for sample in record.samples if sample.phase == phase])
    ]
    matplotlib = optional("matplotlib", "--svg")
    size = (4 * max(1, len(panels)), 4)
    figure = optional("matplotlib.figure", "--svg").Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{profile.name}, {profile.date}")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for each, (title, record, samples) in zip(axes, panels, strict=False):
        _draw_samples(each, record, samples)
        each.set_title(title, fontsize="medium")
    if not panels:
        _draw_roofline(axes[0], profile)
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(content, format="svg")
    return content.getvalue()


def _draw_samples(axes: Any, record: Record, samples: Sequence[Sample]) -> None:
    """Measured over predicted milliseconds; on the line the costs are right."""
    for held_out, colour, label in ((False, _FITTED, "fitted"), (True, _HELD_OUT, "held out")):
        chosen = [sample for sample in samples if sample.held_out == held_out]
        predicted = [record.costs.milliseconds(sample.amounts) for sample in chosen]
        axes.plot(predicted, [sample.ms for sample in chosen], "o", color=colour, alpha=0.75, label=label)
    axes.axline((1, 1), (10, 10), color="#999999", linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="predicted ms", ylabel="measured ms")
    times = [ms for each in samples for ms in (each.ms, record.costs.milliseconds(each.amounts)) if ms > 0]
    if times:  # as far as there are points: the line itself would widen the axes
        axes.set(xlim=(min(times) / 1.5, max(times) * 1.5), ylim=(min(times) / 1.5, max(times) * 1.5))
    axes.legend()


def _draw_roofline(axes: Any, profile: DeviceProfile) -> None:
    """Milliseconds to read a step's weights or rows, from the costs alone."""
    cost = profile.models[ANY].costs.decode_ms_per_gb_of_weights
    axes.plot(_DERIVED_GB, [gb * cost.value for gb in _DERIVED_GB], "--", color=_FITTED)
    axes.set(xscale="log", yscale="log", xlabel="GB read", ylabel="ms")
    note = ", not measured" if cost.basis == "derived" else ""
    axes.set_title(f"a decode step, {cost.basis}{note}", fontsize="medium")
