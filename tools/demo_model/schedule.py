"""The plan of a training run: stages with a length each, and how learning rates move inside a stage."""

from __future__ import annotations

from dataclasses import dataclass


class BadPlan(ValueError):
    """A plan that names an unknown stage or no length."""


@dataclass(frozen=True)
class Recipe:
    """How a kind of stage trains; rates are those at the plateau.

    ``muon`` is for matrices and ``adamw`` for everything else; ``vision`` multiplies both for the vision tower.
    ``warm`` and ``decay`` are the shares of the stage in which the rates rise and fall. ``half``: only every second
    decoder layer takes part. ``sparse``: the decoder sees only patches that show something, and a few others.
    """

    muon: float
    adamw: float
    vision: float
    warm: float
    decay: float
    batch: int
    half: bool = False
    sparse: bool = False


RECIPES = {
    # The vision tower alone, on the dense labels.
    "vision": Recipe(muon=0.02, adamw=2e-3, vision=1.0, warm=0.03, decay=0.35, batch=16),
    # The dense head alone, for weights that come without one.
    "probe": Recipe(muon=0.0, adamw=4e-3, vision=0.0, warm=0.03, decay=0.5, batch=16),
    # Everything, but half of the decoder and a fifth of its picture rows. Attention to the right patch is discovered by
    # its share of the uniform attention that training begins with: among all 576 rows it was not within an hour.
    "find": Recipe(muon=0.006, adamw=1.5e-3, vision=0.3, warm=0.03, decay=0.0, batch=8, half=True, sparse=True),
    # The whole decoder, still on few rows.
    "grow": Recipe(muon=0.006, adamw=1.5e-3, vision=0.3, warm=0.01, decay=0.0, batch=8, sparse=True),
    # The same, with rates that fall to nothing: most of what is read exactly is learned here.
    "anneal": Recipe(muon=0.006, adamw=1.5e-3, vision=0.3, warm=0.0, decay=1.0, batch=8, sparse=True),
    # Everything: the model meets the empty patches of its pictures.
    "read": Recipe(muon=0.002, adamw=5e-4, vision=0.3, warm=0.02, decay=1.0, batch=8),
}


@dataclass(frozen=True)
class Stage:
    """A recipe for a number of minutes of training, or exactly of steps."""

    name: str
    minutes: float = 0.0
    steps: int = 0

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.name]

    def progress(self, minutes: float, steps: int) -> float:
        """How much of the stage is done, 0 to 1 and beyond."""
        return steps / self.steps if self.steps else minutes / self.minutes

    def rate(self, progress: float) -> float:
        """Multiplier of the learning rates at ``progress``."""
        recipe = self.recipe
        rising = min(1.0, progress / recipe.warm + 0.02) if recipe.warm else 1.0
        left = max(0.0, 1.0 - progress)
        return rising * (left / recipe.decay if left < recipe.decay else 1.0)


def parse_plan(text: str) -> tuple[Stage, ...]:
    """``vision:20,find:20,anneal:40,read:15`` in minutes, or ``read:200s`` in steps."""
    return tuple(_parse_stage(part) for part in text.split(","))


def _parse_stage(part: str) -> Stage:
    name, _, length = part.strip().partition(":")
    if name not in RECIPES or not length:
        raise BadPlan(f"{part!r} is no stage: give one of {', '.join(RECIPES)}, a colon and minutes or steps with an s")
    if length.endswith("s"):
        return Stage(name, steps=int(length[:-1]))
    return Stage(name, minutes=float(length))
