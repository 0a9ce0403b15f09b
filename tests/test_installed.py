"""What an installation has: a wheel from a source distribution, an editable install, a checkout that is not installed.

Compilers are switched off, since the native kernel is optional and takes minutes; the long test compiles it.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("avl_edge", "engines", "plugins", "profiles", "tests", "tools")
BUILT = shutil.ignore_patterns("*.so", "__pycache__", "measured")
"""What a checkout may have and git does not."""
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-build-isolation", "--no-deps", "--no-index")

# Without `site`, so that the running environment's own avl-edge is no part of it; its packages are, behind the tree.
START = """
import site, sys
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
"""
FIND = """
import json, pathlib
import avl_edge
from avl_edge.attention.cuda import source
from avl_edge.machine import profile
from avl_edge.package import engine
from avl_edge.resources import resource_files

print(json.dumps({
    "package": str(pathlib.Path(avl_edge.__file__).parent),
    "profiles": list(profile.shipped()),
    "profile files": list(map(str, resource_files("profiles/*.yaml"))),
    "recipes": {name: str(path) for name, path in engine.shipped_recipes().items()},
    "precision": engine.find_recipe("llava-1.5").precision,
    "sources": [str(source.path(each)) for name in sys.stdin.read().split() for each in source.read(name)],
    "model": avl_edge.Runtime.open("demo").name,
}))
"""
LOSE = """
from avl_edge.cli import run_app
from avl_edge.attention.cuda import source

print(run_app(["plan", "--model", "llava-1.5-7b", "--device", "agx-orin-64"]))
print(run_app(["build", "demo", "--out", "package", "--recipe", "llava-1.5"]))
try:
    source.read()
except Exception as error:
    print(error.exit_code, error, file=sys.stderr)
"""


def _run(*command: str | Path, cwd: Path, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        input=given,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


def _pip(*arguments: str | Path, cwd: Path) -> None:
    _run(*PIP, *arguments, cwd=cwd, CC="false", CXX="false")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which nothing was built: an older egg-info would tell the builds what to take."""
    folder = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=BUILT)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    program = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    _run("-c", program, folder, cwd=source)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", *OFFLINE, "--wheel-dir", folder, sdist, cwd=folder)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", *OFFLINE, "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("editable")
    _pip("install", *OFFLINE, "--target", folder, "--editable", source, cwd=folder)
    return folder


def _beside(root: Path) -> set[Path]:
    """The files of a repository that an installed package needs, below its root."""
    folders = (root / "engines", root / "profiles", root / "plugins" / "cuda")
    return {path.relative_to(root) for folder in folders for path in folder.glob("*") if path.suffix != ".py"}


def test_a_source_distribution_has_all_that_a_build_reads_and_no_tests(source: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {Path(*Path(each.name).parts[1:]) for each in archive.getmembers() if each.isfile()}
    kernel = {path.relative_to(source) for path in (source / "plugins" / "cpu").iterdir()}
    assert _beside(source) | kernel <= files
    assert {path.parts[0] for path in files if len(path.parts) > 1} == {
        *("avl_edge", "avl_edge.egg-info", "engines", "plugins", "profiles")
    }


def test_a_wheel_has_the_package_and_the_files_beside_it(source: Path, wheel: Path) -> None:
    own = {path for path in (source / "avl_edge").rglob("*") if path.is_file() and path.name != "README.md"}
    expected = {str(path.relative_to(source)): path for path in own}
    expected |= {f"avl_edge/{path}": source / path for path in _beside(source)}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert files == expected.keys()
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


@pytest.mark.parametrize("kind", ["wheel", "editable", "checkout"])
def test_a_program_in_another_folder_finds_them(
    kind: str, source: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue({"wheel": "installed", "editable": "editable", "checkout": "source"}[kind])
    package = (folder if kind == "wheel" else source) / "avl_edge"
    root = package if kind == "wheel" else source
    names = [path.name for path in (ROOT / "plugins" / "cuda").glob("*.cu")]
    done = _run("-ISc", START + FIND, folder, *site.getsitepackages(), cwd=tmp_path, given=" ".join(names))
    found = json.loads(done.stdout)
    assert found["package"] == str(package)
    assert found["profile files"] == sorted(str(root / "profiles" / path.name) for path in ROOT.glob("profiles/*.yaml"))
    assert set(found["profiles"]) == {Path(path).stem for path in found["profile files"]}
    assert found["recipes"] == {"llava-1.5": str(root / "engines" / "llava-1.5.yaml")}
    assert found["precision"] == "float16"
    sources = {path.name for path in (ROOT / "plugins" / "cuda").glob("*.cu*")}
    assert set(found["sources"]) == {str(root / "plugins" / "cuda" / name) for name in sources}
    assert found["model"] == "demo"


def test_an_installation_that_lost_files_says_so(installed: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(installed, lost, ignore=shutil.ignore_patterns("engines", "plugins", "profiles"))
    done = _run("-ISc", START + LOSE, lost, *site.getsitepackages(), cwd=tmp_path)
    cure = f"is missing from the installation in {lost / 'avl_edge'}: install avl-edge again"
    assert done.stdout.split() == ["1", "1"]
    assert done.stderr.splitlines() == [
        f"avl-edge: profiles/*.yaml {cure}",
        f"avl-edge: engines/*.yaml {cure}",
        f"1 plugins/cuda/core_attention.cu {cure}",
    ]


@pytest.mark.long
def test_an_environment_of_its_own_answers_with_the_native_kernel(sdist: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python, program = (tmp_path / "venv" / "bin" / name for name in ("python", "avl-edge"))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "venv" / "lib" / version / "site-packages"
    (packages / "running.pth").write_text("\n".join(site.getsitepackages()))
    _run(*PIP, "--python", python, "install", *OFFLINE, "--ignore-installed", sdist, cwd=tmp_path)
    assert list((packages / "avl_edge" / "attention").glob("_core_attention.*"))
    assert list((packages / "avl_edge" / "kv" / "books").glob("_books.*"))
    command = [program, "run", "--image", ROOT / "examples" / "cockpit.png", "--prompt", "What is the speed?"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "18 km/h\n", "")
