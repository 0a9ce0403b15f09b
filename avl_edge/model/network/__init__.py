"""The networks, as plain objects over memory-mapped weights."""

from .llava import Llava

__all__ = ["Llava"]
