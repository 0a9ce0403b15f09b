"""``avl-edge watch``"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated, TypeAlias

import torch
import typer

from ..config import Options
from ..errors import AvlEdgeError, DeadlineExceeded
from ..server.cameras import Cameras
from ..serving.runtime import Runtime
from .memory import MaxMemory
from .options import Model, Threads
from .terminal import AsJson, Debug, readers_may_leave

Address: TypeAlias = Annotated[
    str,
    typer.Option("--camera", metavar="ADDRESS", help="A V4L2 device, rtsp:// address, video file or folder."),
]
Prompt: TypeAlias = Annotated[str, typer.Option(metavar="TEXT", help="What is asked about each frame.")]
Every: TypeAlias = Annotated[float, typer.Option(min=0.01, help="Seconds from one question to the next.")]
Count: TypeAlias = Annotated[int | None, typer.Option(min=1, help="How many questions.", show_default="no end")]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
_NAME = "camera"


def watch(
    camera: Address,
    prompt: Prompt,
    every: Every = 2.0,
    count: Count = None,
    model: Model = "demo",
    max_new_tokens: MaxNewTokens = 64,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Ask about a camera's latest frame again and again. An answer that is not there when the next question is due is
    dropped."""
    if threads is not None:
        torch.set_num_threads(threads)
    options, cameras = Options(max_new_tokens=max_new_tokens), Cameras({_NAME: camera})
    try:
        with Runtime.load(model, max_memory=max_memory) as runtime, readers_may_leave():
            due, asked = time.monotonic(), 0
            while count is None or asked < count:
                time.sleep(max(due - time.monotonic(), 0.0))
                due, asked = max(due + every, time.monotonic()), asked + 1
                _ask(runtime, cameras, prompt, options, every, as_json)
    finally:
        cameras.close()


def _ask(runtime: Runtime, cameras: Cameras, prompt: str, options: Options, seconds: float, as_json: bool) -> None:
    """One question; what keeps it from an answer is said, and the next one comes."""
    try:
        frame = cameras.picture(_NAME, None, "--camera")
        request = runtime.prepare([frame.content], prompt, options)
        result = runtime.submit(request, deadline=seconds).result()
    except DeadlineExceeded:
        print(f"avl-edge: dropped: no answer within {seconds:g} s", file=sys.stderr)
    except AvlEdgeError as error:
        print(f"avl-edge: {error}", file=sys.stderr)
    else:
        document = {"text": result.text, "usage": asdict(result.usage), "timings": asdict(result.timings)}
        print(json.dumps(document) if as_json else result.text, flush=True)
