"""``avl-edge profile`` and ``avl-edge profile show``"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..errors import BadModel
from ..machine import device, profile
from ..machine.device import DeviceFacts
from ..machine.profile import BadProfile, DeviceProfile
from ..measure import profiler
from .options import Model, checkpoint_of
from .profiles import OWN_PROFILES, open_profile, search_path
from .progress import progress
from .terminal import AsJson, Debug, readers_may_leave

app = typer.Typer(invoke_without_command=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def root(
    context: typer.Context,
    model: Model = "demo",
    out: Annotated[
        Path | None,
        typer.Option(help="The profile's file.", show_default=f"{OWN_PROFILES}/MACHINE.yaml in the current folder"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="About how long to measure.")] = 120.0,
    threads: Annotated[
        int | None, typer.Option(min=1, max=os.cpu_count(), help="CPU threads, as they will be in use.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Write over a profile of another device or power mode.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Measure nothing new: hold the profile against random requests.")
    ] = False,
    requests: Annotated[int, typer.Option(min=1, max=1000, help="How many, for --verify.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Which, for --verify.")] = 7,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Measure what this machine can do, into a profile that plans are made from; each run adds or renews its model.

    With one thread the time is the processor's, not the wall's: what other programs take away is not counted.
    """
    if context.invoked_subcommand:
        return
    facts = device.probe()
    path = out or OWN_PROFILES / f"{profile.name_of(facts)}.yaml"
    old = _matching(path, facts, replace and not verify)
    if verify and old is None:
        raise BadProfile(f"there is no profile {path}: measure first, without --verify")
    torch.set_num_threads(_threads(old, threads))
    bench = _open(model)
    if not verify:
        profile.require_writable(path)
    if verify and old is not None:
        _verify(bench, old, requests, seed, as_json)
        return
    with progress("measuring") as report:
        measured = profiler.measure(bench, facts, seconds, report)
    merged = profile.merged(old, measured) if old else measured
    profile.save(merged, path)
    with readers_may_leave():
        print(json.dumps({"profile": str(path)}) if as_json else f"{profile.report(merged)}\nwritten to {path}")


@app.command(short_help="Print a profile.")
def show(
    file: Annotated[
        str | None,
        typer.Argument(help="A profile's file or a device like agx-orin-64.", show_default="this machine's"),
    ] = None,
    power: Annotated[str | None, typer.Option(help="The power mode of a named device, like 30W.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file too.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Print a profile, every number with its unit and whether it was measured."""
    found = open_profile(file, power)
    if svg is not None:
        try:
            svg.write_text(profile.svg(found), encoding="utf-8")
        except OSError as error:
            raise BadProfile(f"the plot {svg} cannot be written ({error.strerror})") from None
    with readers_may_leave():
        print(json.dumps(profile.to_plain(found)) if as_json else profile.report(found).rstrip("\n"))


@app.command("list", short_help="Which profiles there are.")
def list_profiles(as_json: AsJson = False, debug: Debug = False) -> None:  # noqa: ARG001
    """List the profiles of the search path, in the order in which they are looked through; * marks the one that plans
    are made from on this machine as it is now."""
    facts = device.probe()
    every = [*((str(path), found) for path, found in profile.own(*search_path()))]
    every += [("shipped", found) for found in profile.shipped().values()]
    mine = profile.device_of(facts), profile.mode_of(facts)
    used = next((found for _, found in every if profile.mismatch(found, *mine) is None), None)
    rows = [
        {
            "name": found.name,
            "device": found.device.name,
            "power_mode": found.power_mode.name if found.power_mode else None,
            "date": found.date,
            "from": where,
            "used": found is used,
        }
        for where, found in every
    ]
    with readers_may_leave():
        if as_json:
            print(json.dumps({"search_path": [str(folder) for folder in search_path()], "profiles": rows}))
            return
        width = max(len(str(row["name"])) for row in rows)
        for row in rows:
            mode = row["power_mode"] or "-"
            print(f"{'*' if row['used'] else ' '} {row['name']:<{width}}  {mode:<10}  {row['date']}  {row['from']}")
        print(f"looked through: {', '.join(map(str, search_path()))}, then those that are shipped")


def _matching(path: Path, facts: DeviceFacts, replace: bool) -> DeviceProfile | None:
    """The profile in ``path`` that measurements are added to; None to begin a new one."""
    if not path.exists() or replace:
        return None
    old = profile.read(path)
    profile.require_match(old, facts, "--replace")
    return old


def _threads(old: DeviceProfile | None, given: int | None) -> int:
    """The threads to measure with: those of the profile that is added to, or held against requests."""
    before = old.versions.get("threads", "") if old else ""
    if not before.isdecimal():
        return given or torch.get_num_threads()
    if given is not None and given != int(before):
        raise BadProfile(f"the profile was measured with {before} threads, not {given}: give those, or --replace")
    return min(int(before), os.cpu_count() or 1)


def _open(model: str) -> profiler.Bench:
    directory = checkpoint_of(model)
    if not directory.is_dir():
        raise BadModel(f"there is no model {model!r}: give 'demo' or the directory of a checkpoint")
    with progress("loading") as report:
        return profiler.Bench(directory, "demo" if model == "demo" else directory.resolve().name, report)


def _verify(bench: profiler.Bench, of_machine: DeviceProfile, requests: int, seed: int, as_json: bool) -> None:
    with progress("verifying") as report:
        verdict = profiler.verify(bench, of_machine, requests, seed, report)
    with readers_may_leave():
        print(
            json.dumps(profiler.to_dict(verdict, bench.shape.name, of_machine))
            if as_json
            else profiler.report(verdict).rstrip("\n")
        )
    raise typer.Exit(0 if verdict.holds else 1)
