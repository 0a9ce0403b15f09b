"""From pictures and text to what the model takes, and from token ids back to text. Needs no torch."""

from ..images import Frames
from .chat import Message, Turn, asked, check_messages, shown_in, turns_of
from .detokenizer import Detokenizer
from .processor import Processor
from .schema import SchemaMatcher

__all__ = [
    "Detokenizer",
    "Frames",
    "Message",
    "Processor",
    "SchemaMatcher",
    "Turn",
    "asked",
    "check_messages",
    "shown_in",
    "turns_of",
]
