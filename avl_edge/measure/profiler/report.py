"""What ``--verify`` found, as text and as data."""

from __future__ import annotations

from datetime import date
from typing import Any

from ...config import format_size
from ...machine.profile import DeviceProfile
from .verify import MEDIAN_PERCENT, OVER_PERCENT, Verdict


def report(verdict: Verdict) -> str:
    """One line a request, and the verdict."""
    lines = [f"{'ms per token: predicted  measured':>40} {'peak memory: predicted  measured':>40} request"]
    for each in verdict.comparisons:
        times = f"{each.predicted_ms:.2f}  {each.measured_ms:.2f}  {each.ms_error_percent:+.1f} %"
        sizes = "  ".join(map(format_size, (each.predicted_bytes, each.measured_bytes)))
        lines.append(f"{times:>40} {sizes:>30}  {each.bytes_error_percent:+6.1f} % {each.trial}")
    least, most = verdict.bytes_error_percent
    times = f"median error of the time per token {verdict.median_ms_error_percent:.1f} % (under {MEDIAN_PERCENT:g})"
    sizes = f"peak memory predicted {least:+.1f} to {most:+.1f} % of what was used (0 to {OVER_PERCENT:+g})"
    for holds, claim in ((verdict.times_hold, times), (verdict.bytes_hold, sizes)):
        lines.append(f"{'ok  ' if holds else 'MISS'} {claim}")
    return "\n".join(lines) + "\n"


def to_dict(verdict: Verdict, model: str, profile: DeviceProfile) -> dict[str, Any]:
    """The document that ``avl-edge profile --verify --json`` prints."""
    least, most = verdict.bytes_error_percent
    return {
        "model": model,
        "profile": profile.name,
        "power_mode": profile.power_mode.name if profile.power_mode else None,
        "profiled": profile.date,
        "verified": date.today().isoformat(),
        "versions": dict(profile.versions),
        "holds": verdict.holds,
        "median_ms_error_percent": verdict.median_ms_error_percent,
        "bytes_error_percent": {"least": least, "most": most},
        "requests": [
            {
                "request": str(each.trial),
                "predicted_ms_per_token": each.predicted_ms,
                "measured_ms_per_token": each.measured_ms,
                "predicted_peak_bytes": each.predicted_bytes,
                "measured_peak_bytes": each.measured_bytes,
            }
            for each in verdict.comparisons
        ],
    }
