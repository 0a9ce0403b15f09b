"""What to do about a request that does not fit: the changes that make it fit, the cheapest first.

An alternative's price is the share of what was asked that it gives up: half of the streams is .5, a tenth more memory
.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ...config import format_size
from ...errors import BadInput, TooLarge
from ...machine.profile import DeviceProfile, PowerMode, short
from ...model.known import KNOWN
from ...model.sizes import PRECISIONS, ModelShape, Precision
from .estimate import Estimate, estimates, first_fit
from .request import PlanRequest

# No arithmetic tells what these give up; they are judgements, in order: answers hardly change, a little, watts are
# spent, answers change much, another device has to be bought.
_PRECISION_PRICES = {"fp16": 0.01, "int8": 0.05, "int4": 0.15}
_NO_HURRY_MS = 1e8
_ALTERNATIVES = 3
_POWER_PRICE, _SMALLER_MODEL_PRICE, _DEVICE_PRICE = 0.1, 0.4, 0.6


@dataclass(frozen=True)
class Alternative:
    """One change: the option to give, what comes of it, and its price from 0."""

    option: str
    outcome: str
    price: float

    def __str__(self) -> str:
        return f"{self.option} ({self.outcome})"


class Refused(TooLarge):
    """A request that no setting makes fit. ``reason`` says why, ``alternatives`` what would, the cheapest first."""

    def __init__(self, reason: str, alternatives: tuple[Alternative, ...]) -> None:
        self.reason, self.alternatives = reason, alternatives
        numbered = "; ".join(f"({number}) {alternative}" for number, alternative in enumerate(alternatives, start=1))
        advice = f"the cheapest ways to make it fit: {numbered}" if alternatives else "no single change would do"
        super().__init__(f"{reason}; {advice}")


def plan(
    model: ModelShape, profile: DeviceProfile, request: PlanRequest, others: Iterable[DeviceProfile] = ()
) -> Estimate:
    """The best plan that keeps the constraints.

    ``others`` are profiles to propose: of the same device in other power modes, and of other devices. Raises
    :class:`Refused` with the three cheapest ways to make it fit, :class:`BadInput` for what no device could serve.
    """
    found = first_fit(model, profile, request)
    if found:
        return found
    single = (
        _smaller_weights(model, profile, request),
        _smaller_counts(model, profile, request),
        _freer_method(model, profile, request),
        _looser_limits(model, profile, request),
        _smaller_models(model, profile, request),
        _other_profiles(model, profile, request, others),
    )
    alternatives = list(chain.from_iterable(single))
    if len(alternatives) < _ALTERNATIVES:
        alternatives += _smaller_weights_and_more(model, profile, request)
    alternatives.sort(key=lambda alternative: alternative.price)
    raise Refused(_reason(model, profile, request), tuple(alternatives[:_ALTERNATIVES]))


def _reason(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> str:
    offered = list(estimates(model, profile, request))
    smallest = min(offered, key=lambda plan: plan.memory.peak_bytes).memory
    fastest = min(plan.ms_per_token for plan in offered)
    mode = f" in {_spoken(profile.power_mode)}" if profile.power_mode else ""
    who = f"{model.name} on {profile.device.name}{mode}"
    if smallest.peak_bytes > smallest.limit_bytes:
        return (
            f"{who} needs {format_size(smallest.peak_bytes)} ({smallest.peak_bytes} bytes) at least, but "
            f"{format_size(smallest.limit_bytes)} may be used"
        )
    target = request.target_ms_per_token
    if target is not None and fastest > target:
        return f"{who} takes {fastest:.1f} ms per token at least, but the target is {target:g} ms"
    return f"{who} keeps the memory limit or the target of {target:g} ms per token, but not both"


def _try(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Estimate | None:
    """:func:`first_fit`, where a request that cannot be one (its prompt exceeds the context) does not fit either."""
    try:
        return first_fit(model, profile, request)
    except BadInput:
        return None


def _smaller_formats(model: ModelShape, request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    """The request in formats below the present one; the head stays as it is."""
    weights = request.weights or model.stored
    for body in _PRECISION_PRICES:
        if PRECISIONS[body] < PRECISIONS[weights.body]:
            yield body, replace(request, weights=Precision(body, weights.head))


def _smaller_weights(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Iterator[Alternative]:
    for body, smaller in _smaller_formats(model, request):
        found = _try(model, profile, smaller)
        if found:
            outcome = f"weights of {format_size(found.memory.weights_bytes)}"
            yield Alternative(f"--weights {body}", outcome, _PRECISION_PRICES[body])


def _smaller_weights_and_more(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Iterator[Alternative]:
    """A smaller format that is not enough by itself, with one more change."""
    for body, smaller in _smaller_formats(model, request):
        if _try(model, profile, smaller) is None:
            for alternative in (*_smaller_counts(model, profile, smaller), *_looser_limits(model, profile, smaller)):
                yield Alternative(
                    f"--weights {body} {alternative.option}",
                    alternative.outcome,
                    alternative.price + _PRECISION_PRICES[body],
                )


def _smaller_counts(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Iterator[Alternative]:
    """The most streams, new tokens or pictures that fit."""
    least = {"streams": 1, "max_new_tokens": 1} | ({} if request.image_tokens is not None else {"images": 0})
    for name, lowest in least.items():
        asked = getattr(request, name)

        def fits(count: int, name: str = name) -> bool:
            changed: dict[str, Any] = {name: count}
            return _try(model, profile, replace(request, **changed)) is not None

        most = _largest(asked, lowest, fits)
        if most is not None:
            yield Alternative(f"--{name.replace('_', '-')} {most}", f"instead of {asked}", 1 - most / asked)


def _freer_method(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Iterator[Alternative]:
    """`distinct` with parameters of the estimate's choice."""
    if request.method is not None:
        found = _try(model, profile, replace(request, method="distinct", parameters={}))
        if found:
            kept = found.kv.bytes_stored / found.kv.bytes_full
            yield Alternative(
                "--method distinct without its parameters", f"stores {100 * kept:.0f} % of the rows", 1 - kept
            )


