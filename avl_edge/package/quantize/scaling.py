"""AWQ's scaling (arXiv 2306.00978): inputs that are large are multiplied before their weights are rounded.

The norm or linear layer that gives an input is divided by its factor, so that the model computes what it did. A factor
is the input's mean magnitude on calibration prompts to a power from 0 to 0.9, the same for all layers that read it,
that leaves the least error in their outputs. Of grouped-query attention the query heads that share a value head share
the factors of ``o_proj``. The paper's clipping is in the search of a group's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...model.checkpoint import Weights
from ...model.spec import TextSpec
from ...model.weight_format import WeightFormat
from ...model.weights import Dense, LinearWeight, pack

POWERS = tuple(step / 10 for step in range(10))
SAMPLED_TOKENS = 512
"""Of all prompts together, by which a site's error is judged; magnitudes are those of all tokens."""
_LEAST_INPUT = 1e-4


@dataclass(frozen=True)
class Site:
    """Linear layers ``readers`` that read one input, and the norm or linear layer ``giver`` that gives it.

    ``repeats``: how many times in a row each block of ``block`` outputs of the giver is read, as query heads read a
    value head.
    """

    readers: tuple[str, ...]
    giver: str
    repeats: int = 1
    block: int = 1

    def share(self, values: Tensor) -> Tensor:
        """Of each output of the giver, from what its inputs ask for."""
        return values.view(-1, self.repeats, self.block).mean(1).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """Of each input, from that of the giver's outputs."""
        return values.view(-1, 1, self.block).expand(-1, self.repeats, -1).flatten()


def layer_sites(name: str, spec: TextSpec) -> list[Site]:
    """Every input of a decoder layer's linear layers."""
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    return [
        Site(tuple(f"{attention}.{part}_proj" for part in "qkv"), f"{name}.input_layernorm"),
        Site((f"{attention}.o_proj",), f"{attention}.v_proj", spec.heads // spec.kv_heads, spec.head_dim),
        Site((f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{name}.post_attention_layernorm"),
        Site((f"{mlp}.down_proj",), f"{mlp}.up_proj"),
    ]


@dataclass
class Inputs:
    """What a linear layer read: ``total`` of magnitudes float32 ``[inputs]`` over ``tokens``, and ``sampled`` of these
    tokens ``[n, inputs]``."""

    sample: int
    total: Tensor | None = None
    tokens: int = 0
    sampled: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Of one prompt, ``[n, inputs]``."""
        added = x.float().abs().sum(0)
        self.total = added if self.total is None else self.total + added
        self.tokens += len(x)
        self.sampled.append(x[:: max(1, len(x) // self.sample)].float())

    @property
    def magnitude(self) -> Tensor:
        assert self.total is not None, "the layer has run"
        return (self.total / self.tokens).clamp(min=_LEAST_INPUT)


@dataclass(frozen=True)
class _Recorded(Dense):
    add: Callable[[Tensor], None] = field(kw_only=True)

    def __call__(self, x: Tensor) -> Tensor:
        self.add(x)
        return super().__call__(x)


class Recorder(Weights):
    """Gives linear layers that remember what they read, for ``prompts`` prompts."""

    def __init__(self, weights: Weights, prompts: int) -> None:
        super().__init__({})
        self.dtype = weights.dtype
        self._weights = weights
        self._sample = -(-SAMPLED_TOKENS // prompts)
        self.inputs: dict[str, Inputs] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        return self._weights.take(name, *shape)

    def has(self, layer: str) -> bool:
        return self._weights.has(layer)

    def deny(self, name: str) -> None:
        self._weights.deny(name)

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool = False) -> LinearWeight:
        plain = self._weights.linear(name, outputs, inputs, bias=bias)
        assert isinstance(plain, Dense), "what is quantised already is refused"
        read = self.inputs[name] = Inputs(self._sample)
        return _Recorded(plain.weight, plain.bias, add=read.add)


@dataclass(frozen=True)
class Scaling:
    """Factors of some layers' inputs and outputs: ``columns[name] [inputs]`` multiply a matrix's columns, ``rows[name]
    [outputs]`` divide a norm's elements, or a matrix's rows and its bias. float32."""

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sites: Sequence[Site], recorder: Recorder, tensors: Mapping[str, Tensor], form: WeightFormat
    ) -> Scaling:
        """The best of all :data:`POWERS` at each site, of layers whose ``tensors`` are plain."""
        columns: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for site in sites:
            matrices = [tensors[f"{reader}.weight"].float() for reader in site.readers]
            factors = factors_of(site, matrices, recorder.inputs[site.readers[0]], form)
            norm = tensors[f"{site.giver}.weight"]
            if norm.ndim == 1:
                # What the norm is divided by is rounded to its dtype, and its readers are multiplied by that.
                factors = torch.nan_to_num(norm.float() / (norm / factors).to(norm.dtype).float(), nan=1.0, posinf=1.0)
            rows[site.giver] = factors
            columns.update(dict.fromkeys(site.readers, site.spread(factors)))
        return cls(columns, rows)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor ``name``, scaled: float32 where there are factors for it, else as it is."""
        layer = name.rpartition(".")[0]
        if layer in self.rows:
            tensor = tensor.float() / self.rows[layer].view(-1, *[1] * (tensor.ndim - 1))
        if layer in self.columns and name.endswith(".weight"):
            tensor = tensor.float() * self.columns[layer]
        return tensor


def factors_of(site: Site, matrices: Sequence[Tensor], read: Inputs, form: WeightFormat) -> Tensor:
    """Factors of the giver's outputs, with which the readers' outputs change least when their ``matrices``, float32,
    are rounded."""
    magnitude, x = site.share(read.magnitude), torch.cat(read.sampled)
    best, least = torch.ones_like(magnitude), torch.inf
    for power in POWERS:
        factors = magnitude**power
        factors = factors / (factors.max() * factors.min()).sqrt()
        wide = site.spread(factors)
        changes = (pack(matrix * wide, form).dequantize().div_(wide).sub_(matrix) for matrix in matrices)
        error = sum(float((x @ change.T).square_().sum()) for change in changes)
        if error < least:
            best, least = factors, error
    return best
