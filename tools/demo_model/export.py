"""Write a checkpoint as a directory that transformers loads unchanged: ``python -m tools.demo_model.export``."""

from __future__ import annotations

import copy
import importlib
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tools.demo_model.canvas import PATCH, SIZE
from tools.demo_model.config import ModelConfig
from tools.demo_model.layout import load_weights, own_name
from tools.demo_model.model import DemoModel
from tools.demo_model.tokenizer import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, SPECIAL_TOKENS

# Any: transformers' annotations change from version to version.
hf: Any = importlib.import_module("transformers")

MAX_FILE_BYTES = 16 * 2**20
MAX_POSITIONS = 2048
SHIPPED = Path("avl_edge/demo")


class TooLarge(RuntimeError):
    """A file of the exported directory is larger than what may be shipped."""


def llava_config(c: ModelConfig) -> Any:
    """The configuration of transformers' model of the same sizes."""
    ids = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    special = {"bos_token_id": ids[BOS], "eos_token_id": ids[EOS], "pad_token_id": ids[PAD]}
    vision = hf.CLIPVisionConfig(
        hidden_size=c.vision_width,
        intermediate_size=c.vision_ff,
        num_hidden_layers=c.vision_layers,
        num_attention_heads=c.vision_heads,
        image_size=SIZE,
        patch_size=PATCH,
        layer_norm_eps=c.norm_eps,
        projection_dim=c.vision_width,
    )
    text = hf.LlamaConfig(
        vocab_size=c.vocab,
        hidden_size=c.width,
        intermediate_size=c.ff,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=c.norm_eps,
        **special,
    )
    return hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        image_seq_length=c.image_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        **special,
    )


def to_transformers(model: DemoModel) -> Any:
    """The same model as transformers' class, float32."""
    target = hf.LlavaForConditionalGeneration(llava_config(model.config)).eval()
    model = copy.deepcopy(model)
    model.multi_modal_projector.fold()
    own = model.state_dict()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "post_layernorm" not in name:
                parameter.copy_(own[own_name(name)].reshape(parameter.shape))
    return target


def processor(tokenizer_file: Path) -> Any:
    """Tokenizer, chat template and a preprocessing that leaves a 336 x 336 picture as it is."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    images = hf.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return hf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def generation_config() -> Any:
    """Greedy decoding up to the end token."""
    ids = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    return hf.GenerationConfig(
        do_sample=False, bos_token_id=ids[BOS], eos_token_id=ids[EOS], pad_token_id=ids[PAD], max_new_tokens=160
    )


def write(model: DemoModel, tokenizer_file: Path, directory: Path) -> None:
    """Write ``model`` in bfloat16 to ``directory``; each file appears there in one step, complete."""
    target = to_transformers(model).to(torch.bfloat16)
    target.generation_config = generation_config()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        staging = Path(name)
        target.save_pretrained(staging)
        processor(tokenizer_file).save_pretrained(staging)
        files = sorted(path for path in staging.iterdir() if path.is_file())
        for file in files:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise TooLarge(f"{file.name} has {file.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
        for file in files:
            file.chmod(0o644)
            file.replace(directory / file.name)


def read_checkpoint(path: Path) -> DemoModel:
    """The model of a training checkpoint, or of an exported directory."""
    if path.is_dir():
        model = DemoModel(ModelConfig())
        model.load_state_dict(load_weights(path), strict=False)
        return model.eval()
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model = DemoModel(ModelConfig(**state["config"]))
    model.load_state_dict(state["model"])
    return model.eval()


def main(
    checkpoint: Annotated[Path, typer.Option(help="A training checkpoint.")] = Path("runs/demo/checkpoint.pt"),
    tokenizer: Annotated[Path, typer.Option(help="The run's tokenizer.")] = Path("runs/demo/tokenizer.json"),
    out: Annotated[Path, typer.Option(help="The directory to write.")] = SHIPPED,
) -> None:
    """Export a checkpoint."""
    write(read_checkpoint(checkpoint), tokenizer, out)
    for file in sorted(out.iterdir()):
        typer.echo(f"{file.stat().st_size:>10} {file}")


if __name__ == "__main__":
    typer.run(main)
