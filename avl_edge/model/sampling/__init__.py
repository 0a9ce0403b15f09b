"""From logits to a token: bias and penalties, the distribution that is drawn from, the draw."""

from .distribution import distribution
from .processor import LogitsProcessor
from .sampler import Sampler

__all__ = ["LogitsProcessor", "Sampler", "distribution"]
