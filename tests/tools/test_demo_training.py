"""Training the demo model: its schedule, and that it can be stopped and goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.equipment.demo_model import TOKENIZER
from tests.equipment.processes import hear_interrupts
from tools.demo_model.config import ModelConfig
from tools.demo_model.schedule import BadPlan, Stage, parse_plan
from tools.demo_model.trainer import Options, Trainer


class TestSchedule:
    def test_plans_are_read(self) -> None:
        assert parse_plan("vision:2.5,read:7s") == (Stage("vision", minutes=2.5), Stage("read", steps=7))

    @pytest.mark.parametrize("text", ["sleep:3", "read", "read:"])
    def test_bad_plans_are_named(self, text: str) -> None:
        with pytest.raises(BadPlan):
            parse_plan(text)

    def test_rates_rise_stay_and_fall_to_nothing(self) -> None:
        stage = Stage("vision", steps=100)
        rates = [stage.rate(i / 100) for i in range(101)]
        assert rates[0] < rates[10] == 1.0 == rates[60]
        assert rates[100] == 0.0


def _options(folder: Path, steps: int) -> Options:
    tiny = ModelConfig(
        vision_width=64, vision_layers=1, vision_heads=1, vision_ff=64, width=64, layers=2, heads=1, ff=64
    )
    plan = (Stage("vision", steps=1), Stage("find", steps=1), Stage("read", steps=steps))
    return Options(folder, plan, batch=1, workers=0, text_length=128, validation=0, config=tiny)


class TestTraining:
    def test_a_resumed_run_gives_the_same_weights(self, tmp_path: Path) -> None:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        for folder in (whole, parts):
            folder.mkdir()
            TOKENIZER.save(str(folder / "tokenizer.json"))
        uninterrupted = Trainer(_options(whole, 2))
        uninterrupted.run()

        stopped = Trainer(_options(parts, 2))
        _step_until(stopped, stage=2, steps=1)
        stopped.save()
        resumed = Trainer(_options(parts, 2))
        resumed.resume()
        assert resumed.position.steps == 1
        resumed.run()
        for name, weight in uninterrupted.model.state_dict().items():
            assert torch.equal(weight, resumed.model.state_dict()[name]), name

    @pytest.mark.slow
    def test_ctrl_c_saves_and_stops(self, tmp_path: Path) -> None:
        """A terminal sends it to the whole process group, the worker that draws included."""
        TOKENIZER.save(str(tmp_path / "tokenizer.json"))
        options = ["--plan", "vision:1000s", "--batch", "1", "--threads", "1", "--folder", str(tmp_path)]
        command = [sys.executable, "-m", "tools.demo_model.train", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_interrupts
        )
        assert process.stdout is not None
        assert '"steps": 20' in process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert 20 <= state["position"]["steps"] < 1000


def _step_until(trainer: Trainer, stage: int, steps: int) -> None:
    """Run ``trainer`` as ``run`` does, and stop in the middle of ``stage``."""

    class Stopped(Exception):
        pass

    step = trainer.step

    def stopping(batch):
        if (trainer.position.stage, trainer.position.steps) == (stage, steps):
            raise Stopped
        return step(batch)

    trainer.step = stopping
    with pytest.raises(Stopped):
        trainer.run()
