"""From measured times to prices: non-negative least squares of relative errors, with a small pull to what is known.

Samples of one model cannot tell a price per byte of weights from one per layer, since both are always the same: there
the blocks that were measured alone decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ...machine.profile import Fit, Sample, unit_ms

Prices = dict[str, float]

_PULL = 0.03
_SWEEPS = 2000


def fit_prices(samples: Sequence[Sample], known: Mapping[str, float]) -> Prices:
    """The prices of everything in ``samples`` that explain their times; ``known`` ones from elsewhere pull a little."""
    names = sorted({name for sample in samples for name, amount in sample.amounts.items() if amount})
    amounts = np.array([[sample.amounts.get(name, 0.0) * unit_ms(name) for name in names] for sample in samples])
    weighted = amounts / np.array([[sample.ms] for sample in samples])
    # In units of a price's largest share of a time, all unknowns are alike in size.
    scale = np.maximum(weighted.max(axis=0), 1e-12)
    pulls = [(index, known[name]) for index, name in enumerate(names) if name in known]
    rows, targets = [weighted / scale], [np.ones(len(samples))]
    for index, price in pulls:
        expected = price * scale[index]
        strength = _PULL * np.sqrt(len(samples)) / max(expected, 0.05)
        row = np.zeros((1, len(names)))
        row[0, index] = strength
        rows.append(row)
        targets.append(np.array([strength * expected]))
    solved = solve(np.concatenate(rows), np.concatenate(targets)) / scale
    return {name: float(f"{price:.6g}") for name, price in zip(names, solved, strict=True)}


def solve(matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The x >= 0 that minimises ``|matrix @ x - target|``, by coordinate descent: few unknowns, always convergent."""
    gram, moment = matrix.T @ matrix, matrix.T @ target
    x = np.zeros(len(moment))
    for _ in range(_SWEEPS):
        before = x.copy()
        for index, curvature in enumerate(gram.diagonal()):
            if curvature > 0:
                x[index] = max(0.0, x[index] + (moment[index] - gram[index] @ x) / curvature)
        if np.abs(x - before).max() < 1e-10:
            break
    return x


def predicted(sample: Sample, prices: Mapping[str, float]) -> float:
    """Milliseconds of what ``sample`` consists of."""
    return sum(prices.get(name, 0.0) * amount * unit_ms(name) for name, amount in sample.amounts.items())


def quality(samples: Sequence[Sample], prices: Mapping[str, float]) -> Fit:
    """Relative errors of ``prices`` over the samples that were held out."""
    held = [sample for sample in samples if sample.held_out]
    errors = [100 * abs(predicted(sample, prices) / sample.ms - 1) for sample in held] or [0.0]
    return Fit(len(samples) - len(held), len(held), round(float(np.median(errors)), 2), round(max(errors), 2))
