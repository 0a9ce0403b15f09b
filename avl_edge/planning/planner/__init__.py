"""What a request costs on a device, before anything is loaded: bytes, tiers, milliseconds; or a refusal with advice."""

from __future__ import annotations

from .division import Division, divide, kv_pool_bytes
from .plan import KvPlan, MemoryPlan, Plan, TimePlan, first_fit, plans
from .report import report
from .request import PlanRequest
from .tiers import Tiers, tiers, tokens_in
from .ways import Refused, Way, plan
from .work import Amounts, Answer, Step, prompt_work, step_work, vision_work

__all__ = [
    "Amounts",
    "Answer",
    "Division",
    "KvPlan",
    "MemoryPlan",
    "Plan",
    "PlanRequest",
    "Refused",
    "Step",
    "Tiers",
    "TimePlan",
    "Way",
    "divide",
    "first_fit",
    "kv_pool_bytes",
    "plan",
    "plans",
    "prompt_work",
    "report",
    "step_work",
    "tiers",
    "tokens_in",
    "vision_work",
]
