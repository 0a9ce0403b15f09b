"""The exported graphs, run by ONNX Runtime, against transformers and the torch backend: features and prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from avl_edge.kv.methods import H2O, Avl, FastV, Method
from tests.conftest import Checkpoints
from tests.equipment.exported import PRUNE_AFTER, TOLERANCE, Exports, prompt_of, start
from tests.equipment.pixels import stacked

FAMILIES = ["llama-mha", "llama-gqa-full", "llama-bias", "llama-tied", "mistral-yarn", "mistral-wide", "qwen2-tied"]


@pytest.fixture(scope="module")
def export(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(checkpoint, tmp_path_factory)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_equal_transformers(export: Exports, name: str) -> None:
    exported = export(name)
    model = LlavaForConditionalGeneration.from_pretrained(exported.directory).eval()
    side = exported.spec.vision.image_size
    for images in (1, 2, 5):
        pixels = np.random.default_rng(images).standard_normal((images, 3, side, side), dtype=np.float32)
        with torch.no_grad():
            expected = torch.stack(list(model.get_image_features(torch.from_numpy(pixels)).pooler_output))
        np.testing.assert_allclose(exported.encode(pixels), expected.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_equal_transformers(export: Exports, name: str) -> None:
    """Two pictures, one, and none, side by side in one run: the logits of each prompt's last token."""
    exported = export(name)
    prompts = [prompt_of(exported, lengths, n, n) for lengths, n in (((5, 9), 2), ((1, 1), 1), ((30, 0), 0))]
    model = LlavaForConditionalGeneration.from_pretrained(exported.directory).eval()
    features = [exported.encode(stacked(prompt)) for prompt in prompts if prompt.pixel_values is not None]
    logits = exported.decode(exported.prompt_feeds(prompts, features))["logits"]
    for prompt, ours in zip(prompts, logits, strict=True):
        pixels = None if prompt.pixel_values is None else torch.from_numpy(stacked(prompt))
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([prompt.token_ids]), pixel_values=pixels).logits[0, -1]
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "method",
    [Avl(prune_layer=PRUNE_AFTER, prefill_keep=60), FastV(layer=PRUNE_AFTER + 1, drop=30), H2O()],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("name", ["llama-gqa-full", "qwen2-tied"])
def test_prompt_gives_the_policy_what_it_asks_for(export: Exports, method: Method, name: str) -> None:
    """Scores, survivors, rows and logits of a prompt, as the torch backend has them under that method."""
    exported = export(name)
    prompt = prompt_of(exported, (6, 11), 2, 3)
    _, _, store, (cache,), (logits,) = start(exported, method, [prompt], 0)
    is_image = np.array(prompt.token_ids) == exported.spec.image_token_id
    queries = {
        "avl": np.flatnonzero(~is_image & (np.arange(len(prompt)) >= prompt.spans[0].start)),
        "fastv": np.array([-1]),
        "h2o": np.arange(len(prompt)),
    }[method.name]
    assert prompt.pixel_values is not None
    feeds = exported.prompt_feeds([prompt], [exported.encode(stacked(prompt))], queries)
    survivors = getattr(cache, "survivors", np.arange(len(prompt)))
    feeds |= {"pinned": (~is_image).astype(np.int32), "survivors": np.array([len(survivors)])}
    out = exported.decode(feeds)
    assert out["kept"].tolist() == survivors.tolist()
    assert (len(survivors) < len(prompt)) == (method.name != "h2o")
    np.testing.assert_allclose(out["logits"][0], logits, rtol=0, atol=TOLERANCE)
    for layer, (last, total, chosen, ids) in cache.seen.items():
        np.testing.assert_allclose(out[f"key.{layer}"][chosen], store.keys[ids], rtol=0, atol=2e-5)
        np.testing.assert_allclose(out[f"value.{layer}"][chosen], store.values[ids], rtol=0, atol=2e-5)
        if method.name == "fastv":
            assert not out[f"token_scores.{layer}"][1].any()
        if cache.prompt_queries(layer) is not None:
            np.testing.assert_allclose(out[f"token_scores.{layer}"][0], last, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(out[f"token_scores.{layer}"][1], total, rtol=1e-3, atol=1e-5)


def test_half_precision_is_as_close_to_float64_as_torch(export: Exports) -> None:
    """Two programs in float16 part in the last bits, so errors are compared: ours, and transformers' own."""
    exported = export("llama-gqa-full", dtype=torch.float16)
    prompt = prompt_of(exported, (5, 9), 2, 1)
    assert prompt.pixel_values is not None
    pixels = torch.from_numpy(stacked(prompt))
    features = exported.encode(stacked(prompt))
    logits = exported.decode(exported.prompt_feeds([prompt], [features]))["logits"][0]
    runs = {}
    for dtype in (torch.float64, torch.float16):
        model = LlavaForConditionalGeneration.from_pretrained(exported.directory, dtype=dtype).eval()
        with torch.no_grad():
            run = model(input_ids=torch.tensor([prompt.token_ids]), pixel_values=pixels.to(dtype))
        runs[dtype] = run.logits[0, -1].double().numpy()
    exact = runs[torch.float64]
    theirs = np.sqrt(np.mean((runs[torch.float16] - exact) ** 2))
    assert np.sqrt(np.mean((logits - exact) ** 2)) <= 1.5 * theirs
