"""Priorities and deadlines over HTTP, and what is counted of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Checkpoints
from tests.equipment.served import LIMIT, Served, asking, picture, serving, wait_for
from tests.equipment.slow_backend import stopped

QUESTION, PICTURE = "What is it?", picture()


@pytest.fixture
def served(checkpoint: Checkpoints) -> Iterator[Served]:
    with serving(checkpoint("mistral-gqa")) as served:
        yield served


def _counts(served: Served) -> dict[str, float]:
    """By name, and by name and a label's value; read by Prometheus' own parser."""
    status, headers, page = served.request("GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = "".join(f" {value}" for key, value in sorted(sample.labels.items()) if key != "model_name")
            found[sample.name.removeprefix("avl_edge:") + labels] = sample.value
    return found


class TestPriorities:
    @pytest.mark.parametrize("way", ["field", "own", "header"])
    def test_lower_is_sooner(self, served: Served, way: str) -> None:
        ended: list[int] = []

        def ask(priority: int) -> None:
            body = asking(QUESTION, picture((priority % 200, 9, 9)))
            headers = {}
            if way == "header":
                headers["x-priority"] = str(priority)
            else:
                body |= {"priority": priority} if way == "field" else {"avl_edge": {"priority": priority}}
            assert served.post(body, **headers)[0] == 200
            ended.append(priority)

        threads = []
        with stopped(served.runtime, "begin_prefill") as stop:
            for number, priority in enumerate((0, 5, 1, -3)):
                threads.append(Thread(target=ask, args=(priority,)))
                threads[-1].start()
                if number == 0:
                    assert stop.reached.wait(LIMIT)
                submitted = number + 1
                assert wait_for(lambda count=submitted: _posted(served) == count)
        for thread in threads:
            thread.join(LIMIT)
        assert ended.index(-3) < ended.index(1) < ended.index(5)

    @pytest.mark.parametrize("value", ["high", "nan", "5000", ""])
    def test_a_header_is_a_number(self, served: Served, value: str) -> None:
        status, _, document = served.post(asking(QUESTION), **{"x-priority": value})
        assert (status, document["error"]["param"]) == (400, "x-priority")


def _posted(served: Served) -> int:
    """Requests that the engine has, or that are in its mail."""
    return served.service.submitted


class TestDeadlines:
    @pytest.mark.parametrize("way", ["own", "header"])
    def test_who_is_late_gets_504_and_is_not_to_ask_again(self, served: Served, way: str) -> None:
        body, headers = asking(QUESTION, PICTURE, max_tokens=400), {}
        if way == "own":
            body["avl_edge"] = {"deadline_ms": 30, "late": "drop"}
        else:
            headers["x-deadline-ms"] = "30"
        with stopped(served.runtime):
            thread = Thread(target=lambda: time.sleep(0.1))
            thread.start()
            found: list[Any] = []
            asked = Thread(target=lambda: found.append(served.post(body, **headers)))
            asked.start()
            thread.join()
        asked.join(LIMIT)
        status, sent, document = found[0]
        assert (status, document["error"]["code"]) == (504, "deadline_exceeded")
        assert sent["x-should-retry"] == "false"
        served.wait_until_idle()
        assert _counts(served)["deadline_missed_total"] == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_answer_may_be_cut_instead(self, served: Served, stream: bool) -> None:
        backend: Any = served.runtime.debug.backend
        decode = backend.decode
        backend.decode = lambda *given, **named: (time.sleep(0.05), decode(*given, **named))[1]
        served.post(asking(QUESTION, PICTURE))  # its rows are there from now on
        own = {"deadline_ms": 600, "late": "cut"}
        _, _, found = served.post(asking(QUESTION, PICTURE, max_tokens=400, stream=stream, avl_edge=own))
        if stream:
            chunks = [json.loads(line.removeprefix("data: ")) for line in found.splitlines() if "{" in line]
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
            assert any(each["choices"][0]["delta"].get("content") for each in chunks)
        else:
            assert found["choices"][0]["finish_reason"] == "length"
            assert 0 < found["usage"]["completion_tokens"] < 100
        assert _counts(served)["deadline_missed_total"] == 1

    def test_what_cannot_be_met_is_refused_before_it_is_begun(self, served: Served) -> None:
        """By what prompts took lately; who says ``drop`` is begun in any case."""
        for number in range(3):
            assert served.post(asking(QUESTION, picture((number, 50, 50))))[0] == 200
        own = {"deadline_ms": 1000}
        served.service.pace.ms_per_prompt_token = 1e6
        before = _counts(served)["prompt_tokens_total"]
        status, _, document = served.post(asking(QUESTION, PICTURE, avl_edge=own))
        assert (status, document["error"]["code"]) == (504, "deadline_exceeded")
        assert "cannot be met" in document["error"]["message"]
        assert _counts(served)["prompt_tokens_total"] == before
        assert served.post(asking(QUESTION, PICTURE, avl_edge={"deadline_ms": 20_000, "late": "drop"}))[0] == 200


class TestCounts:
    def test_of_answers(self, served: Served) -> None:
        answers = [served.post(asking(each, PICTURE))[2] for each in ("What is it?", "Of which colour is it?")]
        counts = _counts(served)
        assert counts["request_success_total length"] == 2
        assert counts["prompt_tokens_total"] == sum(each["usage"]["prompt_tokens"] for each in answers)
        cached = answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert counts["prompt_tokens_cached_total"] == cached > 0
        assert counts["generation_tokens_total"] == 16
        for name, number in (("time_to_first_token", 2), ("inter_token_latency", 14), ("e2e_request_latency", 2)):
            assert counts[f"{name}_seconds_count"] == number
        assert counts["ready"] == 1

    def test_of_what_runs_now(self, served: Served) -> None:
        with stopped(served.runtime):
            thread = Thread(target=lambda: served.post(asking(QUESTION, PICTURE)))
            thread.start()
            assert wait_for(lambda: served.service.on_their_way == 1)
        thread.join(LIMIT)
        served.wait_until_idle()
        counts = _counts(served)
        view = served.runtime.debug
        held = sum(each.cache.rows.lease.nbytes for each in view.scheduler.prefixes if each.cache)
        assert counts["kv_pool_used_bytes"] == held > 0
        assert counts["kv_pool_bytes"] == view.pool.pages * view.pool.page_bytes
        assert counts["memory_bytes weights"] == served.runtime.memory().entries["weights"].used
        assert (counts["num_requests_running"], counts["num_requests_waiting"], counts["held_pictures"]) == (0, 0, 1)

    def test_of_clients_that_left_and_of_errors(self, served: Served) -> None:
        with stopped(served.runtime) as stop:
            stream = served.client().chat.completions.create(**asking(QUESTION, PICTURE, stream=True))
            assert stop.reached.wait(LIMIT)
            stream.close()
        served.wait_until_idle()
        assert wait_for(lambda: _counts(served)["request_success_total abort"] == 1)
        served.post(asking(QUESTION, wish=1))
        assert _counts(served)["request_refused_total 400"] == 1
