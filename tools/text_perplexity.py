"""What a change of a decoder costs on texts, computed by transformers: for what the runtime does not do by itself.

The windows are those of ``avl-edge eval --data text:...``, and so are the figures; each window is one pass.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from avl_edge.measure.perplexity import Window, WindowLayout, compare
from tools.record import machine

_TOKENS_AT_ONCE = 32  # of which two distributions in float64 are compared


def load(directory: Path) -> Any:
    """The checkpoint as transformers runs it, in its own dtype."""
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype="auto").eval()


def predictions(model: Any, windows: Sequence[Window], layout: WindowLayout) -> Iterator[Tensor]:
    """The logits ``[tokens, vocabulary]``, float32, of each window's predicted tokens."""
    for window in windows:
        with torch.inference_mode():
            logits: Tensor = model(
                input_ids=torch.tensor([window.token_ids[:-1]]), logits_to_keep=layout.predicted
            ).logits
        yield logits[0].float()


def errors(reference: Tensor, own: Tensor, window: Window, layout: WindowLayout) -> npt.NDArray[np.float64]:
    """Negative log-likelihood, KL and agreement of ``own`` predictions: ``[3, tokens]``."""
    targets = torch.tensor(window.token_ids[layout.prompt :])
    parts = zip(*(torch.split(each, _TOKENS_AT_ONCE) for each in (reference, own, targets)), strict=True)
    return np.concatenate([compare(torch.stack([a, b]), target)[:, 1] for a, b, target in parts], axis=-1)


def rows_of(
    unchanged: Any,
    variants: Sequence[str],
    changed: Callable[[str], Any],
    windows: Sequence[Window],
    layout: WindowLayout,
    label: str,
) -> list[dict[str, Any]]:
    """A row for the model as it is, and one for each variant, named under ``label``; ``changed`` makes its model.

    The unchanged model's logits are held, float32.
    """
    references = list(predictions(unchanged, windows, layout))
    rows: list[dict[str, Any]] = []
    for variant in ("", *variants):
        own = predictions(changed(variant), windows, layout) if variant else references
        found = [errors(*each, layout) for each in zip(references, own, windows, strict=True)]
        likelihood, kl, same = np.stack(found, axis=1)
        perplexity = float(np.exp(likelihood.mean()))
        rows.append(
            {
                label: variant,
                "perplexity": perplexity,
                "perplexity_change": perplexity / rows[0]["perplexity"] - 1 if rows else 0.0,
                "kl": max(float(kl.mean()), 0.0),
                "same_token": float(same.mean()),
            }
        )
    return rows


def write(
    program: str,
    model: Path,
    windows: Sequence[Window],
    layout: WindowLayout,
    rows: Sequence[dict[str, Any]],
    out: Path | None,
    **more: Any,
) -> None:
    """Print the evaluation as one JSON document, and write it to ``out``."""
    document = {
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "model": model.name,
        "texts": [{"name": each.name, "sha256": each.digest} for each in windows],
        "windows": len(windows),
        "window": layout.length,
        "prompt": layout.prompt,
        "tokens": len(windows) * layout.predicted,
        **more,
        "results": rows,
    }
    text = json.dumps(document, indent=1)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
