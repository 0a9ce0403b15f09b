"""``avl-edge serve``"""

from __future__ import annotations

import logging
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import typer

from ..backends.targets import TARGETS
from ..config import require, size_in_bytes
from ..server.access import Keys
from ..server.process import Address, log_json, serve
from ..server.service import Service
from ..server.settings import Settings
from ..serving.runtime import Runtime
from .memory import MaxMemory
from .options import MEMORY, Threads
from .reserve import Reserve, reserve_bytes
from .terminal import Debug

ACCESS = "Access options"
LIMITS = "Limits"
_TAKEN_AS_GIVEN = (
    "held_pictures",
    "max_queue",
    "max_connections",
    "max_pictures",
    "max_pixels",
    "max_tokens",
    "drain",
)
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Level(str, Enum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"


Model: TypeAlias = Annotated[
    str, typer.Option(help="'demo', the directory of a checkpoint, or one that avl-edge build has made.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(help=f"Where to compute: {', '.join(TARGETS)}.", show_default="cpu; tensorrt for a built package"),
]
Names: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--name", help="What clients call the model; may be repeated.", show_default="the directory's name"),
]
Host: TypeAlias = Annotated[str, typer.Option(help="The address to listen at.", rich_help_panel=ACCESS)]
Port: TypeAlias = Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.", rich_help_panel=ACCESS)]
Socket: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="PATH", help="A UNIX socket to listen at instead.", rich_help_panel=ACCESS)
]
KeyFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--api-key-file", metavar="FILE", help="API keys, one a line.", rich_help_panel=ACCESS),
]
AllowedHosts: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        help="A name that clients reach this host by; may be repeated.",
        show_default="localhost and the address",
        rich_help_panel=ACCESS,
    ),
]
PoolSize: TypeAlias = Annotated[
    str | None, typer.Option("--kv-pool", help="The row pool of all requests, like 1GiB.", rich_help_panel=MEMORY)
]


def _limit(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(min=1, help=text, rich_help_panel=LIMITS)
    return option


MaxQueue: TypeAlias = Annotated[int, _limit("Requests on their way; more get status 429.")]
MaxConnections: TypeAlias = Annotated[int, _limit("Open connections.")]
MaxPictures: TypeAlias = Annotated[int, _limit("Pictures of one request.")]
MaxPixels: TypeAlias = Annotated[int, _limit("Pixels of one request's pictures.")]
MaxBody: TypeAlias = Annotated[str, typer.Option(help="The body of one request.", rich_help_panel=LIMITS)]
MaxTokens: TypeAlias = Annotated[int, _limit("Tokens of an answer that asks for no number.")]
HeldPictures: TypeAlias = Annotated[
    int,
    typer.Option(min=0, help="Pictures whose rows are kept for later questions.", rich_help_panel=MEMORY),
]
Drain: TypeAlias = Annotated[
    float, typer.Option(min=0, help="Seconds that answers may go on after SIGTERM.", rich_help_panel=LIMITS)
]
LogLevel: TypeAlias = Annotated[Level, typer.Option(help="What is logged, as JSON on stderr.")]


def serve_command(
    model: Model = "demo",
    device: Device = None,
    threads: Threads = None,
    name: Names = None,
    host: Host = Address.host,
    port: Port = Address.port,
    socket: Socket = None,
    api_key_file: KeyFile = None,
    allow_host: AllowedHosts = None,
    max_memory: MaxMemory = None,
    reserve: Reserve = None,
    kv_pool: PoolSize = None,
    held_pictures: HeldPictures = Settings.held_pictures,
    max_queue: MaxQueue = Settings.max_queue,
    max_connections: MaxConnections = Settings.max_connections,
    max_pictures: MaxPictures = Settings.max_pictures,
    max_pixels: MaxPixels = Settings.max_pixels,
    max_body: MaxBody = "32MiB",
    max_tokens: MaxTokens = Settings.max_tokens,
    drain: Drain = Settings.drain,
    log_level: LogLevel = Level.info,
    debug: Debug = False,
) -> None:
    """Answer requests of OpenAI's API, POST /v1/chat/completions, until SIGTERM or Ctrl-C.

    Whoever can connect may ask: without --api-key-file only this machine can, by the default --host.
    """
    given = locals()
    require(
        api_key_file is not None or socket is not None or host in ("127.0.0.1", "::1", "localhost"),
        f"--host {host} lets other machines ask: give --api-key-file too",
    )
    pool_bytes = None if kv_pool is None else size_in_bytes("--kv-pool", kv_pool)
    body_bytes = size_in_bytes("--max-body", max_body)
    runtime = _open(model, device, threads, max_memory, reserve)
    settings = Settings(
        names=tuple(name or (runtime.name,)),
        hosts=frozenset() if socket else frozenset((*_LOOPBACK, host.lower(), *(allow_host or ()))),
        max_body=body_bytes,
        max_body_total=max(body_bytes, Settings.max_body_total),
        **{each: given[each] for each in _TAKEN_AS_GIVEN},
    )
    keys = Keys(api_key_file)
    log_json(getattr(logging, log_level.value.upper()))
    with runtime:
        load = partial(runtime.load_weights, pool_bytes=pool_bytes, threads=threads)
        serve(Service(runtime, settings), keys, Address(host, port, socket), load)


def _open(model: str, device: str | None, threads: int | None, max_memory: str | None, reserve: str | None) -> Runtime:
    if threads is not None:
        torch.set_num_threads(threads)
    runtime = Runtime.open(model, device=device, max_memory=max_memory)
    left = reserve_bytes(reserve) if reserve is not None or runtime.can_keep_free else None
    if left is not None:
        runtime.keep_free(left)
    return runtime
