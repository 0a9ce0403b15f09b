"""The commands by name, imported when they are called: torch takes seconds to import, and only some of them compute."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from .help import Command, Group
from .terminal import quit_at_once


@dataclass(frozen=True)
class Lazy:
    """A command: ``target`` is MODULE:NAME, of a function or of a :class:`typer.Typer` with commands of its own;
    ``help`` is its line in the list of commands."""

    target: str
    help: str


COMMANDS = {
    "run": Lazy("run:run", "Answer questions about one or more images."),
    "serve": Lazy("serve:serve_command", "Answer requests of OpenAI's API over HTTP."),
    "doctor": Lazy("doctor:doctor", "Say what machine this is and what to mend on it."),
    "plan": Lazy("plan:plan", "Say what a request would cost on a device."),
    "methods": Lazy("methods:methods", "List the methods with their parameters and sources."),
    "models": Lazy("models:models", "List the models that plan knows by name."),
    "eval": Lazy("evaluate:evaluate", "Ask the same questions with several methods."),
    "build": Lazy("build:build", "Build ONNX graphs and engines from a checkpoint."),
    "quantize": Lazy("quantize:quantize", "Pack a checkpoint's decoder in 8 or 4 bits."),
    "profile": Lazy("profile:app", "Measure what this machine can do, for plan."),
    "bench": Lazy("bench:app", "Time the parts that decide the speed."),
}


class LazyGroup(Group):
    """The commands of :data:`COMMANDS`, each known by its name and line of help until it is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, command in COMMANDS.items():
            self.add_command(TyperCommand(name, short_help=command.help))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """As its base; the command, where there is one, is the real one."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else _load(name), rest


def _load(name: str) -> Any:
    module, _, attribute = COMMANDS[name].target.partition(":")
    found = getattr(import_module(f".{module}", __package__), attribute)
    if signal.getsignal(signal.SIGINT) is quit_at_once:  # from here on there is something to end in order
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name, cls=Command)(found)
        found = alone
    return typer.main.get_command(found)
