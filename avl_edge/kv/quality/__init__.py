"""What settings were measured to be worth: the order in which a budget tries them, and the presets.

``measured.json`` is made by ``python -m tools.quality_table`` from an evaluation of the demo model. Rankings on a small
model are no evidence about large ones: the table says which model it is of, and so does every explanation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from ...config import Formats, KvShape, PromptShape
from ...errors import BadInput, TooLarge
from ..budget import KvPlan, fit, kv_plan
from ..layout import can_hold
from ..methods import Choice, Full, Method, candidates, check_layers, parameter_without_method
from .presets import PRESETS, Preset, preset
from .ranking import explain, ranked
from .table import Point, QualityTable, table

__all__ = ["PRESETS", "Point", "Preset", "QualityTable", "at_share", "choices", "explain", "preset", "ranked", "table"]


_SMALLEST = Formats("int4", "int4", "int4")


def choices(
    name: str | None, parameters: Mapping[str, float], fitted: bool, formats: Formats | None, shape: KvShape
) -> Iterator[Choice]:
    """The settings to choose from, best answers first; as :func:`avl_edge.kv.methods.candidates` for a method by name.

    Without a name: full attention, and where a budget or a target is to be met (``fitted``), whatever the table
    expects the best answers of, without packing where rows of ``shape`` cannot be packed; and `distinct`, then A-VL,
    for less than it has measured, or in ``formats`` that it does not know. Raises :class:`BadInput` for an unknown
    method or parameter.
    """
    if name is not None:
        settings = candidates(name, parameters, fitted, formats)
        check_layers(name, parameters, shape.layers)
        yield from settings
        return
    for parameter in parameters:
        raise BadInput(parameter_without_method(parameter))
    if formats is not None or not fitted:
        yield Choice(Full(), formats or Formats())
    if not fitted:
        return
    known = ranked(formats)
    if not all(can_hold(each.formats, shape) for each in known):
        known = ranked(Formats())
    yield from known
    smallest = formats or (_SMALLEST if can_hold(_SMALLEST, shape) else Formats())
    yield from candidates("distinct", {}, True, smallest)
    yield from candidates("avl", {"by_values": 1}, True, smallest)  # which drops text as well


def at_share(
    settings: list[Choice], share: float, prompt: PromptShape, shape: KvShape, what: str = "the method"
) -> KvPlan[Method]:
    """The first of ``settings`` that holds, at the end of the prompt, at most ``share`` of full attention's bytes.

    The share is rounded up to whole pages of the pool. :class:`TooLarge` says what ``what`` needs at least.
    """
    full = prompt.length * shape.layers * shape.row_bytes
    whole = kv_plan(Full(), Formats(), shape, prompt, 0)
    # The decimal share that was given, not the binary number nearest to it.
    exact = Fraction(str(share)) * full
    page = whole.peak_bytes // whole.pages
    budget = -(-exact // page) * page
    try:
        return fit(settings, shape, prompt, 0, int(budget))
    except TooLarge:
        least = min(kv_plan(*each, shape, prompt, 0).peak_bytes for each in settings)
        raise TooLarge(
            f"{what} cannot hold this prompt in {100 * share:g} % of full attention's memory: "
            f"the least is {100 * least / full:.1f} %"
        ) from None
