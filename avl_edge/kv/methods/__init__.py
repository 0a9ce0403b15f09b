"""The methods, one file each: which row is in which tier.

`base` is what a method says of itself, `policy` what decides for a request, `arithmetic` what they count and rank with,
`registry` the methods by name. To add one, write its file and name its class in `registry`; or, from outside this
package, :func:`register` it.
"""

from __future__ import annotations

from .attentionpack import AttentionPack
from .avl import Avl
from .base import Method, Parameter, TierPeaks, Tiers, parameter
from .coarse import Coarse
from .distinct import Distinct
from .fastv import FastV
from .full import Full
from .h2o import H2O
from .policy import Kept, NoScores, Policy, PromptLayer, Prune, Settlement, SettlesByLayer, Step, StepLayer, pruned
from .random import Random
from .registry import (
    METHODS,
    Choice,
    candidates,
    check_layers,
    parameter_defaults,
    parameter_help,
    parameter_without_method,
    register,
    sharing_methods,
)
from .streaming import Streaming

__all__ = [
    "H2O",
    "METHODS",
    "AttentionPack",
    "Avl",
    "Choice",
    "Coarse",
    "Distinct",
    "FastV",
    "Full",
    "Kept",
    "Method",
    "NoScores",
    "Parameter",
    "Policy",
    "PromptLayer",
    "Prune",
    "Random",
    "Settlement",
    "SettlesByLayer",
    "Step",
    "StepLayer",
    "Streaming",
    "TierPeaks",
    "Tiers",
    "candidates",
    "check_layers",
    "parameter",
    "parameter_defaults",
    "parameter_help",
    "parameter_without_method",
    "pruned",
    "register",
    "sharing_methods",
]
