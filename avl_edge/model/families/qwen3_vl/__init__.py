"""Qwen3-VL, and models of its form such as Cosmos-Reason2: norms of heads, M-RoPE whose axes take turns, positions
that are learned and interpolated, and DeepStack, which feeds earlier layers of the tower to the decoder's first."""

from .published import PUBLISHED
from .spec import Qwen3VlSpec, read

__all__ = ["PUBLISHED", "Qwen3VlSpec", "read"]
