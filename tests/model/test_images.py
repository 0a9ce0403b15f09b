"""Pictures: what `open_image` takes and refuses, and pixels equal to the Pillow-based processors of transformers."""

from __future__ import annotations

import io
import json
import struct
import sys
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avl_edge.errors import BadImage, BadInput, BadModel
from avl_edge.model.images import open_image, take_sources
from avl_edge.model.images.config import ImageProcessorConfig
from avl_edge.model.images.headers import read_header
from avl_edge.model.images.preprocess import preprocess

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": 56}
SETTINGS = {
    "clip": CLIP,
    "square": CLIP | {"size": {"height": 42, "width": 56}, "do_center_crop": False},
    "int size, small crop": CLIP | {"size": 64, "crop_size": {"height": 41, "width": 30}},
    "crop larger than the picture": CLIP | {"size": {"shortest_edge": 33}, "crop_size": 56},
    "bilinear, other values": CLIP | {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]},
    "no normalisation": CLIP | {"do_normalize": False},
    "no rescaling": CLIP | {"do_rescale": False},
    "llava, padded": CLIP | {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 48, "width": 48}},
    "flags that are null": CLIP | {"do_convert_rgb": None, "do_normalize": None, "image_mean": None},
    "defaults": {"image_processor_type": "CLIPImageProcessor"},
}


def photograph(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, channels]: smooth waves with noise on them, like a photograph's shapes and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * rng.uniform(0.01, 0.2) + y * rng.uniform(0.01, 0.2) + c) for c in range(channels)]
    noisy = 128 + 100 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, channels))
    return noisy.clip(0, 255).astype(np.uint8)


def reference(path: Path, config: dict) -> np.ndarray:
    """What transformers, without torchvision, makes of the file."""

    name = config["image_processor_type"]
    processor = getattr(transformers, name + "Pil")(**{k: v for k, v in config.items() if k != "image_processor_type"})
    return processor(str(path), return_tensors="np")["pixel_values"][0]


def ours(path: Path, config: dict) -> np.ndarray:
    return preprocess(open_image(path), ImageProcessorConfig.parse(config, "test"))


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("size", [(641, 479), (337, 1000), (20, 33), (56, 56), (300, 3)])
def test_pixels_equal_transformers(tmp_path: Path, size: tuple[int, int], config: dict) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(photograph(*size)).save(path)
    pixels, expected = ours(path, config), reference(path, config)
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, expected)
    output_size = ImageProcessorConfig.parse(config, "test").output_size
    assert pixels.shape == (3, *output_size)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 150), st.integers(2, 150), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70))
