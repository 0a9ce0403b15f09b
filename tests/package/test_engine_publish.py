"""Packages are published whole or not at all, whoever builds or reads beside."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from avl_edge.package.engine import BadPackage, BuildFailed, BuildRunning, Fingerprint, open_package, publish
from tests.equipment.published import contents, fill, names


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
