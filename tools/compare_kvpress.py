"""The methods of this runtime beside those of kvpress, a library of KV-cache compression for transformers.

    python -m tools.compare_kvpress --questions 200 --seed 3 --out docs/measurements/kvpress.json

The same checkpoint, the same pictures and questions, the same bytes, the same metrics. kvpress' presses run in
transformers' own LLaVA under its greedy ``generate``; ``transformers`` is that model without a press, which has to
answer as ``full`` does but for ties within the model's dtype. A share of, say, 0.25 lets every side hold, at the end of
the prompt and over all layers, at most a quarter of the bytes of full attention, text included; ``bytes_prompt`` is
what was then found in the caches. The runtime's methods round their share up to whole pages of 16 rows, and h2o and
A-VL count in whole percents.

kvpress 0.5.5 asks for transformers below 5.3, and this project checks itself against a later one. So the extra
``peers`` holds what kvpress imports, and kvpress itself is installed beside it without its pins::

    pip install -e '.[dev,peers]'
    pip install --no-deps kvpress==0.5.5

Later versions of transformers no longer tell an attention layer its ``cache_position``, by which a press knows the
prompt from a step; a hook of this program adds it. The attention functions that kvpress wraps when it is imported are
put back, since no press compared here needs it. Nothing else of kvpress or transformers is changed.

What differs, and should be read beside the figures:

- A press keeps rows per head, another set in each; the runtime keeps one set per layer for all heads (StreamingLLM and
  TOVA choose the same rows for all heads here too).
- ``compression_ratio`` is of the whole prompt: system text, picture and question alike. SnapKV keeps its window, TOVA
  the last row, StreamingLLM and expected attention four sinks, whatever they score; the rest of the question may be
  lost. A-VL leaves the text before the picture alone, and holds the text after it to a budget of its own.
- A press acts once, at the end of the prompt; rows of generated tokens stay. In the runtime a method goes on:
  ``h2o`` and ``streaming`` stay at the rows that they had, so that they end with fewer bytes.
- kvpress' own pipeline compresses before it has seen the question. Here the question is part of the prompt that is
  compressed, as it is for the runtime.
- SnapKV's window of 64 is longer than these questions and observes from picture rows as well; a second row has one
  of 8.
- Observed attention is H2O with means for sums and without H2O's recent rows. It needs the attention weights, so eager
  attention with its matrix of prompt by prompt. All presses run in that one model; times and peaks say nothing about
  either side and are left out.
- kvpress says that LLaVA is not among the models that it is tested with.

With ``--float32`` the presses compute in float32, from the same weights, to see whether rounding decides; their bytes
are then counted as if the rows were in the checkpoint's dtype.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from avl_edge import Options, Runtime
from avl_edge.cli.progress import progress
from avl_edge.config import Progress, require
from avl_edge.errors import AvlEdgeError, BadInput, DoesNotFit
from avl_edge.kv.cache import prompt_shape
from avl_edge.measure.evaluate import (
    REFERENCE,
    Answer,
    Asked,
    Questions,
    Setting,
    read_questions,
    report,
    require_packages,
    settings_of,
)
from avl_edge.model.checkpoint import stored_dtype
from avl_edge.model.demo import DEMO
from avl_edge.model.images import open_image
from avl_edge.serving.requests import Request
from tools.kvpress_peer import PRESSES, Peer, Press, load_kvpress, rows_of
from tools.record import machine

METHODS = "full,h2o,streaming,avl,distinct,distinct:format=int4"
PRESS_NOTATIONS = "observed,snapkv,snapkv:window_size=8,tova,streaming,expected,keydiff,knorm"
PLAIN = Setting("transformers")
METRIC = "exact_match"


@dataclass(frozen=True)
class Comparison:
    """Asks both sides. ``presses`` by the setting that stands for each at a share; None is transformers alone."""

    runtime: Runtime
    peer: Peer
    methods: Sequence[Setting]
    presses: Mapping[Setting, Press | None]
    max_new_tokens: int

    def run(self, questions: Questions, seen: Progress | None = None) -> dict[str, Any]:
        """The questions to everybody: a JSON document as :func:`avl_edge.measure.evaluate.report` gives it, without
        times."""
        asked = Asked({setting: {} for setting in [*self.methods, *self.presses]})
        held = dict.fromkeys(asked.answers, 0)
        length = 0
        for index, question in enumerate(questions.items):
            prepare = partial(self.runtime.prepare, [open_image(question.image)], questions.prompt(question))
            full = prepare(Options(method=REFERENCE.method, max_new_tokens=self.max_new_tokens))
            length += len(full.prompt)
            for setting in list(asked.answers):
                try:
                    answer, prompt_bytes = self._ask(index, setting, full, prepare)
                except DoesNotFit as error:
                    asked.drop_setting(setting, f"{error} ({question.where})")
                else:
                    asked.answers[setting][index] = answer
                    held[setting] += prompt_bytes
            if seen:
                seen(index + 1, len(questions.items))
        found = report(self.runtime, questions, asked, METRIC)
        for setting, row in zip(asked.answers, found["results"], strict=True):
            row["bytes_prompt"] = held[setting] / len(questions.items)
            row["bytes_prompt_fraction"] = held[setting] / (length * self._token_bytes)
        return _without_times(found)

    @property
    def _token_bytes(self) -> int:
        """Bytes of one token's rows in all layers."""
        return self.runtime.kv_shape.row_bytes * self.runtime.kv_shape.layers

    def _ask(
        self, index: int, setting: Setting, full: Request, prepare: Callable[[Options], Request]
    ) -> tuple[Answer, int]:
        """An answer, and the bytes held at the end of its prompt; :class:`DoesNotFit` where the share is too small."""
        if setting in self.presses:
            return self._ask_peer(index, setting, full)
        shape = prompt_shape(len(full.prompt), full.prompt.spans)
        generation = self.runtime.submit(prepare(setting.options(shape, self.runtime.kv_shape, self.max_new_tokens)))
        next(generation)
        held = self.runtime.kv_bytes_in_use
        result = generation.result()
        # An answer of one token has given its rows back by now; it ended with those of its prompt.
        return Answer.of(index, setting, result, None), held or result.kv.bytes_stored

    def _ask_peer(self, index: int, setting: Setting, full: Request) -> tuple[Answer, int]:
        press, length = self.presses[setting], len(full.prompt)
        reply = self.peer.answer(full.prompt, press and _fitted(press, setting, length), full.max_new_tokens)
        itemsize = self.runtime.kv_shape.itemsize
        read = reply.read_fraction(length)
        answer = Answer(
            question=index,
            method=setting.method,
            kv_fraction=setting.kv_fraction,
            parameters=press.notation.parameters if press else {},
            text=reply.text,
            token_ids=reply.token_ids,
            bytes_stored=reply.end_elements * itemsize,
            bytes_peak=0,
            bytes_full=(length + len(reply.token_ids) - 1) * self._token_bytes,
            rows_read_fraction=read,
            bytes_read_fraction=read,
            prefill_ms=0.0,
            decode_ms_per_token=0.0,
        )
        return answer, reply.prompt_elements * itemsize


