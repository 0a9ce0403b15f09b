"""Every window in every setting, decoded side by side and compared token by token with full attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ...backends.cpu.backend import TorchBackend
from ...backends.decode_loop import DecodeLoop
from ...config import KvShape, Progress
from ...errors import DoesNotFit
from ...kv.budget import KvPlan
from ...kv.cache import SequenceCache
from ...kv.methods import Method
from ...model.network.image_features import ImageFeatures
from ...model.vision_language import VisionLanguageModel
from ..evaluate.settings import REFERENCE, Setting
from .windows import Window, WindowLayout

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """A setting's predictions and rows.

    ``negative_log_likelihood`` in nats, ``kl`` of full attention's prediction from the setting's in nats, and ``same``,
    1 where both have the same likeliest token: float64 ``[windows, tokens]``. Bytes and rows are of all windows,
    ``bytes_stored`` and ``rows_stored`` at their end; ``bytes_full`` and ``bytes_read_full`` full attention's.
    """

    plan: KvPlan[Method]
    negative_log_likelihood: Values
    kl: Values
    same: Values
    bytes_stored: int
    bytes_full: int
    rows_stored: int
    bytes_read: int
    bytes_read_full: int


def plans_of(
    settings: Sequence[Setting], layout: WindowLayout, shape: KvShape
) -> tuple[dict[Setting, KvPlan[Method]], dict[Setting, str]]:
    """What each setting holds of a window, full attention first, whether it was asked for or not; and the settings that
    say nothing about such windows, with the reason."""
    steps, prompt = layout.predicted - 1, layout.shape
    plans = {REFERENCE: REFERENCE.plan(prompt, shape, steps)}
    left_out = {}
    for setting in settings:
        try:
            plan = setting.plan(prompt, shape, steps)
        except DoesNotFit as error:
            left_out[setting] = str(error)
            continue
        stores_all = plan.method.peak_rows(prompt, steps, shape.layers) == shape.layers * (prompt.length + steps)
        if stores_all and not layout.image and setting.name != REFERENCE.name:
            left_out[setting] = (
                f"{setting} stores and reads every row of a text without images, as {REFERENCE.name} does: mark some "
                "as an image's with --as-image"
            )
            continue
        plans[setting] = plan
    return plans, left_out


@torch.inference_mode()
def measure(
    model: VisionLanguageModel,
    windows: Sequence[Window],
    layout: WindowLayout,
    plans: Mapping[Setting, KvPlan[Method]],
    progress: Progress | None = None,
) -> dict[Setting, Scores]:
    """Decode all ``windows`` in all settings together, each step given the text's own token; the first of ``plans`` is
    what the others are compared with.

    Two next-token distributions are compared as soon as they are there, so none is kept.
    """
    assert next(iter(plans)) == REFERENCE
    pages = len(windows) * sum(plan.pages for plan in plans.values())
    errors = np.zeros((3, len(plans), len(windows), layout.predicted))
    with DecodeLoop(TorchBackend.with_pages(model, pages)) as loop:
        logits = _prefill(loop, model, windows, layout, list(plans.values()))
        for step in range(layout.predicted):
            targets = [window.token_ids[layout.prompt + step] for window in windows]
            errors[..., step] = compare(logits.view(len(plans), len(windows), -1), torch.tensor(targets))
            if progress:
                progress(step + 1, layout.predicted)
            if step < layout.predicted - 1:
                logits = loop.decode(targets * len(plans))
        caches = [loop.caches[at : at + len(windows)] for at in range(0, len(loop.caches), len(windows))]
        return {
            setting: _scores(plan, errors[:, number], caches[number], loop.pool.shape)
            for number, (setting, plan) in enumerate(plans.items())
        }


def _prefill(
    loop: DecodeLoop,
    model: VisionLanguageModel,
    windows: Sequence[Window],
    layout: WindowLayout,
    plans: Sequence[KvPlan[Method]],
) -> Tensor:
    """The logits of each prompt's last token, ``[plans * windows, vocabulary]``."""
    logits = []
    for plan in plans:
        for window in windows:
            prompt = window.prompt(layout)
            embedded = model.decoder.embed(torch.tensor(prompt.token_ids))
            own = [ImageFeatures(embedded[span.start : span.start + span.length]) for span in prompt.spans]
            logits.append(loop.prefill(prompt, ImageFeatures.joined(own) if own else None, plan))
    return torch.stack(logits)


def compare(logits: Tensor, targets: Tensor) -> Values:
    """Of logits ``[settings, windows, vocabulary]``, the first setting's the reference: negative log-likelihood of
    ``targets`` ``[windows]``, KL from the reference, and whether the likeliest token is the same: ``[3, settings,
    windows]``."""
    errors = np.zeros((3, *logits.shape[:2]))
    reference = functional.log_softmax(logits[0].double(), -1)
    for number, own in enumerate(logits):
        predicted = functional.log_softmax(own.double(), -1)
        errors[0, number] = -predicted.gather(-1, targets[:, None])[:, 0].numpy()
        errors[1, number] = functional.kl_div(predicted, reference, reduction="none", log_target=True).sum(-1).numpy()
        errors[2, number] = (predicted.argmax(-1) == reference.argmax(-1)).numpy()
    return errors


def _scores(plan: KvPlan[Method], errors: Values, caches: Sequence[SequenceCache], shape: KvShape) -> Scores:
    held = [layer.counts() for cache in caches for layer in cache.rows.layers]
    negative_log_likelihood, kl, same = errors
    return Scores(
        plan,
        negative_log_likelihood,
        kl,
        same,
        bytes_stored=sum(cache.rows.lease.nbytes for cache in caches),
        bytes_full=sum((cache.length + cache.step) * shape.layers * shape.row_bytes for cache in caches),
        rows_stored=sum(each["text"] + each["core"] + each["secondary"] for each in held),
        bytes_read=sum(cache.bytes_read for cache in caches),
        bytes_read_full=sum(cache.rows_full * shape.row_bytes for cache in caches),
    )
