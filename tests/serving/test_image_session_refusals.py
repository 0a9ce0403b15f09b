"""What cannot share a picture's rows is refused with what can; several prompts on the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avl_edge import BadInput, Formats, Options, Runtime, TooLarge
from avl_edge.cli import run_app
from tests.conftest import Checkpoints
from tests.equipment.image_sessions import FIRST, IMAGES, SECOND, is_empty


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"), threaded=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(method="h2o"), "h2o stores rows for one question alone: choose one of full, distinct, coarse, avl"),
        (Options(method="fastv", parameters={"drop": 0}), "fastv stores rows for one question alone"),
        (Options(method="streaming"), "streaming stores rows for one question alone"),
        (Options(method="random"), "random stores rows for one question alone"),
        (Options(method="attentionpack"), "attentionpack stores rows for one question alone"),
        (Options(method="avl"), "give avl with prefill_keep=100 and by_values=1, or secondary=100"),
        (Options(method="avl", parameters={"secondary": 60, "prefill_keep": 100}), "give avl with prefill_keep=100"),
        (Options(method="avl", parameters={"secondary": 60, "by_values": 1}), "give avl with prefill_keep=100"),
        (Options(method="coarse", parameters={"by_mass": 1}), "give coarse with by_mass=0"),
        (
            Options(formats=Formats("exact", "lowrank:8", "lowrank:8")),
            "give both one format, exact, int8, int8/int4 or int4",
        ),
        (Options(formats=Formats("exact", "int8", "int4")), "give both one format"),
        (Options(preset="paper"), "the preset paper stores rows for one question alone"),
        (Options(preset="best"), "there is no preset"),
        (Options(method="best"), "unknown method"),
        (Options(parameters={"core": 10}), "'full' takes no 'core'"),
    ],
)
def test_what_cannot_share_is_refused_with_what_can(runtime: Runtime, options: Options, message: str) -> None:
    """By ``open_images``, and by ``ask`` of an image session that others may ask."""
    session = runtime.open_images(IMAGES)
    for refused in (lambda: runtime.open_images(IMAGES, options), lambda: session.ask(FIRST, options)):
        with pytest.raises(BadInput, match=message) as refusal:
            refused()
        assert "\n" not in str(refusal.value)
    assert is_empty(runtime)


def test_what_makes_no_session_is_refused(runtime: Runtime) -> None:
    session, context = runtime.open_images(IMAGES), runtime.spec.text.context
    for refused, message in [
        (lambda: runtime.open_images([]), "an image session needs a picture"),
        (lambda: runtime.open_images("cam.jpg"), "put a single one into brackets"),
        (lambda: runtime.open_images([Path("none.jpg")]), "does not exist"),
        (lambda: runtime.open_images(IMAGES, {"method": "avl"}), "options must be avl_edge.Options"),  # type: ignore[arg-type]
        (lambda: runtime.open_images(IMAGES * 20), f"context ends at {context}"),
        (lambda: session.ask(""), "the prompt is empty"),
        (lambda: session.ask(FIRST, 3), "options must be avl_edge.Options"),  # type: ignore[arg-type]
        (lambda: session.ask(FIRST, {}), "options must be avl_edge.Options"),  # type: ignore[arg-type]
        (lambda: session.ask("boat " * context), f"context ends at {context}"),
        (lambda: session.ask(FIRST, Options(formats=Formats("int8", "exact", "exact"))), "formats of its session"),
        (lambda: session.ask(FIRST, Options(preset="lossless")), "formats of its session"),
    ]:
        with pytest.raises((BadInput, TooLarge), match=message):
            refused()
    with runtime.open_images(IMAGES, Options(preset="lossless", max_new_tokens=4)) as packed:
        assert packed.ask(FIRST).result().method == "full"
        assert packed.stats.formats["core"] == "int8/int4"


@pytest.mark.parametrize("name", ["small", "lossless"])
def test_presets_share(name: str) -> None:
    """Whatever the question's length, a preset stores of the picture what the session stored."""
    runtime = Runtime.load("demo", threaded=False)
    with runtime.open_images(IMAGES[:1], Options(preset=name, max_new_tokens=2)) as session:
        for prompt in ("Hi", FIRST, f"{FIRST} {SECOND} {FIRST}"):
            assert session.ask(prompt).result().token_ids
        assert session.ask(FIRST, Options(preset=name, max_new_tokens=2)).result().token_ids
    assert is_empty(runtime)


def test_a_question_stays_with_its_runtime(runtime: Runtime, checkpoint: Checkpoints) -> None:
    other = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
    with runtime.open_images(IMAGES[:1]) as session:
        question = session.prepare(FIRST)
        with pytest.raises(BadInput, match="another runtime"):
            other.submit(question)
        assert runtime.submit(question).result().token_ids
    assert is_empty(other)


def _with_template(checkpoint: Checkpoints, folder: Path, old: str, new: str) -> Runtime:
    shutil.copytree(checkpoint("llama-mha"), folder)
    path = folder / "chat_template.jinja"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return Runtime.open(folder, threaded=False)


