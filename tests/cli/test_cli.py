"""The command line as a person meets it: answers, plans, refusals, interrupts. Real files, real processes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from avl_edge.cli import run_app
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.command_line import COMMAND, Outcome
from tests.equipment.machines import TREES
from tests.equipment.processes import hear_interrupts

PROMPT = "What is shown?"


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> str:
    return str(checkpoint("mistral-gqa"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "cam.jpg"
    random_image(5, (120, 90)).save(path)
    return str(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], model: str, picture: str):  # type: ignore[no-untyped-def]
    """``run(*options)`` on the small model; ``image`` and ``prompt`` may be replaced or left out with None."""

    def call(*options: str, image: str | None = picture, prompt: str | None = PROMPT, model: str = model) -> Outcome:
        arguments = ["run", "--model", model, *options]
        arguments += [] if image is None else ["--image", image]
        arguments += [] if prompt is None else ["--prompt", prompt]
        code = run_app(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def test_json_is_one_document_and_nothing_else(run) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--json", "--method", "avl", "--max-new-tokens", "30")
    assert (outcome.code, outcome.err) == (0, "")
    document = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert set(document) >= {
        "text",
        "token_ids",
        "finish_reason",
        "model",
        "backend",
        "method",
        "usage",
        "timings",
        "kv",
    }
    assert set(document["usage"]) == {"prompt_tokens", "image_tokens", "completion_tokens"}
    assert set(document["timings"]) == {
        "load_ms",
        "encode_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms_per_token",
        "tokens_per_s",
    }
    kv = document["kv"]
    assert set(kv) >= {"bytes_full", "bytes_stored", "bytes_peak", "rows_read_fraction", "refreshes", "layers"}
    assert len(kv["layers"]) == 5
    assert set(kv["layers"][0]) == {"text", "core", "secondary", "freed"}
    assert 0 < kv["bytes_stored"] <= kv["bytes_peak"] < kv["bytes_full"]
    assert document["usage"]["completion_tokens"] == len(document["token_ids"]) == 30


def test_any_parameter_can_be_set(run) -> None:  # type: ignore[no-untyped-def]
    options = ["--json", "--method", "avl", "--max-new-tokens", "3", "--core", "10"]
    settings = json.loads(run(*options, "--set", "text-floor=5", "--set", "heavy=12.5").out)["settings"]
    assert (settings["text_floor"], settings["heavy"], settings["core"]) == (5, 12.5, 10)


@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ([], ("exact", "exact", "exact")),
        (["--kv-format", "int8"], ("int8", "int8", "int8")),
        (["--kv-format", "int4", "--text-format", "exact", "--core-format", "int8"], ("exact", "int8", "int4")),
        (["--method", "avl", "--secondary-format", "int4"], ("exact", "exact", "int4")),
        (["--method", "coarse", "--kv-format", "int8", "--set", "mass=90"], ("int8", "int8", "int8")),
        (["--kv-format", "lowrank:8"], ("exact", "lowrank:8", "lowrank:8")),
    ],
)
def test_formats_of_rows(run, options: list[str], formats: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--json", "--max-new-tokens", "8", *options)
    document = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert document["formats"] == dict(zip(("text", "core", "secondary"), formats, strict=True))
    kv = document["kv"]
    assert (kv["bytes_stored"] < kv["bytes_full"]) == (kv["bytes_read_fraction"] < 1) == bool(options)
    table = run("--stats", "--max-new-tokens", "3", *options).err
    spoken = ", ".join(f"{tier} {name}" for tier, name in document["formats"].items() if name != "exact")
    assert f"formats                  {spoken or 'exact'}" in table


def test_text_streams_the_same_answer(run) -> None:  # type: ignore[no-untyped-def]
    document = json.loads(run("--json", "--max-new-tokens", "20").out)
    outcome = run("--max-new-tokens", "20")
    assert outcome.out == document["text"] + "\n"
    assert outcome.err == ""


def test_stats_go_to_stderr(run) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--stats", "--max-new-tokens", "5")
    assert outcome.code == 0
    assert "KV stored / peak / full" in outcome.err
    assert "KV" not in outcome.out


def test_a_budget_picks_and_says_so(run) -> None:  # type: ignore[no-untyped-def]
    full = json.loads(run("--json", "--max-new-tokens", "40").out)["kv"]["bytes_peak"]
    budget = int(0.7 * full)
    outcome = run("--json", "--max-new-tokens", "40", "--kv-budget", str(budget), "--method", "avl")
    document = json.loads(outcome.out)
    assert document["method"] == "avl"
    assert re.match(
        r"avl-edge: avl P \d+ S \d+ C \d+ K 3 T \d+ holds at most [\d.]+ kB of the [\d.]+ kB budget", outcome.err
    )
    assert document["kv"]["bytes_peak"] <= budget == document["kv"]["bytes_budget"]
    assert document["settings"]["secondary"] < 100
    assert set(document["formats"].values()) == {"exact"}


def test_a_budget_without_a_method_is_kept_and_what_was_picked_is_said(run) -> None:  # type: ignore[no-untyped-def]
    full = json.loads(run("--json", "--max-new-tokens", "40").out)["kv"]["bytes_peak"]
    for share in (0.9, 0.5, 0.2):
        outcome = run("--json", "--max-new-tokens", "40", "--kv-budget", str(int(share * full)))
        document = json.loads(outcome.out)
        assert document["kv"]["bytes_peak"] <= share * full
        packed = [f"{tier} {name}" for tier, name in document["formats"].items() if name != "exact"]
        assert packed
        assert re.match(rf"avl-edge: {document['method']}[ ,]", outcome.err)
        assert ", ".join(packed) in outcome.err
    outcome = run("--json", "--max-new-tokens", "40", "--kv-budget", str(full))
    assert outcome.err.startswith("avl-edge: full holds at most ")
    assert set(json.loads(outcome.out)["formats"].values()) == {"exact"}


def test_what_does_not_fit_is_refused_with_the_smallest_that_does(run) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--kv-budget", "10kB", "--json")
    assert (outcome.code, outcome.out) == (3, "")
    smallest = re.search(r"smallest that would do is .*? \((\d+) bytes\)", outcome.err)
    assert smallest
    assert run("--kv-budget", smallest.group(1), "--json").code == 0
    assert run("--kv-budget", str(int(smallest.group(1)) - 1), "--json").code == 3
    assert run("--kv-budget", smallest.group(1), "--method", "full").code == 3


def _png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


BAD_PICTURES = {
    "empty.jpg": (b"", "is empty"),
    "note.jpg": (b"not a picture at all\n", "holds text, not a picture"),
    "cut.jpg": (_encoded(random_image(1, (200, 200)), "JPEG")[:2000], "is damaged"),
    "huge.png": (_png_header(50_000, 50_000), "too large: 50000 x 50000"),
    "thin.png": (_encoded(random_image(1, (1, 4000)), "PNG"), "too narrow: 1 x 4000"),
    "moving.gif": (
        _encoded(random_image(1, 20), "GIF", save_all=True, append_images=[random_image(2, 20)]),
        "GIF is not supported: use JPEG, PNG, WebP or BMP",
    ),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(run, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    content, message = BAD_PICTURES[name]
    path = tmp_path / name
    path.write_bytes(content)
    _refused(run(image=str(path)), message, name)


def _refused(outcome: Outcome, *messages: str) -> None:
    """Exit code 2, one line on stderr that says why, nothing on stdout."""
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("avl-edge: ")
    assert outcome.err.count("\n") == 1
    for message in messages:
        assert message in outcome.err


def test_bad_paths(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _refused(run(image=str(tmp_path / "none.jpg")), "does not exist", "none.jpg")
    _refused(run(image=str(tmp_path)), "is a directory")
    _refused(run(model=str(tmp_path / "nothing")), "there is no model")
    _refused(run(model=""), "there is no model")
    _refused(run(model=str(tmp_path)), "has no config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--secondary", "0", "--method", "avl"], "secondary (S) must be above 0"),
        (["--core", "101", "--method", "avl"], "core (C) must be above 0 and at most 100"),
        (["--core", "50", "--method", "avl"], "P >= S >= C"),
        (["--refresh", "-1", "--method", "avl"], "refresh (K)"),
        (["--text-keep", "0", "--method", "avl"], "text_keep (T)"),
        (["--core", "20"], "'core' is a parameter of avl"),
        (["--core", "20"], "name the method, as in --method avl"),
        (["--method", "avl", "--core", "20", "--set", "core=10"], "'core' is given twice"),
        (["--method", "avl", "--set", "core=10", "--set", "core=10"], "'core' is given twice"),
        (["--method", "avl", "--set", "refresh=inf"], "must be a number, not inf"),
        (["--method", "avl", "--set", "refresh=2.5"], "refresh (K)"),
        (["--method", "best"], "choose one of full"),
        (["--set", "text_floor"], "give NAME=VALUE"),
        (["--set", "text_floor=many"], "give NAME=VALUE"),
        (["--method", "avl", "--set", "floor=3"], "takes no 'floor', a parameter of no method"),
        (["--kv-budget", "0"], "must be more than 0"),
        (["--kv-budget", "lots"], "like 160MB"),
        (["--kv-format", "int9"], "format must be exact, int8, int4, lowrank:R or lowrank:R+int8, not 'int9'"),
        (["--core-format", "lowrank:"], "the core format must be exact"),
        (["--kv-format", ""], "the text format must be exact"),
        (["--text-format", "lowrank:8"], "text rows cannot be low-rank: choose exact, int8 or int4"),
        (["--secondary-format", "lowrank:33"], "the secondary format lowrank:33 asks for more"),
        (["--core-format", "lowrank:16", "--secondary-format", "lowrank:8"], "give both one rank"),
        (["--method", "coarse", "--core-format", "int8"], "give core and secondary rows the same format"),
        (["--method", "coarse", "--kv-format", "lowrank:16"], "coarse looks at the keys of stored rows"),
        (["--method", "coarse", "--core", "200", "--kv-budget", "1MB"], "core must be above 0"),
        (["--method", "streaming", "--set", "window=0", "--kv-budget", "1MB"], "window must be"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--threads", "0"], "--help"),
        (["--threads", "1000000000"], "--help"),
        (["--refresh", "x"], "--help"),
        (["--frobnicate"], "--help"),
    ],
)
def test_options_out_of_range(run, options: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    _refused(run(*options), message)


def test_bad_prompts(run) -> None:  # type: ignore[no-untyped-def]
    _refused(run(prompt=""), "prompt is empty")
    _refused(run(prompt=" \n"), "prompt is empty")
    _refused(run(prompt=None), "--prompt")
    _refused(run(prompt="boat " * 600), "context ends at 512")
    _refused(run(prompt="<image> what?"), "contains <image>")


def test_faults_of_ours_have_their_own_code_and_no_trace(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fail(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("avl_edge.backends.cpu.target.Llava", fail)
    outcome = run()
    assert outcome.code == 1
    assert (
        outcome.err == "avl-edge: internal error: RuntimeError: disk on fire (run again with --debug for the trace)\n"
    )
    with pytest.raises(RuntimeError, match="on fire"):
        run("--debug")


def test_doctor_reads_a_recorded_tree(capsys: pytest.CaptureFixture[str]) -> None:
    for tree in sorted(path for path in TREES.iterdir() if path.is_dir()):
        code = run_app(["doctor", "--root", str(tree), "--json"])
        document = json.loads(capsys.readouterr().out)
        assert code == (0 if document["ok"] else 1)
        assert run_app(["doctor", "--root", str(tree)]) == code
        assert len(capsys.readouterr().out.splitlines()) > len(document["checks"])
    assert run_app(["doctor", "--root", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("avl-edge: ")


def test_help_and_version(run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    assert run_app(["--version"]) == 0
    assert re.fullmatch(r"avl-edge \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert run_app(["run", "--help"]) == 0
    assert "--kv-budget" in capsys.readouterr().out


def test_a_picture_from_stdin(model: str, picture: str) -> None:
    options = ["--model", model, "--prompt", PROMPT, "--max-new-tokens", "8"]
    piped = subprocess.run(
        [*COMMAND, *options, "--image", "-"], input=Path(picture).read_bytes(), capture_output=True, timeout=120
    )
    direct = subprocess.run([*COMMAND, *options, "--image", picture], capture_output=True, timeout=120)
    assert piped.returncode == direct.returncode == 0
    assert piped.stdout == direct.stdout != b"\n"
    assert direct.stderr == b""


def test_interrupt_stops_with_130_and_no_trace(model: str, picture: str) -> None:
    options = ["--model", model, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        [*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_interrupts
    )
    assert process.stdout
    os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert time.monotonic() - start < 30


def test_a_reader_that_leaves_is_no_fault(model: str, picture: str) -> None:
    """``avl-edge run ... | head -c 1``: the pipe breaks, which ends the run quietly."""
    options = ["--model", model, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", "300"]
    process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in errors
    assert b"internal error" not in errors


@pytest.mark.parametrize("as_json", [False, True])
def test_a_terminal_that_cannot_show_the_answer_is_no_fault(model: str, picture: str, as_json: bool) -> None:
    """The random model says bytes of every kind; what ASCII lacks is replaced, or escaped in JSON."""
    options = ["--model", model, "--image", picture, "--prompt", PROMPT, *(["--json"] if as_json else [])]
    plain = subprocess.run([*COMMAND, *options], capture_output=True, check=True, env=_encoding("utf-8"))
    ascii_ = subprocess.run([*COMMAND, *options], capture_output=True, check=True, env=_encoding("ascii"))
    text = plain.stdout.decode()
    if as_json:
        assert _without_times(text) == _without_times(ascii_.stdout.decode("ascii"))
    else:
        assert not text.isascii()
        assert text.encode("ascii", "replace") == ascii_.stdout


def _encoding(name: str) -> dict[str, str]:
    return {**os.environ, "PYTHONIOENCODING": name}


def _without_times(document: str) -> dict[str, object]:
    return {name: value for name, value in json.loads(document).items() if name != "timings"}