def _looser_limits(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Iterator[Alternative]:
    """Only the limits that the request set itself, since a device does not grow: the one, the other, or both."""
    memory, target = request.max_memory, request.target_ms_per_token
    unbounded = {"max_memory": profile.memory.budget_bytes, "target_ms_per_token": _NO_HURRY_MS}
    given = [name for name, limit in (("max_memory", memory), ("target_ms_per_token", target)) if limit is not None]
    for names in [[name] for name in given] + ([given] if len(given) == 2 else []):
        freed: dict[str, Any] = {name: unbounded[name] for name in names}
        fitting = [each for each in estimates(model, profile, replace(request, **freed)) if each.fits]
        if not fitting:
            continue
        options, price = [], 0.0
        if memory is not None and "max_memory" in names:
            fitting = [min(fitting, key=lambda each: each.memory.peak_bytes)]
            need = fitting[0].memory.peak_bytes
            if need <= memory:  # the other limit alone was in the way
                continue
            options.append(f"--max-memory {need}B")
            price += need / memory - 1
        if target is not None and "target_ms_per_token" in names:
            # Rounded up, so that what is proposed does fit.
            reached = math.ceil(100 * min(each.ms_per_token for each in fitting)) / 100
            if reached <= target:
                continue
            options.append(f"--target-ms-per-token {reached:.2f}")
            price += reached / target - 1
        yield Alternative(" ".join(options), "at least", price)


def _smaller_models(model: ModelShape, profile: DeviceProfile, request: PlanRequest) -> Iterator[Alternative]:
    """The largest model of the same family below this one, in its own format or in the first that fits."""
    family = model.name.rpartition("-")[0]
    smaller = [each for each in KNOWN.values() if family and each.name.rpartition("-")[0] == family]
    for each in sorted(smaller, key=lambda shape: shape.parameters, reverse=True):
        if each.parameters >= model.parameters:
            continue
        outcome = f"{each.parameters / 1e9:.1f} instead of {model.parameters / 1e9:.1f} billion parameters"
        if _try(each, profile, request):
            yield Alternative(f"--model {each.name}", outcome, _SMALLER_MODEL_PRICE)
            return
        for alternative in _smaller_weights(each, profile, request):
            yield Alternative(
                f"--model {each.name} {alternative.option}", outcome, _SMALLER_MODEL_PRICE + alternative.price
            )
            return


def _other_profiles(
    model: ModelShape, profile: DeviceProfile, request: PlanRequest, others: Iterable[DeviceProfile]
) -> Iterator[Alternative]:
    """One power mode of the same device, and one other device that is a product, with the least memory that does."""
    fitting = [each for each in others if each.device.kind == "jetson" and _try(model, each, request)]
    fitting.sort(key=lambda each: each.memory.budget_bytes)
    modes = [each.power_mode for each in fitting if each.device == profile.device and each.power_mode]
    devices = [each for each in fitting if each.device != profile.device]
    if modes and modes[0] != profile.power_mode:
        yield Alternative(f"--power {_spoken(modes[0])}", "another power mode", _POWER_PRICE)
    if devices:
        mode = f" --power {_spoken(devices[0].power_mode)}" if devices[0].power_mode else ""
        yield Alternative(f"--device {devices[0].device.name}{mode}", "another device", _DEVICE_PRICE)


def _spoken(mode: PowerMode) -> str:
    """As people write it: ``30W``."""
    return short(mode.name).upper()


def _largest(asked: int, least: int, fits: Callable[[int], bool]) -> int | None:
    """The largest count from ``least`` to ``asked`` - 1 that fits, by bisection; None if there is none."""
    if asked <= least or not fits(least):
        return None
    low, high = least, asked  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
