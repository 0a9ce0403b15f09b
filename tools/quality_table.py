"""The table that the planner and the presets read, from evaluations: ``python -m tools.quality_table EVAL.json...``.

Takes the documents of ``avl-edge eval --out``, all about the same questions to the same model, the later ones before
the earlier, and writes ``avl_edge/kv/quality/measured.json``, and the evaluations put together as
``docs/measurements/methods.json``, which may be the first of them again. What formats cost on text comes from
``docs/measurements/text_formats.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

OUT = Path("avl_edge/kv/quality/measured.json")
MERGED = Path("docs/measurements/methods.json")
TEXT = Path("docs/measurements/text_formats.json")


def is_bound(setting: str) -> bool:
    """Random rows, and those picked by the true attention: bounds to measure methods by, nothing to be given."""
    return setting.startswith("random") or ":mass=100" in setting


def points(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A point per setting and share, as ``avl_edge.kv.quality.Point`` takes it."""
    found = {}
    for row in results:
        if not is_bound(row["method"]):
            low, high = row["score_interval"]
            found[row["method"], row["kv_fraction"]] = {
                "setting": row["method"],
                "kv_fraction": row["kv_fraction"],
                "stored": round(row["bytes_stored_fraction"], 4),
                "read": round(row["bytes_read_fraction"], 4),
                "score": round(row["score"], 4),
                "low": round(low, 4),
                "high": round(high, 4),
            }
    return list(found.values())


def text_quality(document: dict[str, Any]) -> dict[str, Any]:
    """The document of ``avl-edge eval --data text:...`` as ``avl_edge.kv.quality.TextQuality`` takes it."""
    rows = {row["method"].removeprefix("full:format="): row for row in document["results"]}
    rises = {name: round(rows[name]["perplexity_change"], 5) for name in ("int8", "int8/int4", "int4")}
    return {"model": document["model"], "date": document["date"], "tokens": document["tokens"], "rises": rises}


def commands(document: dict[str, Any]) -> list[str]:
    """Those that a document came from: one of an evaluation, several of what was put together."""
    command = document["command"]
    return command if isinstance(command, list) else [command]


def merged(documents: list[dict[str, Any]], commands: list[str]) -> dict[str, Any]:
    """All documents as one: every setting once, with the ``commands`` and the machine that they came from."""
    rows = {(row["method"], row["kv_fraction"]): row for document in documents for row in document["results"]}
    unreachable = [row for document in documents for row in document["unreachable"]]
    date = max(document["date"] for document in documents)
    return {
        "command": commands,
        "date": date,
        "machine": documents[0]["machine"],
        "result": {**documents[0], "date": date, "results": list(rows.values()), "unreachable": unreachable},
    }


def main(evaluations: Annotated[list[Path], typer.Argument(help="Documents of avl-edge eval.")]) -> None:
    """Write the table."""
    documents = [json.loads(path.read_text()) for path in evaluations]
    came_from = list(dict.fromkeys(command for document in documents for command in commands(document)))
    documents = [document.get("result", document) for document in documents]
    about = {(d["model"], d["data"], d["questions"]) for d in documents}
    if len(about) != 1:
        raise typer.BadParameter(f"these evaluations are about different things: {sorted(about)}")
    (model, data, questions), *_ = about
    content = {
        "model": model,
        "data": data,
        "questions": questions,
        "date": max(document["date"] for document in documents),
        "points": points([row for document in documents for row in document["results"]]),
        "text": text_quality(json.loads(TEXT.read_text())),
    }
    OUT.write_text(json.dumps(content, indent=1) + "\n")
    MERGED.write_text(json.dumps(merged(documents, came_from), indent=1) + "\n")
    print(f"{len(content['points'])} points in {OUT}")


if __name__ == "__main__":
    typer.run(main)
