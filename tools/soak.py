"""A service under load for minutes: what fails, what memory does, whom urgent requests wait for.

    python -m tools.soak [--model demo] [--clients 32] [--seconds 600] [--out soak.json]

Starts ``avl-edge serve`` and asks it by OpenAI's client: first one at a time, urgent questions alone, then all clients
together with mixed priorities, pictures and deadlines. The document has a ``verdict`` for each thing that has to hold;
the exit code is 1 where one does not.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import openai
import typer
from PIL import Image, ImageDraw

QUESTIONS = ("What is the speed?", "Which gear is the car in?", "What can you see?", "Is it freezing?")
URGENT, USUAL, LAZY = -2, 0, 2
_MIB = 2**20
_PAGE = 4096


@dataclass
class Seen:
    """What clients saw: ends by status, seconds until the first token of urgent requests, tokens, and the resident
    memory of the service (requests so far, bytes)."""

    ends: Counter[str] = field(default_factory=Counter)
    urgent: list[float] = field(default_factory=list)
    tokens: int = 0
    resident: list[tuple[int, int]] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """How many have ended."""
        return sum(self.ends.values())


@contextmanager
def service(model: str, *options: str) -> Iterator[tuple[str, int]]:
    """The address and process id of one that is ready, until the end of the block."""
    command = [sys.executable, "-m", "avl_edge", "serve", "--model", model, "--port", "0", "--name", "soak", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = ""
        for line in process.stderr:
            found = json.loads(line)
            address = found.get("address", address)
            if found["message"] == "ready":
                break
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(60)
    drain.wait(60)


def drawn(number: int) -> str:
    """A picture of its own for each number, as a data URL."""
    image = Image.new("RGB", (336, 336), (40 + 29 * number % 200, 90, 140))
    ImageDraw.Draw(image).text((20 + number % 200, 150), f"{number}", fill="white", font_size=60)
    file = BytesIO()
    image.save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


async def ask(client: openai.AsyncOpenAI, seen: Seen, pictures: list[str], priority: int, **own: Any) -> None:
    """One streamed answer, or its end otherwise."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": each}} for each in pictures]
    content = [*parts, {"type": "text", "text": random.choice(QUESTIONS)}]
    messages: Any = [{"role": "user", "content": content}]
    began, first = time.perf_counter(), None
    try:
        stream = await client.chat.completions.create(
            model="soak",
            messages=messages,
            max_tokens=24,
            stream=True,
            extra_body={"priority": priority, "avl_edge": own},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - began
                seen.tokens += 1
        seen.ends["answered"] += 1
        if priority == URGENT and first:
            seen.urgent.append(first)
    except openai.APIStatusError as error:
        seen.ends[str(error.status_code)] += 1
        await asyncio.sleep(0.05 if error.status_code == 429 else 0)
    except openai.APIError as error:
        seen.ends["504" if error.code == "deadline_exceeded" else type(error).__name__] += 1


async def one_client(client: openai.AsyncOpenAI, seen: Seen, number: int, end: float) -> None:
    """Asks until ``end``: a few are urgent, with a picture that is known; many show three pictures of their own."""
    while time.perf_counter() < end:
        if number % 8 == 0:
            await ask(client, seen, [drawn(0)], URGENT)
            await asyncio.sleep(0.2)
        elif number % 8 == 1:
            await ask(client, seen, [drawn(random.randrange(4))], USUAL, deadline_ms=random.choice((50, 500, 20_000)))
        elif number % 2:
            await ask(client, seen, [drawn(random.randrange(100, 10_000)) for _ in range(3)], LAZY)
        else:
            await ask(client, seen, [drawn(random.randrange(8))], USUAL)


async def watch(seen: Seen, process: int, end: float) -> None:
    """The service's resident memory, every second."""
    while time.perf_counter() < end:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        seen.resident.append((seen.requests, pages * _PAGE))
        await asyncio.sleep(1)


async def alone(client: openai.AsyncOpenAI, seconds: float) -> tuple[Seen, float]:
    """Urgent questions one at a time; and tokens a second."""
    seen, began = Seen(), time.perf_counter()
    await ask(client, Seen(), [drawn(0)], URGENT)
    while time.perf_counter() - began < seconds:
        await ask(client, seen, [drawn(0)], URGENT)
    return seen, seen.tokens / (time.perf_counter() - began)


async def together(client: openai.AsyncOpenAI, clients: int, seconds: float) -> float:
    """Tokens a second of so many who ask about a picture that is known."""
    seen, began = Seen(), time.perf_counter()

    async def go() -> None:
        while time.perf_counter() - began < seconds:
            await ask(client, seen, [drawn(0)], USUAL)

    await asyncio.gather(*(go() for _ in range(clients)))
    return seen.tokens / (time.perf_counter() - began)


def growth(resident: list[tuple[int, int]]) -> float:
    """MiB for each 1,000 requests, from the middle of the run to its end."""
    half = resident[len(resident) // 2 :]
    (before, low), (after, high) = half[0], half[-1]
    return (high - low) / _MIB / max((after - before) / 1000, 1e-9)


def p99(seconds: list[float]) -> float:
    """Of at least two."""
    return quantiles(seconds, n=100)[98] if len(seconds) > 1 else float("nan")


async def rest(client: openai.AsyncOpenAI) -> dict[str, float]:
    """The service's counts once nothing is on its way, or after ten seconds."""
    for _ in range(20):
        page = await client.get("/metrics", cast_to=str)
        lines = re.findall(r"^avl_edge:(\w+)\{[^}]*\} (\S+)$", page, re.MULTILINE)
        found = {name: float(value) for name, value in lines}
        if not found["num_requests_taken"]:
            break
        await asyncio.sleep(0.5)
    return found


async def soak(address: str, process: int, clients: int, seconds: float) -> dict[str, Any]:
    """The document of one run."""
    loaded = Seen()
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        quiet, one_at_a_time = await alone(client, seconds / 10)
        batched = await together(client, 8, seconds / 10)
        end = time.perf_counter() + seconds
        work = [asyncio.ensure_future(one_client(client, loaded, number, end)) for number in range(clients)]
        await watch(loaded, process, end)
        for task in work:  # who still waits then is a client that was killed
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        found = await rest(client.with_options(base_url=address))
    left = found["kv_pool_used_bytes"] - found["held_picture_bytes"]
    other = {end: count for end, count in loaded.ends.items() if end not in ("answered", "429", "504")}
    return {
        "requests": loaded.requests,
        "ends": dict(loaded.ends),
        "urgent_first_token_p99_s": {"alone": p99(quiet.urgent), "loaded": p99(loaded.urgent)},
        "tokens_per_s": {"one_at_a_time": one_at_a_time, "batched": batched},
        "resident_mib_per_1000_requests": growth(loaded.resident),
        "verdict": {
            "nothing_else_fails": not other,
            "every_row_is_back": left <= 0 and found["num_requests_taken"] == 0,
            "memory_is_flat": growth(loaded.resident) < 1,
            "urgent_ones_wait_little": p99(loaded.urgent) <= 2 * p99(quiet.urgent),
            "batches_pay": batched >= 2.5 * one_at_a_time,
        },
    }


def main(
    model: Annotated[str, typer.Option(help="'demo', or the directory of a checkpoint.")] = "demo",
    clients: Annotated[int, typer.Option(min=1)] = 32,
    seconds: Annotated[float, typer.Option(min=1)] = 600.0,
    out: Annotated[Path | None, typer.Option(help="Where the document is written.")] = None,
) -> None:
    """Load a service, and say what held."""
    with service(model) as (address, process):
        document = asyncio.run(soak(address, process, clients, seconds))
    text = json.dumps(document, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    if not all(document["verdict"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
