"""avl-edge: answers about camera images on the edge, inside a KV memory budget that is never exceeded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import Formats, Options
from .errors import AvlEdgeError, BadImage, BadInput, BadModel, Busy, DoesNotFit, TooLarge

if TYPE_CHECKING:
    from .model.images import Frame
    from .model.prompt import Frames, Message
    from .request import Result, TokenEvent
    from .serving.generation import Generation
    from .serving.image_session import ImageSession
    from .serving.runtime import Runtime

__all__ = [
    "AvlEdgeError",
    "BadImage",
    "BadInput",
    "BadModel",
    "Busy",
    "DoesNotFit",
    "Formats",
    "Frame",
    "Frames",
    "Generation",
    "ImageSession",
    "Message",
    "Options",
    "Result",
    "Runtime",
    "TokenEvent",
    "TooLarge",
]

# What computes is imported when its name is first asked for (PEP 562): torch takes seconds to import, and what only
# plans, probes or prints help is done before that.
_MODULES = {
    "Frame": "model.images",
    "Frames": "model.prompt",
    "Generation": "serving.generation",
    "ImageSession": "serving.image_session",
    "Message": "model.prompt",
    "Result": "request",
    "Runtime": "serving.runtime",
    "TokenEvent": "request",
}

if not TYPE_CHECKING:  # a type checker that saw it would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value  # asked for once
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
