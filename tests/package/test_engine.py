"""Packages: published whole or not at all, opened only whole and only where they belong."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.errors import BadModel
from avl_edge.machine.device import DeviceFacts, Gpu, Software
from avl_edge.package.directory import is_package
from avl_edge.package.engine import BadPackage, Mismatch, Platform, open_package, publish
from tests.equipment.published import FINGERPRINT, ORIN, SHAPES, contents, fill, names


def test_published_package_opens(out: Path) -> None:
    with open_package(out) as package:
        assert package.manifest.fingerprint == FINGERPRINT
        assert package.manifest.version == "1.0"
        assert package["vision.engine"].read_bytes() == b"\0" * 5000 + b"old"
        with pytest.raises(BadPackage, match=r"has no other\.engine: rebuild it with avl-edge build MODEL --out "):
            package["other.engine"]


@pytest.mark.parametrize(
    ("umask", "existing", "mode"),
    [
        (0o022, None, 0o755),
        (0o077, None, 0o700),
        (0o002, None, 0o755),
        (0, None, 0o755),
        (0o022, 0o750, 0o750),
        (0o077, 0o755, 0o755),
        (0o022, 0o777, 0o755),
        (0o022, 0o2775, 0o2755),
    ],
)
def test_modes_follow_the_folder_and_the_umask_and_nobody_else_writes(
    tmp_path: Path, umask: int, existing: int | None, mode: int
) -> None:
    out, previous = tmp_path / "out", os.umask(umask)
    try:
        if existing is not None:
            out.mkdir()
            out.chmod(existing)
        publish(out, "1.0", fill())
    finally:
        os.umask(previous)
    assert stat.S_IMODE(out.stat().st_mode) == mode
    (built,) = out.glob("build-*")
    assert stat.S_IMODE(built.stat().st_mode) & 0o777 == mode & 0o777
    files = [out / "manifest.json", *built.iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) & 0o777 for path in files} == {mode & 0o666}
    with open_package(out):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can build for a service's user")
def test_what_root_built_a_service_s_user_reads_and_what_it_may_not_is_one_line() -> None:
    with tempfile.TemporaryDirectory() as name:  # which pytest's own folder would hide
        Path(name).chmod(0o755)
        out = Path(name) / "out"
        publish(out, "1.0", fill("shared"))
        out.chmod(0o755)
        with _as_nobody():
            assert contents(out) == "shared"
            assert is_package(out)
        out.chmod(0o700)
        with _as_nobody():
            for refused in (lambda: open_package(out), lambda: is_package(out)):
                with pytest.raises(BadModel, match=r"denied|may not be read by this user: chmod"):
                    refused()


@contextmanager
def _as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


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
        with pytest.raises(BadPackage, match="format 1, this program reads 3"):
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
            with pytest.raises(BadPackage, match="chmod go-w"):
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
