"""A checkpoint as another one whose decoder is packed in 8 or 4 bits: compressed-tensors, as transformers reads it."""

from __future__ import annotations

from .checkpoint import Outcome, quantize_checkpoint
from .pictures import calibration_prompts

__all__ = ["Outcome", "calibration_prompts", "quantize_checkpoint"]
