"""From scores to figures: one row per setting, plain data that becomes JSON and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

import numpy as np

from ..evaluate.report import machine
from ..evaluate.settings import REFERENCE, Setting
from .run import Scores, Values
from .windows import Window, WindowLayout


def report(
    windows: Sequence[Window], layout: WindowLayout, scores: Mapping[Setting, Scores], left_out: Mapping[Setting, str]
) -> dict[str, Any]:
    """Everything about an evaluation on texts, as a JSON document.

    ``results`` has a row per setting, full attention over exact rows first: ``perplexity`` of all ``tokens``,
    ``perplexity_change`` its share above full's, ``kl_to_full`` in nats per token, ``same_token`` the share of tokens
    for which both predict the same one; ``by_text`` the perplexity of each text alone. ``bytes_per_row`` is of the rows
    held at the end, scales and bases included; fractions are of full attention's.
    """
    whole = perplexity(scores[REFERENCE].negative_log_likelihood)
    names = list(dict.fromkeys(window.name for window in windows))
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "data": "text",
        "texts": [
            {"name": window.name, "sha256": window.digest} for window in {each.name: each for each in windows}.values()
        ],
        "windows": len(windows),
        "window": layout.length,
        "prompt": layout.prompt,
        "as_image": layout.image,
        "tokens": len(windows) * layout.predicted,
        "results": [_row(setting, each, whole, names, windows) for setting, each in scores.items()],
        "problems": [],
        "unreachable": [{**asdict(setting), "reason": reason} for setting, reason in left_out.items()],
    }


def perplexity(negative_log_likelihood: Values) -> float:
    """The exponential of the mean over tokens."""
    return float(np.exp(negative_log_likelihood.mean()))


def _row(
    setting: Setting, scores: Scores, whole: float, names: Sequence[str], windows: Sequence[Window]
) -> dict[str, Any]:
    own = perplexity(scores.negative_log_likelihood)
    of_text = {name: [window.name == name for window in windows] for name in names}
    return {
        "method": setting.method,
        "kv_fraction": setting.kv_fraction,
        "parameters": asdict(scores.plan.method),
        "formats": scores.plan.formats.by_tier(),
        "perplexity": own,
        "perplexity_change": own / whole - 1,
        "kl_to_full": max(float(scores.kl.mean()), 0.0),
        "same_token": float(scores.same.mean()),
        "by_text": {name: perplexity(scores.negative_log_likelihood[chosen]) for name, chosen in of_text.items()},
        "bytes_per_row": scores.bytes_stored / scores.rows_stored,
        "bytes_stored_fraction": scores.bytes_stored / scores.bytes_full,
        "bytes_read_fraction": scores.bytes_read / scores.bytes_read_full if scores.bytes_read_full else None,
    }
