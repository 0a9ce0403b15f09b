"""``avl-edge doctor``"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..machine import device
from .terminal import AsJson, Debug, readers_may_leave


def doctor(
    root: Annotated[str, typer.Option(help="Read a recorded file tree instead of this machine.")] = "/",
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Say what machine this is and what to mend on it. Exit code 1 when a check failed."""
    facts = device.probe(root)
    checks = device.diagnose(facts)
    with readers_may_leave():
        print(json.dumps(device.to_dict(facts, checks)) if as_json else device.report(facts, checks).rstrip("\n"))
    raise typer.Exit(device.exit_code(checks))
