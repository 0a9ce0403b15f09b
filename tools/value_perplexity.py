"""What packing a decoder's values costs on texts, in fewer bits and other ways than the row formats have.

    python -m tools.value_perplexity --model real-decoder --data text:LICENSE

Keys stay exact. A variant is a number of bits, and with a plus behind it what is done before: ``4``, ``4+group16``
(dimensions that share a scale; 32 where none is named), ``4+hadamard`` (each head rotated by a Hadamard matrix),
``4+smooth`` (a mean and a deviation per channel, of the prompt's values). The code is that of
:mod:`avl_edge.kv.formats`' int4: a signed float16 scale. How it is measured: :mod:`tools.text_perplexity`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from avl_edge.config import require
from avl_edge.errors import AvlEdgeError
from avl_edge.measure.perplexity import Window, WindowLayout, files_of, read_windows
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor
from tools.text_perplexity import load, rows_of, write

VARIANTS = ",".join(
    f"{bits}{way}" for bits in (4, 3, 2) for way in ("", "+group16", "+hadamard", "+smooth", "+hadamard+group16")
)


def packed(values: Tensor, bits: int, group: int) -> Tensor:
    """``[..., d]`` as it is read back from so many bits, one scale for each ``group`` of dimensions."""
    half = 2 ** (bits - 1)
    grouped = values.float().view(*values.shape[:-1], -1, group)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    step = (torch.where(high >= -low, high, low) / -half).half().float()
    numbers = torch.where(step != 0, grouped / step, 0).round().clamp(-half, half - 1)
    back: Tensor = (numbers * step).view_as(values)
    return back


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix ``[size, size]``, for a power of two."""
    require(size & (size - 1) == 0, f"heads of {size} have no Hadamard matrix here: it takes a power of two")
    matrix: Tensor = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    normal: Tensor = matrix / size**0.5
    return normal


def through(variant: str, prompt: int) -> Callable[[Tensor], Tensor]:
    """What a variant makes of values ``[..., tokens, heads, d]`` of which ``prompt`` tokens are the prompt."""
    bits, *options = variant.split("+")
    ways = {option for option in options if option in ("hadamard", "smooth")}
    groups = [int(option[5:]) for option in options if option.startswith("group") and option[5:].isdecimal()]
    require(
        bits.isdecimal() and 1 < int(bits) <= 8 and len(groups) <= 1 and len(ways) + len(groups) == len(options),
        f"there are no values {variant!r}: give bits from 2 to 8, with +hadamard, +smooth or +groupN behind them",
    )

    def pack(values: Tensor) -> Tensor:
        size = values.shape[-1]
        group = groups[0] if groups else min(32, size)
        require(size % group == 0, f"heads of {size} have no groups of {group}")
        wide, center, scale = values.float(), torch.zeros(1), torch.ones(1)
        if "smooth" in ways:
            center = wide[..., :prompt, :, :].mean(-3, keepdim=True)
            scale = wide[..., :prompt, :, :].std(-3, keepdim=True).clamp(min=1e-6)
        turn = hadamard(size) if "hadamard" in ways else torch.eye(size)
        back: Tensor = packed((wide - center) / scale @ turn, int(bits), group) @ turn.T * scale + center
        return back.to(values.dtype)

    return pack


def evaluate(
    directory: Path, windows: Sequence[Window], layout: WindowLayout, variants: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for values as they are, and one for each variant."""
    model, spec = load(directory), read_spec(directory).text
    hooks: list[Any] = []

    def packs(pack: Callable[[Tensor], Tensor], _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return pack(output.view(*output.shape[:-1], spec.kv_heads, spec.head_dim)).view_as(output)

    def changed(variant: str) -> Any:
        while hooks:
            hooks.pop().remove()
        hook = partial(packs, through(variant, layout.prompt))
        hooks.extend(layer.self_attn.v_proj.register_forward_hook(hook) for layer in model.model.language_model.layers)
        return model

    return rows_of(model, variants, changed, windows, layout, "values")


def main(
    model: Annotated[Path, typer.Option(help="A LLaVA-1.5 checkpoint.")],
    data: Annotated[str, typer.Option(help="text:FILE,FILE, as avl-edge eval takes it.")],
    values: Annotated[str, typer.Option(help="Variants, with commas.")] = VARIANTS,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are not predicted.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
) -> None:
    """Print what each way to pack values costs, as one JSON document."""
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer, layout = Processor.of(read_spec(model), model).text, WindowLayout(window, prompt_tokens)
    windows = read_windows(files_of(data), tokenizer, layout, 1)
    write("tools.value_perplexity", model, windows, layout, evaluate(model, windows, layout, values.split(",")), out)


if __name__ == "__main__":
    try:
        typer.run(main)
    except AvlEdgeError as error:
        typer.echo(f"value_perplexity: {error}", err=True)
        sys.exit(error.exit_code)
