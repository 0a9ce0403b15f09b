"""One training run: stages, optimizers, checkpoints. Deterministic: a step depends on the state and its seeds only."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tools.demo_model.config import ModelConfig
from tools.demo_model.data import TEXT_LENGTH, Batch, Scenes, head_ids, loader
from tools.demo_model.losses import Loss, reading_loss, vision_loss
from tools.demo_model.model import DemoModel
from tools.demo_model.optim import BatchedMuon
from tools.demo_model.scenes import TRAINING_SEEDS, VALIDATION_SEEDS
from tools.demo_model.schedule import Stage

ADAMW_ONLY = ("embed_tokens", "position_embedding", "lm_head", "dense_head")


@dataclass(frozen=True)
class Options:
    """How a run trains. ``folder`` holds the tokenizer, the checkpoint and the log."""

    folder: Path
    plan: tuple[Stage, ...]
    seed: int = 0
    device: str = "cpu"
    workers: int = 1
    save_minutes: float = 4.0
    dense_weight: float = 1.0
    text_length: int = TEXT_LENGTH
    batch: int = 0
    compile: bool = False
    validation: int = 32
    config: ModelConfig = field(default_factory=ModelConfig)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"


@dataclass
class Position:
    """Where a run stands: stage, steps and minutes of training in it, and the next unseen scene."""

    stage: int = 0
    steps: int = 0
    minutes: float = 0.0
    scenes: int = 0


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains the parameter: hidden matrices, but no embedding and no output head."""
    return parameter.dim() == 2 and not any(word in name for word in ADAMW_ONLY)


