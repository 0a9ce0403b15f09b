"""The house stands on its ground floor: imports go downward in ARCHITECTURE.md's table, and never in a circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "avl_edge"
OPTIONAL = {"onnx", "tensorrt", "cuda"}


def _rooms() -> list[tuple[str, bool]]:
    """(room, imports torch?) in the order of the table."""
    table = (ROOT / "ARCHITECTURE.md").read_text().split("## The rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|.*\| (yes|no) \|$", table, re.MULTILINE)
    return [(room, torch == "yes") for names, torch in rows for room in re.findall(r"`(\w+)`", names)]


ROOMS = _rooms()
ORDER = {room: index for index, (room, _) in enumerate(ROOMS)}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute module, at the top of the file?) of every import."""
    tree = ast.parse(path.read_text())
    package = ("avl_edge", *path.relative_to(PACKAGE).parent.parts)
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "avl_edge":
                found += [(f"avl_edge.{alias.name}", id(node) in top) for alias in node.names]
            else:
                found.append((module, id(node) in top))
    return found


def test_every_room_is_in_the_table_and_every_row_is_a_room() -> None:
    assert {_room(path) for path in _files()} == set(ORDER)


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    room = _room(path)
    for module, at_top in _imports(path):
        assert at_top or module.split(".")[0] in OPTIONAL, f"deferred import of {module}"
        if module.startswith("avl_edge."):
            other = module.split(".")[1]
            assert ORDER[other] <= ORDER[room], f"{room} imports {other}, which stands above it"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_tools_and_no_torch_where_the_table_says_no(path: Path) -> None:
    modules = {module.split(".")[0] for module, _ in _imports(path)}
    assert "tools" not in modules
    assert "transformers" not in modules
    if not dict(ROOMS)[_room(path)]:
        assert "torch" not in modules


def test_ground_floor_imports_without_torch() -> None:
    """In a process where torch cannot be imported. `pool` is mixed: its `rows` are torch-free."""
    rooms = [f"avl_edge.{room}" for room, torch in ROOMS if not torch] + ["avl_edge.pool.rows"]
    program = f"""
import importlib, sys, types
sys.modules["torch"] = None
package = types.ModuleType("avl_edge"); package.__path__ = [{str(PACKAGE)!r}]; sys.modules["avl_edge"] = package
pool = types.ModuleType("avl_edge.pool"); pool.__path__ = [{str(PACKAGE / "pool")!r}]
sys.modules["avl_edge.pool"] = pool
for room in {rooms!r}: importlib.import_module(room)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_runtime_works_without_optional_packages() -> None:
    """`onnx`, `tensorrt` and `cuda` are optional: the package imports where they cannot be."""
    program = "import sys; sys.modules.update(dict.fromkeys(('onnx', 'tensorrt', 'cuda'))); import avl_edge.cli"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
