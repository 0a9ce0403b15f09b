"""``avl-edge plan``"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from ..config import Options, parse_size
from ..errors import BadInput
from ..kv.methods.notation import format_names
from ..machine import profile
from ..machine.profile import DeviceProfile
from ..model.demo import DEMO
from ..model.known import KNOWN, known_shape, shape_of_checkpoint
from ..model.sizes import PRECISIONS, ModelShape, Precision
from ..planning import estimate
from ..planning.estimate import PlanRequest
from .memory import MaxPlannedMemory
from .options import (
    MEMORY,
    Core,
    CoreFormat,
    Json,
    KvFormat,
    Method,
    Parameters,
    PrefillKeep,
    Refresh,
    Secondary,
    SecondaryFormat,
    TextFormat,
    TextKeep,
    checkpoint_of,
    given_parameters,
)
from .profiles import open_profile
from .terminal import Debug, readers_may_leave

_SIZE = re.compile(r"([0-9]{1,5})[xX]([0-9]{1,5})")


AnyModel: TypeAlias = Annotated[
    str,
    typer.Option(help="'demo', the directory of a checkpoint, or the name of a published model: see avl-edge models."),
]
DeviceName: TypeAlias = Annotated[
    str | None,
    typer.Option("--device", help="Like agx-orin-64, or the file of a profile.", show_default="this machine"),
]
Power: TypeAlias = Annotated[
    str | None, typer.Option(help="The power mode, like 30W.", show_default="the device's default")
]
Images: TypeAlias = Annotated[int, typer.Option(help="Pictures in the prompt.")]
ImageSize: TypeAlias = Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Their size in pixels.")]
ImageTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(help="All image tokens of the prompt.", show_default="what the pictures give"),
]
PromptTokens: TypeAlias = Annotated[int, typer.Option(help="Text tokens of the prompt.")]
SystemTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="How many of them stand before the image.", show_default=f"{PlanRequest.system_tokens}, at most half"
    ),
]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
Streams: TypeAlias = Annotated[int, typer.Option(help="Requests at a time.")]
Weights: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"Format of the decoder's matrices: {', '.join(PRECISIONS)}.",
        show_default="as stored",
        rich_help_panel=MEMORY,
    ),
]
Head: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Format of the decoder's head, likewise.", show_default="as stored", rich_help_panel=MEMORY),
]
TargetMs: TypeAlias = Annotated[
    float | None,
    typer.Option("--target-ms-per-token", help="The longest that a decode step of all streams may take, on average."),
]


def plan(
    model: AnyModel,
    device_name: DeviceName = None,
    power: Power = None,
    images: Images = PlanRequest.images,
    image_size: ImageSize = "1280x960",
    image_tokens: ImageTokens = None,
    prompt_tokens: PromptTokens = PlanRequest.prompt_tokens,
    system_tokens: SystemTokens = None,
    max_new_tokens: MaxNewTokens = Options.max_new_tokens,
    streams: Streams = PlanRequest.streams,
    target_ms_per_token: TargetMs = None,
    method: Method = None,
    prefill_keep: PrefillKeep = None,
    secondary: Secondary = None,
    core: Core = None,
    refresh: Refresh = None,
    text_keep: TextKeep = None,
    parameters: Parameters = None,
    max_memory: MaxPlannedMemory = None,
    kv_format: KvFormat = None,
    text_format: TextFormat = None,
    core_format: CoreFormat = None,
    secondary_format: SecondaryFormat = None,
    weights: Weights = None,
    head: Head = None,
    as_json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Say what a request would cost on a device: memory, tiers and times, or how to make it fit. Loads nothing."""
    shape, of_device = _shape(model), open_profile(device_name, power)
    request = PlanRequest(
        images=images,
        image_size=_image_size(image_size),
        image_tokens=image_tokens,
        prompt_tokens=prompt_tokens,
        system_tokens=_system_tokens(system_tokens, prompt_tokens),
        max_new_tokens=max_new_tokens,
        streams=streams,
        method=method,
        parameters=given_parameters(parameters, prefill_keep, secondary, core, refresh, text_keep),
        formats=format_names(text_format, core_format, secondary_format, kv_format),
        weights=Precision(weights or shape.stored.body, head or shape.stored.head) if weights or head else None,
        max_memory=None if max_memory is None else parse_size(max_memory),
        target_ms_per_token=target_ms_per_token,
    )
    _print_plan(shape, of_device, request, as_json)


def _print_plan(shape: ModelShape, of_device: DeviceProfile, request: PlanRequest, as_json: bool) -> None:
    """The plan; where it does not fit, :class:`~avl_edge.planning.estimate.Refused`, printed too as JSON."""
    try:
        found = estimate.plan(shape, of_device, request, profile.shipped().values())
    except estimate.Refused as refusal:
        if as_json:
            alternatives = [asdict(alternative) for alternative in refusal.alternatives]
            _print(json.dumps({"fits": False, "reason": refusal.reason, "alternatives": alternatives}))
        raise
    _print(json.dumps(found.to_dict()) if as_json else estimate.report(found).rstrip("\n"))


def _system_tokens(given: int | None, prompt_tokens: int) -> int:
    """A question stands after its picture, however short the prompt."""
    return given if given is not None else min(PlanRequest.system_tokens, max(prompt_tokens, 0) // 2)


def _print(text: str) -> None:
    with readers_may_leave():
        print(text)


def _image_size(text: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadInput(f"cannot read --image-size {text!r}: give WIDTHxHEIGHT in pixels, like 1280x960")
    return int(match.group(1)), int(match.group(2))


def _shape(model: str) -> ModelShape:
    if model == "demo":
        return shape_of_checkpoint(DEMO, "demo")
    if model.lower() not in KNOWN and Path(model).is_dir():
        return shape_of_checkpoint(checkpoint_of(model), Path(model).resolve().name)
    return known_shape(model)
