"""The oracle against transformers' own greedy decoding, against caches that really are cut, and its invariants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from tests.equipment.checkpoints import SPECS, TOKENIZER_SIZE, make_checkpoint, random_image
from tests.equipment.oracle import AvlSettings, OracleStep, generate, keep_text, load_model, text_budget, top

EVERYTHING = AvlSettings(prefill_keep=100, secondary=100, core=100, text_keep=100)
TIGHT = AvlSettings(text_keep=50, text_floor=6)
STEPS = 12
ONE_IMAGE = "USER: <image>\nWhat is shown in this picture, and where is the bicycle? ASSISTANT:"
TWO_IMAGES = "A polite chat. USER: <image>\nThen look at <image>\nHow do the two of them differ? ASSISTANT:"


@dataclass(frozen=True)
class Case:
    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    directory: Path

    def inputs(self, text: str = ONE_IMAGE) -> tuple[Tensor, Tensor]:
        images = [random_image(seed, (70 + 20 * seed, 60)) for seed in range(text.count("<image>"))]
        batch = self.processor(text=text, images=images, return_tensors="pt")
        return batch["input_ids"], batch["pixel_values"].double()

    def run(self, settings: AvlSettings, text: str = ONE_IMAGE, steps: int = STEPS) -> list[OracleStep]:
        return generate(self.model, *self.inputs(text), settings, steps)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are so small that a second thread only waits; on a busy machine it waits for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            directory = make_checkpoint(tmp_path_factory.mktemp(name), SPECS[name])
            made[name] = Case(load_model(directory), LlavaProcessor.from_pretrained(directory), directory)
        return made[name]

    return get


Cases = Callable[[str], Case]
ALL = pytest.mark.parametrize("name", SPECS)
SOME = pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-full", "mistral-gqa", "qwen2-tied"])
PROMPTS = pytest.mark.parametrize("text", [ONE_IMAGE, TWO_IMAGES], ids=["one image", "two images"])


def tokens(steps: list[OracleStep]) -> list[int]:
    return [step.token for step in steps]


def test_the_specs_cover_what_they_should() -> None:
    specs = list(SPECS.values())
    assert {spec.text for spec in specs} == {"llama", "mistral", "qwen2"}
    assert {spec.feature_layer for spec in specs} == {-1, -2, (-3, -1)}
    assert {spec.strategy for spec in specs} == {"default", "full"}
    assert {spec.dtype for spec in specs} == {torch.float32, torch.bfloat16}
    assert {spec.tied for spec in specs} == {spec.kv_heads < spec.heads for spec in specs} == {False, True}
    assert {(spec.rope_scaling or {}).get("rope_type") for spec in specs} >= {None, "llama3", "linear", "yarn"}


@ALL
def test_a_checkpoint_reloads(name: str, case: Cases) -> None:
    made, spec = case(name), SPECS[name]
    stored = LlavaForConditionalGeneration.from_pretrained(made.directory)
    assert stored.dtype == spec.dtype
    tied = stored.lm_head.weight.data_ptr() == stored.model.language_model.embed_tokens.weight.data_ptr()
    assert tied == spec.tied
    assert len(made.processor.tokenizer) == TOKENIZER_SIZE
    input_ids, pixel_values = made.inputs(TWO_IMAGES)
    assert (input_ids == stored.config.image_token_id).sum() == 2 * spec.image_tokens
    assert pixel_values.shape == (2, 3, spec.image_size, spec.image_size)


def test_a_sharded_checkpoint_holds_the_same_weights(tmp_path: Path, case: Cases) -> None:
    directory = make_checkpoint(tmp_path, SPECS["llama-mha"], max_shard_size="200KB")
    assert (directory / "model.safetensors.index.json").is_file()
    assert len(list(directory.glob("*.safetensors"))) > 2
    expected = case("llama-mha").model.state_dict()
    found = load_model(directory).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["llama-mha", "qwen2-gqa"])
def test_the_tokenizer_gives_text_back(name: str, case: Cases) -> None:
    tokenizer = case(name).processor.tokenizer
    text = "Where is the zebra? Größe 12 — 北"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == tokenizer.bos_token_id) == (name == "llama-mha")


@ALL
def test_decoding_varies_and_depends_on_the_picture(name: str, case: Cases) -> None:
    made = case(name)
    input_ids, pixel_values = made.inputs()
    steps = generate(made.model, input_ids, pixel_values, EVERYTHING, 16)
    assert len(set(tokens(steps))) >= 6
    assert not set(tokens(steps)) & set(made.processor.tokenizer.all_special_ids)
    other = generate(made.model, input_ids, pixel_values.flip(-1), EVERYTHING, 16)
    assert (steps[0].logits - other[0].logits).abs().max() > 0.1


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
