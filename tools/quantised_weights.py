"""A checkpoint whose decoder's weights have been through int8 or int4 and back, to judge what they cost.

    python -m tools.quantised_weights real-decoder real-decoder-int4 --weights int4 --group 128
    python -m tools.quantised_weights real-decoder real-decoder-awq --weights int4 --activation-aware calibration.txt
    avl-edge eval --model real-decoder-awq --data text:LICENSE --methods full:format=int8

Round to nearest: a group of so many neighbouring inputs of a row shares a scale, its largest magnitude over 127 or 7,
in float16; symmetric, as TensorRT takes int4 weights. The result is stored in the checkpoint's own dtype, so that every
backend computes with the quantiser's output as it is.

``--activation-aware`` is AWQ's scaling (arXiv 2306.00978): inputs that are large on a calibration text are multiplied
before they are rounded, and divided by the norm or the linear layer that gives them. The factor of an input is its mean
magnitude to a power from 0 to 0.9, the same for all layers that read it, that leaves the least error in their outputs.
Of grouped-query attention the query heads that share a value head share the factors of ``o_proj``. What the paper adds,
clipping of the largest weights, is left out.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from avl_edge.config import require
from avl_edge.errors import AvlEdgeError
from avl_edge.measure.perplexity import WindowLayout, read_windows
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor

LEVELS = {"int8": 127, "int4": 7}
POWERS = tuple(step / 10 for step in range(10))
CALIBRATION_TOKENS = 256

_LARGEST_SCALE = 65504.0
_LEAST_INPUT = 1e-4


def quantised(weight: Tensor, levels: int, group: int) -> Tensor:
    """``[outputs, inputs]`` rounded to whole numbers from -``levels`` to ``levels`` times a float16 scale for each
    ``group`` inputs, in the dtype that it came in."""
    grouped = weight.float().view(len(weight), -1, group)
    scales = (grouped.abs().amax(-1, keepdim=True) / levels).clamp(max=_LARGEST_SCALE).half().float()
    whole = torch.where(scales > 0, grouped / scales, 0.0).round().clamp(-levels, levels)
    return (whole * scales).view_as(weight).to(weight.dtype)


@dataclass(frozen=True)
class Site:
    """Linear layers that read the same input, and the module that gives it.

    ``share`` makes factors of that module's outputs ``[outputs]`` from what the inputs ask for, ``spread`` the factors
    of the inputs from these: they differ where several query heads read one value head.
    """

    readers: Sequence[nn.Linear]
    giver: Any
    share: Callable[[Tensor], Tensor] = lambda values: values
    spread: Callable[[Tensor], Tensor] = lambda values: values

    @torch.no_grad()
    def absorb(self, factors: Tensor) -> None:
        """Multiply the readers' inputs by ``factors`` of the giver's outputs, and divide what it gives: the model
        computes what it did."""
        weight, bias = self.giver.weight, getattr(self.giver, "bias", None)
        weight.div_(factors.view(-1, *[1] * (weight.ndim - 1)))
        if bias is not None:
            bias.div_(factors)
        for reader in self.readers:
            reader.weight.mul_(self.spread(factors))


def sites_of(model: Any, *, head: bool) -> Iterator[Site]:
    """Every input of the decoder's linear layers, in the order of the layers; with ``head`` the head's too."""
    decoder, config = model.model.language_model, model.config.text_config
    kv_heads = config.num_key_value_heads
    queries = config.num_attention_heads // kv_heads

    def share(values: Tensor) -> Tensor:
        return values.view(kv_heads, queries, -1).mean(1).flatten()

    def spread(values: Tensor) -> Tensor:
        return values.view(kv_heads, 1, -1).expand(-1, queries, -1).flatten()

    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield Site([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm)
        yield Site([attention.o_proj], attention.v_proj, share, spread)
        yield Site([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm)
        yield Site([mlp.down_proj], mlp.up_proj)
    if head:
        yield Site([model.lm_head], decoder.norm)


@torch.no_grad()
def inputs_of(model: Any, sites: Sequence[Site], token_ids: Sequence[int]) -> list[Tensor]:
    """What each site reads while the model reads a text: ``[tokens, inputs]``."""
    seen: list[Tensor] = []
    hooks = [
        site.readers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].float())) for site in sites
    ]
    model(input_ids=torch.tensor([token_ids]))
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def factors_of(site: Site, inputs: Tensor, levels: int, group: int) -> Tensor:
    """The factors, of all :data:`POWERS`, with which the site's outputs change least when its weights are rounded."""
    magnitude = site.share(inputs.abs().mean(0)).clamp(min=_LEAST_INPUT)
    weights = [reader.weight.float() for reader in site.readers]
    best, least = torch.ones_like(magnitude), torch.inf
    for power in POWERS:
        factors = magnitude**power
        factors = factors / (factors.max() * factors.min()).sqrt()
        wide = site.spread(factors)
        changes = (quantised(weight * wide, levels, group) / wide - weight for weight in weights)
        error = sum(float((inputs @ change.T).square().sum()) for change in changes)
        if error < least:
            best, least = factors, error
    return best


