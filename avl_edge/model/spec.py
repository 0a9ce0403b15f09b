"""What a checkpoint is, read from its config.json: sizes and kinds, no weights. Each family has its own `ModelSpec`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import KvShape, Picture
from .pictures import PictureRule
from .sizes import VisionShape


@dataclass(frozen=True)
class TextSpec:
    """A decoder of the LLaMA family.

    ``context`` is the longest sequence in tokens, prompt and answer; ``head_norms``: an RMSNorm for the heads of query
    and key.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    vocab_size: int
    context: int
    tied_head: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rope: Mapping[str, Any]
    head_norms: bool = False

    def kv_shape(self, itemsize: int) -> KvShape:
        """The row shape for elements of ``itemsize`` bytes."""
        return KvShape(self.layers, self.kv_heads, self.head_dim, itemsize)


@dataclass(frozen=True)
class ModelSpec(ABC):
    """A vision-language checkpoint: what all families have, and what is asked of each.

    ``image_token_id``: the placeholder in whose places the features of pictures stand.
    """

    prefixes: ClassVar[Mapping[str, str]] = {}
    """How names of tensors may begin in this family's files, beside those that all have (see
    :mod:`avl_edge.model.checkpoint`), and what stands for it in canonical names."""

    has_own_names: ClassVar[bool] = False
    """Whether the family's ``network`` has ``renamed(name, tensor)``: the canonical ones of a tensor of a file."""

    codec: ClassVar[str]
    """The module with the family's ``open_codec(spec, directory)``; it needs Pillow and the tokenizer's package."""
    network: ClassVar[str]
    """The module with the family's ``VisionEncoder``; it needs torch."""

    text: TextSpec
    image_token_id: int

    @property
    @abstractmethod
    def picture(self) -> PictureRule:
        """From the size of a picture to patches and tokens."""

    @abstractmethod
    def pixel_bytes(self, picture: Picture) -> int:
        """Of a picture as the vision encoder takes it, preprocessed."""

    @property
    @abstractmethod
    def vision_shape(self) -> VisionShape:
        """The sizes of the vision encoder and of what makes its output the decoder's input."""