def test_a_question_before_the_picture_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    early = "{{ message['content'][-1]['text'][:3] + message['role'].upper() + ': ' }}"
    runtime = _with_template(checkpoint, tmp_path / "m", "{{ message['role'].upper() + ': ' }}", early)
    with pytest.raises(BadInput, match="writes the question before the pictures: ask one at a time"):
        runtime.open_images(IMAGES)


def test_a_template_that_writes_something_new_is_noticed(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the date, and it is past midnight now."""
    dated = "{{ strftime_now('%d') + message['role'].upper() + ': ' }}"
    now = ["19"]
    monkeypatch.setattr("avl_edge.model.prompt.template.strftime_now", lambda _: now[0])
    runtime = _with_template(checkpoint, tmp_path / "m", "{{ message['role'].upper() + ': ' }}", dated)
    session = runtime.open_images(IMAGES)
    session.prepare(FIRST)
    now[0] = "20"
    with pytest.raises(BadInput, match="open them again"):
        session.prepare(FIRST)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], checkpoint: Checkpoints, tmp_path: Path) -> Iterator[Any]:
    picture = tmp_path / "cam.jpg"
    IMAGES[0].save(picture)

    def call(*options: str, image: str | None = str(picture)) -> tuple[int, str, str]:
        arguments = ["run", "--model", str(checkpoint("mistral-gqa")), "--max-new-tokens", "12", *options]
        code = run_app([*arguments, *(["--image", image] if image else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


BOTH = ("--prompt", FIRST, "--prompt", SECOND)


def test_several_prompts_are_answered_as_each_alone(run: Any) -> None:
    alone = {prompt: json.loads(run("--json", "--prompt", prompt)[1]) for prompt in (FIRST, SECOND)}
    code, out, err = run(*BOTH)
    cut = "avl-edge: the answer was cut after 12 tokens: raise --max-new-tokens\n"
    assert (code, err) == (0, 2 * cut)
    assert out == "".join(f"{prompt}\n{document['text']}\n" for prompt, document in alone.items())
    code, out, err = run(*BOTH, "--json")
    document = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert [each["prompt"] for each in document["answers"]] == [FIRST, SECOND]
    for answer in document["answers"]:
        single = alone[answer.pop("prompt")]
        assert {*answer, "memory"} == set(single), "what the process held is told once"
        assert (answer["token_ids"], answer["usage"]) == (single["token_ids"], single["usage"])
        assert answer["kv"]["bytes_stored"] + answer["kv"]["bytes_shared"] == single["kv"]["bytes_stored"]
    assert document["session"]["bytes_stored"] == document["answers"][0]["kv"]["bytes_shared"]
    assert document["memory"]["entries"]["weights"] == alone[FIRST]["memory"]["entries"]["weights"]
    code, _, err = run(*BOTH, "--stats")
    assert code == 0
    assert err.count("KV shared") == err.count("KV stored / peak / full") == 2
    assert "of rows held once" in err


def test_a_budget_holds_for_the_picture_and_all_questions(run: Any) -> None:
    whole = json.loads(run(*BOTH, "--json")[1])
    peak = whole["session"]["bytes_peak"] + sum(each["kv"]["bytes_peak"] for each in whole["answers"])
    code, _, err = run(*BOTH, "--kv-budget", str(peak))
    assert (code, "rows exact, hold at most" in err) == (0, True)
    code, out, err = run(*BOTH, "--kv-budget", str(peak - 1), "--json")
    document = json.loads(out)
    assert (code, "2 questions, rows int8, hold at most" in err) == (0, True)
    held = document["session"]["bytes_peak"] + sum(each["kv"]["bytes_peak"] for each in document["answers"])
    assert held < peak
    code, out, err = run(*BOTH, "--kv-budget", "10kB")
    found = re.search(r"smallest that would do is .*\((\d+) bytes\)", err)
    assert (code, out, bool(found)) == (3, "", True)
    assert found
    assert run(*BOTH, "--kv-budget", found[1])[0] == 0
    assert run(*BOTH, "--kv-budget", str(int(found[1]) - 1))[0] == 3
    assert run(*BOTH, "--kv-budget", found[1], "--kv-format", "exact")[0] == 3
    code, _, least = run(
        *BOTH, "--kv-budget", "10kB", "--method", "distinct", "--set", "secondary=1", "--kv-format", "int4"
    )
    assert (code, re.search(r"smallest that would do is .*\((\d+) bytes\)", least)[1]) == (3, found[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "h2o"], "choose one of full, distinct, coarse, avl"),
        (["--method", "avl"], "give avl with prefill_keep=100 and by_values=1"),
        (["--kv-format", "lowrank:8"], "give both one format"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_methods_that_share_nothing_are_refused_in_a_line(run: Any, options: list[str], message: str) -> None:
    code, out, err = run(*BOTH, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("avl-edge: ")
    assert message in err
    code, _, err = run(*BOTH, image=None)
    assert (code, "several prompts share a picture: give --image" in err) == (2, True)
