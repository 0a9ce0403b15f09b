"""A family is one folder, and a line where families are listed: this one is, and nothing of the package knows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from avl_edge import BadModel, Options, Runtime, TooLarge
from avl_edge.cli import run_app
from avl_edge.model.families import FAMILIES, read_spec
from avl_edge.model.known import shape_of_checkpoint
from tests.equipment.checkpoints import CHAT_TEMPLATE, IMAGE, VOCAB_SIZE, make_tokenizer, random_image

CELL, STEPS, PROMPT = 14, 24, "What is shown in this picture?"
IMAGES = [random_image(1, (90, 62)), random_image(2, (20, 100)), random_image(3, 9)]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(FAMILIES, "toy", "tests.equipment.toy_family")
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    decoder = LlamaForCausalLM(text).eval()
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    tensors = {"toy.colours.weight": torch.randn(64, 3)}
    for name, tensor in decoder.state_dict().items():
        tensors[name if name.startswith("lm_head") else f"language_model.{name}"] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "toy", "text_config": text.to_dict(), "cell": CELL}
    config["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    decoder.save_pretrained(tmp_path / "decoder")
    return tmp_path


def _features(directory: Path, images: Sequence[Image.Image]) -> torch.Tensor:
    """By numpy: the mean colour of each cell, as Pillow rounds it."""
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="np") as file:
        matrix = file.get_tensor("toy.colours.weight")
    found = []
    for image in images:
        size = max(1, image.width // CELL), max(1, image.height // CELL)
        colours = np.asarray(image.resize(size, Image.Resampling.BOX), dtype=np.float64).reshape(-1, 3) / 255
        found.append(colours @ matrix.T.astype(np.float64))
    return torch.from_numpy(np.concatenate(found)).float()


@torch.no_grad()
def _reference(directory: Path, token_ids: Sequence[int], images: Sequence[Image.Image]) -> list[int]:
    """transformers' decoder over the same embeddings, with a hook behind its first layer."""
    decoder = LlamaForCausalLM.from_pretrained(directory / "decoder").eval()
    image_id = read_spec(directory).image_token_id
    features, ids = _features(directory, images), list(token_ids)

    def add(_: Any, __: Any, hidden: torch.Tensor) -> torch.Tensor:
        hidden[0, torch.tensor(ids) == image_id] += features / 2
        return hidden

    decoder.model.layers[0].register_forward_hook(add)
    for _ in range(STEPS):
        embedded = decoder.model.embed_tokens(torch.tensor(ids))
        embedded[torch.tensor(ids) == image_id] = features
        ids.append(int(decoder(inputs_embeds=embedded[None]).logits[0, -1].argmax()))
    return ids[len(token_ids) :]


@pytest.mark.parametrize("count", [1, 3])
def test_it_answers_as_its_definition_says(toy: Path, count: int) -> None:
    runtime = Runtime.load(toy, threaded=False)
    images = IMAGES[:count]
    generation = runtime.generate(images, PROMPT, Options(method="full", max_new_tokens=STEPS))
    expected = _reference(toy, generation.prompt.token_ids, images)
    assert list(generation.result().token_ids) == expected
    assert [span.length for span in generation.prompt.spans] == [24, 7, 1][:count]
    with runtime.open_images(images) as session:
        options = Options(method="full", max_new_tokens=STEPS)
        assert list(session.ask(PROMPT, options).result().token_ids) == expected


@pytest.mark.parametrize("method", ["avl", "fastv", "h2o", "distinct", "coarse"])
def test_methods_take_all_of_its_tokens(toy: Path, method: str) -> None:
    runtime = Runtime.load(toy, threaded=False)
    result = runtime.generate(IMAGES, PROMPT, Options(method=method, max_new_tokens=STEPS)).result()
    assert len(result.token_ids) == STEPS
    assert result.usage.image_tokens == 32
    assert result.kv.rows_read_fraction < 1


def test_it_is_planned_and_refused_as_others_are(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of_checkpoint(toy, "toy")
    assert shape.picture(90, 62).tokens == 24
    sizes = ["--image-size", "90x62", "--prompt-tokens", "20", "--system-tokens", "3"]
    assert run_app(["plan", "--model", str(toy), "--device", "agx-orin-64", *sizes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"]["images"] == 24
    IMAGES[0].save(toy / "picture.png")
    assert run_app(["run", "--model", str(toy), "--image", str(toy / "picture.png"), "--prompt", "Why?"]) == 0
    with pytest.raises(TooLarge, match="give fewer or smaller ones"):
        Runtime.open(toy).prepare([random_image(1, 400)], PROMPT)


def test_without_its_line_it_is_unknown(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "toy")
    with pytest.raises(BadModel, match=r"model_type 'toy', which is not supported: it must be one of llava"):
        Runtime.open(toy)
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_toy.Toy"}}))
    with pytest.raises(BadModel, match=r"needs Python code of its own.*never run"):
        Runtime.open(toy)
