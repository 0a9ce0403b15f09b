"""Texts of ``avl-edge eval``: perplexity instead of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..backends.targets import open_target
from ..config import format_size, require, size_in_bytes
from ..errors import TooLarge
from ..machine import allocator, device
from ..measure.evaluate import Setting
from ..measure.perplexity import WindowLayout, files_of, measure, plans_of, read_windows, report
from ..model.checkpoint import load_weights, stored_dtype
from ..model.families import read_spec
from ..model.prompt import Processor
from ..model.vision_language import VisionLanguageModel
from ..model.weight_format import WeightFormats
from ..planning.request_planner import RequestPlanner
from .options import checkpoint_of
from .progress import progress


def text_document(
    data: str,
    model: str,
    settings: Sequence[Setting],
    layout: WindowLayout,
    windows: int,
    max_memory: str | None,
    packed: WeightFormats,
) -> dict[str, Any]:
    """The evaluation of ``windows`` windows of each text, in a process of at most ``max_memory``, with the decoder
    ``packed``; :class:`BadInput` or :class:`TooLarge` where there is none."""
    directory = checkpoint_of(model)
    spec = read_spec(directory)
    require(
        layout.length <= spec.text.context,
        f"a window of {layout.length} tokens is longer than this model's context of {spec.text.context}",
    )
    packed.check(spec.text)
    read = read_windows(files_of(data), Processor.of(spec, directory).text, layout, windows)
    dtype = stored_dtype(directory, spec.prefixes)
    shape = spec.text.kv_shape(dtype.itemsize)
    for setting in settings:
        setting.check(shape)
    plans, left_out = plans_of(settings, layout, shape)
    if len(left_out) == len(settings):
        raise TooLarge(next(iter(left_out.values())))
    needed = len(read) * sum(plan.peak_bytes for plan in plans.values())
    _check_memory(needed)
    if max_memory is not None:
        planner = RequestPlanner(open_target(directory, "cpu", packed), spec, shape)
        _bound_memory(planner, size_in_bytes("--max-memory", max_memory), layout, len(read) * len(plans), needed)
    with progress("loading") as loading:
        network = VisionLanguageModel(spec, load_weights(directory, loading, spec.prefixes, packed))
    with progress("decoding") as decoding:
        scores = measure(network, read, layout, plans, decoding)
    about = {"model": directory.absolute().name, "dtype": str(dtype).removeprefix("torch."), **packed.named()}
    return {**about, **report(read, layout, scores, left_out)}


def _check_memory(needed: int) -> None:
    usable = device.probe("/").memory.usable_bytes
    if usable is not None and needed > usable:
        raise TooLarge(
            f"the rows of all windows in all settings take {format_size(needed)}, and {format_size(usable)} are free: "
            "name fewer --methods, or lower --windows or --window"
        )


def _bound_memory(planner: RequestPlanner, limit: int, layout: WindowLayout, sequences: int, needed: int) -> None:
    """:class:`TooLarge` where so many ``sequences``, which hold ``needed`` bytes of rows, are more than the process may
    take."""
    allocator.bound()
    workspace = planner.workspace(layout.shape, layout.predicted - 1)
    what = "the rows of all windows in all settings"
    memory = planner.process_memory(limit, allocator.resident_bytes())
    memory.require(workspace.prompt_bytes + sequences * workspace.step_bytes, needed, what)


def text_table(document: Mapping[str, Any]) -> Table:
    """A row per setting."""
    image = f", of which {document['as_image']} are held as an image's" if document["as_image"] else ""
    title = (
        f"{len(document['texts'])} texts, {document['windows']} windows of {document['window']} tokens: "
        f"{document['tokens']} predicted after prompts of {document['prompt']}{image}"
    )
    note = "change: of perplexity, from full's; KL: from full's, nats per token; same: likeliest token as full's"
    table = Table(title=title, caption=note, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for name in ("KV", "perplexity", "change", "KL", "same", "bytes/row", "stored", "read"):
        table.add_column(name, justify="right", no_wrap=True)
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
            "-" if row["bytes_read_fraction"] is None else f"{row['bytes_read_fraction']:.1%}",
        )
    return table
