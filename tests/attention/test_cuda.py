"""`attention.cuda` without a GPU: its source found and compiled, the cache of what was compiled, launch arguments."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge.attention.cuda import (
    FORMATS,
    LOW_RANK,
    Bases,
    CompileFailed,
    Kernels,
    KernelShape,
    Lists,
    NoCuda,
    Pool,
    PromptHeads,
    Scan,
    Step,
    Workspace,
    cubin,
    nvrtc,
    source,
)
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


# Launches


class Recorded:
    """Remembers launches: name, grid, threads, stream, and the arguments' values by their types."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def launch(self, kernel: str, grid: Any, threads: int, stream: int, arguments: Sequence[Any]) -> None:
        kinds = {ctypes.c_void_p: "p", ctypes.c_int32: "i"}
        values = [(kinds[type(each)], each.value) for each in arguments]
        self.launches.append((kernel, grid, threads, stream, values))


POOL = Pool(100, 200, kv_heads=4, key_row_stride=512, key_head_stride=128, value_row_stride=1024, value_head_stride=256)


def test_a_step_is_three_launches_or_four() -> None:
    module = Recorded()
    kernels = Kernels(module, KernelShape(128, 2, "Half"))
    for scores in (False, True):
        workspace = Workspace.of(kernels.shape, 3, 8, 5, 1000, scores=scores)
        step = Step(1, 2, 3, 4, Lists.of(5, 6, 3, 1000), 7, 8 if scores else 0)
        kernels.step(step, POOL, workspace, 4096, 99)
    names = [launch[0] for launch in module.launches]
    assert names == ["avl_append", "avl_attend", "avl_merge", "avl_append", "avl_attend", "avl_merge", "avl_scores"]
    assert {launch[2:4] for launch in module.launches} == {(128, 99)}
    append, attend, merge = module.launches[:3]
    strides = [("i", number) for number in (512, 128, 1024, 256)]
    assert append[1] == (3, 2, 1)
    assert append[4] == [("p", 2), ("p", 3), ("p", 4), ("i", 4), *strides, ("p", 100), ("p", 200)]
    assert attend[1] == (4, 5, 3)
    inputs = [("p", number) for number in (1, 100, 200, 5, 6, 10)]
    numbers = [*strides, ("i", 1000), ("i", 0), ("i", 5)]
    assert attend[4] == [*inputs, *numbers, ("p", 4096), ("p", 4096 + workspace.states), ("p", None)]
    assert merge[1] == (2, 3, 1)
    assert merge[4][2:8] == [("p", 6), ("p", 10), ("i", 8), ("i", 5), ("i", 1), ("p", 7)]
    assert module.launches[4][4][-1] == ("p", 4096 + workspace.logits), "logits where scores are asked for"


def test_a_step_over_formats_reads_each_with_its_own_kernel() -> None:
    """Parts stand side by side in the workspace and one after the other in the tables; a format is loaded once."""
    modules = {name: Recorded() for name in FORMATS}
    asked: list[str] = []

    def packed(name: str) -> Recorded:
        asked.append(name)
        return modules[name]

    kernels = Kernels(modules["exact"], KernelShape(128, 2, "Half"), packed=packed)
    formats, candidates = ("exact", "int8", "int4"), Lists.of(50, 60, 2, 300, ("exact", "int8", "int4"))
    scan = Scan(candidates, ("int4",), limits=70, listed=80, picked=90)
    workspace = Workspace.of(kernels.shape, 2, 8, 5, 1000, scores=True, parts=3, scanned=300)
    step = Step(1, 2, 3, 1000, Lists.of(5, 8, 2, 1000, formats), 7, 9, written=("int8",), scan=scan)
    for _ in range(2):
        kernels.step(step, POOL, workspace, 4096, 99)
    assert asked == ["int8", "int4"]
    assert [launch[0] for launch in modules["int8"].launches] == 2 * ["avl_append", "avl_attend"]
    assert [launch[0] for launch in modules["int4"].launches] == 2 * ["avl_scan", "avl_attend"]
    chosen = ["avl_log_sums", "avl_scores", "avl_nucleus"]
    assert [each[0] for each in modules["exact"].launches] == 2 * [*chosen, "avl_attend", "avl_merge", "avl_scores"]
    append, attend = modules["int8"].launches[:2]
    assert append[4][2] == ("p", 1000 + 4 * 2), "the second line of slots"
    assert attend[4][4:6] == [("p", 8 + 4 * 2), ("p", 12 + 4 * 2)], "the second line of begins and ends"
    assert attend[4][-5:-3] == [("i", 5), ("i", 15)], "the second five of fifteen splits"
    seen = modules["int4"].launches[0]
    assert seen[1] == (4, 10, 2)
    assert seen[4][2:5] == [("p", 50), ("p", 60 + 16), ("p", 64 + 16)]
    log_sums, scores, nucleus = modules["exact"].launches[:3]
    assert (log_sums[1], scores[1], nucleus[1]) == ((2, 2, 3), (10, 2, 3), (2, 3, 1))
    assert nucleus[4] == [("p", number) for number in (4096 + workspace.weights, 50, 60, 64, 70, 80, 5, 12, 90)]


