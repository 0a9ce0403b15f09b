"""Measuring this machine: a profile from measurements, and whether it predicts well."""

from __future__ import annotations

from .bench import Bench, Measured, Trial, trials
from .measure import measure
from .report import report, to_dict
from .verify import Comparison, Verdict, verify

__all__ = ["Bench", "Comparison", "Measured", "Trial", "Verdict", "measure", "report", "to_dict", "trials", "verify"]
