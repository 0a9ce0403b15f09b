"""Sizes of a model's parts and what follows from them: parameters, bytes, bytes per step. No weights are needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import KvShape, Picture, require
from .pictures import PictureRule

_GROUPS = {"int8": 128, "int4:32": 32, "int4:64": 64, "int4": 128}
PRECISIONS: dict[str, float] = {
    "fp32": 4,
    "fp16": 2,
    **{name: int(name[3]) / 8 + 2 / group for name, group in _GROUPS.items()},
}
"""Bytes per parameter; int8 and int4 with one fp16 scale for each group of 128, or of as many as are named."""

_SAMPLER_BYTES = 40
"""Of each logit while a token is drawn: float32 scores, weights in two precisions, int64 ids and their order."""
_ROW_BOOKS_BYTES = 32
"""Of each row beside its key and value: int32 id and position, its score so far and of this step, and their copies."""


@dataclass(frozen=True)
class Precision:
    """The formats of the decoder's matrices and of its head, by their names in :data:`PRECISIONS`."""

    body: str
    head: str

    def __post_init__(self) -> None:
        for name in (self.body, self.head):
            require(name in PRECISIONS, f"weights are stored as one of {', '.join(PRECISIONS)}, not {name!r}")


@dataclass(frozen=True)
class DecoderShape:
    """A decoder of the LLaMA family. Biases: on query, key and value, on the attention's output, in the MLP.
    ``head_norms``: an RMSNorm for the heads of query and key."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Of one layer's matrices."""
        return self.hidden_size * (2 * self.query_size + 2 * self.key_size + 3 * self.intermediate_size)

    @property
    def small_parameters(self) -> int:
        """Norms and biases of all layers and the last norm: what no format packs."""
        bias = (self.query_size + 2 * self.key_size) * self.qkv_bias + self.hidden_size * self.out_bias
        bias += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        return self.layers * (2 * self.hidden_size + bias + 2 * self.head_dim * self.head_norms) + self.hidden_size

    @property
    def vocabulary_parameters(self) -> int:
        """Of the embedding, and once more of the head where it is not tied to it."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer with all that makes its output the decoder's input.

    ``patch_size``: edge of a patch in pixels. ``outside`` counts the parameters that are in no layer: embeddings,
    norms, merger or projector; ``layer_small`` a layer's norms and biases. ``gated``: three matrices in the MLP, not
    two. ``runs``: layers that the features need (None: all). ``states``: layer outputs held until the end.
    ``window``: patches that see each other in all but ``unwindowed`` layers (0: no windows). ``deep``: vectors of the
    decoder's width that a token has beside its own, for early layers of the decoder (DeepStack).
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    patch_size: int
    outside: int
    layer_small: int
    gated: bool = False
    runs: int | None = None
    states: int = 1
    window: int = 0
    unwindowed: int = 0
    deep: int = 0

    @property
    def layer_parameters(self) -> int:
        """Of one layer's matrices."""
        return self.hidden_size * (4 * self.hidden_size + (3 if self.gated else 2) * self.intermediate_size)

    @property
    def parameters(self) -> int:
        return self.layers * (self.layer_parameters + self.layer_small) + self.outside

    @property
    def needed_layers(self) -> int:
        """Layers that run."""
        return self.layers if self.runs is None else self.runs

    def flops(self, picture: Picture) -> float:
        """Floating-point operations for one picture, the parts outside of the layers counted once per patch of four."""
        runs = self.needed_layers
        whole = self.unwindowed if self.window else runs
        seen = whole * picture.patches + (runs - whole) * self.window
        linear = 2.0 * picture.patches * (runs * self.layer_parameters + self.outside / 4)
        return picture.crops * (linear + 4.0 * picture.patches * seen * self.hidden_size)

    def peak_bytes(self, pictures: Sequence[Picture], itemsize: int) -> int:
        """Live tensors at the worst moment, in the middle of the last layer, all pictures at once."""
        patches = sum(picture.crops * picture.patches for picture in pictures)
        width = (self.states + 2) * self.hidden_size + 3 * self.intermediate_size
        return patches * itemsize * (width + 3 * self.patch_size**2)


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model by its sizes. ``itemsize``: bytes of an element of rows, activations, small weights.
    ``stored_as``: what the decoder's matrices are, None where they are no smaller than all else."""

    name: str
    decoder: DecoderShape
    vision: VisionShape
    picture: PictureRule
    itemsize: int = 2
    stored_as: Precision | None = None

    @property
    def precision(self) -> str:
        """The precision that the weights are stored in where none is asked for."""
        return "fp32" if self.itemsize == 4 else "fp16"

    @property
    def parameters(self) -> int:
        body = self.decoder.layers * self.decoder.layer_parameters + self.decoder.small_parameters
        vocabularies = 1 if self.decoder.tied_head else 2
        return body + vocabularies * self.decoder.vocabulary_parameters + self.vision.parameters

    def kv_shape(self) -> KvShape:
        return KvShape(self.decoder.layers, self.decoder.kv_heads, self.decoder.head_dim, self.itemsize)

    @property
    def stored(self) -> Precision:
        """The formats of the checkpoint itself."""
        return self.stored_as or Precision(self.precision, self.precision)

    def weight_bytes(self, weights: Precision) -> int:
        """Bytes of all weights with the decoder's matrices and its head in the formats of ``weights``.

        Embedding, vision, norms and biases stay as they are. A tied head in another precision is a second copy.
        """
        decoder = self.decoder
        separate = not decoder.tied_head or weights.head != self.precision
        loose = decoder.vocabulary_parameters + decoder.small_parameters + self.vision.parameters
        packed = decoder.layers * decoder.layer_parameters * PRECISIONS[weights.body]
        return math.ceil(packed + self._head_bytes(weights.head) * separate) + loose * self.itemsize

    def float32_scale_bytes(self, weights: Precision) -> int:
        """What scales of groups take more where they are held in float32."""
        counts = {weights.head: self.decoder.vocabulary_parameters}
        counts[weights.body] = counts.get(weights.body, 0) + self.decoder.layers * self.decoder.layer_parameters
        return sum(2 * count // _GROUPS[name] for name, count in counts.items() if name in _GROUPS)

    def step_bytes(self, weights: Precision) -> int:
        """Bytes of the weights that one decode step reads: all of the decoder's but the embedding."""
        packed = self.decoder.layers * self.decoder.layer_parameters * PRECISIONS[weights.body]
        return math.ceil(packed + self._head_bytes(weights.head)) + self.decoder.small_parameters * self.itemsize

    def _head_bytes(self, head: str) -> float:
        return self.decoder.vocabulary_parameters * PRECISIONS[head]

    def activation_bytes(self, tokens: int, image_tokens: int) -> int:
        """Live tensors of prefill at its worst moment, inside a layer's MLP, the image features still held.

        Per token: two hidden states and the normed one; query, key, value and the attention's result; three vectors of
        the gated MLP; RoPE's cosines and sines.
        """
        d = self.decoder
        width = 3 * d.hidden_size + 2 * d.query_size + 2 * d.key_size + 3 * d.intermediate_size + 2 * d.head_dim
        features = image_tokens * (1 + self.vision.deep) * d.hidden_size
        return self.itemsize * (tokens * width + features + d.vocab_size)

    def workspace_bytes(self, pictures: Sequence[Picture], tokens: int, image_tokens: int) -> int:
        """Live tensors of vision encoder or prefill, whichever are more: they do not run at once."""
        return max(self.vision.peak_bytes(pictures, self.itemsize), self.activation_bytes(tokens, image_tokens))

    def step_workspace_bytes(self, tokens: int) -> int:
        """What a sequence of so many tokens takes in a decode step beside its rows, whatever its method: a token's
        activations, the sampler's copies of its logits, and for each row its id, position and score."""
        rows = self.decoder.layers * tokens
        return self.activation_bytes(1, 0) + self.decoder.vocab_size * _SAMPLER_BYTES + rows * _ROW_BOOKS_BYTES
