"""The TensorRT plugin's kernels as NVRTC compiles them for a GPU; none of it is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from avl_edge.attention.cuda import NoCuda, nvrtc, source
from avl_edge.backends.tensorrt import kernels as token_kernels
from avl_edge.backends.tensorrt.attention import Attention, Sizes
from avl_edge.backends.tensorrt.kernels import TokenShape, digest, token_cubin
from avl_edge.errors import BadInput


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loaded_on_a_gpu(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiled for the GPU at hand, here a name; LLaVA-1.5-7B's sizes need the scratch memory that arithmetic says."""
    try:
        nvrtc.find()
    except NoCuda as error:
        pytest.skip(str(error))
    images: list[bytes] = []
    gpu = SimpleNamespace(arch="sm_87", cuda=(12, 6), multiprocessors=16, load=lambda image: images.append(image))
    monkeypatch.setattr("avl_edge.backends.tensorrt.attention.Gpu", lambda: gpu)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attention = Attention.load(128, 1, dtype)
    wanted = ("avl_attend", "avl_append"), ("avl_token_attend", "avl_token_scores", "avl_token_join", "avl_token_sums")
    for image, kernels in zip(images, wanted, strict=True):
        assert image.startswith(b"\x7fELF")
        assert all(kernel.encode() in image for kernel in kernels)
    prompt = Sizes(3072, 1, 4096, 3072, 2**18, 32, 32, 128, 32)
    attention.prepare(prompt)
    assert len(images) == 2, "a prompt needs no kernels for packed rows"
    step = Sizes(16, 16, 16 * 4096, 16, 2**18, 32, 32, 128, 32)
    assert attention.workspace_bytes(prompt) >= 3072 * 32 * 4
    # Sums of 16 sequences in 5 splits, and logits of every row; less than 24 MB.
    least = 16 * 5 * 32 * 128 * 4 + 32 * 16 * 4096 * 4 if dtype != "float32" else 16 * 32 * 4
    assert least <= attention.workspace_bytes(step) < 24e6
    packed, question = replace(step, parts=3), replace(prompt, parts=3)
    if dtype == "float32":
        for call in (packed, question):
            with pytest.raises(BadInput, match="a float32 engine reads exact rows: build the package with --precision"):
                attention.prepare(call)
        return
    for _ in range(2):
        attention.prepare(packed)
        assert len(images) == 4, "each format once"
    assert b"avl_append" in images[3]
    assert images[2] != images[3]
    assert least + 16 * 2 * 5 * 32 * 128 * 4 <= attention.workspace_bytes(packed) < 36e6
    for _ in range(2):
        attention.prepare(question)
        assert len(images) == 5, "once for rows of all formats"
    assert all(kernel.encode() in images[4] for kernel in wanted[1])
    assert images[4] != images[1]


@pytest.mark.parametrize("arch", ["sm_87", "sm_90"])
@pytest.mark.parametrize("row", ["Half", "Bfloat", "Float", "packed Half", "packed Bfloat"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_fits_the_registers_of_the_device(head_dim: int, row: str, arch: str) -> None:
    try:
        compiler = nvrtc.find()
    except NoCuda as error:
        pytest.skip(str(error))
    packed, name = row.startswith("packed"), token_kernels.NAME
    options = ["--ptxas-options=-v", *TokenShape(head_dim, 4, row.split()[-1]).options]
    options += [token_kernels.PACKED] if packed else []
    compiled = compiler.compile(source.read(name), name, arch, options)
    assert compiled.log.count("Compiling entry function 'avl_token_") == 4
    assert compiled.log.count("0 bytes spill stores, 0 bytes spill loads") == 4
    if compiler.version[0] == 12:
        assert nvrtc.isa(compiled.ptx) <= (8, 5), "the driver of JetPack 6 refuses newer PTX"


def test_cached(tmp_path: Path) -> None:
    try:
        first = token_cubin("sm_87", TokenShape(64, 1, "Half"), folder=tmp_path)
    except NoCuda as error:
        pytest.skip(str(error))
    assert first.startswith(b"\x7fELF")
    assert len(list(tmp_path.iterdir())) == 1
    assert token_cubin("sm_87", TokenShape(64, 1, "Half"), folder=tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("head_dim", "group", "row"), [(12, 1, "Half"), (264, 1, "Half"), (64, 0, "Half"), (64, 1, "Int")]
)
def test_refused_shapes(head_dim: int, group: int, row: str) -> None:
    with pytest.raises(BadInput, match="the GPU kernels take"):
        TokenShape(head_dim, group, row)


def test_digest_follows_both_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before, texts = digest(), {name: source.read(name) for name in (source.NAME, token_kernels.NAME)}

    def changed(name: str, more: bytes) -> str:
        of_name = {**texts[name], name: texts[name][name] + more}
        monkeypatch.setattr(source, "read", lambda other=source.NAME: {**texts, name: of_name}[other])
        return digest()

    for name in texts:
        assert changed(name, b"\n// more is said") == before
        assert changed(name, b"\nint more;") != before
