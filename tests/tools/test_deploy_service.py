"""The assistant's systemd unit and its dashboard, held to the command and the counts that they name."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Mapping

import typer

from avl_edge.cli import app
from avl_edge.server.metrics import Metrics, Moment
from tests import ROOT

DEPLOY = ROOT / "tools" / "deploy"
NAME = re.compile(r"avl_edge:\w+")


def _service() -> Mapping[str, str]:
    """The section of the unit; of keys that stand more than once the last."""
    unit = configparser.RawConfigParser(strict=False, delimiters="=")
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read(DEPLOY / "avl-edge.service")
    return unit["Service"]


def test_the_assistant_calls_a_real_command_with_real_options() -> None:
    service = _service()
    line = service["ExecStart"].replace("${MODEL}", "demo").replace("$OPTIONS", "--max-memory 2GB")
    program, name, *arguments = shlex.split(line)
    assert program == "/opt/avl-edge/venv/bin/avl-edge"
    group = typer.main.get_command(app)
    _, command, rest = group.resolve_command(typer.Context(group), [name, *arguments])  # type: ignore[attr-defined]
    context = command.make_context(name, rest)
    assert context.params["model"] == "demo"
    assert str(context.params["socket"]) == f"/run/{service['RuntimeDirectory']}/socket"
    assert int(service["TimeoutStopSec"]) > context.params["drain"]


def test_the_assistant_is_held_inside_its_bounds() -> None:
    service = _service()
    assert (service["Type"], service["Restart"]) == ("notify", "on-failure")
    assert service["ProtectSystem"] == "strict"
    assert service["DevicePolicy"] == "closed"
    for key in ("NoNewPrivileges", "PrivateNetwork", "RestrictSUIDSGID"):
        assert service[key] == "yes", key


def test_the_dashboard_asks_for_what_is_counted() -> None:
    """By the names in the page of a service that has answered nothing yet."""
    page = Metrics("demo").page(Moment(memory={"weights": 1}, memory_limit=2, available_bytes=1, stall_percent=0.0))
    counted = set(re.findall(r"^(avl_edge:\w+)", page.decode(), re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = {
        each for panel in dashboard["panels"] for target in panel["targets"] for each in NAME.findall(target["expr"])
    }
    assert asked <= counted
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
