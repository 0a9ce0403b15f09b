"""From a model, a device's profile and a request to a plan: memory, method, tiers and times. Pure arithmetic.

Of all settings that keep both constraints (bytes, milliseconds per token) the first on the method's ladder (without a
method, of the measured table) is taken: quality is what is maximised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ...config import Formats, PromptShape
from ...kv.budget import kv_plan
from ...kv.layout import Format, packing, smoothing_rows
from ...kv.methods import Method, Tiers
from ...kv.quality import choices
from ...machine.profile import Basis, DeviceProfile
from ...model.sizes import ModelShape, Precision
from .request import PlanRequest
from .work import Amounts, Answer, mean_step, prompt_work, step_work, vision_work


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the whole process. Vision encoder and prefill do not run at once: of their workspaces the larger counts.

    ``kv_bytes`` is all streams' worst case; ``limit_bytes`` what may be used.
    """

    weights_bytes: int
    vision_bytes: int
    activations_bytes: int
    kv_bytes: int
    overhead_bytes: int
    limit_bytes: int
    basis: Basis

    @property
    def peak_bytes(self) -> int:
        workspace = max(self.vision_bytes, self.activations_bytes)
        return self.weights_bytes + self.overhead_bytes + workspace + self.kv_bytes


@dataclass(frozen=True)
class KvEstimate:
    """One request's rows in bytes, as in a result's ``kv``: full attention's and the method's at the answer's end, the
    most at any time, and the tiers of each layer at the end."""

    bytes_full: int
    bytes_stored: int
    bytes_peak: int
    layers: tuple[Tiers, ...]


@dataclass(frozen=True)
class TimeEstimate:
    """Predicted milliseconds. ``ttft_ms``: one request alone, from the picture to its first token, so
    ``encode_ms`` and ``prefill_ms``. ``ms_per_token``: the average step of all streams together. A basis is
    ``measured`` where all costs were measured on the device and the weights are as stored; ``basis`` is that of all
    times together."""

    encode_ms: float
    prefill_ms: float
    ms_per_token: float
    ms_per_token_basis: Basis
    basis: Basis

    @property
    def ttft_ms(self) -> float:
        return self.encode_ms + self.prefill_ms

    @property
    def tokens_per_s(self) -> float:
        """Of one stream; 0 where the profile knows no costs."""
        return 1000 / self.ms_per_token if self.ms_per_token else 0.0


