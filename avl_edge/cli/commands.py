"""The commands by name, and how they are listed, found and helped with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

USAGE = 2
"""The exit code of a command line that cannot be run as given."""


@dataclass(frozen=True)
class Lazy:
    """A command: ``target`` is MODULE:NAME, of a function or of a :class:`typer.Typer` with commands of its own;
    ``help`` is its line in the list of commands."""

    target: str
    help: str


COMMANDS = {
    "run": Lazy("run:run", "Answer questions about one or more images."),
    "doctor": Lazy("doctor:doctor", "Say what machine this is and what to mend on it."),
    "plan": Lazy("plan:plan", "Say what a request would cost on a device."),
    "models": Lazy("models:models", "List the models that plan knows by name."),
    "eval": Lazy("evaluate:evaluate", "Ask the same questions with several methods."),
    "build": Lazy("build:build", "Build ONNX graphs and engines from a checkpoint."),
    "profile": Lazy("profile:app", "Measure what this machine can do, for plan."),
    "bench": Lazy("bench:app", "Time the parts that decide the speed."),
}


class Command(TyperCommand):
    """Its help lists options under the headings that they name as ``rich_help_panel``, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                heading = getattr(parameter, "rich_help_panel", None) or usual
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Group(TyperGroup):
    """Called without a command it prints its help, on stderr and with the exit code of bad input."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not self.invoke_without_command and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            raise typer.Exit(USAGE)
        return super().parse_args(ctx, args)


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
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name, cls=Command)(found)
        found = alone
    return typer.main.get_command(found)
