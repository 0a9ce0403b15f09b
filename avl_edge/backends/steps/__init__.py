"""Decode steps on a device, whoever computes them: what goes up, what is replayed, what comes down."""

from __future__ import annotations

from .device import Accelerator, CudaDevice
from .recorded import RecordedStep, RecordedSteps
from .tables import Bucket, Reads, StepTables

__all__ = [
    "Accelerator",
    "Bucket",
    "CudaDevice",
    "Reads",
    "RecordedStep",
    "RecordedSteps",
    "StepTables",
]
