"""How much memory is left to others: a size, nothing, or what the machine's profile says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avl_edge import BadInput, Runtime
from avl_edge.cli import run_app
from avl_edge.cli.reserve import reserve_bytes
from avl_edge.machine.device import read_machine
from avl_edge.serving.memory_pressure import MemoryPressureHandler
from tests.conftest import Checkpoints
from tests.equipment.machines import GB, TREES, write
from tests.equipment.short_memory import IMAGE, PROMPT, RESERVE, ask


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path, 6 * GB)
    return tmp_path


def test_without_a_reserve_memory_is_not_polled(
    checkpoint: Checkpoints, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avl_edge.machine.pressure.read_shortage", None)
    runtime = Runtime.load(checkpoint("mistral-gqa"), device_root=tree)
    assert ask(runtime).result().finish_reason == "length"
    with pytest.raises(BadInput, match="reserve_bytes must be 0 or more bytes, not -1"):
        Runtime.load(checkpoint("mistral-gqa"), reserve_bytes=-1, device_root=tree)


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
    monkeypatch.setattr("avl_edge.machine.device.read_machine", lambda: read_machine(TREES / name))
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

    usual = Runtime.keep_free

    def keep_free(runtime: Runtime, reserve: int) -> None:
        assert reserve == RESERVE
        usual(runtime, reserve, root=tree, every_ms=0)
        check = MemoryPressureHandler.check

        def until_it_waits(*arguments: Any) -> None:
            scheduler = runtime.debug.scheduler
            write(tree, 6 * GB if scheduler.is_held and scheduler.waiting else GB)
            check(*arguments)

        monkeypatch.setattr(MemoryPressureHandler, "check", until_it_waits)

    monkeypatch.setattr(Runtime, "keep_free", keep_free)
    options = ["--reserve", "2GB", "--stats", "--max-new-tokens", "8", "--method", "avl", "--secondary", "90"]
    assert run_app([*arguments, *options]) == 0
    err = capsys.readouterr().err
    assert "memory pressure" in err
    assert "2 demotions" in err
    assert "waited" in err