def test_any_size_and_crop_equal_transformers(width: int, height: int, edge: int, rows: int, columns: int) -> None:
    from transformers import CLIPImageProcessorPil

    config = {"size": {"shortest_edge": edge}, "crop_size": {"height": rows, "width": columns}}
    image = Image.fromarray(photograph(width, height))
    expected = CLIPImageProcessorPil(**config)(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(preprocess(image, ImageProcessorConfig.parse(config, "test")), expected)


KINDS = {
    "palette.png": lambda: Image.fromarray(photograph(90, 70)).quantize(32),
    "gray.jpg": lambda: Image.fromarray(photograph(90, 70, 1)[..., 0]),
    "gray_alpha.png": lambda: Image.fromarray(photograph(90, 70, 2), "LA"),
    "rgba.png": lambda: Image.fromarray(photograph(90, 70, 4)),
    "rgba.webp": lambda: Image.fromarray(photograph(90, 70, 4)),
    "lossy.webp": lambda: Image.fromarray(photograph(90, 70)),
    "one_bit.png": lambda: Image.fromarray(photograph(90, 70)).convert("1"),
    "cmyk.jpg": lambda: Image.fromarray(photograph(90, 70)).convert("CMYK"),
    "rgb.bmp": lambda: Image.fromarray(photograph(90, 70)),
    "palette.bmp": lambda: Image.fromarray(photograph(90, 70)).quantize(16),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:.*mode.*parameter is deprecated:DeprecationWarning")
def test_every_kind_of_picture_equals_transformers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    KINDS[name]().save(path)
    assert open_image(path).mode == "RGB"
    with Image.open(path) as lazy:
        assert np.array_equal(np.asarray(open_image(lazy)), np.asarray(open_image(path)))
    assert np.array_equal(ours(path, CLIP), reference(path, CLIP))
    assert np.array_equal(np.asarray(open_image(path.read_bytes())), np.asarray(open_image(path)))
    header = read_header(path.read_bytes(), path.suffix[1:].upper().replace("JPG", "JPEG"))
    assert header
    assert (header.width, header.height) == (90, 70)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_transformers(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photograph(90, 60)).save(path, exif=exif, quality=95)
    assert open_image(path).size == ((90, 60) if orientation < 5 else (60, 90))
    assert np.array_equal(ours(path, CLIP), reference(path, CLIP))


def test_a_cameras_multi_picture_jpeg_is_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    first = Image.fromarray(photograph(90, 60))
    first.save(path, format="MPO", save_all=True, append_images=[Image.fromarray(photograph(90, 60, seed=1))])
    assert open_image(path).size == (90, 60)
    assert np.array_equal(ours(path, CLIP), reference(path, CLIP))


def test_a_pillow_image_is_taken_and_left_as_it_is() -> None:
    image = Image.fromarray(photograph(90, 70, 4))
    before = image.tobytes()
    assert open_image(image).mode == "RGB"
    assert image.mode == "RGBA"
    assert image.tobytes() == before


# --- what is refused ---


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def huge_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(kind: str, size: tuple[int, int] = (40, 30), frames: int = 1) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.fromarray(photograph(*size, seed=seed)) for seed in range(frames)]
    more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(buffer, kind, **more)
    return buffer.getvalue()


def huge_webp() -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def huge_jpeg() -> bytes:
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    return bytes(data)


REFUSED = {
    "empty": (b"", "is empty"),
    "text": ("Grüße, this is no picture\n".encode(), "holds text, not a picture"),
    "text that begins like a BMP": (b"BMW is a maker of cars in Munich", "holds text, not a picture"),
    "unknown": (bytes(range(256)), "is not a picture of a known format"),
    "truncated jpeg": (encoded("JPEG", (400, 300))[:-3000], "is damaged and cannot be decoded (image file is trunc"),
    "truncated png": (encoded("PNG", (400, 300))[:3000], "is damaged and cannot be decoded"),
    "truncated webp": (encoded("WEBP", (400, 300))[:1000], "is damaged and cannot be decoded"),
    "header only": (encoded("PNG")[:20], "its PNG header is incomplete"),
    "jpeg without frame": (b"\xff\xd8\xff\xe0\0\x04ab\xff\xd9", "its JPEG header is incomplete"),
    "png of width 0": (huge_png(0, 10), "its PNG header is incomplete"),
    "huge png": (huge_png(50_000, 50_000), "is too large: 50000 x 50000 pixels, more than 64 megapixels"),
    "huge webp": (huge_webp(), "is too large: 16383 x 16383 pixels"),
    "huge jpeg": (huge_jpeg(), "is too large: 60000 x 60000 pixels"),
    "huge bmp": (encoded("BMP")[:18] + struct.pack("<ii", 20000, -20000) + bytes(40), "too large: 20000 x 20000"),
    "narrow": (encoded("PNG", (1, 4000)), "is too narrow: 1 x 4000 pixels, an aspect ratio over 100:1"),
    "gif": (encoded("GIF"), "GIF is not supported: use JPEG, PNG, WebP or BMP"),
    "tiff": (encoded("TIFF"), "TIFF is not supported: use JPEG, PNG, WebP or BMP"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not supported: use JPEG, PNG, WebP or BMP"),
    "animated gif": (encoded("GIF", frames=3), "GIF is not supported"),
    "animated png": (encoded("PNG", frames=3), "is animated"),
    "animated webp": (encoded("WEBP", frames=3), "is animated"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("error")
def test_bad_pictures_are_refused_with_their_name_and_the_reason(tmp_path: Path, case: str) -> None:
    data, reason = REFUSED[case]
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    for source, name in ((path, f"'{path}'"), (data, "the picture")):
        with pytest.raises(BadImage) as caught:
            open_image(source)
        message = str(caught.value)
        assert message.startswith(name)
        assert reason in message
        assert "0x" not in message
        assert "\n" not in message


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]), st.data())
def test_damaged_pictures_give_a_picture_or_bad_image(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(kind))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(BadImage):
            assert open_image(bytes(content)).mode == "RGB"


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    cases = {
        tmp_path / "none.png": "does not exist",
        tmp_path: "is a directory",
        Path("a\0b"): "cannot be opened",
    }
    if sys.platform != "win32":
        cases[Path("/dev/null")] = "is not a regular file"
    for path, reason in cases.items():
        with pytest.raises(BadImage, match=reason):
            open_image(path)
    with pytest.raises(BadImage, match="not int"):
        open_image(5)  # type: ignore[arg-type]


def test_a_string_is_no_picture(tmp_path: Path) -> None:
    """A service that hands on a client's string must not read files of its own."""
    path = tmp_path / "picture.png"
    path.write_bytes(encoded("PNG"))
    for refused in (lambda: open_image(str(path)), lambda: take_sources([path, str(path)])):
        with pytest.raises(BadInput, match=r"give pathlib\.Path\(\.\.\.\), or give its bytes"):
            refused()


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded("PNG"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # permission bits do not stop root, who may run the tests
    with pytest.raises(BadImage, match="cannot be read: check its permissions"):
        open_image(path)


# --- settings files ---


def test_settings_are_read_from_either_file(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    assert ImageProcessorConfig.open(tmp_path).crop == (56, 56)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_token": "<image>"}))
    assert ImageProcessorConfig.open(tmp_path).crop == (56, 56)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": CLIP | {"crop_size": 28}}))
    assert ImageProcessorConfig.open(tmp_path).crop == (28, 28)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "PixtralImageProcessor is not supported"),
        ({"size": {"longest_edge": 5}}, "size must be"),
        ({"size": 0}, "size must be"),
        ({"size": None}, "size must be"),
        ({"crop_size": {"shortest_edge": 5}}, "crop_size must be"),
        ({"image_mean": [1, 2]}, "image_mean must be a list of 3 numbers"),
        ({"image_std": [1, 0, 1]}, "image_std must be a list of 3 positive"),
        ({"do_resize": "yes"}, "do_resize must be true or false"),
        ({"resample": 9}, "resample must be"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a number"),
        ([], "must be a JSON object"),
    ],
)
def test_bad_settings_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(BadModel, match=reason):
        ImageProcessorConfig.parse(settings, "preprocessor_config.json")


def test_missing_and_broken_settings_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"has no preprocessor_config\.json"):
        ImageProcessorConfig.open(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(BadModel, match="is not valid JSON"):
        ImageProcessorConfig.open(tmp_path)
