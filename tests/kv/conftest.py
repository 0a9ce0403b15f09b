"""Checkpoints for the oracle, loaded once for all of its tests."""

from __future__ import annotations

import pytest
from transformers import LlavaProcessor

from tests.equipment.checkpoints import SPECS, make_checkpoint
from tests.equipment.oracle import load_model
from tests.equipment.oracle_cases import Case, Cases


@pytest.fixture(scope="package")
def case(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """``case(name)``: the random checkpoint of that name, made and read once."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            directory = make_checkpoint(tmp_path_factory.mktemp(name), SPECS[name])
            made[name] = Case(load_model(directory), LlavaProcessor.from_pretrained(directory), directory)
        return made[name]

    return get
