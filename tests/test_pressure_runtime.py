"""A runtime whose machine runs short of memory: in order, within its budgets, and never longer than it has to."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avl_edge import BadInput, Formats, Generation, Options, Runtime
from avl_edge.budget import peak_pages
from avl_edge.cache import prompt_shape
from avl_edge.cli import run_app
from avl_edge.cli.reserve import reserve_bytes
from avl_edge.device import read_machine
from avl_edge.pressure import Limits, Monitor
from tests.checkpoints import random_image
from tests.conftest import Checkpoints
from tests.test_pressure import GB, write

ROOT = Path(__file__).parent.parent
IMAGE = random_image(3, (120, 80))
PROMPT = "Describe the picture in detail."
FULL = Options(max_new_tokens=30)
AVL = Options(method="avl", parameters={"secondary": 100, "prefill_keep": 100, "core": 40}, max_new_tokens=40)
RESERVE = 2 * GB


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path, 6 * GB)
    return tmp_path


@pytest.fixture
def runtime(checkpoint: Checkpoints, tree: Path) -> Runtime:
    """One that looks before every step."""
    runtime = Runtime.load(checkpoint("mistral-gqa"), reserve_bytes=RESERVE, device_root=tree)
    runtime._monitor = Monitor(Limits(RESERVE), tree, every_ms=0)
    return runtime


def _ask(runtime: Runtime, options: Options = FULL) -> Generation:
    return runtime.generate([IMAGE], PROMPT, options)


def _check(runtime: Runtime, *alive: Generation) -> None:
    caches = [each.cache for each in alive if each.cache]
    runtime._pool.check_integrity([cache.rows for cache in caches])
    for each in alive:
        lease = each.cache.rows.lease if each.cache else None
        assert lease is None or lease.held <= lease.limit <= each._sequence.request.plan.pages


def _formats(generation: Generation) -> Formats:
    assert generation.cache is not None
    return generation.cache.formats


def test_with_enough_memory_nothing_happens(runtime: Runtime, checkpoint: Checkpoints) -> None:
    expected = _ask(Runtime.load(checkpoint("mistral-gqa")), AVL).result()
    result = _ask(runtime, AVL).result()
    assert result.token_ids == expected.token_ids
    assert result.kv == expected.kv
    assert vars(result.kv.pressure) == {"demotions": 0, "rows_evicted": 0, "waited_ms": 0.0, "bytes_given_back": 0}


def test_memory_that_comes_and_goes_above_the_reserve_changes_nothing(runtime: Runtime, tree: Path) -> None:
    expected = _ask(runtime, AVL).result().token_ids
    generation = _ask(runtime, AVL)
    for number, _ in enumerate(generation):
        write(tree, (3 + number % 5) * GB)
    assert generation.result().token_ids == expected
    assert generation.result().kv.pressure.demotions == 0


def test_formats_then_rows_then_requests(runtime: Runtime, tree: Path) -> None:
    """A-VL under pressure from its fourth token on: one notch a step, in order, and the core stays as it is."""
    generation = _ask(runtime, AVL)
    for _ in range(3):
        next(generation)
    write(tree, GB)
    seen = []
    for _ in range(8):
        next(generation)
        _check(runtime, generation)
        assert generation.cache is not None
        stored = sum(len(rows.image_ids) for rows in generation.cache.rows)
        seen.append((_formats(generation).secondary, stored, runtime._scheduler.is_held))
    rows = [count for _, count, _ in seen]
    assert [name for name, _, _ in seen] == ["int8", "int4"] + ["int4"] * 6
    assert rows[0] == rows[1] == 5 * 36
    assert sorted(set(rows), reverse=True) == rows[1:6]
    assert rows[5] == rows[-1] == 5 * 14
    assert [held for _, _, held in seen] == [False] * 6 + [True] * 2
    assert (_formats(generation).core, _formats(generation).text) == ("exact", "exact")
    write(tree, 6 * GB)
    result = generation.result()
    assert (result.finish_reason, len(result.token_ids)) == ("length", 40)
    assert result.formats == {"text": "exact", "core": "exact", "secondary": "int4"}
    assert (result.kv.pressure.demotions, result.kv.pressure.rows_evicted) == (2, 5 * 22)
    assert not runtime._scheduler.is_held
    assert _ask(runtime, AVL).result().formats["secondary"] == "exact"


def test_features_of_earlier_pictures_go(runtime: Runtime, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a convenience: memory that is short takes them, and the next question encodes its picture again."""
    encoded: list[int] = []
    encode = runtime._backend.encode_images  # type: ignore[union-attr]
    monkeypatch.setattr(runtime._backend, "encode_images", lambda pixels: encoded.append(1) or encode(pixels))
    _ask(runtime).result()
    _ask(runtime).result()
    assert len(encoded) == 1
    write(tree, GB)
    runtime.step()
    write(tree, 6 * GB)
    _ask(runtime).result()
    assert len(encoded) == 2


