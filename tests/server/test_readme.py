"""The lines of the README that ask the service, as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from avl_edge.server.settings import Settings
from tests import ROOT
from tests.equipment.served import serving

PAGES = ("README.md", "docs/service.md")


@pytest.mark.slow
def test_the_lines_work() -> None:
    with serving("demo", Settings()) as served:
        for page in PAGES:
            (lines,) = re.findall(r"^```py\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
            program = lines.replace(":8000/", f":{served.port}/")
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
