"""Texts of ``avl-edge eval``: perplexity instead of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..config import require
from ..errors import DoesNotFit
from ..measure.evaluate import Setting
from ..measure.perplexity import TEXT, WindowLayout, measure, plans_of, read_windows, report
from ..model.checkpoint import load_weights
from ..model.network import Llava
from ..model.prompt import Processor
from ..model.spec import read_spec
from .options import checkpoint_of
from .progress import progress


def files_of(data: str) -> list[Path]:
    """The files that ``text:FILE,FILE`` names."""
    return [Path(name.strip()) for name in data.removeprefix(TEXT).split(",") if name.strip()]


def text_document(
    data: str, model: str, settings: Sequence[Setting], layout: WindowLayout, windows: int
) -> dict[str, Any]:
    """The evaluation of ``windows`` windows of each text; :class:`BadInput` or :class:`DoesNotFit` where there is
    none."""
    directory = checkpoint_of(model)
    spec = read_spec(directory)
    require(
        layout.length <= spec.text.context,
        f"a window of {layout.length} tokens is longer than this model's context of {spec.text.context}",
    )
    read = read_windows(files_of(data), Processor.of(spec, directory).text, layout, windows)
    with progress("loading") as loading:
        network = Llava(spec, load_weights(directory, loading))
    shape = spec.text.kv_shape(network.dtype.itemsize)
    for setting in settings:
        setting.check(shape)
    plans, left_out = plans_of(settings, layout, shape)
    if settings and len(left_out) == len(settings):
        raise DoesNotFit(next(iter(left_out.values())))
    with progress("decoding") as decoding:
        scores = measure(network, read, layout, plans, decoding)
    dtype = str(network.dtype).removeprefix("torch.")
    return {"model": directory.resolve().name, "dtype": dtype, **report(read, layout, scores, left_out)}


def text_table(document: Mapping[str, Any]) -> Table:
    """A row per setting."""
    image = f", of which {document['as_image']} are held as an image's" if document["as_image"] else ""
    title = (
        f"{len(document['texts'])} texts, {document['windows']} windows of {document['window']} tokens: "
        f"{document['tokens']} predicted after prompts of {document['prompt']}{image}"
    )
    note = "change: of perplexity, from full's; KL: from full's, nats per token; same: likeliest token as full's"
    table = Table(title=title, caption=note, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("method", "KV", "perplexity", "change", "KL", "same", "bytes/row", "stored", "read"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name != "method")
    for row in document["results"]:
        table.add_row(
            row["method"],
            f"{row['kv_fraction']:.1%}",
            f"{row['perplexity']:.4g}",
            f"{row['perplexity_change']:+.2%}",
            f"{row['kl_to_full']:.4f}",
            f"{row['same_token']:.1%}",
            f"{row['bytes_per_row']:.0f}",
            f"{row['bytes_stored_fraction']:.1%}",
            f"{row['bytes_read_fraction']:.1%}",
        )
    return table
