"""Pictures as cameras, programs and networks leave them: metadata of any kind, all depths, no end, transparency."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from avl_edge.errors import BadImage
from avl_edge.model.images import open_image
from avl_edge.model.images.sources import image_size, open_flat

Array = npt.NDArray[Any]
NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(kind: str, pixels: Array = NOISE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(depth: int, colour: int, rows: list[bytes], width: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND")


def arrays(*sources: Any) -> list[Array]:
    return [np.asarray(open_image(each)) for each in sources]


# --- metadata ---


def with_rational(numerator: int, denominator: int) -> bytes:
    """EXIF data: turned a quarter, and so many dots an inch."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 5, 1, 38)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<Iii", 0, numerator, denominator)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("rational", [(-1, 0), (0, 0), (72, 1)])
def test_a_turned_picture_with_an_impossible_number_is_turned(kind: str, rational: tuple[int, int]) -> None:
    content = encoded(kind, exif=with_rational(*rational))
    plain = open_image(encoded(kind))
    assert image_size(content) == (48, 64)
    assert np.array_equal(np.asarray(open_image(content)), np.asarray(plain.transpose(Image.Transpose.ROTATE_270)))


PNG, JPEG, WEBP = encoded("PNG"), encoded("JPEG"), encoded("WEBP")


