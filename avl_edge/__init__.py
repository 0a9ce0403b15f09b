"""avl-edge: answers about camera images on the edge, inside a memory budget that is never exceeded."""

from .config import Formats, Options
from .errors import AvlEdgeError, BadImage, BadInput, BadModel, DoesNotFit
from .generation import Generation
from .request import Result, TokenEvent
from .runtime import Runtime
from .scene import Scene

__all__ = [
    "AvlEdgeError",
    "BadImage",
    "BadInput",
    "BadModel",
    "DoesNotFit",
    "Formats",
    "Generation",
    "Options",
    "Result",
    "Runtime",
    "Scene",
    "TokenEvent",
]
