"""Options that several commands have, under the headings of their help, and what they mean together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from ..config import TRANSPARENCY
from ..errors import BadInput, BadModel
from ..kv.methods import METHODS, parameter_defaults, parameter_help
from ..kv.methods.notation import parse_parameter
from ..model.demo import DEMO
from ..package.directory import is_package
from .terminal import AS_JSON

SAMPLING = "Sampling options"
METHOD = "Method options"
MEMORY = "Memory options"
OUTPUT = "Output options"
FORMATS = "exact, int8, int8/int4, int4, lowrank:R or lowrank:R+int8"

Model: TypeAlias = Annotated[str, typer.Option(help="'demo', or the directory of a checkpoint.")]
Threads: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, max=os.cpu_count(), help="CPU threads; fewer are faster where others keep the cores busy."),
]


def _of_sampling(text: str, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=SAMPLING, **settings)


Temperature: TypeAlias = Annotated[float, _of_sampling("0 takes the likeliest token every time.")]
TopK: TypeAlias = Annotated[int, _of_sampling("Sample from so many of the likeliest tokens; 0: from all.")]
TopP: TypeAlias = Annotated[float, _of_sampling("Sample from the likeliest tokens that together reach this.")]
MinP: TypeAlias = Annotated[
    float, _of_sampling("Sample from tokens at least this many times as likely as the likeliest.")
]
RepetitionPenalty: TypeAlias = Annotated[
    float, _of_sampling("Divides the logits of tokens that are in the prompt or the answer.")
]
FrequencyPenalty: TypeAlias = Annotated[
    float, _of_sampling("Subtracted from a token's logit for each time that it is in the answer.")
]
PresencePenalty: TypeAlias = Annotated[
    float, _of_sampling("Subtracted from the logits of tokens that are in the answer.")
]
LogitBias: TypeAlias = Annotated[
    list[str] | None,
    _of_sampling("Added to the logit of a token; may be repeated.", metavar="ID=BIAS"),
]
Stop: TypeAlias = Annotated[
    list[str] | None,
    _of_sampling("The answer ends before this text; may be repeated.", metavar="TEXT"),
]
Seed: TypeAlias = Annotated[int | None, _of_sampling("Repeats the draws.", show_default="another one for each answer")]
WithLogprobs: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        help="With --json: the log-probability of each token, and of so many of the likeliest in its place.",
        rich_help_panel=OUTPUT,
    ),
]


MinPixels: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="The fewest pixels to resize a picture to, where a model takes any size.", show_default="the model's"
    ),
]
MaxPixels: TypeAlias = Annotated[
    int | None, typer.Option(help="The most; fewer are fewer tokens.", show_default="the model's")
]


def _of_method(parameter: str) -> Any:
    """An option for a parameter of methods, described as they describe it."""
    return typer.Option(
        help=parameter_help(parameter), show_default=parameter_defaults(parameter), rich_help_panel=METHOD
    )


Method: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"One of {', '.join(METHODS)}.",
        show_default="full; where that does not fit, what was measured to answer best",
        rich_help_panel=METHOD,
    ),
]
PrefillKeep: TypeAlias = Annotated[float | None, _of_method("prefill_keep")]
Secondary: TypeAlias = Annotated[float | None, _of_method("secondary")]
Core: TypeAlias = Annotated[float | None, _of_method("core")]
Refresh: TypeAlias = Annotated[int | None, _of_method("refresh")]
TextKeep: TypeAlias = Annotated[float | None, _of_method("text_keep")]
Parameters: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any parameter of the method; may be repeated.", rich_help_panel=METHOD
    ),
]

KvFormat: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"How rows are stored: {FORMATS}. Of every tier without a format of its own.",
        show_default="exact",
        rich_help_panel=MEMORY,
    ),
]
TextFormat: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Of text rows: exact, int8, int8/int4 or int4.", show_default="as --kv-format", rich_help_panel=MEMORY
    ),
]
CoreFormat: TypeAlias = Annotated[
    str | None, typer.Option(help="Of core rows.", show_default="as --kv-format", rich_help_panel=MEMORY)
]
SecondaryFormat: TypeAlias = Annotated[
    str | None, typer.Option(help="Of secondary rows.", show_default="as --kv-format", rich_help_panel=MEMORY)
]

WeightsFormat: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Pack the decoder's matrices: int8, or int4 with a scale for 128 inputs, or int4:GROUP.",
        show_default="as stored",
        rich_help_panel=MEMORY,
    ),
]
HeadFormat: TypeAlias = Annotated[
    str | None,
    typer.Option("--head", help="Pack the decoder's head, likewise.", show_default="as stored", rich_help_panel=MEMORY),
]

MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
Transparency: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"Transparent parts of pictures: {', '.join(TRANSPARENCY)}.", show_default="as the model's family has it"
    ),
]
KvBudget: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="The most KV memory, of all prompts together, like 160MB or 1.5GiB.",
        rich_help_panel=MEMORY,
    ),
]
WithExplanation: TypeAlias = Annotated[
    bool, typer.Option("--explain", help="Say on stderr why this setting was picked.", rich_help_panel=OUTPUT)
]
WithStats: TypeAlias = Annotated[
    bool, typer.Option("--stats", help="Print a table of times and memory to stderr.", rich_help_panel=OUTPUT)
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help=AS_JSON, rich_help_panel=OUTPUT)]


def checkpoint_of(model: str) -> Path:
    """The directory that ``model`` names, for what reads weights; :class:`BadModel` for a package, which has none."""
    directory = DEMO if model == "demo" else Path(model)
    if is_package(directory):
        raise BadModel(f"{directory} is a package of avl-edge build: give the checkpoint that it was built from")
    return directory


def given_parameters(
    texts: list[str] | None,
    prefill_keep: float | None,
    secondary: float | None,
    core: float | None,
    refresh: float | None,
    text_keep: float | None,
) -> dict[str, float]:
    """A method's parameters from ``--set`` and from options of their own; :class:`BadInput` for one given twice."""
    named = {
        "prefill_keep": prefill_keep,
        "secondary": secondary,
        "core": core,
        "refresh": refresh,
        "text_keep": text_keep,
    }
    given = {name: value for name, value in named.items() if value is not None}
    for name, value in map(parse_parameter, texts or []):
        if name in given:
            raise BadInput(f"{name!r} is given twice: keep one of them")
        given[name] = value
    return given


def given_biases(texts: list[str] | None) -> dict[int, float]:
    """Token ids and what is added to their logits, from ``ID=BIAS``; :class:`BadInput` for a token given twice."""
    given: dict[int, float] = {}
    for text in texts or []:
        token, _, bias = text.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError:
            raise BadInput(
                f"cannot read {text!r} as a bias: give ID=BIAS, a token id and a number, like 13=-5"
            ) from None
        if number in given:
            raise BadInput(f"token {number} is given two biases: keep one of them")
        given[number] = value
    return given
