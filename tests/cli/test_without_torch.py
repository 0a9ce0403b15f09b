"""What only plans, probes or prints starts at once: it imports neither torch nor anything else that is slow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import avl_edge
from tests import ROOT
from tests.equipment.machines import TREES
from tests.equipment.processes import run_python

# Of a command line: what its process must not import. numpy is in the methods' arithmetic, yaml in profiles; PIL is in
# what families know of pictures, by which plans count tokens.
COMPUTES = {"torch", "PIL", "jinja2", "rich", "safetensors", "tokenizers"}
SLOW = COMPUTES | {"numpy", "yaml"}
COUNTS = COMPUTES - {"PIL"}
LINES = {
    "--help": (SLOW, "Usage: avl-edge [OPTIONS] COMMAND [ARGS]..."),
    "--version": (SLOW, "avl-edge 0."),
    "models": (COUNTS, "llava-1.5-7b"),
    "models --help": (COUNTS, "Usage: avl-edge models"),
    "methods": (COMPUTES, "avl: image rows in tiers"),
    "methods --help": (COMPUTES, "Usage: avl-edge methods"),
    f"doctor --root {TREES / 'pc-no-gpu'}": (SLOW, "python"),
    "doctor --help": (SLOW, "Usage: avl-edge doctor"),
    "plan --model llava-1.5-7b --device agx-orin-64": (COUNTS, "peak memory"),
    "plan --model demo --device agx-orin-64": (COUNTS, "peak memory"),
    "plan --help": (COUNTS, "Usage: avl-edge plan"),
}
PROGRAM = """
import sys
forbidden = set(sys.argv.pop(1).split(","))
sys.modules["torch"] = None
from avl_edge.cli import run_app
code = run_app(sys.argv[1:])
print("imported:", *sorted(name for name in forbidden if sys.modules.get(name)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("line", LINES)
def test_no_torch_and_nothing_slow(line: str) -> None:
    forbidden, expected = LINES[line]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(sorted(forbidden)), *line.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "imported:\n")
    assert expected in done.stdout


def _cpu_seconds(*arguments: str) -> float:
    """User and system time of a process of its own: the least of three, as other programs can only add to it."""
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=120)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(times)


def test_help_starts_at_once() -> None:
    """torch alone takes more than a second of it."""
    assert _cpu_seconds("-m", "avl_edge", "--help") <= _cpu_seconds("-c", "import typer") + 0.4


def test_the_package_imports_what_computes_when_it_is_asked_for() -> None:
    printed = run_python(
        """
        import sys
        import avl_edge
        print("torch" in sys.modules, "numpy" in sys.modules)
        from avl_edge import Runtime
        print("torch" in sys.modules, Runtime.__module__, Runtime is avl_edge.Runtime)
        """
    )
    assert printed == "False False\nTrue avl_edge.serving.runtime True\n"


def test_the_packages_names_are_all_there() -> None:
    assert set(avl_edge.__all__) <= set(dir(avl_edge))
    for name in avl_edge.__all__:
        assert getattr(avl_edge, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'avl_edge' has no attribute 'Runtim'"):
        avl_edge.Runtim  # type: ignore[attr-defined]  # noqa: B018
