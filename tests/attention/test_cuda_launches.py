"""Launches of the CUDA kernels without a GPU: which, over which grids, with which arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from avl_edge.attention.cuda import (
    FORMATS,
    LOW_RANK,
    Bases,
    Kernels,
    KernelShape,
    Lists,
    Pool,
    PromptHeads,
    Scan,
    Step,
    Workspace,
)


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
    step = Step(1, 2, 3, 1000, Lists.of(5, 8, 2, 1000, formats), 7, bases=bases, smoothing=600)
    kernels.step(step, POOL, workspace, 4096, 99)
    names = ["avl_smooth", "avl_append", "avl_attend", "avl_merge"]
    assert [launch[0] for launch in modules["exact"].launches] == names
    smooth = modules["exact"].launches[0]
    strides = [("i", number) for number in (512, 128, 1024, 256)]
    assert smooth[1:] == ((4, 2, 1), 128, 99, [("p", 1), ("p", 2), ("p", 600), *strides, ("p", 100), ("p", 200)])
    packed, plain = modules[LOW_RANK].launches
    assert packed[:4] == ("avl_attend_low_rank", (4, 5, 2), 128, 99)
    inputs = [("p", number) for number in (1, 100, 200, 5, 16, 20, 400, 300, 500, 600)]
    numbers = [("i", number) for number in (512, 128, 1024, 256, 1000, 5, 15, 9, 3, 1)]
    results = [("p", 4096 + place) for place in (workspace.sums, workspace.states, workspace.logits)]
    assert packed[4] == [*inputs, *numbers, *results]
    assert plain[4][15:20] == [("i", number) for number in (10, 15, 9, 9, 0)]
    assert modules["exact"].launches[2][4][-1] == ("p", None), "exact rows leave no logits that nobody asks for"


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
