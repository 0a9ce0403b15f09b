"""Muon with all matrices of a shape in one batch.

The same updates as ``torch.optim.Muon``, which orthogonalizes one matrix after another: for a small model those are a
thousand tiny products per step, slower than the rest of the step on a CPU that is shared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al., Muon, 2024).
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """``[K, M, N]`` -> the nearest (about) orthogonal matrices, float32."""
    x = matrices.to(torch.bfloat16)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x if wide else x.mT).float()


class BatchedMuon(Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay; for matrices only."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            shapes: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        ahead = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
        rows, columns = parameters[0].shape
        size = group["lr"] * max(1.0, rows / columns) ** 0.5
        for parameter, update in zip(parameters, orthogonalize(torch.stack(ahead)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Move the parameter's momentum, and look one step ahead of it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum"]
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)