@dataclass(frozen=True)
class Estimate:
    """What a request costs on a device with one method's settings. Times and tiers are computed when asked for."""

    model: ModelShape
    profile: DeviceProfile
    request: PlanRequest
    method: Method
    formats: Formats

    @property
    def weights(self) -> Precision:
        return self.request.weights or self.model.stored

    @cached_property
    def prompt(self) -> PromptShape:
        return self.request.prompt(self.model)

    @cached_property
    def steps(self) -> int:
        """Decode steps."""
        return self.request.steps(self.model)

    @cached_property
    def kv(self) -> KvEstimate:
        shape = self.model.kv_shape()
        held = tuple(Answer(self.method, self.prompt, shape, self.steps).layers(self.steps))
        return KvEstimate(
            bytes_full=shape.layers * (self.prompt.length + self.steps) * shape.row_bytes,
            bytes_stored=sum(self._stored_bytes(layer) for layer in held),
            bytes_peak=self._peak_bytes,
            layers=held,
        )

    def _stored_bytes(self, held: Tiers) -> int:
        shape = self.model.kv_shape()
        rows = {"text": held.text, "core": held.core, "secondary": held.secondary}
        tiers = self.formats.stored.by_tier().items()
        basis = {name: Format(name).basis_rows * shape.row_bytes for tier, name in tiers if rows[tier]}
        beside = sum(basis.values()) + smoothing_rows(self.formats) * shape.row_bytes
        return sum(rows[tier] * packing(Format(name), shape).row_bytes for tier, name in tiers) + beside

    @property
    def _peak_bytes(self) -> int:
        return kv_plan(self.method, self.formats, self.model.kv_shape(), self.prompt, self.steps).peak_bytes

    @cached_property
    def memory(self) -> MemoryEstimate:
        model, peaks = self.model, self.profile.record(self.model.name).peaks
        percent, limit = peaks.workspace_percent.value, self.profile.memory.budget_bytes
        vision = model.vision.peak_bytes(self.request.pictures(model), model.itemsize)
        activations = model.activation_bytes(self.prompt.length, self.prompt.images)
        measured = peaks.overhead_bytes.basis == peaks.workspace_percent.basis == "measured"
        return MemoryEstimate(
            weights_bytes=model.weight_bytes(self.weights),
            vision_bytes=math.ceil(vision * percent / 100),
            activations_bytes=math.ceil(activations * percent / 100),
            kv_bytes=self._peak_bytes * self.request.streams,
            overhead_bytes=math.ceil(peaks.overhead_bytes.value),
            limit_bytes=limit if self.request.max_memory is None else min(limit, self.request.max_memory),
            basis="measured" if measured else "derived",
        )

    @cached_property
    def _step_work(self) -> Amounts:
        step = mean_step(self.method, self.prompt, self.model.kv_shape(), self.steps, self.formats)
        return step_work(self.model, [step] * self.request.streams, self.weights)

    @cached_property
    def ms_per_token(self) -> float:
        """Of an average decode step of all streams together."""
        return self.profile.record(self.model.name).costs.milliseconds(self._step_work)

    @cached_property
    def time(self) -> TimeEstimate:
        costs = self.profile.record(self.model.name).costs
        vision = vision_work(self.model, self.request.pictures(self.model))
        prefill = prompt_work(self.model, self.method, self.prompt, self.weights)
        return TimeEstimate(
            encode_ms=costs.milliseconds(vision),
            prefill_ms=costs.milliseconds(prefill),
            ms_per_token=self.ms_per_token,
            ms_per_token_basis=self._basis(self._step_work),
            basis=self._basis({**vision, **prefill, **self._step_work}),
        )

    def _basis(self, amounts: Amounts) -> Basis:
        if self.weights != self.model.stored:
            return "derived"  # from the bytes of another format: nothing was measured in this one
        return self.profile.record(self.model.name).costs.basis(amounts)

    @property
    def fits(self) -> bool:
        """Whether both constraints hold."""
        if self.memory.peak_bytes > self.memory.limit_bytes:
            return False
        target = self.request.target_ms_per_token
        return target is None or self.ms_per_token <= target

    def to_dict(self) -> dict[str, Any]:
        """The document that ``avl-edge plan --json`` prints."""
        mode = self.profile.power_mode
        return {
            "fits": self.fits,
            "model": self.model.name,
            "device": self.profile.device.name,
            "power_mode": mode.name if mode else None,
            "profile": self.profile.name,
            "weights": asdict(self.weights),
            "method": self.method.name,
            "settings": asdict(self.method),
            "formats": self.formats.by_tier(),
            "streams": self.request.streams,
            "prompt": {name: getattr(self.prompt, name) for name in ("prefix", "images", "suffix", "length")},
            "max_new_tokens": self.steps + 1,
            "memory": {**asdict(self.memory), "peak_bytes": self.memory.peak_bytes},
            "kv": asdict(self.kv),
            "time": {**asdict(self.time), "ttft_ms": self.time.ttft_ms, "tokens_per_s": self.time.tokens_per_s},
        }


def estimates(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Iterator[Estimate]:
    """Every plan that the request leaves open, best answers first.

    Without constraints a method's parameters take their defaults where that fits, as in :meth:`Runtime.prepare`;
    otherwise those not given are picked. Without a ``method`` full attention is tried
    first, then what the measured table puts first.
    """
    name, parameters, formats = request.method, request.parameters, request.formats
    if request.max_memory is None and request.target_ms_per_token is None:
        usual = choices(name, parameters, False, formats, model.kv_shape())
        yield from (Estimate(model, profile, request, *each) for each in usual)
    for each in choices(name, parameters, True, formats, model.kv_shape()):
        yield Estimate(model, profile, request, *each)


def first_fit(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Estimate | None:
    """The best plan that keeps the constraints; None if there is none."""
    return next((plan for plan in estimates(model, profile, request) if plan.fits), None)
