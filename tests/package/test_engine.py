"""Packages: published whole or not at all, opened only whole and only where they belong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.machine.device import DeviceFacts, Gpu, Software
from avl_edge.package.engine import (
    BadPackage,
    BuildFailed,
    BuildRunning,
    Fingerprint,
    Mismatch,
    Platform,
    open_package,
    publish,
)

ORIN = Platform("10.3.0", "12.6", "sm_87", "36.4.3", "c" * 64)
SHAPES = {"images": 4, "prompt_tokens": 3072, "sequences": 16}
FINGERPRINT = Fingerprint("a" * 64, "b" * 64, "float16", 2, SHAPES, ORIN)


def fill(text: str = "engine", fingerprint: Fingerprint = FINGERPRINT) -> Callable[[Path], Fingerprint]:
    """Writes two files that take the place of engines."""

    def write(staging: Path) -> Fingerprint:
        (staging / "vision.engine").write_bytes(b"\0" * 5000 + text.encode())
        (staging / "decoder.engine").write_text(text)
        return fingerprint

    return write


def contents(out: Path) -> str:
    """What a reader gets."""
    with open_package(out, FINGERPRINT) as package:
        return package["decoder.engine"].read_text()


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory with a package in it."""
    publish(tmp_path / "out", "1.0", fill("old"))
    return tmp_path / "out"


def test_published_package_opens(out: Path) -> None:
    with open_package(out) as package:
        assert package.manifest.fingerprint == FINGERPRINT
        assert package.manifest.version == "1.0"
        assert package["vision.engine"].read_bytes() == b"\0" * 5000 + b"old"
        with pytest.raises(BadPackage, match=r"has no other\.engine: rebuild it with avl-edge build MODEL --out "):
            package["other.engine"]


@pytest.mark.parametrize("exists", [False, True])
def test_directories_are_private(tmp_path: Path, exists: bool) -> None:
    previous = os.umask(0)
    if exists:
        (tmp_path / "out").mkdir(mode=0o777)
    try:
        publish(tmp_path / "out", "1.0", fill())
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", *(tmp_path / "out").glob("build-*"))}
    assert modes == {0o700}


def test_new_build_replaces_the_old(out: Path) -> None:
    publish(out, "1.0", fill("new"))
    assert contents(out) == "new"
    assert len(list(out.glob("build-*"))) == 1


class TestMismatch:
    @pytest.mark.parametrize("field", [field.name for field in fields(Platform)])
    def test_other_machine(self, out: Path, field: str) -> None:
        wanted = replace(FINGERPRINT, platform=replace(ORIN, **{field: "10.16.0"}))
        with pytest.raises(
            Mismatch, match=rf"another .+, now 10\.16\.0\): rebuild it with avl-edge build .*{out}"
        ) as error:
            open_package(out, wanted)
        assert error.value.field == field
        assert error.value.exit_code == 2

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("model", "d" * 64, r"checkpoint \(aaaaaaaaaaaa, now dddddddddddd\)"),
            ("graphs", "d" * 64, r"form of the ONNX graphs"),
            ("precision", "float32", r"precision \(float16, now float32\)"),
            ("shapes", {**SHAPES, "images": 8}, r"shapes \(images 4, now 8\)"),
        ],
    )
    def test_other_build(self, out: Path, field: str, value: object, words: str) -> None:
        with pytest.raises(Mismatch, match=words) as error:
            open_package(out, replace(FINGERPRINT, **{field: value}))  # type: ignore[arg-type]
        assert error.value.field == field

    def test_field_that_this_machine_does_not_have(self, out: Path) -> None:
        with pytest.raises(Mismatch, match=r"L4T release \(36\.4\.3, now none\)"):
            open_package(out, replace(FINGERPRINT, platform=replace(ORIN, l4t=None)))

    def test_graphs_serve_where_no_engines_are_asked_for(self, tmp_path: Path) -> None:
        graphs = replace(FINGERPRINT, platform=None)
        publish(tmp_path / "out", "1.0", fill(fingerprint=graphs))
        with open_package(tmp_path / "out", graphs):
            pass
        with pytest.raises(Mismatch, match=r"no engines: rebuild it with .* on the device"):
            open_package(tmp_path / "out", FINGERPRINT)

    def test_target_of_a_machine(self) -> None:
        software = Software(l4t="36.4.3", cuda="12.6", tensorrt="10.3.0")
        facts = DeviceFacts("/", software=software, gpus=(Gpu("Orin", integrated=True, sm="sm_87"),))
        assert Platform.of(facts, "c" * 64) == ORIN
        assert Platform.of(DeviceFacts("/")) == Platform()


