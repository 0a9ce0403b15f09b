"""Pictures are paid for once: whoever asks again, about the same pixels, finds their rows; and gets the same answer."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from threading import Barrier, Thread
from typing import Any

import pytest
from PIL import Image

from avl_edge import Options, Runtime
from avl_edge.server.settings import Settings
from tests.conftest import Checkpoints
from tests.equipment.served import Served, asking, picture, raw_post, serving, wait_for
from tests.equipment.slow_backend import stopped

RED, GREEN, BLUE = picture((200, 0, 0)), picture((0, 200, 0)), picture((0, 0, 200))
QUESTIONS = ("What is it?", "Of which colour is the field?", "Is there a corner?")


@pytest.fixture
def served(checkpoint: Checkpoints) -> Iterator[Served]:
    with serving(checkpoint("mistral-gqa")) as served:
        yield served


@pytest.fixture(scope="module")
def fresh(checkpoint: Checkpoints) -> Iterator[Runtime]:
    """What has never seen a picture, to compare with."""
    with Runtime.load(checkpoint("mistral-gqa")) as runtime:
        yield runtime


def _ask(served: Served, body: dict[str, Any], key: str = "") -> tuple[str, int]:
    status, _, document = served.post(body, authorization=f"Bearer {key}")
    assert status == 200, document
    return document["choices"][0]["message"]["content"], document["usage"]["prompt_tokens_details"]["cached_tokens"]


def _counted(served: Served) -> list[int]:
    """How many pictures the backend has encoded and prompts it has begun, from now on."""
    backend: Any = served.runtime.debug.backend
    counts = [0, 0]

    def counted(place: int, function: Any) -> Any:
        def count(*given: Any, **named: Any) -> Any:
            counts[place] += 1
            return function(*given, **named)

        return count

    backend.begin_encode = counted(0, backend.begin_encode)
    backend.begin_prefill = counted(1, backend.begin_prefill)
    return counts


@pytest.mark.parametrize("asks", [1, 2])
def test_answers_are_those_of_fresh_requests(served: Served, fresh: Runtime, asks: int) -> None:
    for shown in ([RED], [GREEN, BLUE]):
        for question in QUESTIONS * asks:
            expected = fresh.generate(shown, question, Options(max_new_tokens=8)).result().text
            assert _ask(served, asking(question, *shown))[0] == expected


def test_a_second_question_runs_its_own_words_alone(served: Served) -> None:
    (_, first), (_, second) = (_ask(served, asking(each, RED), key) for each, key in zip(QUESTIONS, "ab", strict=False))
    assert (first, second > 0) == (0, True)
    tokens = served.post(asking(QUESTIONS[0], RED))[2]["usage"]
    assert tokens["prompt_tokens"] - tokens["prompt_tokens_details"]["cached_tokens"] < 16


def test_the_same_pixels_in_another_file_are_the_same_picture(served: Served) -> None:
    _ask(served, asking(QUESTIONS[0], RED))
    file = BytesIO()
    Image.open(BytesIO(RED)).save(file, "BMP")
    counts = _counted(served)
    _, cached = _ask(served, asking(QUESTIONS[0], file.getvalue()))
    assert (cached > 0, counts[0], len(served.runtime.debug.scheduler.prefixes)) == (True, 0, 1)


def test_a_conversation_that_is_sent_again_every_turn_finds_its_picture(served: Served) -> None:
    body = asking(QUESTIONS[0], RED)
    answer, _ = _ask(served, body)
    counts = _counted(served)
    for question in QUESTIONS[1:]:
        body["messages"] += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        answer, cached = _ask(served, body)
        assert cached > 0
    assert counts == [0, 2], "a prompt for each question, and no picture"


def test_what_was_said_before_a_picture_is_part_of_it(served: Served) -> None:
    for system in ("Be brief.", "Be exact."):
        body = asking(QUESTIONS[0], RED)
        body["messages"].insert(0, {"role": "system", "content": system})
        assert _ask(served, body)[1] == 0
        assert _ask(served, body)[1] > 0


def test_two_who_ask_at_once_have_it_run_once(served: Served) -> None:
    counts, gate, answers = _counted(served), Barrier(6), []

    def ask(question: str) -> None:
        gate.wait()
        answers.append(_ask(served, asking(question, RED)))

    threads = [Thread(target=ask, args=(each,)) for each in QUESTIONS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert counts == [1, 7]


def test_methods_that_share_no_rows_are_answered_too(served: Served, fresh: Runtime) -> None:
    for own in ({"method": "avl"}, {"method": "h2o"}, {"kv_budget": "200kB"}, {"preset": "paper"}):
        expected = fresh.generate([RED], QUESTIONS[0], Options(max_new_tokens=8, **own)).result()
        for _ in range(2):
            text, cached = _ask(served, asking(QUESTIONS[0], RED, avl_edge=own))
            assert (text, cached) == (expected.text, 0)


def test_packed_rows_are_held_beside_exact_ones(served: Served) -> None:
    for own in ({}, {"formats": "int4"}, {"method": "distinct"}):
        assert _ask(served, asking(QUESTIONS[0], RED, avl_edge=own))[1] == 0
        assert _ask(served, asking(QUESTIONS[0], RED, avl_edge=own))[1] > 0
    explained = served.post(asking(QUESTIONS[0], RED, avl_edge={"formats": "int4", "explain": True}))[2]["avl_edge"]
    assert (explained["formats"]["core"], explained["image_session"]) == ("int4", True)


class TestRoom:
    """The pool has room for two pictures and a question, and no more."""

    @pytest.fixture
    def small(self, checkpoint: Checkpoints) -> Iterator[Served]:
        with Runtime.load(checkpoint("mistral-gqa")) as runtime:
            session = runtime.open_images([RED])
            question = session.prepare(QUESTIONS[0], Options(max_new_tokens=8)).plan.peak_bytes
            pool_bytes = 2 * session.peak_bytes + 2 * question
        with serving(checkpoint("mistral-gqa"), pool_bytes=pool_bytes) as served:
            yield served

    def test_the_longest_unused_goes_first(self, small: Served) -> None:
        for shown in (RED, GREEN, RED, BLUE):  # BLUE takes GREEN's place
            _ask(small, asking(QUESTIONS[0], shown))
        assert _ask(small, asking(QUESTIONS[1], RED))[1] > 0
        assert _ask(small, asking(QUESTIONS[1], BLUE))[1] > 0
        assert _ask(small, asking(QUESTIONS[1], GREEN))[1] == 0
        small.wait_until_idle()

    def test_a_running_request_keeps_its_rows(self, small: Served, fresh: Runtime) -> None:
        expected = [
            fresh.generate([each], QUESTIONS[0], Options(max_new_tokens=8)).result().text for each in (RED, BLUE)
        ]
        _ask(small, asking(QUESTIONS[0], GREEN))
        answers: dict[int, str] = {}

        def ask(number: int, shown: bytes) -> None:
            answers[number] = _ask(small, asking(QUESTIONS[0], shown))[0]

        with stopped(small.runtime):
            threads = [Thread(target=ask, args=each) for each in enumerate((RED, BLUE))]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join()
        assert [answers[0], answers[1]] == expected
        small.wait_until_idle()

    def test_many_pictures_one_after_the_other_are_all_answered(self, small: Served, fresh: Runtime) -> None:
        for number in range(8):
            shown = picture((number, 90, 90))
            expected = fresh.generate([shown], QUESTIONS[0], Options(max_new_tokens=8)).result().text
            assert _ask(small, asking(QUESTIONS[0], shown))[0] == expected
        small.wait_until_idle()


def test_so_many_pictures_are_held(checkpoint: Checkpoints) -> None:
    with serving(checkpoint("mistral-gqa"), Settings(names=("test",), held_pictures=2)) as served:
        for shown in (RED, GREEN, BLUE):
            _ask(served, asking(QUESTIONS[0], shown))
        served.wait_until_idle()
        assert len(served.runtime.debug.scheduler.prefixes) == 2
        assert _ask(served, asking(QUESTIONS[0], RED))[1] == 0
    with serving(checkpoint("mistral-gqa"), Settings(names=("test",), held_pictures=0)) as served:
        assert [_ask(served, asking(QUESTIONS[0], RED))[1] for _ in range(2)] == [0, 0]


class TestNames:
    def test_a_picture_that_was_sent_is_known_by_its_uuid(self, served: Served) -> None:
        body = asking(QUESTIONS[0], RED)
        part = body["messages"][0]["content"][0]
        part["uuid"] = "frame-1"
        expected, _ = _ask(served, body)
        part["image_url"] = None
        assert _ask(served, body) == (expected, _ask(served, body)[1])
        assert _ask(served, body)[1] > 0

    def test_one_that_others_have_displaced_is_gone(self, checkpoint: Checkpoints) -> None:
        settings = Settings(names=("test",), picture_bytes=len(RED) + len(GREEN))
        with serving(checkpoint("mistral-gqa"), settings) as served:
            for number, shown in enumerate((RED, GREEN, BLUE)):
                body = asking(QUESTIONS[0], shown)
                body["messages"][0]["content"][0]["uuid"] = str(number)
                _ask(served, body)
            body["messages"][0]["content"][0] = {"type": "image_url", "image_url": None, "uuid": "0"}
            status, _, document = served.post(body)
            assert (status, document["error"]["code"]) == (404, "picture_not_found")
            body["messages"][0]["content"][0]["uuid"] = "2"
            assert served.post(body)[0] == 200


def test_a_client_that_leaves_while_its_picture_is_run_leaves_nothing(served: Served) -> None:
    with stopped(served.runtime, "begin_prefill") as stop:
        with served.connect() as connection:
            connection.sendall(raw_post(asking(QUESTIONS[0], RED)))
            assert stop.reached.wait(60)
        assert wait_for(lambda: served.service.on_their_way == 0)
    served.wait_until_idle()
    assert served.runtime.kv_bytes_in_use == 0
    assert served.runtime.memory().entries["pixels"].used == 0
    assert _ask(served, asking(QUESTIONS[0], RED))[1] == 0