def test_pressure_before_there_are_weights(checkpoint: Checkpoints, tree: Path) -> None:
    runtime = Runtime.open(checkpoint("mistral-gqa"))
    runtime.keep_free(RESERVE, root=tree)
    write(tree, GB)
    assert not runtime.step()


def test_low_rank_rows_can_only_go(runtime: Runtime, tree: Path) -> None:
    """There is no smaller format for them. The basis of their layer stays, and moves with the other rows."""
    options = Options("avl", {"secondary": 90, "core": 30}, Formats("exact", "exact", "lowrank:8"), max_new_tokens=30)
    generation = _ask(runtime, options)
    for _ in range(4):
        next(generation)
    write(tree, GB)
    for _ in range(8):
        next(generation)
        _check(runtime, generation)
    assert generation.cache is not None
    assert [len(rows.basis) for rows in generation.cache.rows] == [8] * 5
    pressure = generation.result().kv.pressure
    assert (pressure.demotions, pressure.rows_evicted) == (0, 5 * (32 - 10))


def test_full_attention_packs_all_image_rows(runtime: Runtime, tree: Path) -> None:
    generation = _ask(runtime)
    next(generation)
    write(tree, GB)
    next(generation)
    assert _formats(generation) == Formats("exact", "int8", "int8")
    write(tree, 6 * GB)
    next(generation)
    assert _formats(generation) == Formats("exact", "int8", "int8"), "rows were promoted again"
    cache, request = generation.cache, generation._sequence.request
    assert cache is not None
    shape = prompt_shape(len(request.prompt), request.prompt.spans)
    promised = peak_pages(request.plan.method, cache.formats, runtime.kv_shape, shape, request.max_new_tokens - 1)
    assert cache.rows.lease.limit == promised < request.plan.pages
    assert generation.result().kv.pressure.demotions == 1


def test_the_answer_goes_on_as_if_it_had_been_packed_from_there(runtime: Runtime, tree: Path) -> None:
    """What follows the first token is what a request answers whose image rows were int8 from the start."""
    packed = _ask(runtime, Options(formats=Formats("exact", "int8", "int8"), max_new_tokens=30)).result()
    generation = _ask(runtime)
    next(generation)
    write(tree, GB)
    next(generation)
    write(tree, 6 * GB)
    result = generation.result()
    assert result.token_ids == packed.token_ids
    assert result.kv.bytes_stored == packed.kv.bytes_stored


