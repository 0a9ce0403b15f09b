"""Imports go downward: between the wings of ARCHITECTURE.md's table, between the modules of a wing's README, and among
the files of a module never in a circle. Tests and tools reach nothing that is private to another object."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from avl_edge.cli.commands import COMMANDS
from tests import ROOT

PACKAGE = ROOT / "avl_edge"
OPTIONAL = {"onnx", "tensorrt", "cuda"}
PRIVATE = re.compile(r"(?:.*\.)?(_(?!_)\w+)")
"""The last part of a dotted name, where it is private."""
ALLOWED_PRIVATE = {
    ("tests/equipment/oracle.py", "_attn_implementation"),
    ("tests/kv/test_oracle.py", "_forward_pre_hooks"),
    ("tests/model/test_shapes.py", "_get_number_of_features"),
}
"""Of transformers and torch, where there is no public way."""
ROW = re.compile(r"^\| `(\w+)` \|.*?(?:\| (yes|no) )?\|$", re.MULTILINE)


def _table(path: Path, heading: str) -> dict[str, bool | None]:
    """The names in the table under ``heading``, in order, and whether they may import torch (None: it does not say)."""
    section = path.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {name: torch == "yes" if torch else None for name, torch in ROW.findall(section)}


WINGS = list(_table(ROOT / "ARCHITECTURE.md", "The wings"))
MODULES = {
    wing: _table(PACKAGE / wing / "README.md", "Modules, bottom to top")
    for wing in WINGS
    if (PACKAGE / wing / "README.md").is_file()
}
TORCH_FREE = [
    *(wing for wing in WINGS if (PACKAGE / f"{wing}.py").is_file()),
    *(f"{wing}.{module}" for wing, modules in MODULES.items() for module, torch in modules.items() if not torch),
]


def _files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in WINGS]


def _name(path: Path) -> tuple[str, ...]:
    """Of a file, below the package: ("kv", "pool", "rows"); an ``__init__`` is its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(path: Path) -> Iterator[tuple[tuple[str, ...], bool]]:
    """(parts of the absolute name, at the top of the file?) of every import; of ``from a import b``, a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("avl_edge", *path.relative_to(PACKAGE).parent.parts)
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((tuple(alias.name.split(".")), id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from (((*module, alias.name), id(node) in top) for alias in node.names)


def _own_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The package's modules that a file imports, below the package."""
    modules = {_name(each) for each in _files()}
    for name, _ in _imports(path):
        if name[0] == "avl_edge":
            yield next(name[1:end] for end in range(len(name), 0, -1) if name[1:end] in modules or end == 1)


def _lazy_commands() -> set[tuple[str, ...]]:
    """The modules that the command line imports when their command is called."""
    return {("cli", lazy.target.partition(":")[0]) for lazy in COMMANDS.values()}


FILES = pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))


def test_every_file_is_in_a_wing_and_every_row_is_there() -> None:
    assert {_name(path)[0] for path in _files()} == set(WINGS)
    assert {path.stem for path in PACKAGE.glob("*.py")} <= {"__init__", "__main__", *WINGS}
    assert set(MODULES) == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    for wing, modules in MODULES.items():
        assert {_name(path)[1] for path in _files() if _name(path)[0] == wing and len(_name(path)) > 1} == set(modules)


@FILES
def test_imports_go_downward(path: Path) -> None:
    wing, *rest = _name(path)
    for other in _own_imports(path):
        assert other, "what `avl_edge` offers by name is for its users"
        assert WINGS.index(other[0]) <= WINGS.index(wing), f"{wing} imports {other[0]}, which stands above it"
        if other[0] == wing and wing in MODULES:
            # The wing's own file stands above all of its modules: what a module imported of it would be a circle.
            order = [*MODULES[wing], wing]
            own, its = (rest or [wing])[0], (*other, wing)[1]
            assert order.index(its) <= order.index(own), f"{own} imports {its}, which is above it"


