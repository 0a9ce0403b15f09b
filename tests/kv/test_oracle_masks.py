"""Rows that the oracle hides behind masks, against caches and prompts from which they were really taken out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from tests.equipment.oracle import generate, text_budget
from tests.equipment.oracle_cases import EVERYTHING, PROMPTS, SOME, STEPS, TIGHT, Cases


@SOME
@PROMPTS
@torch.no_grad()
def test_hidden_rows_are_as_good_as_removed(name: str, text: str, case: Cases) -> None:
    """Every step again over caches from which the rows have really been taken out, layer by layer, and the choices
    from the weights seen there. Without a prefill prune, so that prefill is plain."""
    made = case(name)
    settings = replace(TIGHT, prefill_keep=100)
    input_ids, pixel_values = made.inputs(text)
    steps = generate(made.model, input_ids, pixel_values, settings, STEPS)
    is_image = (input_ids[0] == made.model.config.image_token_id).tolist()
    total, first, length = sum(is_image), is_image.index(True), len(is_image)
    is_text = [position > first and not image for position, image in enumerate(is_image)] + [True] * STEPS

    out = made.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=True, output_attentions=True)
    torch.testing.assert_close(steps[0].logits, out.logits[0, -1], rtol=1e-5, atol=1e-5)
    rows = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    sums = [torch.zeros(length + STEPS, dtype=torch.float64) for _ in rows]
    for index, layer_rows in enumerate(steps[0].rows):
        weights = out.attentions[index].mean(1)[0]
        for query in range(first, length):
            sums[index][:length] += weights[query] if is_text[query] else 0.0
        score = weights[-1] * torch.tensor(is_image)
        assert sorted(score.topk(settings.core * total // 100).indices.tolist()) == list(layer_rows.core)
        stored = sorted(score.topk(settings.secondary * total // 100).indices.tolist())
        assert stored == sorted(layer_rows.core + layer_rows.secondary)

    for t in range(1, STEPS):
        refresh = t % settings.refresh == 0
        cache, now = DynamicCache(), length + t - 1
        held = [sorted(at.text + at.core + (at.secondary if refresh else ())) for at in steps[t - 1].rows]
        for index, (keys, values) in enumerate(rows):
            cache.update(keys[:, :, held[index]], values[:, :, held[index]], index)
        out = made.model(
            input_ids=torch.tensor([[steps[t - 1].token]]),
            position_ids=torch.tensor([[now]]),
            past_key_values=cache,
            output_attentions=True,
        )
        torch.testing.assert_close(steps[t].logits, out.logits[0, -1], rtol=1e-5, atol=1e-5)
        for index, (before, after) in enumerate(zip(steps[t - 1].rows, steps[t].rows, strict=True)):
            new = cache.layers[index]
            rows[index] = tuple(
                torch.cat([old, grown[:, :, -1:]], dim=2)
                for old, grown in zip(rows[index], (new.keys, new.values), strict=True)
            )
            score = torch.zeros(now + 1, dtype=torch.float64)
            score[[*held[index], now]] = out.attentions[index].mean(1)[0, -1]
            sums[index][: now + 1] += score
            if refresh:
                images = sorted(before.core + before.secondary, key=lambda p: float(score[p]), reverse=True)
                assert sorted(images[: len(before.core)]) == list(after.core)
            gone = ({*before.text, now}) - set(after.text)
            heavy = settings.heavy * text_budget(settings, sum(is_text[: now + 1])) // 100
            older = [position for position in after.text if is_text[position]][:heavy]
            assert all(sums[index][lost] <= sums[index][older].min() for lost in gone)
            assert all(lost < after.text[-1] for lost in gone)
    assert any(len(at.text) < now + 1 - total for at in steps[-1].rows)


@SOME
@PROMPTS
@pytest.mark.parametrize("prune_layer", [0, 1, 2])
def test_the_prune_ranks_by_the_last_query_in_its_layer(name: str, text: str, prune_layer: int, case: Cases) -> None:
    made = case(name)
    input_ids, pixel_values = made.inputs(text)
    settings = replace(EVERYTHING, prefill_keep=50, prune_layer=prune_layer)
    step = generate(made.model, input_ids, pixel_values, settings, 1)[0]
    is_image = input_ids[0] == made.model.config.image_token_id
    plain = made.model(input_ids=input_ids, pixel_values=pixel_values, output_attentions=True)
    score = plain.attentions[prune_layer].mean(1)[0, -1] * is_image
    survivors = sorted(score.topk(int(is_image.sum()) // 2).indices.tolist())
    for index, rows in enumerate(step.rows):
        images = survivors if index > prune_layer else is_image.nonzero().flatten().tolist()
        assert sorted(rows.core + rows.secondary) == images


@SOME
def test_a_prefill_prune_is_as_good_as_a_shorter_sequence(name: str, case: Cases) -> None:
    """With the prune after layer 0 the deeper layers are run by hand on the hidden states that survive."""
    made = case(name)
    input_ids, pixel_values = made.inputs()
    settings = replace(EVERYTHING, prefill_keep=50, prune_layer=0)
    step = generate(made.model, input_ids, pixel_values, settings, 1)[0]
    decoder = made.model.model.language_model
    kept = sorted(step.rows[1].text + step.rows[1].core)
    assert len(kept) < len(step.rows[0].text + step.rows[0].core) == input_ids.shape[1]
    with torch.no_grad():
        out = made.model(input_ids=input_ids, pixel_values=pixel_values, output_hidden_states=True)
        hidden = out.hidden_states[1][:, kept]
        positions = torch.tensor([kept])
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
        mask = torch.full((len(kept), len(kept)), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
        for layer in decoder.layers[1:]:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        logits = made.model.lm_head(decoder.norm(hidden[0, -1]))
    torch.testing.assert_close(step.logits, logits, rtol=1e-5, atol=1e-5)
