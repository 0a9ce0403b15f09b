"""From measurements to a profile of this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version

from ...config import Formats
from ...kv.budget import kv_plan
from ...machine import profile
from ...machine.device import DeviceFacts
from ...machine.profile import (
    ANY,
    COSTS,
    VERSION,
    Budgets,
    Costs,
    DeviceProfile,
    Figure,
    Fit,
    Memory,
    Peaks,
    Record,
    Sample,
)
from ...model.sizes import ModelShape
from ...planning.estimate import Answer, divide, prompt_work, step_work, vision_work
from . import machine
from .bench import Bench, Measured, Trial, threads, trials, warm_up
from .fit import Prices, fit_prices, predicted, quality
from .timing import clock

Report = Callable[[int, int], None]

_TRIALS, _LEAST_TRIALS = 36, 8
_BLOCK_SECONDS = 0.2
_HELD_OUT = 4  # every fourth
_BLOCKS = "building blocks alone"
_MARGIN = 0.02  # of the resident memory, for what differs from process to process


def measure(bench: Bench, facts: DeviceFacts, seconds: float, report: Report | None = None) -> DeviceProfile:
    """Measure this machine and ``bench``'s model for about ``seconds``; what is known of any model comes with it.

    ``report`` is called with (done, in all). At least eight requests are measured, whatever the time limit.
    """
    end = time.perf_counter() + seconds
    measured: list[tuple[Trial, Measured]] = []
    warm_up(bench)
    for number, trial in enumerate(trials(bench.shape, _TRIALS, seed=1)):
        if number >= _LEAST_TRIALS and time.perf_counter() > end:
            break
        measured.append((trial, bench.measure(trial)))
        if report:
            report(number + 1, _TRIALS)
    # The blocks come last: the memory that they leave behind is no overhead of requests.
    blocks = list(machine.samples(bench.dtype, min(_BLOCK_SECONDS, seconds / 200)))
    return _profile(bench, facts, machine.bandwidth(), blocks, _known(blocks), measured)


def _known(blocks: Sequence[Sample]) -> Prices:
    """Prices of the blocks, each fitted alone; those of vision are those of any matrices."""
    rows = [sample for sample in blocks if "decode_ms_per_gb_of_rows" in sample.amounts]
    others = [sample for sample in blocks if sample not in rows]
    prices = {**fit_prices(rows, {}), **fit_prices(others, {})}
    del prices["decode_us_per_layer"]  # of a call of the attention, which is only a part of a layer
    return {**prices, "vision_ms_per_tflop": prices["prefill_ms_per_tflop"]}


def samples_of(model: ModelShape, trial: Trial, measured: Measured, held_out: bool) -> list[Sample]:
    """What one trial tells: a decode step, a prefill and, with pictures, an encoding."""
    tokens_per_image = model.picture(336, 336).tokens
    prompt = trial.prompt(tokens_per_image)
    step = Answer(trial.method, prompt, model.kv_shape(), trial.steps).mean()
    decode = step_work(model, [step] * trial.streams, model.stored)
    prefill = prompt_work(model, trial.method, prompt, model.stored)
    label = str(trial)
    found = [
        Sample("decode", label, measured.ms_per_token, trial.steps, decode, held_out),
        Sample("prefill", label, measured.prefill_ms, trial.streams, prefill, held_out),
    ]
    if trial.images:
        work = vision_work(model, [model.picture(336, 336)] * trial.images)
        found.append(Sample("vision", label, measured.encode_ms, trial.streams, work, held_out))
    return found


def _profile(
    bench: Bench,
    facts: DeviceFacts,
    bandwidth: float,
    blocks: Sequence[Sample],
    known: Prices,
    measured: Sequence[tuple[Trial, Measured]],
) -> DeviceProfile:
    model, memory, peaks = bench.shape, _memory(facts, bandwidth), fit_peaks(bench.shape, measured)
    samples = [
        sample
        for number, (trial, result) in enumerate(measured)
        for sample in samples_of(model, trial, result, held_out=number % _HELD_OUT == _HELD_OUT - 1)
    ]
    prices, fits = _fits(samples, known)
    fitted = f"fit over requests of {model.name}"
    budgets, rounded = _budgets(model, memory, peaks), tuple(map(_rounded, samples))
    own = Record(_costs(known, _BLOCKS, prices, fitted), peaks, budgets, fits, rounded)
    # Another model's matrices are not of this one's size: blocks alone tell more of it, but for the overheads.
    any_model = Record(_costs(prices, fitted, known, _BLOCKS), peaks, samples=tuple(map(_rounded, blocks)))
    return DeviceProfile(
        version=VERSION,
        name=profile.name_of(facts),
        device=profile.device_of(facts),
        power_mode=profile.mode_of(facts),
        date=date.today().isoformat(),
        versions={
            "avl-edge": version("avl-edge"),
            "torch": version("torch"),
            "threads": str(threads()),
            "clock": clock(),
            "dtype": str(bench.dtype).removeprefix("torch."),
        },
        memory=memory,
        models={ANY: any_model, model.name: own},
    )


def _fits(samples: Sequence[Sample], known: Prices) -> tuple[Prices, dict[str, Fit]]:
    """The prices of every phase, and how well they describe the samples that were held out."""
    prices: Prices = {}
    fits = {}
    for phase in ("decode", "prefill", "vision"):
        of_phase = [sample for sample in samples if sample.phase == phase]
        seen = [sample for sample in of_phase if not sample.held_out]
        if seen:
            prices |= fit_prices(seen, known)
            fits[phase] = quality(of_phase, prices)
    return prices, fits


def _costs(first: Prices, first_origin: str, second: Prices, second_origin: str) -> Costs:
    """Prices of ``second`` before those of ``first``. What no sample needed is taken as free, which nobody measured."""
    figures = {name: _figure(name, price, first_origin) for name, price in first.items()}
    figures |= {name: _figure(name, price, second_origin) for name, price in second.items()}
    return Costs(**{name: figures.get(name, Figure(0.0, "derived", "no sample needed it")) for name in COSTS})


def _figure(name: str, price: float, origin: str) -> Figure:
    if name == "vision_ms_per_tflop" and origin == _BLOCKS:
        return Figure(price, "derived", f"prefill_ms_per_tflop of {_BLOCKS}")
    return Figure(price, "measured", origin)


def _rounded(sample: Sample) -> Sample:
    amounts = {name: float(f"{amount:.6g}") for name, amount in sample.amounts.items()}
    return replace(sample, ms=round(sample.ms, 4), amounts=amounts)


def fit_peaks(model: ModelShape, measured: Sequence[tuple[Trial, Measured]]) -> Peaks:
    """Resident memory against the tensors' sizes: of the lines with nothing above them the closest."""
    sizes = [_tensors(model, trial) for trial, _ in measured]
    held = [result.peak_bytes for _, result in measured]
    points = [(workspace, peak - fixed, peak) for (workspace, fixed), peak in zip(sizes, held, strict=True)]
    candidates = [_covering_line(slope / 100, points) for slope in range(100, 600, 2)]
    _, slope, overhead = min(candidates)
    margin = _MARGIN * max(held)
    origin = f"resident memory over {len(points)} requests"
    return Peaks(
        Figure(max(0, math.ceil(overhead + margin)), "measured", f"{origin}, the most, and 2 % of the peak"),
        Figure(round(100 * slope, 2), "measured", origin),
    )


