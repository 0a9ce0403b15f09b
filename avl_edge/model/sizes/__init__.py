"""Models by their sizes: what can be planned without weights."""

from __future__ import annotations

from ..pictures import AnyRes, Fixed, Merged, Picture
from .known import KNOWN, known_shape, shape_of_checkpoint, shape_of_spec
from .sizes import PRECISIONS, DecoderShape, ModelShape, Precision, VisionShape

__all__ = [
    "KNOWN",
    "PRECISIONS",
    "AnyRes",
    "DecoderShape",
    "Fixed",
    "Merged",
    "ModelShape",
    "Picture",
    "Precision",
    "VisionShape",
    "known_shape",
    "shape_of_checkpoint",
    "shape_of_spec",
]
