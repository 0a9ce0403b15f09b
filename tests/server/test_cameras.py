"""Cameras: the newest frame counts, of a folder and of a video's file, and late answers of ``avl-edge watch`` go."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from avl_edge import BadInput, Options
from avl_edge.cli import run_app
from avl_edge.server.cameras import Cameras, Stream, camera_sources
from avl_edge.server.refusals import Refusal
from tests.conftest import Checkpoints
from tests.equipment.served import asking, picture, serving, wait_for

RED, BLUE = picture((200, 0, 0)), picture((0, 0, 200))
QUESTION = "What is it?"


def _video(path: Path, colours: list[tuple[int, int, int]], fps: int = 10) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = 64, 48
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), colour, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _colour(content: bytes) -> tuple[int, ...]:
    return tuple(int(each) for each in np.asarray(Image.open(BytesIO(content)).convert("RGB"))[24, 32])


def test_the_newest_picture_of_a_folder_is_shown(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = Cameras({"front": str(tmp_path)})
    with serving(checkpoint("mistral-gqa"), cameras=folder) as served:
        body = asking(QUESTION, avl_edge={"camera": "front"})
        status, headers, document = served.post(body)
        assert (status, document["error"]["code"], headers["retry-after"]) == (503, "no_frame", "1")
        part = asking(QUESTION)
        part["messages"][0]["content"].insert(0, {"type": "input_image", "camera": "front"})
        for number, shown in enumerate((RED, BLUE)):
            (tmp_path / f"{number}.png").write_bytes(shown)
            os.utime(tmp_path / f"{number}.png", (1000 + number, 1000 + number))
            (tmp_path / "notes.txt").write_text("none of them")
            expected = served.runtime.generate([shown], QUESTION, Options(max_new_tokens=8)).result().text
            for each in (body, part):
                status, _, document = served.post(each)
                assert (status, document["choices"][0]["message"]["content"]) == (200, expected)
                assert document["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        body["avl_edge"]["max_age_ms"] = 500
        assert served.post(body)[2]["error"]["code"] == "frame_too_old"
        os.utime(tmp_path / "1.png")
        body["avl_edge"]["max_age_ms"] = 60_000
        assert served.post(body)[0] == 200
        body["avl_edge"]["camera"] = "rear"
        assert served.post(body)[2]["error"]["code"] == "unknown_camera"
        assert len(served.runtime.debug.scheduler.prefixes) == 0, "frames keep no rows"


def test_a_video_is_played_as_it_was_taken(tmp_path: Path) -> None:
    colours = [(250, 0, 0)] * 5 + [(0, 0, 250)] * 5
    camera = Stream("drive", str(_video(tmp_path / "drive.mp4", colours)))
    try:
        seen: set[str] = set()

        def look() -> bool:
            frame = camera.latest()
            if frame is not None:
                assert frame.age < 5
                red, _, blue = _colour(frame.content)
                seen.add("red" if red > 200 else "blue" if blue > 200 else "other")
            return seen == {"red", "blue"}

        assert wait_for(look, 20)
    finally:
        camera.close()


def test_what_cannot_be_read_gives_no_frames(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    cameras = Cameras({"front": str(tmp_path / "broken.mp4")})
    with pytest.raises(Refusal, match="gives no frames now"):
        cameras.picture("front", None, "camera")
    cameras.close()


@pytest.mark.parametrize("texts", [["front"], ["=a"], ["front="], ["a=/b", "a=/c"]])
def test_a_camera_has_a_name_and_an_address(texts: list[str]) -> None:
    with pytest.raises(BadInput):
        camera_sources(texts)


@pytest.mark.parametrize("address", ["nowhere", "http://example.com/a.mjpg", "/dev/video-none"])
def test_what_is_no_camera_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match="is no device, file, folder or rtsp"):
        Cameras({"front": address})


def test_watch_answers_about_each_frame(
    checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    command = ["watch", "--camera", str(tmp_path), "--prompt", QUESTION, "--model", str(checkpoint("mistral-gqa"))]
    assert run_app([*command, "--every", "60", "--count", "1", "--max-new-tokens", "4", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["usage"]["completion_tokens"] for each in lines] == [4]
    assert run_app([*command, "--every", "0.01", "--count", "2", "--max-new-tokens", "400"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("dropped: no answer within 0.01 s") == 2
