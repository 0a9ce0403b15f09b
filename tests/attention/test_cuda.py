"""`attention.cuda` without a GPU: its source found and compiled, the cache of what was compiled."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest

from avl_edge.attention.cuda import LOW_RANK, CompileFailed, Kernels, KernelShape, NoCuda, cubin, nvrtc, source
from avl_edge.attention.cuda import store as store_module
from avl_edge.attention.cuda.store import CubinStore
from avl_edge.errors import BadInput
from tests import ROOT

SHAPE = KernelShape(64, 1, "Half")
ENTRIES = (
    *("append", "attend", "merge", "scores", "scan", "log_sums", "nucleus"),
    *("prompt_logits", "prompt_log_sums", "prompt_scores"),
)


@pytest.fixture(scope="module")
def compiler() -> nvrtc.Nvrtc:
    try:
        return nvrtc.find()
    except NoCuda:
        pytest.skip("no NVRTC to compile with: pip install 'nvidia-cuda-nvrtc-cu12==12.6.*'")


# The source and the compiler


def test_the_source_is_that_of_the_repository_with_all_that_it_includes() -> None:
    folder = ROOT / "plugins" / "cuda"
    files = source.read()
    assert next(iter(files)) == "core_attention.cu"
    assert files == {name: (folder / name).read_bytes() for name in files}
    others = source.read(source.LOW_RANK).keys() | source.read("token_attention.cu").keys()
    assert files.keys() | others == {path.name for path in folder.glob("*.cu*")}
    assert all(len(text.splitlines()) < 400 for text in files.values())
    assert len(source.digest()) == len(source.identity()) == 64
    assert source.digest() != source.digest("token_attention.cu")


def test_another_header_is_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = (source.digest(), source.identity()), source.read()
    header = files["device.cuh"]
    for change, is_other in ((b"// a comment\n", False), (b"constexpr int kOther = 1;\n", True)):
        monkeypatch.setattr(source, "read", lambda _, text=header + change: {**files, "device.cuh": text})
        assert (source.digest() != before[0]) == is_other
        assert source.identity() != before[1], "what was compiled from other bytes is not taken for this"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("arch", "format_"), [("sm_80", "exact"), ("sm_87", "int8"), ("sm_90", "int4")])
def test_every_entry_point_is_in_the_module(tmp_path: Path, arch: str, format_: str) -> None:
    image = cubin(arch, SHAPE, format_, folder=tmp_path / "kernels")
    assert image.startswith(b"\x7fELF")
    for entry in ENTRIES:
        assert f".text.avl_{entry}\0".encode() in image
        assert hasattr(Kernels, entry)
    low_rank = cubin(arch, SHAPE, LOW_RANK, folder=tmp_path / "kernels")
    assert b".text.avl_attend_low_rank\0" in low_rank
    assert b".text.avl_merge\0" not in low_rank


def test_code_that_does_not_compile_comes_with_its_log(compiler: nvrtc.Nvrtc) -> None:
    with pytest.raises(CompileFailed, match=r"bad\.cu.*identifier \"nothing\" is undefined"):
        compiler.compile({"bad.cu": b"__global__ void kernel() { nothing(); }"}, "bad.cu", "sm_87")


def test_a_compiler_newer_than_the_driver_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [(12, 6), (13, 1), (12, 9)]
    found = [nvrtc.Nvrtc(ctypes.CDLL(None), version) for version in versions]
    monkeypatch.setattr(nvrtc, "installed", lambda: iter(found))
    assert nvrtc.find().version == (13, 1)
    assert nvrtc.find((12, 6)).version == (12, 9), "within a major version drivers take what newer compilers make"
    with pytest.raises(NoCuda, match=r"driver of CUDA 11\.4 \(12\.6, 13\.1, 12\.9 was found\)"):
        nvrtc.find((11, 4))
    monkeypatch.setattr(nvrtc, "installed", lambda: iter(()))
    with pytest.raises(NoCuda, match=r"none was found.*pip install nvidia-cuda-nvrtc-cu12"):
        nvrtc.find()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((100, 1, "Half"), "head sizes"),
        ((264, 1, "Half"), "head sizes"),
        ((64, 9, "Half"), "query heads"),
        ((64, 1, "float"), "Half or Bfloat"),
        ((64, 1, "Half", 3), "warps"),
    ],
)
def test_shapes_that_the_kernels_do_not_take(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        KernelShape(*fields)


def test_a_shape_of_a_decoder() -> None:
    assert KernelShape.of(128, 28, 4, "bfloat16") == KernelShape(128, 7, "Bfloat")
    with pytest.raises(BadInput, match="float32: convert the checkpoint"):
        KernelShape.of(128, 28, 4, "float32")
    with pytest.raises(BadInput, match="cannot share"):
        KernelShape.of(128, 28, 5, "float16")


# The cache


@pytest.mark.usefixtures("compiler")
def test_a_compiled_module_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    first = cubin("sm_87", SHAPE, folder=folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (entry,) = folder.iterdir()
    assert entry.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", _never)
    assert cubin("sm_87", SHAPE, folder=folder) == first
    others = (("sm_90", SHAPE), ("sm_87", KernelShape(64, 2, "Half")), ("sm_87", KernelShape(64, 1, "Bfloat")))
    for other in (*others, ("sm_87", SHAPE, "int8")):
        with pytest.raises(AssertionError, match="compiled"):
            cubin(*other, folder=folder)
    monkeypatch.setattr(source, "identity", lambda _: "of another source")
    with pytest.raises(AssertionError, match="compiled"):
        cubin("sm_87", SHAPE, folder=folder)


def _never(*_: object) -> None:
    raise AssertionError("compiled")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty", "headless", "directory"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    first = cubin("sm_87", SHAPE, folder=tmp_path / "kernels")
    (entry,) = (tmp_path / "kernels").iterdir()
    whole = entry.read_bytes()
    entry.unlink()
    if damage == "directory":
        entry.mkdir()
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        entry.write_bytes({"truncated": whole[:-100], "a bit": flipped, "empty": b"", "headless": whole[:32]}[damage])
    assert cubin("sm_87", SHAPE, folder=tmp_path / "kernels") == first
    if damage != "directory":
        assert entry.read_bytes() == whole
    assert len(list((tmp_path / "kernels").iterdir())) == 1, "nothing staged is left"


def test_a_folder_that_others_can_write_to_is_neither_read_nor_written(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    CubinStore(folder).put("identity", b"image")
    assert CubinStore(folder).get("identity") == b"image"
    folder.chmod(0o777)
    assert CubinStore(folder).get("identity") is None
    CubinStore(folder).put("other", b"image")
    folder.chmod(0o700)
    assert CubinStore(folder).get("other") is None


def test_a_folder_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    CubinStore(folder).put("identity", b"image")
    monkeypatch.setattr("os.geteuid", lambda: folder.stat().st_uid + 1)
    assert CubinStore(folder).get("identity") is None


def test_without_a_place_to_write_everything_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = CubinStore(tmp_path / "file" / "kernels")
    blocked.put("identity", b"image")
    assert blocked.get("identity") is None
    full = CubinStore(tmp_path / "kernels")
    monkeypatch.setattr("os.fsync", _no_space)
    full.put("identity", b"image")
    assert full.get("identity") is None
    assert list((tmp_path / "kernels").iterdir()) == []


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_the_default_folder_is_where_the_users_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store_module.default_folder() == tmp_path / "avl-edge" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_module.default_folder() == tmp_path / ".cache" / "avl-edge" / "kernels"


def test_many_writers_of_one_entry_leave_a_whole_one(tmp_path: Path) -> None:
    images = [bytes([number]) * 100_000 for number in range(8)]
    writers = [
        threading.Thread(target=CubinStore(tmp_path / "kernels").put, args=("identity", image)) for image in images
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert CubinStore(tmp_path / "kernels").get("identity") in images
