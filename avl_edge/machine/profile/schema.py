"""What a device can do, as frozen data: every number with its unit in its name and with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from ...errors import BadInput

VERSION = 1
ANY = "any"
"""The model name under which costs stand that hold for every model."""

Basis = Literal["measured", "derived"]


class BadProfile(BadInput):
    """A profile that cannot be read, is of another version, or does not belong to this machine."""


@dataclass(frozen=True)
class Figure:
    """A number. ``basis``: was it measured on the device or derived; ``origin``: how, in words."""

    value: float
    basis: Basis
    origin: str


@dataclass(frozen=True)
class Device:
    """Which machines a profile is for.

    ``kind`` is ``jetson`` or ``linux``. A Jetson is known by its module ids. Any other machine by its architecture,
    and by the processor and the number of logical CPUs where the profile was measured (None: any processor).
    """

    name: str
    kind: Literal["jetson", "linux"]
    architecture: str
    modules: tuple[str, ...] = ()
    cpu: str | None = None
    logical_cpus: int | None = None


@dataclass(frozen=True)
class PowerMode:
    """The power mode that the numbers hold for; a machine without power modes has none."""

    id: int
    name: str


@dataclass(frozen=True)
class Memory:
    """``available_bytes``: what a process may take when the device does nothing else; ``reserve_bytes`` stay untouched
    for others; ``bandwidth_bytes_per_s`` is what a read of all memory reaches, ``paper_bandwidth_bytes_per_s`` what the
    memory's clock and width allow."""

    total_bytes: Figure
    available_bytes: Figure
    reserve_bytes: Figure
    bandwidth_bytes_per_s: Figure
    paper_bandwidth_bytes_per_s: Figure | None = None

    @property
    def budget_bytes(self) -> int:
        """What may be planned with."""
        return max(0, int(self.available_bytes.value) - int(self.reserve_bytes.value))


@dataclass(frozen=True)
class Costs:
    """The cost model: time is the sum of these, each times how much of it there is.

    Decode, per step: layers, layers times sequences, layers whose scores a policy looks at, thousands of rows in
    those, weights read, arithmetic, and rows read. Prefill: layers, weights, arithmetic of the matrices, of the
    attention and of the scores. Vision: layers and arithmetic. GB and TFLOP are 10^9 bytes and 10^12 operations.
    """

    decode_us_per_layer: Figure
    decode_us_per_layer_and_sequence: Figure
    decode_us_per_scored_layer: Figure
    decode_us_per_thousand_scored_rows: Figure
    decode_ms_per_gb_of_weights: Figure
    decode_ms_per_tflop: Figure
    decode_ms_per_gb_of_rows: Figure
    prefill_us_per_layer: Figure
    prefill_ms_per_gb_of_weights: Figure
    prefill_ms_per_tflop: Figure
    prefill_ms_per_attention_tflop: Figure
    prefill_ms_per_score_tflop: Figure
    vision_us_per_layer: Figure
    vision_ms_per_tflop: Figure

    def milliseconds(self, amounts: Mapping[str, float]) -> float:
        """The time of ``amounts``, each under the name of its cost."""
        return float(sum(getattr(self, name).value * amount * unit_ms(name) for name, amount in amounts.items()))

    def basis(self, amounts: Mapping[str, float]) -> Basis:
        """``measured`` where all costs that matter for ``amounts`` were."""
        used = [getattr(self, name) for name, amount in amounts.items() if amount]
        return "measured" if all(figure.basis == "measured" for figure in used) else "derived"


COSTS = tuple(each.name for each in fields(Costs))


def unit_ms(cost: str) -> float:
    """Milliseconds of the unit that a cost's name tells."""
    return 0.001 if "_us_per_" in cost else 1.0


@dataclass(frozen=True)
class Peaks:
    """From the sizes of tensors to what a process takes: ``overhead_bytes`` for program and libraries, and
    ``workspace_percent`` of the live tensors of vision encoder or prefill, allocator and all."""

    overhead_bytes: Figure
    workspace_percent: Figure


@dataclass(frozen=True)
class Budgets:
    """How the memory of the device divides for a model: one longest prompt at a time, and the pool takes the rest."""

    weights_bytes: Figure
    vision_bytes: Figure
    activations_bytes: Figure
    overhead_bytes: Figure
    kv_pool_bytes: Figure
    reserve_bytes: Figure


@dataclass(frozen=True)
class Fit:
    """How well the costs describe one phase: relative errors over points that the fit did not see."""

    fitted_points: int
    held_out_points: int
    median_error_percent: float
    worst_error_percent: float


@dataclass(frozen=True)
class Sample:
    """One measured time, and the amounts it is made of. ``held_out``: not used for the fit.

    ``ms`` is the mean over the faster half of ``runs``, so that a moment in which others used the machine drops out.
    """

    phase: Literal["attention", "linear", "decode", "prefill", "vision"]
    label: str
    ms: float
    runs: int
    amounts: Mapping[str, float]
    held_out: bool = False


@dataclass(frozen=True)
class Record:
    """What is known of one model on the device, or of ``any`` model."""

    costs: Costs
    peaks: Peaks
    budgets: Budgets | None = None
    fit: Mapping[str, Fit] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class DeviceProfile:
    """A device in one power mode. ``date`` is ISO 8601; ``versions`` of what the numbers were measured with."""

    version: int
    name: str
    device: Device
    power_mode: PowerMode | None
    date: str
    versions: Mapping[str, str]
    memory: Memory
    models: Mapping[str, Record]

    def record(self, model: str) -> Record:
        """What holds for ``model``: its own record, or that of any model."""
        return self.models.get(model) or self.models[ANY]
