"""What `avl-edge run` refuses: exit code 2 and one line that says why."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests.equipment.checkpoints import random_image
from tests.equipment.command_line import Outcome


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


def _refused(outcome: Outcome, *messages: str, code: int = 2) -> None:
    """The exit code of bad input, one line on stderr that says why, nothing on stdout."""
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith("avl-edge: ")
    assert outcome.err.count("\n") == 1
    for message in messages:
        assert message in outcome.err


def test_bad_paths(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _refused(run(image=str(tmp_path / "none.jpg")), "does not exist", "none.jpg")
    _refused(run(image=str(tmp_path)), "is a directory")
    _refused(run(image=""), "path of the picture is empty")
    _refused(run(image="https://example.org/cat.jpg"), "'https://example.org/cat.jpg' is an address, not a file")
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
        (["--set", "drop=50"], "name the method, as in --method fastv"),
        (["--set", "nothing=50"], "'nothing' is a parameter of no method: avl-edge methods lists what there is"),
        (
            ["--method", "fastv", "--set", "layer=99"],
            "layer is layer 99, but the model has 5 layers: give one from 0 to 4",
        ),
        (["--method", "avl", "--set", "prune_layer=5"], "prune_layer is layer 5, but the model has 5 layers"),
        (["--method", "best"], "choose one of full"),
        (["--set", "text_floor"], "give NAME=VALUE"),
        (["--set", "text_floor=many"], "give NAME=VALUE"),
        (["--method", "avl", "--set", "floor=3"], "takes no 'floor', a parameter of no method"),
        (["--kv-budget", "0"], "must be more than 0"),
        (["--kv-budget", "lots"], "like 160MB"),
        (
            ["--kv-format", "int9"],
            "the text format must be one of exact, int8, int8/int4, int4, not 'int9'",
        ),
        (
            ["--core-format", "lowrank:"],
            "the core format must be one of exact, int8, int8/int4, int4, lowrank:R, lowrank:R+int8, not",
        ),
        (["--kv-format", ""], "the text format must be one of exact"),
        (["--text-format", "lowrank:8"], "text rows cannot be low-rank: choose exact, int8, int8/int4 or int4"),
        (["--secondary-format", "lowrank:33"], "the secondary format lowrank:33 asks for more"),
        (["--core-format", "lowrank:16", "--secondary-format", "lowrank:8"], "give both one rank"),
        (["--method", "coarse", "--core-format", "int8"], "give core and secondary rows the same format"),
        (["--method", "coarse", "--kv-format", "lowrank:16"], "coarse scans the keys of stored rows"),
        (["--method", "coarse", "--core", "200", "--kv-budget", "1MB"], "core must be above 0"),
        (["--method", "streaming", "--set", "window=0", "--kv-budget", "1MB"], "window must be"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "-1"], "top_k must be a whole number from 0"),
        (["--min-p", "2"], "min_p must be a number from 0 to 1"),
        (["--repetition-penalty", "0"], "repetition_penalty must be"),
        (["--frequency-penalty", "3"], "frequency_penalty must be"),
        (["--presence-penalty", "-3"], "presence_penalty must be"),
        (["--seed", "-1"], "seed must be a whole number"),
        (["--stop", ""], "a stop string must have 1 to 256 characters"),
        (["--logprobs", "2"], "give both"),
        (["--json", "--logprobs", "21"], "logprobs must be a whole number from 0 to 20"),
        (["--logit-bias", "3"], "cannot read '3' as a bias"),
        (["--logit-bias", "x=3"], "cannot read 'x=3' as a bias"),
        (["--logit-bias", "3=nan"], "the logit_bias of token 3 must be a number"),
        (["--logit-bias", "3=1", "--logit-bias", "3=2"], "token 3 is given two biases"),
        (["--logit-bias", "100000=1"], "logit_bias names token 100000, but the model's ids end at"),
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
    _refused(run(prompt="boat " * 600), "context ends at 512", code=3)
