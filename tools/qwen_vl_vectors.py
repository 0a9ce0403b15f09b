"""Numbers of Qwen-VL's public code on a small random configuration, which tests hold the family to.

    python -m tools.qwen_vl_vectors CODE REVISION tests/equipment/qwen_vl.npz

``CODE``: a directory with the model's own visual.py, modeling_qwen.py and what these import, of that ``REVISION`` (of
Qwen-VL-Chat-Int4); it is run here and never copied, and needs einops. Weights are drawn by their names, so that a test
can draw them again.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from tests.equipment.qwen_vl_small import CONFIG, PROMPTS, draw, picture_values, prompt_ids

STEPS = 12


def _stub(name: str, **content: Any) -> None:
    """A module that the code imports for what is not run here."""
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def _model(code: Path) -> Any:
    """The public code's model with the weights that tests draw."""
    anything = types.SimpleNamespace(BICUBIC=None)
    makers = dict.fromkeys(("Compose", "Resize", "ToTensor", "Normalize"), lambda *_, **__: None)
    _stub("torchvision", transforms=types.SimpleNamespace(**makers))
    _stub("torchvision.transforms", InterpolationMode=anything)
    _stub("requests")
    package = types.ModuleType("qwen_vl_code")
    package.__path__ = [str(code)]
    sys.modules["qwen_vl_code"] = package
    config = importlib.import_module("qwen_vl_code.configuration_qwen").QWenConfig(**CONFIG)
    modeling = importlib.import_module("qwen_vl_code.modeling_qwen")
    # What transformers had when the code was written.
    modeling.QWenModel.get_head_mask = lambda _, mask, layers: [mask] * layers
    model = modeling.QWenModel(config).eval().float()
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    shapes: dict[str, list[int]] = {}
    for prefix, module in (("transformer.", model), ("lm_head.", head)):
        for name, parameter in module.named_parameters():
            shapes[prefix + name] = list(parameter.shape)
            parameter.data.copy_(draw(prefix + name, parameter.shape))
    return model, head, shapes


@torch.no_grad()
def _greedy(model: Any, head: Any, name: str) -> tuple[list[int], Tensor]:
    """Tokens and the logits of each, ``[steps, vocabulary]``."""
    pictures, _ = PROMPTS[name]

    def encode(paths: list[str]) -> Tensor:
        features: Tensor = model.visual(torch.from_numpy(np.stack([picture_values(int(path)) for path in paths])))
        return features

    model.visual.encode = encode
    ids = torch.tensor([prompt_ids(name)])
    opened = (ids[0] == CONFIG["visual"]["image_start_id"]).nonzero().flatten().tolist()
    for at, seed in zip(opened, pictures, strict=True):  # the code reads a picture's path from its places
        ids[0, at + 1] = ord(str(seed))
    past, tokens, logits = None, [], []
    for _ in range(STEPS):
        length = ids.shape[1] + (0 if past is None else past[0][0].shape[1])
        seen = torch.ones(1, length)
        out = model(input_ids=ids, attention_mask=seen, past_key_values=past, use_cache=True, return_dict=True)
        past = out.past_key_values
        logits.append(head(out.last_hidden_state)[0, -1])
        tokens.append(int(logits[-1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(logits)


def main(code: str, revision: str, out: str) -> None:
    model, head, shapes = _model(Path(code))
    made = {
        "command": f"python -m tools.qwen_vl_vectors CODE {revision} {out}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shapes": shapes,
    }
    arrays: dict[str, Any] = {"made": np.array(json.dumps(made))}
    for name in PROMPTS:
        tokens, logits = _greedy(model, head, name)
        arrays |= {f"{name} tokens": np.array(tokens), f"{name} logits": logits.numpy()}
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
