"""Does a profile keep its word: predicted against measured over random requests that it was not made from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...machine.profile import BadProfile, DeviceProfile
from .bench import Bench, Trial, trials, warm_up
from .measure import predicted_ms, predicted_peak

MEDIAN_PERCENT = 15.0
OVER_PERCENT = 10.0


@dataclass(frozen=True)
class Comparison:
    """One trial: milliseconds per token and peak bytes, predicted and measured."""

    trial: Trial
    predicted_ms: float
    measured_ms: float
    predicted_bytes: int
    measured_bytes: int

    @property
    def ms_error_percent(self) -> float:
        return 100 * (self.predicted_ms / self.measured_ms - 1)

    @property
    def bytes_error_percent(self) -> float:
        """Above 0: more was predicted than was used."""
        return 100 * (self.predicted_bytes / self.measured_bytes - 1)


@dataclass(frozen=True)
class Verdict:
    """All comparisons. Holds when the median error of times is under 15 percent, and predicted bytes are never under
    what was used and at most 10 percent over."""

    comparisons: tuple[Comparison, ...]

    @property
    def median_ms_error_percent(self) -> float:
        return statistics.median(abs(each.ms_error_percent) for each in self.comparisons)

    @property
    def bytes_error_percent(self) -> tuple[float, float]:
        """The least and the most."""
        errors = [each.bytes_error_percent for each in self.comparisons]
        return min(errors), max(errors)

    @property
    def times_hold(self) -> bool:
        return self.median_ms_error_percent < MEDIAN_PERCENT

    @property
    def bytes_hold(self) -> bool:
        least, most = self.bytes_error_percent
        return least >= 0 and most <= OVER_PERCENT

    @property
    def holds(self) -> bool:
        return self.times_hold and self.bytes_hold


def verify(
    bench: Bench, profile: DeviceProfile, count: int, seed: int, report: Callable[[int, int], None] | None = None
) -> Verdict:
    """Measure ``count`` random requests; :class:`BadProfile` when the model was not profiled."""
    if bench.shape.name not in profile.models:
        raise BadProfile(f"{profile.name} holds no measurements of {bench.shape.name}: profile that model first")
    warm_up(bench)
    return Verdict(tuple(_compare(bench, profile, count, seed, report)))


def _compare(
    bench: Bench, profile: DeviceProfile, count: int, seed: int, report: Callable[[int, int], None] | None
) -> Iterator[Comparison]:
    record = profile.models[bench.shape.name]
    for number, trial in enumerate(trials(bench.shape, count, seed), start=1):
        measured = bench.measure(trial)
        yield Comparison(
            trial,
            predicted_ms(bench.shape, record.costs, trial),
            measured.ms_per_token,
            predicted_peak(bench.shape, record.peaks, trial),
            measured.peak_bytes,
        )
        if report:
            report(number, count)