def test_low_rank_formats_share_a_kernel_and_bring_their_bases() -> None:
    """Its logits are there whether scores are asked for or not; ranks are numbers of a launch."""
    modules = {name: Recorded() for name in ("exact", LOW_RANK)}
    kernels = Kernels(modules["exact"], KernelShape(128, 2, "Half"), packed=lambda name: modules[name])
    formats = ("exact", "lowrank:12@3+int8", "lowrank:9")
    workspace = Workspace.of(kernels.shape, 2, 8, 5, 1000, scores=False, parts=3, low_rank=True)
    assert workspace.bytes >= workspace.logits + 4 * 8 * 1000
    bases = Bases(ids=300, rank=9, positions=400, angles=500)
    step = Step(1, 2, 3, 1000, Lists.of(5, 8, 2, 1000, formats), 7, bases=bases)
    kernels.step(step, POOL, workspace, 4096, 99)
    assert [launch[0] for launch in modules["exact"].launches] == ["avl_append", "avl_attend", "avl_merge"]
    packed, plain = modules[LOW_RANK].launches
    assert packed[:4] == ("avl_attend_low_rank", (4, 5, 2), 128, 99)
    inputs = [("p", number) for number in (1, 100, 200, 5, 16, 20, 400, 300, 500)]
    numbers = [("i", number) for number in (512, 128, 1024, 256, 1000, 5, 15, 9, 3, 1)]
    results = [("p", 4096 + place) for place in (workspace.sums, workspace.states, workspace.logits)]
    assert packed[4] == [*inputs, *numbers, *results]
    assert plain[4][14:19] == [("i", number) for number in (10, 15, 9, 9, 0)]
    assert modules["exact"].launches[1][4][-1] == ("p", None), "exact rows leave no logits that nobody asks for"


@given(
    batch=st.integers(1, 16),
    heads=st.integers(1, 64),
    splits=st.integers(1, 40),
    capacity=st.integers(1, 70000),
    dim=st.sampled_from((64, 80, 96, 128, 256)),
    parts=st.integers(1, 3),
    scanned=st.sampled_from((0, 300, 80000)),
)
def test_the_parts_of_a_workspace_do_not_touch(
    batch: int, heads: int, splits: int, capacity: int, dim: int, parts: int, scanned: int
) -> None:
    shape = KernelShape(dim, 1, "Half")
    space = Workspace.of(shape, batch, heads, splits, capacity, scores=True, parts=parts, scanned=scanned)
    results = batch * parts * splits * heads
    sizes = (4 * results * dim, 8 * results, 4 * batch * heads, 4 * scanned, 4 * heads * max(capacity, scanned))
    places = (space.sums, space.states, space.log_sums, space.weights, space.logits, space.bytes)
    for place, size, following in zip(places, sizes, places[1:], strict=False):
        assert place % 16 == 0
        assert place + size <= following


def test_splits_fill_the_gpu_and_leave_every_warp_a_tile() -> None:
    orin, large = (Kernels(Recorded(), KernelShape(128, 1, "Half"), sms) for sms in (16, 132))
    assert orin.splits(32, 4096) == 5
    assert large.splits(32, 4096) == 38
    assert large.splits(8, 4096) == 128, "4096 rows are 128 times a tile of 8 for each of 4 warps"
    assert large.splits(8, 1) == 1


def test_a_prompts_scores_in_pieces() -> None:
    module = Recorded()
    kernels = Kernels(module, KernelShape(64, 2, "Bfloat"))
    query, keys = PromptHeads(1, 512, 64), PromptHeads(2, 256, 64)
    kernels.score_prompt(query, keys, 4, 1000, 300, 7, 3, 4, 8192, 3, 5)
    logits, sums, scores = (module.launches[i::3] for i in range(3))
    assert [launch[4][2] for launch in logits] == [("p", 1000), ("p", 1012), ("p", 1024)]
    assert [launch[4][4] for launch in logits] == [("i", 3), ("i", 3), ("i", 1)]
    assert [launch[4][5] for launch in scores] == [("i", 3), ("i", 3), ("i", 0)], "the last query is not summed"
    assert {launch[4][3] for launch in sums} == {("p", 8192 + 28928)}, "past the logits of three queries"
    assert kernels.prompt_workspace(300, 8, 3) == 28928 + 4 * 24