def test_no_module_is_over_350_lines_and_no_function_over_60() -> None:
    """Of a command, the list of its options is not counted: each is a line."""
    folders = [ROOT / name for name in ("avl_edge", "plugins", "tests", "tools")]
    for path in (each for folder in folders for each in folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 350, f"{path} is too long: is there a second module in it?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                begin = node.body[0].lineno if path.parent.name == "cli" else node.lineno
                lines = (node.end_lineno or node.lineno) - begin + 1
                assert lines <= 60, f"{node.name} in {path} has {lines} lines"


@FILES
def test_imports_stand_at_the_top(path: Path) -> None:
    for name, at_top in _imports(path):
        assert at_top or name[0] in OPTIONAL, f"deferred import of {'.'.join(name)}"


def test_only_six_files_import_by_a_name_that_they_compute() -> None:
    """The package's face, the commands, the families of models and their parts, which are imported when they are asked
    for, packages of the extras, and the console script, which is ready for Ctrl-C before it imports."""
    files = {path for path in PACKAGE.rglob("*.py") if re.search(r"\b(import_module|__import__)\(", path.read_text())}
    imports = (
        "__init__.py",
        "__main__.py",
        "cli/commands.py",
        "optional.py",
        "model/prompt/codec.py",
        "model/families/__init__.py",
    )
    assert files == {PACKAGE / name for name in imports}
    assert _lazy_commands() <= {_name(path) for path in _files()}, "commands lie in the command line's wing"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {_name(path): {other for other in _own_imports(path) if other != _name(path)} for path in _files()}
    graph["cli", "commands"] |= _lazy_commands()
    TopologicalSorter(graph).prepare()


def _is_network_of_a_family(path: Path) -> bool:
    """Which is imported when weights are loaded."""
    return _name(path)[:2] == ("model", "families") and path.stem == "network"


@FILES
def test_no_tools_and_no_torch_where_the_table_says_no(path: Path) -> None:
    modules = {name[0] for name, _ in _imports(path)}
    assert "tools" not in modules
    assert "transformers" not in modules
    if ".".join(_name(path)[:2]) in TORCH_FREE and not _is_network_of_a_family(path):
        assert "torch" not in modules


def test_modules_without_torch_import_without_it() -> None:
    """In a process where torch cannot be imported."""
    program = f"""
import importlib, sys, types
sys.modules["torch"] = None
package = types.ModuleType("avl_edge"); package.__path__ = [{str(PACKAGE)!r}]; sys.modules["avl_edge"] = package
for module in {TORCH_FREE!r}: importlib.import_module("avl_edge." + module)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_runtime_works_without_optional_packages() -> None:
    """`onnx`, `tensorrt` and `cuda` are optional: the package imports where they cannot be."""
    program = "import sys; sys.modules.update(dict.fromkeys(('onnx', 'tensorrt', 'cuda'))); import avl_edge.cli"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def _private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of others: ``x._y`` but of self, cls and super(), imports of ``_y``, and what is set or read by a
    string, as in ``monkeypatch.setattr(x, "_y", ...)`` and ``monkeypatch.setattr("a.module._y", ...)``."""
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))):
                continue
            case ast.Attribute(attr=name):
                names = [name]
            case ast.ImportFrom(names=imported):
                names = [each.name for each in imported]
            case ast.Call(func=ast.Attribute(attr=function) | ast.Name(id=function), args=arguments):
                if function in ("setattr", "delattr", "getattr"):
                    constants = [each.value for each in arguments[:2] if isinstance(each, ast.Constant)]
                    names = [each for each in constants if isinstance(each, str)]
        yield from (found[1] for name in names if (found := PRIVATE.fullmatch(name)))


@pytest.mark.parametrize("folder", ["tests", "tools"])
def test_nothing_private_is_reached(folder: str) -> None:
    """What a runtime consists of is in its ``debug`` view; what else a test or tool needs has a public name."""
    reached = {
        (str(path.relative_to(ROOT)), name)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in _private_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert reached == {each for each in ALLOWED_PRIVATE if each[0].startswith(f"{folder}/")}
