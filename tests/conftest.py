"""Shared equipment: random checkpoints on disk, runtimes over them, and a record of logits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from avl_edge import Runtime
from tests import ROOT
from tests.equipment.checkpoints import SPECS, CheckpointSpec, make_checkpoint

Checkpoints = Callable[..., Path]

# How long an example takes says how busy the machine is. A gate asks every change the same questions, a person's run
# new ones.
settings.register_profile("tests", deadline=None)
settings.register_profile("gate", deadline=None, derandomize=True)
settings.load_profile("gate" if os.environ.get("CI") else "tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A gate runs the short forms of long tests."""
    if os.environ.get("CI"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="the gate runs the short form of this test"))


# The models are tiny: a second thread costs more than it computes, many times more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes that a run of the tests is shared by."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """``checkpoint(name, dtype=..., max_shard_size=...)``: the directory of a random checkpoint, made once."""
    made: dict[tuple[CheckpointSpec, str | None], Path] = {}

    def make(name: str, dtype: torch.dtype | None = None, max_shard_size: str | None = None) -> Path:
        spec = replace(SPECS[name], dtype=dtype) if dtype else SPECS[name]
        key = (spec.text, spec.seed, spec.dtype, max_shard_size)
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(name), spec, max_shard_size=max_shard_size)
        return made[key]

    return make


def hear_interrupts() -> None:
    """For ``preexec_fn``: a shell that runs the tests in its background lets all of them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_python(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Recorder:
    """A backend that remembers the logits of the one sequence that runs."""

    def __init__(self, runtime: Runtime) -> None:
        assert runtime._backend is not None
        self._inner = runtime._backend
        self.name = self._inner.name
        self.encode_images = self._inner.encode_images
        self.logits: list[Tensor] = []
        runtime._backend = self

    def prefill(self, *arguments: object) -> Tensor:
        logits = self._inner.prefill(*arguments)  # type: ignore[arg-type]
        self.logits.append(logits)
        return logits

    def decode(self, *arguments: object) -> Tensor:
        logits = self._inner.decode(*arguments)  # type: ignore[arg-type]
        self.logits.append(logits[0])
        return logits
