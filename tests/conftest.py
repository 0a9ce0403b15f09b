"""Shared equipment: random checkpoints on disk, and what a gate leaves out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.equipment.checkpoints import SPECS, CheckpointSpec, make_checkpoint
from tests.equipment.family_checkpoints import SPECS as FAMILY_SPECS
from tests.equipment.family_checkpoints import make_family

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
def family(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """``family(name, dtype=...)``: the directory of a random checkpoint of another family, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = make_family(tmp_path_factory.mktemp(name), FAMILY_SPECS[name], dtype)
        return made[name, dtype]

    return make


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
