"""What a device is installed from: the container's file, the scripts and the systemd units.

Nothing here has run on a Jetson: files are linted, scripts run with a stand-in for Python and pip, the units are read
as systemd reads them.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from avl_edge.cli import app
from tests import ROOT
from tools.deploy import check_packages

DEPLOY = ROOT / "tools" / "deploy"
DOCKERFILE = ROOT / "Dockerfile.l4t"
SCRIPTS = sorted([*DEPLOY.glob("*.sh"), ROOT / "tools" / "arm" / "run.sh"])
UNITS = sorted([*DEPLOY.glob("*.service"), *DEPLOY.glob("*.path")])
INDEX = "https://index.example/jp6/cu126"


def _tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: it comes with pip install -e '.[dev]' on x86_64 Linux")
    return found


def _instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments dropped."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def _copied() -> list[str]:
    return [source for name, rest in _instructions() if name == "COPY" for source in rest.split()[:-1]]


def _ignored(path: str) -> bool:
    """As docker reads .dockerignore: the last line that matches the path or a folder of it decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        names = parents if "**/" not in line else [Path(path).name, *(Path(parent).name for parent in parents)]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            ignored = not line.startswith("!")
    return ignored


class TestDockerfile:
    def test_lint(self) -> None:
        command = [_tool("hadolint"), "--failure-threshold", "warning", str(DOCKERFILE)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

    def test_what_it_copies_is_there_and_reaches_docker(self) -> None:
        assert "avl_edge" in _copied()
        for source in _copied():
            assert (ROOT / source).exists(), source
            assert not _ignored(source), f"{source} is in .dockerignore"
        assert _ignored("tests")
        assert _ignored("runs/demo/model.safetensors")
        assert _ignored("profiles/measured/mine.yaml")
        assert _ignored("avl_edge/attention/_core_attention.cpython-311-x86_64-linux-gnu.so")

    def test_what_the_build_needs_is_copied(self) -> None:
        """setup.py names sources, pyproject.toml a README and a licence: without them the image's build would fail."""
        sources = re.findall(r'"((?:engines|plugins|profiles)/[\w/.*]+)"', (ROOT / "setup.py").read_text())
        text = (ROOT / "pyproject.toml").read_text()
        named = re.findall(r'^readme = "(.*)"', text, re.MULTILINE) + re.findall(
            r'^license-files = \["(.*)"\]', text, re.M
        )
        assert {source.split("/")[0] for source in sources} == {"engines", "plugins", "profiles"}
        assert len(named) == 2
        for path in [*sources, *named, "setup.py", "pyproject.toml", "tools/deploy/install_packages.sh"]:
            assert any(path == copied or path.startswith(f"{copied}/") for copied in _copied()), path

    def test_everything_has_a_version_and_torch_no_default(self) -> None:
        instructions = _instructions()
        arguments = [rest for name, rest in instructions if name == "ARG"]
        base = next(rest for rest in arguments if rest.startswith("BASE="))
        assert re.fullmatch(r"BASE=[\w./-]+/l4t-jetpack:r36\.4\.0", base)
        assert "TORCH_INDEX" in arguments, "a default would be an index that is wrong for some JetPack"
        runs = " ".join(rest for name, rest in instructions if name == "RUN")
        assert "pip install" not in runs, "packages come by install_packages.sh, which holds torch fast"
        assert ":latest" not in DOCKERFILE.read_text()
        packages = re.search(r"--no-install-recommends(.*?)&&", runs)
        assert packages is not None
        assert all("=" in package for package in shlex.split(packages[1]))

    def test_its_command_is_one_of_ours(self) -> None:
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        assert [rest for name, rest in _instructions() if name == "CMD"] == ['["doctor"]']
        assert "doctor" in commands
        assert [rest for name, rest in _instructions() if name == "USER"] == ["avl-edge"]


# In the place of python3: makes an environment whose Python writes down how it is called.
PYTHON3 = """#!/bin/sh
for venv; do :; done
mkdir -p "$venv/bin"
echo "$@" >> "$LOG"
cat > "$venv/bin/python" <<'END'
#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
    *check_packages.py\\ torch) cat "$TORCH"; [ -z "$REPLACED" ] || echo "torch==9.9" > "$TORCH" ;;
    *check_packages.py\\ tensorrt) exit "$NO_TENSORRT" ;;
    *check_packages.py\\ cuda) echo "cuda-python==12.*" ;;
esac
END
chmod +x "$venv/bin/python"
"""


class Device:
    """A folder with stand-ins for what the scripts call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir()
        python = folder / "bin" / "python3"
        python.write_text(PYTHON3)
        python.chmod(0o755)
        (folder / "torch").write_text("torch==2.8.0\n")
        self.environment = {"LOG": str(self.log), "TORCH": str(folder / "torch"), "REPLACED": "", "NO_TENSORRT": "0"}

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        command = [str(DEPLOY / script), *arguments]
        settings = {**self.environment, **environment, "PATH": path}
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)

    def install(self, index: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("install_packages.sh", str(self.folder / "venv"), str(ROOT), index, **environment)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


class TestScripts:
    def test_lint(self) -> None:
        done = subprocess.run([_tool("shellcheck"), *map(str, SCRIPTS)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert len(SCRIPTS) == 3
        assert all(script.stat().st_mode & stat.S_IXUSR for script in SCRIPTS)

    def test_the_emulated_processor_leaves_its_neighbours_alone(self, tmp_path: Path) -> None:
        """Whatever folder it is given to put its own into, and also where setting up ends half way."""
        tree, given = tmp_path / "tree", tmp_path / "given"
        programs = [tree / ".venv" / "bin" / "python"]
        programs += [tmp_path / "bin" / name for name in ("aarch64-linux-gnu-g++", "qemu-aarch64", "apt-get")]
        for program in programs:
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text("#!/bin/sh\nexit 9\n")
            program.chmod(0o755)
        script = tree / "tools" / "arm" / "run.sh"
        script.parent.mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "arm" / "run.sh", script)
        given.mkdir()
        (given / "thesis.tex").write_text("mine")
        settings = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "AVL_EDGE_ARM": str(given)}
        done = subprocess.run([script, "-c", "pass"], env=settings, capture_output=True, text=True, timeout=60)
        assert done.returncode == 9, done.stderr
        assert (given / "thesis.tex").read_text() == "mine"

    @pytest.mark.parametrize(
        ("index", "message"),
        [("", "TORCH_INDEX is empty"), ("https://pypi.org/simple", "has no torch for a Jetson")],
    )
    def test_no_torch_of_the_ordinary_index(self, device: Device, index: str, message: str) -> None:
        done = device.install(index)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert device.calls == [], "nothing was begun"

    def test_torch_comes_alone_and_is_held_fast(self, device: Device) -> None:
        done = device.install(INDEX)
        assert done.returncode == 0, done.stderr
        installs = [call for call in device.calls if " install " in call]
        assert "--system-site-packages" in device.calls[0]
        assert f"--no-deps --index-url {INDEX} torch" in installs[0]
        assert f"--constraint {device.folder}/venv/torch.txt" in installs[1]
        assert f"--constraint {device.folder}/venv/cuda.txt" in installs[1]
        assert installs[1].endswith(f"{ROOT}[cuda,export]")
        assert (device.folder / "venv" / "cuda.txt").read_text() == "cuda-python==12.*\n"
        assert "--index-url" not in installs[1]
        assert (device.folder / "venv" / "torch.txt").read_text() == "torch==2.8.0\n"

    def test_torch_that_a_dependency_replaced(self, device: Device) -> None:
        done = device.install(INDEX, REPLACED="yes")
        assert done.returncode == 2
        assert "a dependency has replaced torch" in done.stderr

    def test_no_tensorrt(self, device: Device) -> None:
        assert device.install(INDEX, NO_TENSORRT="1").returncode == 1
        assert not any(" install " in call for call in device.calls)

    def test_install_puts_everything_in_its_place(self, device: Device) -> None:
        root = device.folder / "root"
        for _ in range(2):  # the second time over the first
            done = device.run("install.sh", INDEX, str(root))
            assert done.returncode == 0, done.stderr
        assert {path.name for path in (root / "etc/systemd/system").iterdir()} == {path.name for path in UNITS}
        assert os.readlink(root / "usr/local/bin/avl-edge") == "/opt/avl-edge/venv/bin/avl-edge"
        source = root / "opt/avl-edge/source"
        assert {path.name for path in source.iterdir()} == {name.split("/")[0] for name in _copied()}
        assert (source / "avl_edge/__init__.py").is_file()
        assert not (source / "avl_edge/avl_edge").exists()
        assert (source / "tools/deploy/install.sh").is_file()

    @pytest.mark.skipif(os.getuid() == 0, reason="root may install")
    def test_install_without_root(self, device: Device) -> None:
        done = device.run("install.sh", INDEX)
        assert done.returncode == 2
        assert "run it with sudo" in done.stderr

    def test_install_without_index(self, device: Device) -> None:
        done = device.run("install.sh")
        assert done.returncode == 2
        assert "give TORCH_INDEX" in done.stderr


class TestCheck:
    """`check_packages.py` on installed packages of the test's own making."""

    def check(self, folder: Path, what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", str(DEPLOY / "check_packages.py"), what]
        return subprocess.run(command, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60)

    def torch(self, folder: Path, library: str, requires: str) -> None:
        (folder / "torch-2.8.0.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0\nRequires-Dist: {requires}\n"
        (folder / "torch-2.8.0.dist-info" / "METADATA").write_text(metadata)
        (folder / "torch-2.8.0.dist-info" / "RECORD").write_text(f"torch/lib/{library},,\n")

    @pytest.mark.parametrize(
        ("library", "requires", "message"),
        [
            ("libtorch_cpu.so", "sympy", "torch 2.8.0 has no CUDA"),
            ("libtorch_cuda.so", "nvidia-cudnn-cu12==9.1", "brings CUDA of its own (nvidia-cudnn-cu12==9.1)"),
        ],
    )
    def test_torch_of_another_machine(self, tmp_path: Path, library: str, requires: str, message: str) -> None:
        self.torch(tmp_path, library, requires)
        done = self.check(tmp_path, "torch")
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1

    def test_torch_of_the_device(self, tmp_path: Path) -> None:
        self.torch(tmp_path, "libtorch_cuda.so", "sympy")
        done = self.check(tmp_path, "torch")
        assert (done.returncode, done.stdout) == (0, "torch==2.8.0\n")

    @pytest.mark.parametrize(("what", "message"), [("torch", "not installed"), ("tensorrt", "python3-libnvinfer")])
    def test_missing(self, tmp_path: Path, what: str, message: str) -> None:
        done = self.check(tmp_path, what)
        assert done.returncode == 1
        assert message in done.stderr

    def test_cuda_of_the_device(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(check_packages, "CUDA", tmp_path / "version.json")
        with pytest.raises(
            SystemExit, match=r"version\.json does not tell the version of CUDA: apt install cuda-toolkit"
        ):
            check_packages.cuda()
        (tmp_path / "version.json").write_text('{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}')
        assert check_packages.cuda() == "cuda-python==12.*\n"

    def test_tensorrt_of_the_device(self, tmp_path: Path) -> None:
        (tmp_path / "tensorrt").mkdir()
        (tmp_path / "tensorrt" / "__init__.py").write_text("raise OSError('no driver here')")
        assert self.check(tmp_path, "tensorrt").returncode == 0


def _unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Section, key, values; a key may stand more than once."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return sections


class TestUnits:
    def test_service_calls_a_real_command_with_real_options(self) -> None:
        service = _unit(DEPLOY / "avl-edge-profile@.service")["Service"]
        program, name, *arguments = shlex.split(service["ExecStart"][0].replace("%I", "demo"))
        assert program == "/opt/avl-edge/venv/bin/avl-edge"
        group = typer.main.get_command(app)
        _, command, rest = group.resolve_command(typer.Context(group), [name, *arguments])  # type: ignore[attr-defined]
        context = command.make_context(name, rest)
        assert context.params["model"] == "demo"
        assert context.params["seconds"] == 120

    def test_service_is_held_inside_its_bounds(self) -> None:
        service = _unit(DEPLOY / "avl-edge-profile@.service")["Service"]
        assert service["MemoryMax"] == ["80%"]
        assert service["WorkingDirectory"] == [f"/var/lib/{service['StateDirectory'][0]}"]
        assert service["User"] == ["avl-edge"]
        for key in ("NoNewPrivileges", "PrivateNetwork", "ProtectClock", "RestrictSUIDSGID"):
            assert service[key] == ["yes"], key

    def test_path_starts_the_service_of_its_own_model(self) -> None:
        path = _unit(DEPLOY / "avl-edge-profile@.path")
        assert path["Path"]["Unit"] == ["avl-edge-profile@%i.service"]
        # The file that the probe reads the mode from.
        status = path["Path"]["PathChanged"][0]
        assert f'"{status}"' in (ROOT / "avl_edge" / "machine" / "device" / "probe_jetson.py").read_text()

    def test_systemd_takes_them(self, tmp_path: Path) -> None:
        """Instances over an executable that is there, as the program is not installed here."""
        analyze = shutil.which("systemd-analyze")
        if analyze is None:
            pytest.skip("systemd-analyze is not on this machine")
        files = [tmp_path / unit.name.replace("@.", "@demo.") for unit in UNITS]
        for unit, file in zip(UNITS, files, strict=True):
            file.write_text(unit.read_text().replace("/opt/avl-edge/venv/bin/avl-edge", "/bin/true"))
        done = subprocess.run([analyze, "verify", *map(str, files)], capture_output=True, text=True, timeout=60)
        lines = [line for line in done.stderr.splitlines() if any(file.name in line for file in files)]
        assert (done.returncode, lines) == (0, []), done.stderr