@torch.no_grad()
def quantise(model: Any, levels: int, group: int, *, head: bool, calibration: Sequence[int] | None) -> None:
    """Replace the weights of the decoder's linear layers, and of its ``head``, by what is read back of them; scaled
    beforehand where there are token ids of a ``calibration`` text."""
    tied = model.config.text_config.tie_word_embeddings
    sites = list(sites_of(model, head=head))
    for reader in (reader for site in sites for reader in site.readers):
        require(
            reader.in_features % group == 0,
            f"groups of {group} do not divide a layer of {reader.in_features} inputs: give another --group",
        )
    if calibration is not None:
        # A head that is the embedding too would change what the first layer reads.
        scaled = [site for site in sites if not (tied and site.readers[0] is model.lm_head)]
        for site, inputs in zip(scaled, inputs_of(model, scaled, calibration), strict=True):
            site.absorb(factors_of(site, inputs, levels, group))
    for reader in (reader for site in sites for reader in site.readers):
        reader.weight.copy_(quantised(reader.weight, levels, group))


def make_checkpoint(
    source: Path, directory: Path, levels: int, group: int, *, head: bool = False, calibration: Path | None = None
) -> None:
    """Write the checkpoint ``source`` with quantised weights into ``directory``, new or empty."""
    require(
        not directory.exists() or (directory.is_dir() and not any(directory.iterdir())),
        f"{directory} is there already: give a folder that is new or empty",
    )
    spec = read_spec(source)
    token_ids = None
    if calibration is not None:
        layout = WindowLayout(min(CALIBRATION_TOKENS, spec.text.context), 1)
        (window,) = read_windows([calibration], Processor.of(spec, source).text, layout, 1)
        token_ids = window.token_ids
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    quantise(model.eval(), levels, group, head=head, calibration=token_ids)
    model.save_pretrained(directory)
    for file in source.iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copy(file, directory)


def main(
    source: Annotated[Path, typer.Argument(help="A LLaVA-1.5 checkpoint.")],
    directory: Annotated[Path, typer.Argument(help="The folder to write to, new or empty.")],
    weights: Annotated[Literal["int8", "int4"], typer.Option(help="What the weights are rounded to.")] = "int4",
    group: Annotated[int, typer.Option(min=1, help="Inputs that share a scale.")] = 128,
    head: Annotated[bool, typer.Option("--head", help="Round the head too.")] = False,
    activation_aware: Annotated[
        Path | None, typer.Option(help="Scale inputs by their magnitude on this text beforehand (AWQ).")
    ] = None,
) -> None:
    """Make a checkpoint whose decoder's weights have been quantised and read back."""
    make_checkpoint(source, directory, LEVELS[weights], group, head=head, calibration=activation_aware)


if __name__ == "__main__":
    try:
        typer.run(main)
    except AvlEdgeError as error:
        typer.echo(f"quantised_weights: {error}", err=True)
        sys.exit(error.exit_code)