def make_optimizers(model: DemoModel, stage: Stage) -> list[Optimizer]:
    """Muon for matrices and AdamW for the rest, each with a group for the vision tower and one for the others."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(m, v): [] for m in (True, False) for v in (True, False)}
    for name, parameter in model.named_parameters():
        groups[is_matrix(name, parameter), name.startswith("vision_tower")].append(parameter)
    recipe = stage.recipe
    muon = BatchedMuon(_groups(groups[True, True], groups[True, False], recipe.muon, recipe.vision), weight_decay=0.01)
    adamw = AdamW(
        _groups(groups[False, True], groups[False, False], recipe.adamw, recipe.vision),
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [muon, adamw]


def _groups(vision: list[nn.Parameter], others: list[nn.Parameter], rate: float, factor: float) -> list[dict[str, Any]]:
    plain = {"params": others, "lr": rate, "plateau": rate}
    return [{"params": vision, "lr": rate * factor, "plateau": rate * factor}, plain]


class Trainer:
    """A run that can be stopped after any step and continued from its checkpoint."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.model = DemoModel(options.config).to(options.device)
        self.tokenizer = Tokenizer.from_file(str(options.tokenizer))
        self.head = torch.tensor([head_ids(self.tokenizer)], device=options.device)
        self.position = Position()
        self.stopping = False
        self.optimizers = make_optimizers(self.model, self.stage)
        if options.compile:
            self._compile()

    @property
    def stage(self) -> Stage:
        return self.options.plan[self.position.stage]

    @property
    def finished(self) -> bool:
        return self.position.stage >= len(self.options.plan)

    def _compile(self) -> None:
        for layer in (*self.model.vision_tower.layers, *self.model.language_model.layers):
            layer.compile()

    def stop(self) -> None:
        """Ask the run to save and return after the step that it is in."""
        self.stopping = True

    def run(self) -> None:
        """Train until the plan is done, or until ``stop``."""
        while not self.finished:
            self._run_stage()
            if self.stopping:
                self.save()
                return
            self._next_stage()
            self.save()

    def _next_stage(self) -> None:
        before = self.stage.name
        self.position.stage += 1
        self.position.steps, self.position.minutes = 0, 0.0
        if self.finished:
            return
        self.optimizers = make_optimizers(self.model, self.stage)
        if before == "vision" and not self._vision_only:
            self.standardize(fresh=True)

    def standardize(self, fresh: bool) -> None:
        """Let the projector standardize features as those of the next pictures."""
        with torch.no_grad(), self._autocast():
            features = self.model.vision_tower(next(self._batches())["image"])
        self.model.multi_modal_projector.standardize(features, fresh)

    def _run_stage(self) -> None:
        stage, saved, previous = self.stage, time.monotonic(), time.monotonic()
        batches = self._batches()
        while stage.progress(self.position.minutes, self.position.steps) < 1 and not self.stopping:
            loss = self.step(next(batches))
            now = time.monotonic()
            self.position.minutes += (now - previous) / 60
            previous = now
            if self.position.steps % 20 == 0:
                self._log(loss)
            if now - saved > 60 * self.options.save_minutes:
                self.validate()
                self.save()
                saved = previous = time.monotonic()
        if not self.stopping:
            self.validate()

    def _batches(self) -> Iterator[Batch]:
        """Scenes never seen before, in seed order, from where the run stands."""
        options = self.options
        first = TRAINING_SEEDS.start + options.seed * 10**9 + self.position.scenes
        scenes = Scenes(first, 10**8, options.tokenizer, options.text_length)
        for batch in loader(scenes, self._batch_size, options.workers):
            yield {name: torch.as_tensor(value).to(options.device, non_blocking=True) for name, value in batch.items()}

    @property
    def _batch_size(self) -> int:
        return self.options.batch or self.stage.recipe.batch

    @property
    def _vision_only(self) -> bool:
        return self.stage.name in ("vision", "probe")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.options.device).type, torch.bfloat16)

    def _loss(self, batch: Batch) -> Loss:
        with self._autocast():
            if self._vision_only:
                return vision_loss(self.model, batch)
            recipe = self.stage.recipe
            active = self.model.half_layers if recipe.half else self.model.all_layers
            return reading_loss(self.model, batch, self.head, active, self.options.dense_weight, recipe.sparse)

    def step(self, batch: Batch) -> Loss:
        """One step of all optimizers on ``batch``."""
        rate = self.stage.rate(self.stage.progress(self.position.minutes, self.position.steps))
        loss = self._loss(batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["plateau"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.position.steps += 1
        self.position.scenes += int(batch["image"].shape[0])
        return loss

    @torch.no_grad()
    def validate(self) -> None:
        """Log the shares of right predictions on pictures that are never trained on."""
        size = self._batch_size
        scenes = Scenes(
            VALIDATION_SEEDS.start, self.options.validation, self.options.tokenizer, self.options.text_length
        )
        losses = [
            self._loss({k: torch.as_tensor(v).to(self.options.device) for k, v in batch.items()})
            for batch in loader(scenes, size, 0)
        ]
        if losses:
            self._record({"event": "validation", **mean_figures(losses)})

    def _log(self, loss: Loss) -> None:
        self._record({"event": "step", **mean_figures([loss])})

    def _record(self, figures: dict[str, Any]) -> None:
        line = json.dumps({**asdict(self.position), "stage": self.stage.name, **figures})
        print(line, flush=True)
        with (self.options.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Write the checkpoint in one step: a reader sees the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "position": asdict(self.position),
            "config": asdict(self.options.config),
        }
        staging = self.options.checkpoint.with_suffix(".tmp")
        torch.save(state, staging)
        staging.replace(self.options.checkpoint)

    def resume(self) -> None:
        """Continue from the checkpoint of the run's folder."""
        state = torch.load(self.options.checkpoint, map_location=self.options.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.position = Position(**state["position"])
        if self.finished:
            return
        self.optimizers = make_optimizers(self.model, self.stage)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # The rates are the stage's: the checkpoint of a finished run has those of the stage before.
            plateaus = [group["plateau"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, plateau in zip(optimizer.param_groups, plateaus, strict=True):
                group["plateau"] = plateau

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin with ``weights`` (names of ``DemoModel``, as exported: without the dense head) and fresh optimizers."""
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        own = ("dense_head.", "multi_modal_projector.mean", "multi_modal_projector.std")
        assert all(name.startswith(own) for name in missing), missing
        self.standardize(fresh=False)


def mean_figures(losses: list[Loss]) -> dict[str, float]:
    """Mean loss and shares of right characters, tokens and answers."""
    names = ("total", "characters", "tokens", "answers")
    present = [name for name in names if getattr(losses[0], name) is not None]
    return {
        name: round(float(sum(getattr(loss, name).detach() for loss in losses) / len(losses)), 4) for name in present
    }