def test_the_budget_holds_under_pressure(runtime: Runtime, tree: Path) -> None:
    shape = runtime.prepare([IMAGE], PROMPT, FULL)
    for budget in (shape.plan.peak_bytes, shape.plan.peak_bytes // 2):
        generation = _ask(runtime, Options(kv_budget=budget, max_new_tokens=30))
        next(generation)
        write(tree, GB)
        for _ in generation:
            _check(runtime, *([] if generation._sequence.result else [generation]))
        kv = generation.result().kv
        assert kv.bytes_stored <= kv.bytes_peak <= budget
        write(tree, 6 * GB)


def test_who_comes_under_pressure_waits_and_says_so(
    runtime: Runtime, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With nobody running there is nothing to give: the request is held at once, and admitted when there is room."""
    write(tree, GB)
    generation = _ask(runtime)
    with caplog.at_level(logging.WARNING, "avl_edge"):
        for _ in range(3):
            assert runtime.step()
        assert generation.cache is None
        assert runtime.is_waiting
        write(tree, 2 * GB + 10**6)
        assert runtime.step()
        assert runtime.is_waiting, "it would flutter"
        write(tree, 6 * GB)
        result = generation.result()
    assert not runtime.is_waiting
    assert result.finish_reason == "length"
    assert 60 <= result.kv.pressure.waited_ms < 60_000
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "avl-edge: memory is short",
        "avl-edge: there is memory again",
    ]
    assert _ask(runtime).result().kv.pressure.waited_ms == 0


def test_who_runs_goes_on_while_others_wait(runtime: Runtime, tree: Path) -> None:
    first = _ask(runtime)
    next(first)
    write(tree, GB)
    for _ in range(4):
        next(first)
    assert runtime._scheduler.is_held
    second = _ask(runtime)
    assert first.result().finish_reason == "length"
    assert second.cache is None
    assert runtime.step()
    assert second.cache is None
    cancelled = _ask(runtime)
    runtime.step()
    cancelled.close()
    assert cancelled.result().finish_reason == "cancelled"
    assert cancelled.result().kv.pressure.waited_ms > 0
    write(tree, 6 * GB)
    assert second.result().finish_reason == "length"
    assert second.result().kv.pressure.waited_ms > cancelled.result().kv.pressure.waited_ms
    assert second.result().formats == FULL_EXACT


FULL_EXACT = {"text": "exact", "core": "exact", "secondary": "exact"}


def test_a_waiting_thread_lets_others_in(runtime: Runtime, tree: Path) -> None:
    """It waits outside of the lock: another may cancel, ask or end the pressure meanwhile."""
    write(tree, GB)
    generation = _ask(runtime)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(generation.result()), daemon=True)
    thread.start()
    other = _ask(runtime)
    other.close()
    assert not done
    write(tree, 6 * GB)
    thread.join(30)
    assert done[0].finish_reason == "length"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_breaks_off_a_notch_ends_that_request_and_no_other(
    runtime: Runtime, tree: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    expected = _ask(runtime, Options(max_new_tokens=30, formats=Formats("exact", "int8", "int8"))).result().token_ids
    first, second = _ask(runtime), _ask(runtime)
    next(first), next(second)
    write(tree, GB)
    rows = runtime._rows
    assert rows is not None
    demote, calls = rows.demote, 0

    def fails_once(*arguments: Any) -> bool:
        nonlocal calls
        calls += 1
        done = demote(*arguments)
        if calls == 1:
            raise error
        return done

    monkeypatch.setattr(rows, "demote", fails_once)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            runtime.step()
    else:
        runtime.step()
        write(tree, 6 * GB)
    _check(runtime, second)
    assert first._sequence.result is not None
    assert first.cache is None
    if error is KeyboardInterrupt:
        runtime.step()
        write(tree, 6 * GB)
    assert second.result().token_ids == expected
    assert runtime.kv_bytes_in_use == 0
    if error is MemoryError:
        first._sequence.events.clear()
        with pytest.raises(MemoryError):
            next(first)


def test_who_was_let_in_before_an_interrupt_gives_nothing_yet(
    runtime: Runtime, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that let it in ended before it took a row, and in the next one memory is short."""
    expected = _ask(runtime).result().token_ids
    generation = _ask(runtime)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runtime.step()
    write(tree, GB)
    runtime.step()
    write(tree, 6 * GB)
    assert generation.result().token_ids == expected
    assert generation.result().kv.pressure.demotions == 0
    _check(runtime, generation)


def test_free_pages_go_back_to_the_system(runtime: Runtime, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All whole pages of a finished request, once; the next one finds them empty, and answers the same."""
    expected = _ask(runtime).result()
    rows, back = runtime._rows, list[int]()
    assert rows is not None
    give_back = rows.give_back
    monkeypatch.setattr(rows, "give_back", lambda pages: back.append(give_back(pages)) or back[-1])
    runtime.step()
    assert back == []
    write(tree, GB)
    runtime.step(), runtime.step()
    assert 0.8 * expected.kv.bytes_peak < back[0] <= expected.kv.bytes_peak
    assert not any(back[1:])
    write(tree, 6 * GB)
    assert _ask(runtime).result().token_ids == expected.token_ids


def test_without_a_reserve_nobody_looks(checkpoint: Checkpoints, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avl_edge.pressure.read_shortage", None)
    runtime = Runtime.load(checkpoint("mistral-gqa"), device_root=tree)
    assert _ask(runtime).result().finish_reason == "length"
    with pytest.raises(BadInput, match="reserve_bytes must be 0 or more bytes, not -1"):
        Runtime.load(checkpoint("mistral-gqa"), reserve_bytes=-1, device_root=tree)


_GREEDY = """
import sys
from pathlib import Path

group, taken = Path(sys.argv[1]), []
for line in sys.stdin:
    if line.startswith("take"):
        taken.append(bytearray(b"x") * (32 * 2**20))
    else:
        taken.clear()
    resident = int(open("/proc/self/statm").read().split()[1]) * 4096
    (group / "memory.current").write_text(f"{resident}\\n")
    print(resident, flush=True)
"""


class Greedy:
    """A process that really takes memory, in a control group of ``limit`` bytes that holds nobody else."""

    def __init__(self, root: Path, limit: int) -> None:
        group = root / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (root / "proc/self").mkdir()
        (root / "proc/self/cgroup").write_text("0::/\n")
        (group / "memory.max").write_text(f"{limit}\n")
        command = [sys.executable, "-c", _GREEDY, str(group)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.tell("free")

    def tell(self, word: str) -> int:
        """``take`` 32 MiB, or ``free`` all; how much it has then."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture
def greedy(tree: Path) -> Iterator[Greedy]:
    process = Greedy(tree, 200 * 2**20)
    yield process
    process.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_another_process_takes_memory_and_gives_it_back(checkpoint: Checkpoints, tree: Path, greedy: Greedy) -> None:
    runtime = Runtime.load(checkpoint("mistral-gqa"))
    runtime._monitor = Monitor(Limits(64 * 2**20), tree, every_ms=0)
    generation = _ask(runtime, AVL)
    next(generation)
    assert _formats(generation) == Formats()
    while greedy.tell("take") < (200 - 64) * 2**20:
        next(generation)
        assert _formats(generation) == Formats()
    next(generation)
    assert _formats(generation).secondary == "int8"
    next(generation)
    assert _formats(generation).secondary == "int4"
    for _ in range(5):
        next(generation)
    assert runtime._scheduler.is_held
    waiting = _ask(runtime, AVL)
    next(generation)
    assert waiting.cache is None
    _check(runtime, generation)
    greedy.tell("free")
    assert waiting.result().kv.pressure.demotions == 0
    assert waiting.result().kv.pressure.waited_ms > 0
    assert generation.result().kv.pressure.rows_evicted == 5 * 22


@pytest.mark.slow
def test_the_demo_still_reads_the_speed_from_packed_rows(tree: Path) -> None:
    picture, question = str(ROOT / "examples" / "cockpit.png"), "What is the speed?"
    runtime = Runtime.load("demo")
    exact = runtime.generate([picture], question).result()
    packed = runtime.generate([picture], question, Options(formats=Formats("int8", "int8", "int8"))).result()
    runtime._monitor = Monitor(Limits(RESERVE), tree, every_ms=0)
    generation = runtime.generate([picture], question)
    next(generation)
    write(tree, GB)
    next(generation)
    write(tree, 6 * GB)
    result = generation.result()
    assert result.text == packed.text == exact.text == "18 km/h"
    assert result.formats == {"text": "exact", "core": "int8", "secondary": "int8"}
    given = result.kv.pressure.bytes_given_back
    assert 0.4 * exact.kv.bytes_stored < given < 0.6 * exact.kv.bytes_stored


def test_reserve_is_a_size_or_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reserve_bytes("1.5GiB") == 3 * 2**29
    assert reserve_bytes("0") == 0
    assert reserve_bytes("off") is reserve_bytes(" OFF ") is None
    with pytest.raises(BadInput, match="cannot read 'much' as a size"):
        reserve_bytes("much")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("agx-orin-64-jp62", 49968128 * 1024 // 10), ("orin-nano-jp62", None), ("pc-no-gpu", 1717990000)],
)
def test_by_default_it_is_the_profiles(
    name: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most a tenth of what is available now; nothing where no profile is for the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("avl_edge.device.read_machine", lambda: read_machine(ROOT / "tests" / "trees" / name))
    assert reserve_bytes(None) == expected


def test_the_command_line_keeps_a_reserve(
    checkpoint: Checkpoints,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "cam.png"
    IMAGE.save(picture)
    arguments = ["run", "--model", str(checkpoint("mistral-gqa")), "--image", str(picture), "--prompt", PROMPT]
    assert run_app([*arguments, "--reserve", "100000GB"]) == 2
    assert "a reserve of 100000.0 GB cannot be kept: there are" in capsys.readouterr().err
    write(tree, GB)

    def keep_free(runtime: Runtime, reserve: int) -> None:
        assert reserve == RESERVE
        runtime._monitor = Monitor(Limits(reserve), tree, every_ms=0)
        step = runtime.step

        def until_it_waits() -> bool:
            write(tree, 6 * GB if runtime.is_waiting else GB)
            return step()

        monkeypatch.setattr(runtime, "step", until_it_waits)

    monkeypatch.setattr(Runtime, "keep_free", keep_free)
    options = ["--reserve", "2GB", "--stats", "--max-new-tokens", "8", "--method", "avl", "--secondary", "90"]
    assert run_app([*arguments, *options]) == 0
    err = capsys.readouterr().err
    assert "memory pressure" in err
    assert "2 demotions" in err
    assert "waited" in err