class TestDamage:
    @settings(deadline=None, max_examples=60)
    @given(data=st.data())
    def test_any_change_of_any_file_is_found(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        """A byte that is another, a file that is shorter or longer: the package does not open, and says why."""
        out = tmp_path_factory.mktemp("damage") / "out"
        publish(out, "1.0", fill())
        path = data.draw(st.sampled_from([out / "manifest.json", *sorted(out.glob("build-*/*"))]))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
        if kind == "flip":
            content[place] ^= data.draw(st.sampled_from([1, 16, 128]))
        elif kind == "cut":
            del content[place:]
        else:
            content += b"}"
        path.write_bytes(content)
        with pytest.raises(BadPackage, match="rebuild it with avl-edge build MODEL --out"):
            open_package(out, FINGERPRINT)

    def test_truncated_file(self, out: Path) -> None:
        path = next(out.glob("build-*/vision.engine"))
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(
            BadPackage, match=r"vision\.engine has 100 bytes instead of 5003, it was cut off or changed"
        ):
            open_package(out)

    @pytest.mark.parametrize(("old", "new"), [('"36.4.3"', '"36.4.4"'), ('"1.0"', '"2.0"'), ("}\n", "}")])
    def test_edited_manifest(self, out: Path, old: str, new: str) -> None:
        path = out / "manifest.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(BadPackage, match=r"manifest\.json was changed after it was built"):
            open_package(out)

    def test_missing_file(self, out: Path) -> None:
        next(out.glob("build-*/vision.engine")).unlink()
        with pytest.raises(BadPackage, match=r"vision\.engine cannot be read .*rebuild it"):
            open_package(out)

    def test_link_in_place_of_a_file(self, out: Path, tmp_path: Path) -> None:
        path = next(out.glob("build-*/vision.engine"))
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(BadPackage, match="not a plain file"):
            open_package(out)

    def test_manifest_of_another_format(self, out: Path) -> None:
        path = out / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
        with pytest.raises(BadPackage, match="format 1, this program reads 2"):
            open_package(out)

    def test_forged_manifest_reaches_no_file_outside(self, out: Path) -> None:
        """Its digest is right, as whoever forges it can compute it; its paths still go nowhere."""
        from avl_edge.package.engine.manifest import File, Manifest, loads

        path = out / "manifest.json"
        honest = loads(path.read_text(), path)
        names = ("../other", "..", ".", "", "a\0b", "/etc")
        forgeries = [replace(honest, directory=name) for name in names]
        forgeries += [replace(honest, files={name: File(1, "0")}) for name in names]
        for forged in forgeries:
            assert isinstance(forged, Manifest)
            path.write_text(forged.dumps())
            with pytest.raises(BadPackage, match="does not describe a package"):
                open_package(out)

    def test_directory_that_others_can_write(self, out: Path) -> None:
        for directory in (out, next(out.glob("build-*"))):
            directory.chmod(0o770)
            with pytest.raises(BadPackage, match="chmod 700"):
                open_package(out)
            directory.chmod(0o700)

    def test_no_package(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(BadPackage, match="holds no package: build one with"):
                open_package(path)
        (tmp_path / "file").touch()
        with pytest.raises(BadPackage, match="give the directory of a package"):
            open_package(tmp_path / "file")

    def test_damaged_package_is_rebuilt(self, out: Path) -> None:
        (out / "manifest.json").write_text("{")
        publish(out, "1.0", fill("new"))
        assert contents(out) == "new"
        assert names(out) == {"lock", "manifest.json", next(out.glob("build-*")).name}


class TestFailedBuild:
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_full_disk_in_the_middle(self, out: Path, code: int) -> None:
        before = names(out)

        def write(staging: Path) -> Fingerprint:
            (staging / "vision.engine").write_bytes(b"half")
            raise OSError(code, os.strerror(code))

        with pytest.raises(BuildFailed, match=r"what was there before is untouched: .*--out"):
            publish(out, "1.0", write)
        assert names(out) == before
        assert contents(out) == "old"

    @pytest.mark.parametrize("moment", ["staging", "manifest", "rename", "replace"])
    def test_failure_at_every_moment_of_publishing(
        self, out: Path, moment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last steps one by one: until the manifest is replaced the old package counts."""
        before = names(out)

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if moment == "staging":
            monkeypatch.setattr("avl_edge.package.engine.store.tempfile.mkdtemp", fail)
        else:
            monkeypatch.setattr(Path, {"manifest": "write_text"}.get(moment, moment), fail)
        with pytest.raises(BuildFailed, match="the disk is full"):
            publish(out, "1.0", fill("new"))
        monkeypatch.undo()
        assert names(out) == before
        assert contents(out) == "old"

    @pytest.mark.parametrize("error", [KeyboardInterrupt, BadPackage, MemoryError])
    def test_interrupt(self, out: Path, error: type[BaseException]) -> None:
        before = names(out)

        def write(staging: Path) -> Fingerprint:
            (staging / "vision.engine").write_bytes(b"half")
            raise error

        with pytest.raises(error):
            publish(out, "1.0", write)
        assert names(out) == before
        assert contents(out) == "old"

    def test_first_build_that_fails_leaves_nothing_to_open(self, tmp_path: Path) -> None:
        def write(staging: Path) -> Fingerprint:
            (staging / "vision.engine").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(BuildFailed):
            publish(tmp_path / "out", "1.0", write)
        assert names(tmp_path / "out") == {"lock"}
        with pytest.raises(BadPackage, match="holds no package"):
            open_package(tmp_path / "out")

    @pytest.mark.parametrize(
        "others", [{"holiday.jpg"}, {"manifest.json", "build-page"}, {"lock", "manifest.json", "page.html"}]
    )
    def test_files_of_someone_else_are_left_alone(self, tmp_path: Path, others: set[str]) -> None:
        """Also where they have the names that a package has: a web page has a manifest.json, too."""
        for name in others:
            (tmp_path / name).write_text("precious")
        with pytest.raises(BadPackage, match="new or empty directory"):
            publish(tmp_path, "1.0", fill())
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(others, "precious")

    def test_old_package_that_cannot_be_removed(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The new one is published all the same, and the next build removes both."""

        def fail(path: Path) -> None:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

        monkeypatch.setattr("avl_edge.package.engine.store.shutil.rmtree", fail)
        publish(out, "1.0", fill("new"))
        assert contents(out) == "new"
        monkeypatch.undo()
        publish(out, "1.0", fill("newer"))
        assert len(list(out.glob("build-*"))) == 1

    def test_out_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BuildFailed, match="give another --out"):
            publish(tmp_path / "file", "1.0", fill())


BUILDER = """
    import sys, time
    from pathlib import Path
    from avl_edge.package.engine import publish

    def write(staging):
        (staging / "decoder.engine").write_text("half")
        print("writing", flush=True)
        time.sleep(60)

    publish(Path(sys.argv[1]), "1.0", write)
"""


class TestSeveralProcesses:
    def test_second_builder_is_refused_and_a_killed_one_leaves_no_trace(self, out: Path) -> None:
        command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as builder:
            assert builder.stdout is not None
            assert builder.stdout.readline() == "writing\n"
            with pytest.raises(BuildRunning, match=r"another build is running in .*: wait for it"):
                publish(out, "1.0", fill("new"))
            assert contents(out) == "old"
            builder.send_signal(signal.SIGKILL)
        assert contents(out) == "old"
        assert any(name.startswith("staging-") for name in names(out))

        def write(staging: Path) -> Fingerprint:
            # What was left is gone before the disk fills up anew.
            assert [name for name in names(out) if name.startswith("staging-")] == [staging.name]
            return fill("new")(staging)

        publish(out, "1.0", write)
        assert contents(out) == "new"
        assert len(names(out)) == 3

    def test_open_package_outlives_the_next_build(self, out: Path) -> None:
        with open_package(out) as package:
            publish(out, "1.0", fill("new"))
            assert package["decoder.engine"].read_text() == "old"
            assert contents(out) == "new"
        publish(out, "1.0", fill("newer"))
        assert len(list(out.glob("build-*"))) == 1

    def test_readers_never_see_a_half_built_package(self, out: Path) -> None:
        """Many readers while one package follows the other: each gets one of them, whole."""
        done, seen, errors = threading.Event(), set(), []

        def read() -> None:
            while not done.is_set():
                try:
                    seen.add(contents(out))
                except Exception as error:
                    errors.append(error)
                    return

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        written = {"old", *map(str, range(40))}
        for text in map(str, range(40)):
            publish(out, "1.0", fill(text))
        done.set()
        for reader in readers:
            reader.join()
        assert errors == []
        assert seen <= written
        assert contents(out) == "39"

    def test_a_crash_before_the_manifest_leaves_the_old_package(self, out: Path) -> None:
        """The files are in place, the manifest that names them never came."""
        shutil.copytree(next(out.glob("build-*")), out / "build-orphan")
        assert contents(out) == "old"
        publish(out, "1.0", fill("new"))
        assert len(list(out.glob("build-*"))) == 1
