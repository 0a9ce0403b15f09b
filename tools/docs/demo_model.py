"""Tables of ``docs/demo-model.md``: how well the demo model answers, and what its attention is like."""

from __future__ import annotations

from tools.docs.markdown import block, measured, percent, table


def quality() -> str:
    """Held-out questions by kind, the best answered first."""
    result = measured("demo_model_quality")["result"]
    kinds = sorted(result["by_type"].items(), key=lambda item: (-item[1]["exact_match"], item[0]))
    groups = [(f"*{group}*", each) for group, each in result["by_group"].items()]
    lines = [
        [kind, each["questions"], percent(each["exact_match"]), percent(each["character_error_rate"])]
        for kind, each in [("**all**", result), *groups, *kinds]
    ]
    return block(table(["", "questions", "exact match, %", "wrong characters, %"], lines), "demo_model_quality")


def foreign() -> str:
    """Pictures of another program's making."""
    lines = [
        [
            each["picture"],
            each["question"],
            each["truth"],
            each["said"],
            "yes" if each["truth"] == each["said"] else "no",
        ]
        for each in measured("demo_model_foreign")["result"]
    ]
    return block(table(["picture", "question", "right", "answered", "same"], lines, words=5), "demo_model_foreign")


def attention() -> str:
    """How spread out the attention over the picture is, layer by layer."""
    lines = [
        [layer, *(percent(each[key]) for key in ("image_share", "holds_80", "previous_step"))]
        for layer, each in enumerate(measured("demo_model_attention")["result"]["layers"])
    ]
    header = [
        "layer",
        "of all attention, on the picture, %",
        "image tokens that hold 80 % of that, %",
        "of the top tenth, kept from the step before, %",
    ]
    return block(table(header, lines), "demo_model_attention")


TABLES = {"demo-quality": quality, "demo-foreign": foreign, "demo-attention": attention}
