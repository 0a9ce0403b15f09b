"""avl-edge: answers about camera images on the edge, inside a memory budget that is never exceeded."""

from .config import Formats, Options
from .errors import AvlEdgeError, BadImage, BadInput, BadModel, DoesNotFit
from .request import Result, TokenEvent
from .serving.generation import Generation
from .serving.image_session import ImageSession
from .serving.runtime import Runtime

__all__ = [
    "AvlEdgeError",
    "BadImage",
    "BadInput",
    "BadModel",
    "DoesNotFit",
    "Formats",
    "Generation",
    "ImageSession",
    "Options",
    "Result",
    "Runtime",
    "TokenEvent",
]
