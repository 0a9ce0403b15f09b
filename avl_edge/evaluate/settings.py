"""What a share of the KV memory means for each method: the one place where it is defined.

A share of, say, 0.5 lets a method hold, at the end of the prompt and over all layers, at most half of the rows that
full attention holds there: text counts too, and so does what a method must leave alone. So methods are compared at
equal bytes. Which parameters keep a share is each method's own knowledge, its ladder (``Method.ladder``): A-VL lowers
S and with it C, P and T, H2O its budget, FastV raises R and then starts a layer earlier, StreamingLLM shortens its
window. Rows of generated tokens come on top, by each method's own rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

from ..budget import fit
from ..config import KvShape, Options, PromptShape, parse_parameter, require
from ..errors import DoesNotFit
from ..policies import Method, candidates


@dataclass(frozen=True)
class Setting:
    """A ``method`` at ``kv_fraction`` of full attention's memory, above 0 and at most 1.

    The method's name may be followed by parameters that stay as they are: ``avl:prompt_mean=1:refresh=1``.
    """

    method: str
    kv_fraction: float = 1.0

    @property
    def name(self) -> str:
        """The method's name alone."""
        return self.method.partition(":")[0]

    @property
    def parameters(self) -> dict[str, float]:
        """What is fixed."""
        return dict(map(parse_parameter, self.method.split(":")[1:]))

    def __str__(self) -> str:
        return f"{self.method} at {100 * self.kv_fraction:g} %"

    def options(self, prompt: PromptShape, shape: KvShape, max_new_tokens: int) -> Options:
        """Greedy decoding with the parameters that keep the share for this prompt.

        Raises :class:`DoesNotFit` when the method cannot hold so little.
        """
        # The decimal share that was given, not the binary number nearest to it.
        budget = int(Fraction(str(self.kv_fraction)) * prompt.length * shape.layers * shape.row_bytes)
        try:
            method = fit(self._ladder(), shape, prompt, steps=0, budget=budget).method
        except DoesNotFit:
            least = min(rung.peak_rows(prompt, 0, shape.layers) for rung in self._ladder())
            raise DoesNotFit(
                f"{self.method} cannot hold this prompt in {100 * self.kv_fraction:g} % of full attention's memory: "
                f"the least is {100 * least / (prompt.length * shape.layers):.1f} %"
            ) from None
        parameters = asdict(method)  # type: ignore[call-overload]
        return Options(method=self.name, parameters=parameters, max_new_tokens=max_new_tokens)

    def _ladder(self) -> Iterator[Method]:
        return candidates(self.name, self.parameters, fitted=True)


REFERENCE = Setting("full")


def settings_of(methods: Sequence[str], fractions: Sequence[float]) -> list[Setting]:
    """Each method at each fraction, full attention once and first; :class:`BadInput` for what is not one."""
    for method in methods:
        next(Setting(method)._ladder())
    for fraction in fractions:
        require(0 < fraction <= 1, f"a KV fraction must be above 0 and at most 1, not {fraction:g}")
    require(bool(methods), "there is no method to evaluate: name one with --methods")
    require(bool(fractions), "there is no KV fraction to evaluate at: give one with --kv-fraction")
    others = [Setting(name, share) for name in dict.fromkeys(methods) for share in dict.fromkeys(fractions)]
    reference = [REFERENCE] if REFERENCE.method in methods else []
    return reference + [setting for setting in others if setting.method != REFERENCE.method]
