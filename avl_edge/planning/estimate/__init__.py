"""What a request costs on a device, before anything is loaded: bytes, tiers, milliseconds; or a refusal with advice."""

from __future__ import annotations

from .alternatives import Alternative, Refused, plan
from .division import Division, divide, kv_pool_bytes
from .estimate import Estimate, KvEstimate, MemoryEstimate, TimeEstimate, estimates, first_fit
from .report import report
from .request import PlanRequest
from .work import Amounts, Answer, Step, prompt_work, step_work, vision_work

__all__ = [
    "Alternative",
    "Amounts",
    "Answer",
    "Division",
    "Estimate",
    "KvEstimate",
    "MemoryEstimate",
    "PlanRequest",
    "Refused",
    "Step",
    "TimeEstimate",
    "divide",
    "estimates",
    "first_fit",
    "kv_pool_bytes",
    "plan",
    "prompt_work",
    "report",
    "step_work",
    "vision_work",
]