def _without_times(document: dict[str, Any]) -> dict[str, Any]:
    """What `report` tells of this comparison: date and machine stand elsewhere, times and peaks are not compared."""
    left_out = {"date", "machine", "kl_to_full", "bytes_peak", "prefill_ms", "ms_per_token"}
    rows = [{name: row[name] for name in row if name not in left_out} for row in document["results"]]
    return {name: document[name] for name in document if name not in left_out} | {"results": rows}


def _fitted(press: Press, setting: Setting, length: int) -> Any:
    """The press for a prompt of ``length``; :class:`DoesNotFit` where what it always keeps is more than the share."""
    rows = rows_of(setting.kv_fraction, length)
    made = press.at(rows, length)
    always = max(getattr(made, "window_size", 1), getattr(made, "n_sink", 0) + 1)
    if always > rows:
        raise DoesNotFit(f"{setting} has {rows} rows for this prompt and always keeps {always}")
    return made


def press_settings(kvpress: Any, notations: Sequence[str], fractions: Sequence[float]) -> dict[Setting, Press | None]:
    """transformers alone, then each press at each share; :class:`BadInput` for what is none."""
    presses = {text: Press.read(kvpress, text) for text in notations}
    settings = {Setting(f"kvpress:{text}", share): press for text, press in presses.items() for share in fractions}
    return {PLAIN: None, **settings}


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _fractions(text: str) -> list[float]:
    try:
        return list(dict.fromkeys(float(word) for word in _words(text)))
    except ValueError:
        raise BadInput(f"cannot read --kv-fraction {text!r}: give numbers with commas, like 0.5,0.25") from None


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['data']}: {result['questions']} questions, {result['metric'].replace('_', ' ')}"
    caption = "held: of full's bytes at the end of the prompt; same: tokens as full's"
    table = Table(title=title, caption=caption, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for name in ("KV", "held", "score", "95 %", "CER", "same"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["results"]:
        shares = [row["kv_fraction"], row["bytes_prompt_fraction"], row["token_identity"]]
        kv, held, same = ("-" if share is None else f"{share:.1%}" for share in shares)
        interval = "{:.2f}..{:.2f}".format(*row["score_interval"])
        errors = f"{row['character_error_rate']:.3f}"
        table.add_row(row["method"], kv, held, f"{row['score']:.3f}", interval, errors, same)
    return table


def main(
    questions: Annotated[int, typer.Option(min=1, help="How many questions.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the held-out pictures and questions.")] = 1,
    kv_fraction: Annotated[str, typer.Option(help="Shares of full attention's memory.")] = "0.5,0.25,0.125",
    methods: Annotated[str, typer.Option(help="The runtime's, as `avl-edge eval` takes them.")] = METHODS,
    presses: Annotated[str, typer.Option(help=f"kvpress': of {', '.join(PRESSES)}.")] = PRESS_NOTATIONS,
    model: Annotated[str, typer.Option(help="'demo', or the directory of a LLaVA-1.5 checkpoint.")] = "demo",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 160,
    threads: Annotated[int | None, typer.Option(min=1, max=os.cpu_count(), help="CPU threads.")] = None,
    float32: Annotated[bool, typer.Option("--float32", help="Let the presses compute in float32.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of a table.")] = False,
) -> None:
    """Ask the same questions with the runtime's methods and with kvpress' presses, at equal bytes."""
    start = time.monotonic()
    require(out is None or (out.parent.is_dir() and not out.is_dir()), f"{out} cannot be written: give another --out")
    fractions = _fractions(kv_fraction)
    ours = settings_of(_words(methods), fractions)
    theirs = press_settings(load_kvpress(), _words(presses), fractions)
    require_packages(METRIC)
    if threads is not None:
        torch.set_num_threads(threads)
    runtime, directory = Runtime.load(model), DEMO if model == "demo" else Path(model)
    peer = Peer(directory, torch.float32 if float32 else stored_dtype(directory))
    with tempfile.TemporaryDirectory(prefix="avl-edge-") as scratch, progress("asking") as seen:
        drawn = read_questions("demo", seed, questions, Path(scratch))
        result = Comparison(runtime, peer, ours, theirs, max_new_tokens).run(drawn, seen)
    about = {"seed": seed, "max_new_tokens": max_new_tokens, "press_dtype": peer.dtype}
    text = json.dumps(_document({**about, **result}, start), ensure_ascii=False, indent=1)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        Console(highlight=False).print(_table(result))


def _document(result: dict[str, Any], start: float) -> dict[str, Any]:
    """The result with where it comes from, as ``tools.record`` files it."""
    return {
        "command": shlex.join(["python", "-m", "tools.compare_kvpress", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": {**machine(), "kvpress": version("kvpress"), "threads": torch.get_num_threads()},
        "seconds": round(time.monotonic() - start),
        "result": result,
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except AvlEdgeError as error:
        typer.echo(f"compare_kvpress: {error}", err=True)
        sys.exit(error.exit_code)
