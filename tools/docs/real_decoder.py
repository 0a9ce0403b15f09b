"""Tables of ``docs/quality.md`` on a real decoder: perplexity of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.docs.markdown import block, measured, percent, table

FORMATS, UNSMOOTHED, AS_IMAGE = "text_formats", "text_qwen2.5_coder_0.5b", "text_as_image"
WEIGHTS, VALUES = "weights_qwen2.5_coder_0.5b", "values_qwen2.5_coder_0.5b"
WEIGHT_PARTS = {"aware": "activation-aware", "head": "the head too"}
VALUE_PARTS = {
    "group16": "16 dimensions share a scale",
    "hadamard": "each head rotated",
    "smooth": "mean and deviation of each channel",
}


def _title(document: dict[str, Any]) -> str:
    texts = ", ".join(f"`{text['name']}`" for text in document["texts"])
    image = f", of which {document['as_image']:,} are held as an image's" if document.get("as_image") else ""
    windows = "1 window" if document["windows"] == 1 else f"{document['windows']} windows"
    return (
        f"{windows} of {document['window']:,} tokens ({texts}): {document['tokens']:,} tokens predicted after prompts "
        f"of {document['prompt']:,}{image}."
    )


def _rows(name: str) -> str:
    """A line for each setting that was evaluated, and one for each that could not be."""
    document = measured(name)
    header = ["rows", "perplexity", "change, %", "KL per token", "same token, %", "bytes a row", "stored, %", "read, %"]
    lines = [
        [
            f"`{row['method']}`",
            f"{row['perplexity']:.3f}",
            f"{100 * row['perplexity_change']:+.2f}",
            f"{row['kl_to_full']:.4f}",
            percent(row["same_token"]),
            f"{row['bytes_per_row']:.0f}",
            percent(row["bytes_stored_fraction"], 0),
            percent(row["bytes_read_fraction"], 0),
        ]
        for row in document["results"]
    ]
    left_out = [f"Left out: {each['reason']}." for each in document["unreachable"]]
    return block("\n\n".join([table(header, lines), _title(document), *left_out]), name)


def formats() -> str:
    """Every row in a packed format."""
    return _rows(FORMATS)


def unsmoothed() -> str:
    """Formats before keys were smoothed, and methods that leave out text rows, which are exact."""
    return _rows(UNSMOOTHED)


def as_image() -> str:
    """Methods that decide about image rows, on a text that is held as an image."""
    return _rows(AS_IMAGE)


def weights() -> str:
    """What the weights were rounded to; rows are exact."""
    note = f"{measured(WEIGHTS)['group']} inputs share a scale."
    return _variants(WEIGHTS, "weights", "weights of the linear layers", WEIGHT_PARTS, note)


def values() -> str:
    """What values would be packed to; keys are exact."""
    return _variants(VALUES, "values", "bits of values", VALUE_PARTS, "Where nothing else is said, 32 dimensions do.")


def _variants(name: str, column: str, title: str, parts: Mapping[str, str], note: str) -> str:
    document = measured(name)
    lines = [
        [
            _named(row[column], parts),
            f"{row['perplexity']:.3f}",
            f"{100 * row['perplexity_change']:+.2f}",
            f"{row['kl']:.4f}",
            percent(row["same_token"]),
        ]
        for row in document["results"]
    ]
    header = [title, "perplexity", "change, %", "KL per token", "same token, %"]
    return block("\n\n".join([table(header, lines), f"{_title(document)} {note}"]), name)


def _named(variant: str, parts: Mapping[str, str]) -> str:
    first, *ways = variant.split("+")
    return ", ".join([first or "as they are", *(parts[way] for way in ways)])


TABLES = {
    "text-formats": formats,
    "text-unsmoothed": unsmoothed,
    "text-as-image": as_image,
    "text-weights": weights,
    "text-values": values,
}
