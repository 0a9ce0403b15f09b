"""The oracle against transformers' own greedy decoding, and its invariants."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.equipment.oracle import AvlSettings, generate, keep_text, text_budget, top
from tests.equipment.oracle_cases import ALL, EVERYTHING, PROMPTS, SOME, STEPS, TIGHT, Cases, tokens


@ALL
@PROMPTS
def test_keeping_everything_is_transformers_own_greedy_decoding(name: str, text: str, case: Cases) -> None:
    made = case(name)
    input_ids, pixel_values = made.inputs(text)
    expected = made.model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=pixel_values,
        do_sample=False,
        max_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for refresh in (0, 1, 3):
        steps = generate(made.model, input_ids, pixel_values, replace(EVERYTHING, refresh=refresh), STEPS)
        assert tokens(steps) == expected.sequences[0, input_ids.shape[1] :].tolist()
        for step, logits in zip(steps, expected.logits, strict=True):
            torch.testing.assert_close(step.logits, logits[0].to(step.logits.dtype), rtol=1e-5, atol=1e-5)
    positions = tuple(range(input_ids.shape[1] + STEPS - 1))
    images = set((input_ids[0] == made.model.config.image_token_id).nonzero().flatten().tolist())
    for rows in steps[-1].rows:
        assert rows.core == tuple(sorted(images))
        assert rows.secondary == ()
        assert rows.text == tuple(position for position in positions if position not in images)


@SOME
@PROMPTS
def test_refreshing_every_step_is_a_core_of_all_stored_rows(name: str, text: str, case: Cases) -> None:
    made = case(name)
    always = made.run(replace(TIGHT, refresh=1), text)
    whole = made.run(replace(TIGHT, core=TIGHT.secondary, refresh=3), text)
    for left, right in zip(always, whole, strict=True):
        assert torch.equal(left.logits, right.logits)
        for one, other in zip(left.rows, right.rows, strict=True):
            assert one.text == other.text
            assert sorted(one.core + one.secondary) == list(other.core)


@SOME
@PROMPTS
@pytest.mark.parametrize(
    "settings",
    [
        AvlSettings(),
        TIGHT,
        AvlSettings(prefill_keep=40, secondary=45, core=13, refresh=2, text_keep=33, heavy=50, text_floor=3),
        AvlSettings(
            prefill_keep=55, secondary=50, core=0, refresh=0, text_keep=0, heavy=0, text_floor=1, prune_layer=0
        ),
    ],
)
def test_row_counts_and_what_never_comes_back(name: str, text: str, settings: AvlSettings, case: Cases) -> None:
    made = case(name)
    input_ids, pixel_values = made.inputs(text)
    length = input_ids.shape[1]
    images = (input_ids[0] == made.model.config.image_token_id).nonzero().flatten().tolist()
    total, first = len(images), images[0]
    survivors = settings.prefill_keep * total // 100
    steps = generate(made.model, input_ids, pixel_values, settings, STEPS)
    pruned_layers_hold: set[int] = set()
    for t, step in enumerate(steps):
        assert step.token == int(step.logits.argmax())
        for index, rows in enumerate(step.rows):
            deep = index > settings.prune_layer
            stored = set(rows.core + rows.secondary)
            assert all(group == tuple(sorted(group)) for group in (rows.text, rows.core, rows.secondary))
            assert len(rows.core) == settings.core * total // 100
            assert len(stored) == len(rows.core) + len(rows.secondary)
            assert len(stored) == min(settings.secondary * total // 100, survivors if deep else total)
            assert stored <= set(images)
            pruned_layers_hold |= stored if deep else set()
            assert rows.text[:first] == tuple(range(first))
            seen = length - first - total + t
            budget = text_budget(settings, seen)
            assert len(rows.text) - first == min(seen, budget)
            recent = budget - settings.heavy * budget // 100
            assert set(range(length + t - min(recent, t), length + t)) <= set(rows.text)
            if t:
                before = steps[t - 1].rows[index]
                assert stored == set(before.core + before.secondary)
                assert set(rows.text) <= {*before.text, length + t - 1}
                if not settings.refresh or t % settings.refresh:
                    assert rows.core == before.core
    assert len(pruned_layers_hold) <= survivors


@SOME
def test_the_settings_matter(name: str, case: Cases) -> None:
    made = case(name)
    full = made.run(EVERYTHING)
    tight = made.run(TIGHT)
    cores = {step.rows[1].core for step in tight}
    assert len(cores) > 1
    assert len({rows.core for rows in tight[-1].rows}) > 1
    for settings in (
        replace(EVERYTHING, prefill_keep=50),
        replace(EVERYTHING, secondary=50, core=50),
        replace(EVERYTHING, core=30),
        replace(EVERYTHING, text_keep=50, text_floor=6),
    ):
        steps = made.run(settings)
        same_prefill = settings.prefill_keep == 100
        assert torch.equal(full[0].logits, steps[0].logits) == same_prefill
        if tokens(full)[0] == tokens(steps)[0]:
            assert (full[1].logits - steps[1].logits).abs().max() > 1e-3


def test_the_oracle_leaves_the_model_as_it_was(case: Cases) -> None:
    made = case("llama-mha")
    input_ids, pixel_values = made.inputs()
    before = made.model(input_ids=input_ids, pixel_values=pixel_values).logits
    first, second = made.run(TIGHT), made.run(TIGHT)
    assert [step.rows for step in first] == [step.rows for step in second]
    assert torch.equal(before, made.model(input_ids=input_ids, pixel_values=pixel_values).logits)
    assert not any(layer.self_attn._forward_pre_hooks for layer in made.model.model.language_model.layers)


def test_it_also_runs_in_the_precision_of_the_checkpoint(case: Cases) -> None:
    made = case("llama-bf16")
    model = LlavaForConditionalGeneration.from_pretrained(made.directory, attn_implementation="eager")
    steps = generate(model, *made.inputs(), AvlSettings(), 4)
    assert steps[-1].logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(steps[-1].logits).all())


def test_prompts_that_have_no_meaning_are_refused(case: Cases) -> None:
    made = case("llama-mha")
    input_ids, pixel_values = made.inputs()
    image = made.model.config.image_token_id
    message = re.escape("the prompt needs an image and text after it")
    for ids in (input_ids[input_ids != image], torch.cat([input_ids, torch.full((1, 1), image)], dim=1)):
        with pytest.raises(ValueError, match=message):
            generate(made.model, ids, pixel_values, AvlSettings(), 2)
    with pytest.raises(ValueError, match="eager"):
        generate(
            LlavaForConditionalGeneration.from_pretrained(made.directory, attn_implementation="sdpa"),
            input_ids,
            pixel_values,
            AvlSettings(),
            2,
        )


def test_ties_go_to_the_lower_position() -> None:
    assert top([0.5, 0.5, 0.1, 0.5, 0.9], range(5), 3) == [0, 1, 4]
    assert top([0.5, 0.5, 0.1], [2, 1, 0], 1) == [0]
    assert top([0.5, 0.2], [1, 0], 9) == [0, 1]


@pytest.mark.parametrize(
    ("text_keep", "seen", "floor", "budget"),
    [(50, 5, 0, 2), (50, 7, 0, 4), (70, 45, 20, 32), (70, 10, 20, 20), (100, 33, 0, 33), (55, 90, 0, 50), (0, 9, 0, 0)],
)
def test_the_text_budget_rounds_half_to_even(text_keep: int, seen: int, floor: int, budget: int) -> None:
    assert text_budget(AvlSettings(text_keep=text_keep, text_floor=floor), seen) == budget


def test_text_is_kept_by_sum_and_by_recency() -> None:
    settings = AvlSettings(text_keep=50, text_floor=0)
    text = [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41]
    sums = dict.fromkeys(text, 0.0) | {33: 2.0, 36: 1.0, 31: 0.5, 32: 0.5, 34: 0.5, 41: 9.0}
    # a budget of 6: int(4.2) = 4 by sum among 30..39, and the 2 most recent; 31 wins the tie, then 32
    assert keep_text(settings, text, sums, seen=12) == [31, 32, 33, 36, 40, 41]
    assert keep_text(settings, text, sums, seen=24) == text
    assert keep_text(replace(settings, heavy=100), text, sums, seen=2) == [41]
    assert keep_text(replace(settings, heavy=0), text, sums, seen=4) == [40, 41]
    assert keep_text(replace(settings, text_keep=0), text, sums, seen=12) == []
