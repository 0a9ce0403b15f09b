"""Reading a recorded tree: never outside it, never for ever, never an exception for what it holds."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.machine.device import diagnose, probe, report, to_dict
from avl_edge.machine.device.facts import Rail, Temperature
from avl_edge.machine.device.live import PROGRAMS, ask, has_jtop, parse_jtop, run
from avl_edge.machine.device.tree import Tree
from tests.equipment.machines import ORIN

FILES = sorted(str(path.relative_to(ORIN)) for path in ORIN.rglob("*") if path.is_file())


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("not to be read")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    return root


@pytest.mark.parametrize("target", ["../../secret", "../../../../../../../../{outside}", "{outside}"])
def test_no_link_leads_out_of_the_root(outside: Path, target: str) -> None:
    (outside / "etc/os-release").symlink_to(target.format(outside=outside.parent / "secret"))
    reading = Tree(outside).read("/etc/os-release")
    assert reading.text is None
    assert "no such file" in reading.reason


@pytest.mark.parametrize("path", ["/../secret", "/etc/../../secret", "/etc/up/secret"])
def test_no_path_leads_out_of_the_root(outside: Path, path: str) -> None:
    (outside / "etc/up").symlink_to("../..")
    assert Tree(outside).read(path).text is None


def test_links_are_followed_inside_the_root(outside: Path) -> None:
    """As on a Jetson: /proc/device-tree is an absolute link, /sys/class/devfreq/* are relative ones."""
    (outside / "sys/firmware/devicetree/base").mkdir(parents=True)
    (outside / "sys/firmware/devicetree/base/model").write_text("Orin\0")
    (outside / "proc").mkdir()
    (outside / "proc/device-tree").symlink_to("/sys/firmware/devicetree/base")
    (outside / "etc/model").symlink_to("../proc/device-tree/model")
    (outside / "etc/clamped").symlink_to("../../../../../etc/model")
    tree = Tree(outside)
    assert [tree.read(path).text for path in ("/proc/device-tree/model", "/etc/model", "/etc/clamped")] == [
        "Orin\0"
    ] * 3
    assert tree.glob("/proc/device-tree/m*") == ["/proc/device-tree/model"]


def test_circles_of_links_end(outside: Path) -> None:
    (outside / "etc/a").symlink_to("b")
    (outside / "etc/b").symlink_to("a")
    (outside / "etc/self").symlink_to(".")
    tree = Tree(outside)
    assert "circle" in tree.read("/etc/a").reason
    assert not tree.exists("/etc/a")
    assert tree.names("/etc/a") == []
    assert tree.glob("/etc/a/*") == []
    assert tree.read("/etc/" + "self/" * 100 + "x").text is None


def test_what_is_no_text_file_has_a_reason(outside: Path) -> None:
    os.mkfifo(outside / "pipe")  # would block a reader for ever
    (outside / "big").write_bytes(b"x" * 2000)
    (outside / "locked").write_text("x")
    (outside / "locked").chmod(0)
    tree = Tree(outside)
    assert tree.read("/pipe").reason == "not a regular file"
    assert tree.read("/etc").reason == "not a regular file"
    assert tree.read("/big", limit=1999).reason == "larger than 1999 bytes"
    assert tree.read("/big", limit=2000).text == "x" * 2000
    assert tree.read("/nul\0byte").reason == "not a possible path"
    assert tree.read("/" + "n" * 5000).text is None
    if os.geteuid() != 0:
        assert "permission" in tree.read("/locked").reason


def test_ten_comes_after_two(outside: Path) -> None:
    for number in (10, 2, 1):
        (outside / f"etc/zone{number}").mkdir()
    assert Tree(outside).names("/etc") == ["zone1", "zone2", "zone10"]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(ORIN, tmp_path_factory.mktemp("orin") / "tree"))


def _survives(root: Path) -> None:
    facts = probe(root)
    checks = diagnose(facts)
    report(facts, checks)
    json.dumps(to_dict(facts, checks), allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(FILES),
        st.one_of(
            st.binary(max_size=80),
            st.integers(-(2**70), 2**70).map(lambda number: str(number).encode()),
            st.sampled_from([None, b"", b"\xff\xfe\0" * 50, b"9" * 6000, b"max\n"]),
        ),
        min_size=1,
        max_size=25,
    )
)
def test_damaged_tree_is_survived(copied: Path, contents: dict[str, bytes | None]) -> None:
    """None: the file is replaced by a folder. The copy is mended for the next example."""
    for name, content in contents.items():
        (copied / name).unlink()
        (copied / name).mkdir() if content is None else (copied / name).write_bytes(content)
    try:
        _survives(copied)
    finally:
        for name, content in contents.items():
            (copied / name).rmdir() if content is None else (copied / name).unlink()
            shutil.copyfile(ORIN / name, copied / name)


def test_tree_of_nothing_but_rubbish_is_survived(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ORIN, tmp_path / "tree"))
    for name in FILES:
        (root / name).write_bytes(os.urandom(512))
    _survives(root)


def test_tree_of_circles_is_survived(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ORIN, tmp_path / "tree"))
    for name in FILES:
        (root / name).unlink()
        (root / name).symlink_to(Path(name).name)
    _survives(root)


def test_hostile_cgroup_path_stays_inside(outside: Path) -> None:
    (outside / "proc/self").mkdir(parents=True)
    (outside / "proc/self/cgroup").write_text("0::/../../../../" + "x/" * 1000 + "\n")
    (outside.parent / "memory.max").write_text("1\n")
    assert probe(outside).memory.cgroup is None


def test_programs_are_not_run_for_a_recorded_tree(outside: Path) -> None:
    (outside / "commands").mkdir()
    (outside / "commands/nvpmodel").write_text("NV Power Mode: MAXN\n0\n")
    tree = Tree(outside)
    assert ask(tree, "nvpmodel").text == "NV Power Mode: MAXN\n0\n"
    assert all(ask(tree, name).text is None for name in PROGRAMS if name != "nvpmodel")


def test_a_program_has_a_time_limit() -> None:
    start = time.monotonic()
    slow = run((sys.executable, "-c", "import time; time.sleep(60)"), seconds=0.5)
    assert time.monotonic() - start < 10
    assert slow.text is None
    assert "0.5 s" in slow.reason


def test_a_child_that_holds_the_pipe_does_not_hold_us() -> None:
    start = time.monotonic()
    assert run(("/bin/sh", "-c", "sleep 60 & echo told"), seconds=0.5).text == "told\n"
    assert run(("/bin/sh", "-c", "exec >&-; sleep 60"), seconds=0.5).text is None
    assert time.monotonic() - start < 20


def test_a_program_that_never_ends_is_asked_for_one_line() -> None:
    endless = "import time\nwhile True: print('RAM 1/2MB', flush=True); time.sleep(0.05)"
    assert run((sys.executable, "-c", endless), seconds=30, one_line=True).text == "RAM 1/2MB\n"


def test_jetson_stats_is_asked_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the library's interface: a context manager whose readings are dicts."""
    (tmp_path / "jtop.py").write_text(
        "class jtop:\n"
        "    def __init__(self, interval): self.temperature = {'CPU': {'temp': 51.5, 'online': True}}\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *error): pass\n"
        "    def ok(self): return True\n"
        "    power = {'rail': {'VDD_IN': {'volt': 5000, 'curr': 1000, 'power': 5000}}, 'tot': object()}\n"
        "    memory = {'EMC': {'cur': 3199000}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert has_jtop(Tree("/"))
    sample = parse_jtop(ask(Tree("/"), "jtop").text or "")
    assert sample is not None
    assert sample.emc_hz == 3_199_000_000
    assert sample.temperatures == (Temperature("CPU", 51.5),)
    assert sample.rails == (Rail("VDD_IN", 5000, 5000, 1000),)


def test_a_program_that_fails_has_a_reason() -> None:
    assert "status 9" in run((sys.executable, "-c", "print('failed'); raise SystemExit(9)"), seconds=30).reason
    assert "cannot be run" in run(("/no/such/program",), seconds=1).reason
