"""The device's profile while it changes: in another power mode, the next request is planned for another device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Formats, PromptShape, require
from ..errors import TooLarge
from ..kv.methods import Choice, Method
from ..machine import profile
from ..machine.device import DeviceFacts, read_machine
from ..machine.pressure import POLL_MS
from ..machine.profile import BadProfile, DeviceProfile
from ..model.sizes import ModelShape
from ..request import DeviceStats
from . import estimate
from .estimate import PlanRequest

_log = logging.getLogger("avl_edge")


@dataclass(frozen=True)
class PlanObjectives:
    """What requests are planned for: ``streams`` of them at a time, none of whose decode steps, all streams together,
    takes longer than ``target_ms_per_token`` on average (None: as it comes)."""

    streams: int = 1
    target_ms_per_token: float | None = None

    def __post_init__(self) -> None:
        target = self.target_ms_per_token
        require(self.streams >= 1, f"streams must be 1 or more, not {self.streams}")
        require(target is None or 0 < target < 1e9, f"target_ms_per_token must be above 0 and finite, not {target}")


@dataclass(frozen=True)
class DeviceState:
    """What holds for a request that is planned now. ``of_device`` None: no profile is for the machine as it is now."""

    model: ModelShape
    of_device: DeviceProfile | None
    objectives: PlanObjectives
    stats: DeviceStats

    @property
    def kv_budget(self) -> int | None:
        """Bytes for the rows of one request: its share of what the profile leaves for all."""
        if self.of_device is None:
            return None
        share = estimate.kv_pool_bytes(self.model, self.of_device) // self.objectives.streams
        if share < 1:
            raise TooLarge(
                f"the profile {self.of_device.name} leaves no memory for the rows of {self.model.name}: give the "
                f"request a KV budget, or choose a smaller model"
            )
        return share

    def in_time(self, choices: Iterable[Choice], prompt: PromptShape, steps: int) -> Iterator[Choice]:
        """Those of ``choices`` that keep the target; :class:`TooLarge` at their end when none did."""
        target, fastest = self.objectives.target_ms_per_token, 0.0
        if self.of_device is None or target is None:
            yield from choices
            return
        found = False
        for choice in choices:
            ms = self._ms_per_token(self.of_device, *choice, prompt, steps)
            fastest = min(fastest or ms, ms)
            if ms <= target:
                found = True
                yield choice
        if not found:
            raise TooLarge(
                f"{self.model.name} takes {fastest:.1f} ms per token at least by the profile {self.of_device.name}, "
                f"but the target is {target:g} ms: raise the target, or lower --max-new-tokens"
            )

    def _ms_per_token(
        self, of_device: DeviceProfile, method: Method, formats: Formats, prompt: PromptShape, steps: int
    ) -> float:
        request = PlanRequest(
            image_tokens=prompt.images,
            prompt_tokens=prompt.prefix + prompt.suffix,
            system_tokens=prompt.prefix,
            max_new_tokens=steps + 1,
            streams=self.objectives.streams,
        )
        return estimate.Estimate(self.model, of_device, request, method, formats).ms_per_token


class DeviceWatcher:
    """Reads the machine under ``root`` and matches its profile, at most every ``every_ms``.

    ``profiles``: those that were measured on this machine, tried before those that are shipped. With ``follows`` False
    the first of them holds, whatever the machine is.
    """

    def __init__(
        self,
        model: ModelShape,
        objectives: PlanObjectives,
        profiles: Sequence[DeviceProfile] = (),
        *,
        follows: bool = True,
        root: str | Path = "/",
        every_ms: float = POLL_MS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require(follows or len(profiles) > 0, "give a profile, or follow the device")
        self._model, self._objectives, self._profiles = model, objectives, tuple(profiles)
        self._follows, self._root, self._every, self._clock = follows, root, every_ms / 1000, clock
        self._read_at: float | None = None
        self._state: DeviceState | None = None

    def state(self) -> DeviceState:
        """What holds now, and in its ``stats`` what has changed since it was last told."""
        now = self._clock()
        if self._state is None or (self._follows and now - (self._read_at or 0.0) >= self._every):
            before = self._state.stats if self._state else None
            self._read_at = now
            self._state = self._read(before)
            return self._state
        stats = self._state.stats
        unchanged = DeviceStats(stats.profile, stats.power_mode, stats.throttling)
        return DeviceState(self._model, self._state.of_device, self._objectives, unchanged)

    def _read(self, before: DeviceStats | None) -> DeviceState:
        if not self._follows:
            given = self._profiles[0]
            its_mode = given.power_mode.name if given.power_mode else None
            return DeviceState(self._model, given, self._objectives, DeviceStats(given.name, its_mode))
        facts = read_machine(self._root)
        found, mode = _match(facts, self._profiles), profile.mode_of(facts)
        now = DeviceStats(found.name if found else None, mode.name if mode else None, facts.thermal.throttling)
        changed = "" if before is None else _difference(before, now)
        if changed:
            _log.warning("avl-edge: the device has changed: %s; requests are planned anew", changed)
        stats = DeviceStats(now.profile, now.power_mode, now.throttling, changed or None)
        return DeviceState(self._model, found, self._objectives, stats)


def _match(facts: DeviceFacts, profiles: Sequence[DeviceProfile]) -> DeviceProfile | None:
    try:
        return profile.for_machine(facts, profiles)
    except BadProfile:
        return None


def _difference(before: DeviceStats, now: DeviceStats) -> str:
    """Like ``power mode MAXN -> MODE_30W, profile agx-orin-64-maxn -> agx-orin-64-30w, slowed down by cpu-alert``."""
    changes = (("power mode", before.power_mode, now.power_mode), ("profile", before.profile, now.profile))
    parts = [f"{name} {old or 'none'} -> {new or 'none'}" for name, old, new in changes if old != new]
    begun = [name for name in now.throttling if name not in before.throttling]
    ended = [name for name in before.throttling if name not in now.throttling]
    parts += [f"slowed down by {', '.join(begun)}"] if begun else []
    parts += [f"no longer slowed down by {', '.join(ended)}"] if ended else []
    return ", ".join(parts)
