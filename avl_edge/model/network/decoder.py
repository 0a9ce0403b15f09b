"""The LLaMA family's decoder, once: RMSNorm, RoPE, grouped-query attention, gated MLP; biases and norms of
heads where there are such.

Attention itself is not here: a layer gives query, key and value, the backend attends as its pool and policy
say, and the layer takes the result.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import Weights
from ..spec import TextSpec
from ..weights import Dense, LinearWeight
from .layers import RmsNorm, activation
from .rope import Rope, rotate


class Decoder:
    """Embedding, layers, final norm and head. Hidden states are ``[n, hidden]``, one row per token."""

    def __init__(self, spec: TextSpec, weights: Weights) -> None:
        size = spec.hidden_size
        self.spec = spec
        self.embedding = weights.take("text.embed_tokens.weight", spec.vocab_size, size)
        self.layers = [DecoderLayer(spec, f"text.layers.{index}", weights) for index in range(spec.layers)]
        self.norm = RmsNorm.take(weights, "text.norm", size, spec.norm_eps)
        # A file with a head of its own has it for a reason, whatever its config says.
        tied = spec.tied_head and not weights.has("head")
        self.head = Dense(self.embedding) if tied else weights.linear("head", spec.vocab_size, size)
        self._rope = Rope(spec.head_dim, spec.rope)

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 ``[n]`` to ``[n, hidden]``."""
        return F.embedding(token_ids, self.embedding)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE's cosines and sines for ``positions`` ``[n]``, or ``[axes, n]`` (see :class:`Rope`)."""
        return self._rope.angles(positions, self.embedding.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, hidden]`` to ``[n, vocabulary]``."""
        return self.head(self.norm(hidden))


class DecoderLayer:
    def __init__(self, spec: TextSpec, name: str, weights: Weights) -> None:
        size, inner, head_dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
        queries, keys = spec.heads * head_dim, spec.kv_heads * head_dim
        self._head_dim = head_dim
        self.attention_norm = RmsNorm.take(weights, f"{name}.input_layernorm", size, spec.norm_eps)
        self.mlp_norm = RmsNorm.take(weights, f"{name}.post_attention_layernorm", size, spec.norm_eps)
        self._query = weights.linear(f"{name}.self_attn.q_proj", queries, size, bias=spec.qkv_bias)
        self._key = weights.linear(f"{name}.self_attn.k_proj", keys, size, bias=spec.qkv_bias)
        self._value = weights.linear(f"{name}.self_attn.v_proj", keys, size, bias=spec.qkv_bias)
        self.query_norm = self.key_norm = None
        if spec.head_norms:
            self.query_norm = RmsNorm.take(weights, f"{name}.self_attn.q_norm", head_dim, spec.norm_eps)
            self.key_norm = RmsNorm.take(weights, f"{name}.self_attn.k_norm", head_dim, spec.norm_eps)
        self._out = weights.linear(f"{name}.self_attn.o_proj", size, queries, bias=spec.out_bias)
        self._gate = weights.linear(f"{name}.mlp.gate_proj", inner, size, bias=spec.mlp_bias)
        self._up = weights.linear(f"{name}.mlp.up_proj", inner, size, bias=spec.mlp_bias)
        self._down = weights.linear(f"{name}.mlp.down_proj", size, inner, bias=spec.mlp_bias)
        self._activation = activation(spec.activation)

    @property
    def linears(self) -> tuple[LinearWeight, ...]:
        """Of queries, keys, values and the attention's result, then gate, up and down of the MLP."""
        return self._query, self._key, self._value, self._out, self._gate, self._up, self._down

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[n, hidden]`` to query ``[n, heads, d]``, key and value ``[n, kv_heads, d]``; query and key rotated."""
        normed = self.attention_norm(hidden)
        query, key, value = (
            part(normed).view(len(hidden), -1, self._head_dim) for part in (self._query, self._key, self._value)
        )
        if self.query_norm and self.key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output from its input and the attention's result ``[n, heads, d]``."""
        hidden = hidden + self._out(attended.flatten(1))
        normed = self.mlp_norm(hidden)
        return hidden + self._down(self._activation(self._gate(normed)) * self._up(normed))
