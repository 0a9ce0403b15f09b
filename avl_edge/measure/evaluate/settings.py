"""What a share of the KV memory means for each method: the one place where it is defined.

A share of, say, 0.5 lets a method hold, at the end of the prompt and over all layers, at most half of the bytes that
full attention holds there: text counts too, and so does what a method must leave alone. So methods are compared at
equal bytes. Which parameters keep a share is each method's own knowledge, its ladder (``Method.ladder``): A-VL lowers
S and with it C, P and T, H2O its budget, FastV raises R and then starts a layer earlier, StreamingLLM shortens its
window. Rows of generated tokens come on top, by each method's own rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ...config import KvShape, Options, PromptShape, require
from ...kv.budget import KvPlan, kv_plan
from ...kv.layout import check
from ...kv.methods import Choice, Method, candidates
from ...kv.methods.notation import parse
from ...kv.quality import at_share


@dataclass(frozen=True)
class Setting:
    """A ``method`` at ``kv_fraction`` of full attention's memory, above 0 and at most 1.

    The method's name may be followed by parameters that stay as they are, and by the formats of its rows:
    ``avl:prompt_mean=1:refresh=1:secondary_format=int8``; ``format`` is that of every tier without one of its own.
    """

    method: str
    kv_fraction: float = 1.0

    @property
    def name(self) -> str:
        """The method's name alone."""
        return parse(self.method).name

    def __str__(self) -> str:
        return f"{self.method} at {100 * self.kv_fraction:g} %"

    def options(self, prompt: PromptShape, shape: KvShape, max_new_tokens: int) -> Options:
        """Greedy decoding with the parameters that keep the share for this prompt.

        Raises :class:`TooLarge` when the method cannot hold so little.
        """
        plan = self.plan(prompt, shape, 0)
        parameters = asdict(plan.method)
        return Options(self.name, parameters, plan.formats, max_new_tokens=max_new_tokens)

    def plan(self, prompt: PromptShape, shape: KvShape, steps: int) -> KvPlan[Method]:
        """What the parameters that keep the share hold of this prompt and ``steps`` decode steps after it.

        Raises :class:`DoesNotFit` when the method cannot hold so little.
        """
        plan = at_share(self._ladder(), self.kv_fraction, prompt, shape, self.method)
        return kv_plan(plan.method, plan.formats, shape, prompt, steps)

    def check(self, shape: KvShape) -> None:
        """:class:`BadInput` where rows of ``shape`` cannot be stored in this setting's formats."""
        check(self._ladder()[0].formats, shape)

    def _ladder(self) -> list[Choice]:
        notation = parse(self.method)
        return list(candidates(notation.name, notation.parameters, True, notation.formats))


REFERENCE = Setting("full")


def settings_of(methods: Sequence[str], fractions: Sequence[float]) -> list[Setting]:
    """Each method at each fraction, full attention once and first; :class:`BadInput` for what is not one."""
    for method in methods:
        Setting(method)._ladder()
    for fraction in fractions:
        require(0 < fraction <= 1, f"a KV fraction must be above 0 and at most 1, not {fraction:g}")
    require(bool(methods), "there is no method to evaluate: name one with --methods")
    require(bool(fractions), "there is no KV fraction to evaluate at: give one with --kv-fraction")
    others = [Setting(name, share) for name in dict.fromkeys(methods) for share in dict.fromkeys(fractions)]
    reference = [REFERENCE] if REFERENCE.method in methods else []
    return reference + [setting for setting in others if setting.method != REFERENCE.method]
