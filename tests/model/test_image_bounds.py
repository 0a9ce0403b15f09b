"""Pictures that would cost more than they are worth: what a header declares, and what a decoder would do, is bounded
before a decoder runs."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from PIL import Image

from avl_edge.errors import AvlEdgeError, BadImage, BadModel, Busy
from avl_edge.model.images import open_image
from avl_edge.model.images.config import ImageProcessorConfig
from avl_edge.model.images.headers import read_header
from avl_edge.model.images.preprocess import preprocess
from avl_edge.model.images.sources import MAX_BYTES
from tests.equipment.processes import PEAK_MEMORY, run_python

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336}
PADDED = CLIP | {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False}


def encoded(kind: str, size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@contextmanager
def cheap(seconds: float = 5, megabytes: float = 64) -> Iterator[None]:
    """Seconds of the processor, and Python's memory; what Pillow takes besides is measured in a process of its own."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < seconds
    assert peak < megabytes * 1e6


def refused(content: bytes | Path, *reasons: str) -> None:
    with cheap(), pytest.raises(BadImage) as caught:
        open_image(content)
    for reason in reasons:
        assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# --- padding ---


@pytest.mark.parametrize("size", [(3000, 1100), (1100, 3000), (2001, 2000), (3, 300)])
@pytest.mark.parametrize("more", [{}, {"resample": 2, "image_mean": [0.1, 0.5, 0.9]}, {"resample": 0}, {"size": 400}])
def test_padding_in_bands_equals_transformers(size: tuple[int, int], more: dict[str, object]) -> None:
    from transformers import LlavaImageProcessorPil

    image = Image.open(io.BytesIO(encoded("PNG", size)))
    config = PADDED | more
    arguments = {name: value for name, value in config.items() if name != "image_processor_type"}
    expected = LlavaImageProcessorPil(**arguments)(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(preprocess(image, ImageProcessorConfig.parse(config, "test")), expected)


def test_a_narrow_picture_is_padded_without_its_square() -> None:
    """40 kB of JPEG; its square at full size would be 1 GB."""
    program = f"""
        import io
        from PIL import Image
        from avl_edge.model.images import open_image
        from avl_edge.model.images.config import ImageProcessorConfig
        from avl_edge.model.images.preprocess import preprocess

        buffer = io.BytesIO()
        Image.new("RGB", (16000, 160), (9, 99, 199)).save(buffer, "JPEG")
        before = peak_memory()
        preprocess(open_image(buffer.getvalue()), ImageProcessorConfig.parse({PADDED!r}, "test"))
        print(peak_memory() - before)
    """
    assert int(run_python(PEAK_MEMORY + dedent(program))) < 100_000  # kB


@pytest.mark.parametrize(
    ("size", "config", "reason"),
    [
        ((200, 20_000), PADDED, "pads it to 20000 x 20000: it has 200 x 20000 pixels; crop it"),
        ((100, 1), CLIP | {"size": {"shortest_edge": 2000}}, "makes it 200000 x 2000: it has 100 x 1 pixels; crop it"),
    ],
)
def test_pictures_that_a_processor_makes_huge_are_refused(
    size: tuple[int, int], config: dict[str, object], reason: str
) -> None:
    image = Image.new("RGB", size)
    with cheap(), pytest.raises(BadImage, match=reason):
        preprocess(image, ImageProcessorConfig.parse(config, "test"))


def test_a_processor_that_pads_and_keeps_the_square_is_refused() -> None:
    with pytest.raises(BadModel, match="set do_resize"):
        ImageProcessorConfig.parse(PADDED | {"do_resize": False}, "test")
    with pytest.raises(BadModel, match="crop_size must be"):
        ImageProcessorConfig.parse(CLIP | {"crop_size": 100_000}, "test")


# --- scans and parts ---


def with_scans(content: bytes, more: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * more + content[-2:]


def test_scans_are_counted_as_a_decoder_meets_them() -> None:
    baseline = read_header(encoded("JPEG"), "JPEG")
    assert baseline
    assert (baseline.width, baseline.height, baseline.scans) == (64, 48, 1)
    progressive = encoded("JPEG", progressive=True)
    scans = read_header(progressive, "JPEG").scans  # type: ignore[union-attr]
    assert scans == 10  # what libjpeg's jpeg_simple_progression writes for three components
    assert read_header(with_scans(progressive, 5), "JPEG").scans == 15  # type: ignore[union-attr]
    restarts = encoded("JPEG", progressive=True, restart_marker_blocks=1)
    assert read_header(restarts, "JPEG").scans == 10  # type: ignore[union-attr]
    # A thumbnail is a JPEG within a segment of this one.
    exif = Image.Exif()
    exif[0x010E] = "thumbnail: "
    holder = encoded("JPEG", exif=exif.tobytes() + with_scans(progressive, 3)[:20_000], progressive=True)
    assert read_header(holder, "JPEG").scans == 10  # type: ignore[union-attr]


def test_a_progressive_jpeg_of_many_scans_is_refused() -> None:
    ordinary = encoded("JPEG", (2000, 1500), progressive=True, quality=5)
    assert open_image(with_scans(ordinary, 20)).size == (2000, 1500)
    refused(with_scans(ordinary, 400), "a JPEG of 410 scans over 2000 x 1500", "save it as a baseline JPEG")


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


PNG = encoded("PNG")
JPEG = encoded("JPEG")
SCAN = JPEG.index(b"\xff\xda")
MANY = {
    "chunks before the pixels": PNG[:33] + chunk(b"teSt") * 100_000 + PNG[33:],
    "chunks after the pixels": PNG[:-12] + chunk(b"IDAT") * 100_000 + PNG[-12:],
    "segments": JPEG[:SCAN] + b"\xff\xfe\0\2" * 100_000 + JPEG[SCAN:],
}


@pytest.mark.parametrize("case", MANY)
def test_files_of_very_many_parts_are_refused(case: str) -> None:
    refused(MANY[case], "a file of more than 65536 parts")


def opened(content: bytes) -> None:
    with cheap():
        assert open_image(content).size == (64, 48)


def test_much_metadata_costs_nothing() -> None:
    segment = b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0" + bytes(0xFFFF - 2 - 12)
    opened(JPEG[:2] + segment * 200 + JPEG[2:])
    opened(JPEG[:20] + bytes(9 << 20) + JPEG[20:])
    opened(PNG[:33] + chunk(b"teSt", bytes(9 << 20)) + PNG[33:])


def test_compressed_text_in_a_png_does_not_unfold() -> None:
    for key in (b"key", b"Raw profile type exif"):
        bomb = chunk(b"zTXt", key + b"\0\0" + zlib.compress(bytes(200_000_000)))
        opened(PNG[:33] + bomb * 2 + PNG[33:])


def test_run_lengths_of_a_bmp_are_refused() -> None:
    """Pillow decodes them in Python, byte by byte."""
    buffer = io.BytesIO()
    Image.new("P", (64, 48)).save(buffer, "BMP")
    for compression in (1, 2):
        content = bytearray(buffer.getvalue())
        content[30] = compression
        refused(bytes(content), "a BMP in run lengths")


def test_large_files_are_refused_by_their_size(tmp_path: Path) -> None:
    path = tmp_path / "large.bmp"
    with path.open("wb") as file:
        file.write(b"BM")
        file.truncate(MAX_BYTES + 1)
    refused(path, "large.bmp' is too large: more than 268.4 MB")


# --- EXIF ---


def overlapping(entries: int, size: int) -> bytes:
    """EXIF data with a directory of entries that all have the whole of it as their value."""
    directory = b"".join(struct.pack("<HHII", 1000 + i, 7, size, 8) for i in range(entries))
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, entries) + directory).ljust(size + 14, b"\0")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_whose_values_overlap_costs_nothing(kind: str) -> None:
    """Pillow would copy every value: 60 kB would become 240 MB."""
    opened(encoded(kind, exif=overlapping(4000, 60_000)))


def test_raw_exif_text_of_a_png_costs_nothing_either() -> None:
    text = b"Raw profile type exif\0\nexif\n  60014\n" + overlapping(4000, 60_000).hex().encode()
    opened(PNG[:33] + chunk(b"tEXt", text) + PNG[33:])


# --- what decoders raise ---


class PanicException(BaseException):
    """As PyO3 raises a Rust panic: no Exception, and of a class that cannot be imported."""


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (SystemError("tile cannot extend\noutside image"), BadImage),
        (struct.error("unpack requires a buffer"), BadImage),
        (OverflowError("int too large"), BadImage),
        (RecursionError(), BadImage),
        (Image.DecompressionBombError("x" * 10_000), BadImage),
        (PanicException("called `Option::unwrap()`"), BadImage),
        (MemoryError(), Busy),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else None,
)
def test_whatever_a_decoder_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, becomes: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(becomes) as caught:
        open_image(JPEG)
    if isinstance(caught.value, AvlEdgeError):
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