def jpeg_with(marker: int, body: bytes) -> bytes:
    return JPEG[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


def webp_with(flag: int, name: bytes, size: int, body: bytes) -> bytes:
    extended = struct.pack("<I4B", 10, flag, 0, 0, 0) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little")
    inner = b"WEBPVP8X" + extended + WEBP[12:] + name + struct.pack("<I", size) + body
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
BROKEN = {
    "a PNG's text with a wrong checksum": (PNG[:33] + chunk(b"tEXt", b"a\0b")[:-1] + b"\0" + PNG[33:], PNG),
    "a PNG's gamma cut short": (PNG[:33] + chunk(b"gAMA", b"a") + PNG[33:], PNG),
    "a PNG's resolution cut short": (PNG[:33] + chunk(b"pHYs", b"a") + PNG[33:], PNG),
    "a PNG's EXIF that is none": (PNG[:33] + chunk(b"eXIf", b"zzzz") + PNG[33:], PNG),
    "a PNG's profile that unfolds to nothing": (PNG[:33] + chunk(b"iCCP", b"a\0\0zz") + PNG[33:], PNG),
    "a PNG's EXIF in hexadecimal that is none": (
        PNG[:33] + chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nnot hex") + PNG[33:],
        PNG,
    ),
    "a PNG without its last chunk": (PNG[:-12], PNG),
    "a JPEG's JFIF cut short": (jpeg_with(0xE0, b"JFIF\0"), JPEG),
    "a JPEG's Adobe segment cut short": (jpeg_with(0xEE, b"Adobe\0"), JPEG),
    "a JPEG's profile in parts that lack one": (jpeg_with(0xE2, b"ICC_PROFILE\0\x02\x05" + bytes(9)), JPEG),
    "a JPEG's index of more pictures that is none": (jpeg_with(0xE2, b"MPF\0" + bytes(40)), JPEG),
    "a JPEG's Photoshop data that is none": (jpeg_with(0xED, b"Photoshop 3.0\0" + b"8BIM" + b"\xff" * 30), JPEG),
    "a WebP's EXIF longer than the file": (webp_with(8, b"EXIF", 1000, b"II*\0"), WEBP),
    "a WebP that says it has XMP": (webp_with(4, b"JUNK", 2, b"ab"), WEBP),
}


@pytest.mark.parametrize("case", BROKEN)
def test_metadata_that_nobody_needs_never_makes_a_picture_unreadable(case: str) -> None:
    content, sound = BROKEN[case]
    assert np.array_equal(*arrays(content, sound))


def test_an_orientation_in_xmp_counts_where_exif_has_none() -> None:
    for content in (
        jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
        PNG[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + PNG[33:],
        PNG[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)) + PNG[33:],
    ):
        assert image_size(content) == open_image(content).size == (48, 64)
        with Image.open(io.BytesIO(content)) as lazy:  # Pillow's own reading
            assert lazy.getexif()[0x0112] == 6


def test_colours_do_not_need_metadata() -> None:
    """What says how a JPEG's colours are stored is kept."""
    pixels = np.concatenate([NOISE, NOISE[..., :1]], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "CMYK").save(buffer, "JPEG", exif=with_rational(-1, 0), comment=b"x" * 99)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        expected = np.asarray(image.convert("RGB").transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(arrays(buffer.getvalue())[0], expected)


# --- depth ---

WIDE = np.random.default_rng(1).integers(0, 65536, (4, 6, 4)).astype(">u2")
KEY16 = struct.pack(">H", int(WIDE[0, 0, 0]))
KEYS16 = struct.pack(">HHH", *(int(each) for each in WIDE[0, 0, :3]))
DEEP = {
    "grey": (0, 1, ()),
    "grey with a key": (0, 1, (chunk(b"tRNS", KEY16),)),
    "RGB": (2, 3, ()),
    "RGB with a key": (2, 3, (chunk(b"tRNS", KEYS16),)),
    "grey and opacity": (4, 2, ()),
    "RGBA": (6, 4, ()),
}


@pytest.mark.parametrize("case", DEEP)
def test_of_sixteen_bits_the_high_byte_is_taken(case: str) -> None:
    colour, channels, chunks = DEEP[case]
    values = WIDE[..., :channels]
    content = png(16, colour, [row.tobytes() for row in values], 6, *chunks)
    seen = (values >> 8).astype(np.uint8)[..., : 3 if channels > 2 else 1]
    assert np.array_equal(arrays(content)[0], np.broadcast_to(seen, (4, 6, 3)))
    white, share = open_flat(content, transparency="white")
    if chunks:
        assert share == pytest.approx(1 / 24)
        assert tuple(np.asarray(white)[0, 0]) == (255, 255, 255)


def test_a_thermal_camera_s_picture_is_not_white() -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    for source in (encoded("PNG", ramp), Image.fromarray(ramp), ramp):
        assert np.array_equal(arrays(source)[0][..., 0], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize(("depth", "row"), [(1, 0b01010101), (2, 0b00011011), (4, 0x5C)])
def test_of_fewer_bits_all_levels_are_spread(depth: int, row: int) -> None:
    most = 2**depth - 1
    levels = [(row >> 8 - depth * (i + 1)) & most for i in range(8 // depth)]
    key = chunk(b"tRNS", struct.pack(">H", levels[1]))
    plain, keyed = (png(depth, 0, [bytes([row])] * 2, len(levels), *each) for each in ((), (key,)))
    expected = np.array([level * 255 // most for level in levels])
    assert np.array_equal(arrays(plain)[0][0, :, 0], expected)
    black = np.where(np.array(levels) == levels[1], 0, expected)
    assert np.array_equal(np.asarray(open_image(keyed, transparency="black"))[0, :, 0], black)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(BadImage, match="scale them to 8 or 16 bits"):
        open_image(Image.new(mode, (8, 8), 3))


# --- without an end ---


def smooth(size: tuple[int, int], **options: Any) -> bytes:
    y, x = np.mgrid[: size[1], : size[0]]
    waves = np.stack(
        [128 + 100 * np.sin(x * a + y * b) for a, b in ((0.05, 0.02), (0.01, 0.09), (0.07, 0.03))], axis=-1
    )
    return encoded("JPEG", waves.astype(np.uint8), **options)


FORMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "sub-sampled": {"subsampling": 2, "optimize": True},
    "full colour": {"subsampling": 0, "quality": 95},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_jpeg_without_its_end_is_taken_and_one_without_rows_is_not(form: str) -> None:
    content = smooth((200, 120), **FORMS[form])
    whole = arrays(content)[0]
    for unended in (content[:-2], content[:-1], content[:-2] + bytes(300), content[:-2] + b"\xff\xfe"[:1]):
        assert np.array_equal(arrays(unended)[0], whole)
        assert image_size(unended) == (200, 120)
    cuts = {content.rindex(b"\xff\xda") - 1, *range(len(content) // 2, len(content) - 40, 97)}
    cuts |= {at for at in range(len(content) - 3) if content[at] == 0xFF and 0xD0 <= content[at + 1] <= 0xD7}
    for cut in sorted(cuts):
        for lacking in (content[:cut], content[:cut] + bytes(100)):
            with pytest.raises(BadImage, match="is damaged and cannot be decoded"):
                open_image(lacking)


def test_a_jpeg_that_lacks_whole_scans_is_refused() -> None:
    content = smooth((200, 120), progressive=True)
    last = content.rindex(b"\xff\xda")
    tables = content.rindex(b"\xff\xc4", 0, last)
    for cut in (last, tables):
        with pytest.raises(BadImage, match="truncated"):
            open_image(content[:cut])


# --- transparency ---


def lettering() -> Image.Image:
    """Black letters on nothing, and what is nothing is black too; its edges are half there."""
    image = Image.new("RGBA", (80, 40), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((5, 5), "STOP", fill=(0, 0, 0, 255), font_size=24)
    return image


def _key(image: Image.Image, mode: str) -> Image.Image:
    """The same with a transparent colour instead, 7 in grey: opaque where the letters are."""
    grey = Image.composite(Image.new("L", image.size, 0), Image.new("L", image.size, 7), image.getchannel("A"))
    return grey.point(lambda value: 7 if value else 0).convert(mode)


TRANSPARENT: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "RGBA": ("PNG", lambda: lettering(), {}),
    "LA": ("PNG", lambda: lettering().convert("LA"), {}),
    "WebP": ("WEBP", lambda: lettering(), {"lossless": True, "exact": True}),
    "palette": ("PNG", lambda: lettering().quantize(16), {}),
    "palette with one key": ("PNG", lambda: _key(lettering(), "L").convert("P"), {"transparency": 7}),
    "grey key": ("PNG", lambda: _key(lettering(), "L"), {"transparency": 7}),
    "RGB key": ("PNG", lambda: _key(lettering(), "RGB"), {"transparency": (7, 7, 7)}),
}


@pytest.mark.parametrize("case", TRANSPARENT)
@pytest.mark.parametrize("shown", ["drop", "white", "black"])
@pytest.mark.filterwarnings("error")
def test_all_kinds_of_transparency_follow_one_rule(case: str, shown: str) -> None:
    kind, make, options = TRANSPARENT[case]
    buffer = io.BytesIO()
    make().save(buffer, kind, **options)
    content = buffer.getvalue()
    with Image.open(io.BytesIO(content)) as image:
        rgba = image.convert("RGBA")
    if shown == "drop":
        expected = rgba.convert("RGB")
    else:  # as Qwen's tools have it
        expected = Image.new("RGB", rgba.size, shown)
        expected.paste(rgba, mask=rgba.getchannel("A"))
    flat, share = open_flat(content, transparency=shown)
    assert np.array_equal(np.asarray(flat), np.asarray(expected))
    assert share == pytest.approx((np.asarray(rgba)[..., 3] < 255).mean())
    levels = np.asarray(flat.convert("L"))
    assert (np.ptp(levels) > 200) == (shown == "white")
    with Image.open(io.BytesIO(content)) as lazy:
        assert np.array_equal(np.asarray(open_image(lazy, transparency=shown)), np.asarray(flat))


def test_transformers_agree_on_white() -> None:
    from transformers.image_transforms import convert_to_rgb

    rgba = np.concatenate([NOISE, NOISE[..., :1]], axis=-1)
    expected = np.asarray(convert_to_rgb(Image.fromarray(rgba), return_numpy=True)).astype(int)
    ours = np.asarray(open_image(encoded("PNG", rgba), transparency="white")).astype(int)
    if (np.asarray(expected) != NOISE).any():  # older ones drop what is transparent
        assert abs(ours - expected).max() <= 1


def test_what_is_opaque_is_not_called_transparent() -> None:
    assert open_flat(encoded("PNG", np.dstack([NOISE, np.full((48, 64), 255, np.uint8)])))[1] == 0
    assert open_flat(PNG)[1] == 0


# --- containers and pointers ---


def ftyp(own: bytes, *others: bytes) -> bytes:
    body = b"ftyp" + own + bytes(4) + b"".join(others)
    return struct.pack(">I", len(body) + 4) + body + bytes(40)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ftyp(b"heic", b"mif1", b"heic"), "HEIC is not supported: use JPEG, PNG, WebP or BMP (heif-convert makes"),
        (ftyp(b"hevc", b"msf1", b"hevc"), "HEIC is not supported"),
        (ftyp(b"mif1", b"mif1", b"heic"), "HEIC is not supported"),
        (ftyp(b"mif1", b"avif", b"miaf"), "AVIF is not supported: use JPEG, PNG, WebP or BMP (avifdec makes"),
        (ftyp(b"avis", b"msf1"), "AVIF is not supported"),
        (ftyp(b"mif1", b"mif1"), "HEIF is not supported"),
        (ftyp(b"isom", b"mp42"), "MP4 video is not supported"),
        (ftyp(b"qt  "), "QuickTime video is not supported"),
        (ftyp(b"crx ", b"isom"), "a camera's raw CR3 is not supported"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
)
def test_files_that_are_no_supported_picture_are_named(content: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        open_image(content)
    assert reason in str(caught.value)
