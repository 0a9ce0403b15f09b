"""A service of a small random checkpoint, one for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Checkpoints
from tests.equipment.served import Served, serving


@pytest.fixture(scope="module")
def served(checkpoint: Checkpoints) -> Iterator[Served]:
    with serving(checkpoint("mistral-gqa")) as served:
        yield served