def _covering_line(slope: float, points: Sequence[tuple[int, int, int]]) -> tuple[float, float, float]:
    """(its worst excess as a share of the peak, ``slope``, height) of the lowest such line over all ``points``, each
    (workspace, what it has to cover, peak)."""
    height = max(covered - slope * workspace for workspace, covered, _ in points)
    return max((height + slope * workspace - covered) / peak for workspace, covered, peak in points), slope, height


def _tensors(model: ModelShape, trial: Trial) -> tuple[int, int]:
    """(workspace, weights and rows) in bytes, by the shapes."""
    picture = model.picture(336, 336)
    prompt, kv = trial.prompt(picture.tokens), model.kv_shape()
    rows = kv_plan(trial.method, Formats(), kv, prompt, trial.steps).peak_bytes * trial.streams
    workspace = model.workspace_bytes([picture] * trial.images, prompt.length, prompt.images)
    return workspace, model.weight_bytes(model.stored) + rows


def predicted_peak(model: ModelShape, peaks: Peaks, trial: Trial) -> int:
    """Bytes that the process will hold at most while it answers ``trial``."""
    workspace, fixed = _tensors(model, trial)
    return math.ceil(peaks.overhead_bytes.value + fixed + workspace * peaks.workspace_percent.value / 100)


def predicted_ms(model: ModelShape, costs: Costs, trial: Trial) -> float:
    """Milliseconds of an average decode step of ``trial``."""
    prices = {name: getattr(costs, name).value for name in COSTS}
    step = samples_of(model, trial, Measured(0, 0, 0, 0), held_out=False)[0]
    return predicted(step, prices)


def _memory(facts: DeviceFacts, bandwidth: float) -> Memory:
    available = facts.memory.usable_bytes or 0
    return Memory(
        total_bytes=Figure(facts.memory.total_bytes or available, "measured", "MemTotal"),
        available_bytes=Figure(available, "measured", "the lesser of MemAvailable and the control group's room"),
        reserve_bytes=Figure(profile.reserve_bytes(available), "derived", "a tenth of what is available (choice)"),
        bandwidth_bytes_per_s=Figure(float(f"{bandwidth:.4g}"), "measured", "reading 256 MB"),
    )


def _budgets(model: ModelShape, memory: Memory, peaks: Peaks) -> Budgets:
    """One longest prompt at a time, of pictures as far as they go; the pool takes what is left."""
    parts = divide(model, memory, peaks)

    def derived(value: int, origin: str) -> Figure:
        return Figure(value, "derived", origin)

    return Budgets(
        weights_bytes=derived(parts.weights_bytes, "the shapes"),
        vision_bytes=derived(
            parts.vision_bytes, f"the shapes of {parts.images} pictures, and what resident memory added"
        ),
        activations_bytes=derived(
            parts.activations_bytes, "the shapes of a full context, and what resident memory added"
        ),
        overhead_bytes=derived(parts.overhead_bytes, "peaks.overhead_bytes"),
        kv_pool_bytes=derived(parts.kv_pool_bytes, "what is left; vision and activations are not needed at once"),
        reserve_bytes=memory.reserve_bytes,
    )
