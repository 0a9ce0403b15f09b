"""avl-edge: answers about camera images on the edge, inside a memory budget that is never exceeded."""

from .config import Options
from .errors import AvlEdgeError, BadImage, BadInput, BadModel, DoesNotFit
from .request import Result, TokenEvent
from .runtime import Generation, Runtime

__all__ = [
    "AvlEdgeError",
    "BadImage",
    "BadInput",
    "BadModel",
    "DoesNotFit",
    "Generation",
    "Options",
    "Result",
    "Runtime",
    "TokenEvent",
]
