"""What tests of packages share."""

from __future__ import annotations

from pathlib import Path

import pytest

from avl_edge.package.engine import publish
from tests.equipment.published import fill


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory with a package in it."""
    publish(tmp_path / "out", "1.0", fill("old"))
    return tmp_path / "out"
