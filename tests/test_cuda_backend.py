"""The GPU backend against the oracle, the torch backend on the CPU: the whole path from prompt to rows and tokens.

No GPU is needed: `tests/cuda_on_cpu.py` brings a device that works at once, and kernels by reference or emulation. That
no operator of the step mixes devices or waits for the host is checked with torch's fake tensors of a CUDA device.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avl_edge.backend import TorchBackend
from avl_edge.budget import kv_plan
from avl_edge.cache import SequenceCache, prompt_shape
from avl_edge.checkpoint import load_weights
from avl_edge.config import Formats
from avl_edge.cuda import Kernels, KernelShape, NoCuda, Pool
from avl_edge.cuda_backend import CudaDevice
from avl_edge.cuda_backend.model import load_model
from avl_edge.cuda_backend.step import DecodeStep
from avl_edge.cuda_backend.tables import Bucket, StepTables
from avl_edge.errors import BadInput
from avl_edge.models import Llava
from avl_edge.models.rope import _KINDS, Rope
from avl_edge.policies import H2O, Avl, Coarse, FastV, Full, Method, Streaming
from avl_edge.pool import RowPool, RowStore
from avl_edge.request import ImageSpan, Prompt
from avl_edge.spec import ModelSpec, read_spec
from tests.conftest import Checkpoints
from tests.cuda_on_cpu import EmulatedModule, HostDevice, backend_for

METHODS: dict[str, Method] = {
    "full": Full(),
    "avl": Avl(refresh=3, text_floor=4),
    "avl-often": Avl(prefill_keep=80, secondary=60, core=20, refresh=2, text_keep=50, text_floor=2, prune_layer=1),
    "avl-mean": Avl(prompt_mean=1, text_keep=100),
    "h2o": H2O(),
    "fastv": FastV(),
    "streaming": Streaming(),
}
STEPS = 8


def _prompt(spec: ModelSpec, seed: int, text: int = 12, images: int = 1) -> tuple[Prompt, np.ndarray | None]:
    """A prompt with pictures in its middle, and their pixels."""
    rng = np.random.default_rng(seed)
    length = spec.tokens_per_image
    ids = rng.integers(10, 300, text + images * length + text // 2)
    spans = tuple(ImageSpan(f"{seed}{i}", 3 + text // 2 + i * (length + 1), length) for i in range(images))
    side = spec.vision.image_size
    pixels = rng.standard_normal((images, 3, side, side), dtype=np.float32) if images else None
    return Prompt(tuple(map(int, ids)), spans, pixels), pixels


class Side:
    """One backend with a pool of its own, and the sequences on it."""

    def __init__(self, backend: Any, spec: ModelSpec, itemsize: int, pages: int) -> None:
        self.backend, self.spec = backend, spec
        self.shape = spec.text.kv_shape(itemsize)
        self.pool = RowPool(pages, self.shape)

    def admit(self, prompt: Prompt, method: Method, formats: Formats | None = None) -> SequenceCache:
        shape = prompt_shape(len(prompt), prompt.spans)
        planned = kv_plan(method, formats or Formats(), self.shape, shape, STEPS * 2)
        return SequenceCache(self.pool, planned, len(prompt), prompt.spans, self.shape.layers)

    def start(self, prompt: Prompt, method: Method) -> tuple[SequenceCache, Tensor]:
        cache = self.admit(prompt, method)
        features = None if prompt.pixel_values is None else self.backend.encode_images(prompt.pixel_values)
        return cache, self.backend.prefill(prompt, features, cache)


PAGES = 4096


def _both(directory: Path, module: Any = None, warps: int = 4) -> tuple[Side, Side, HostDevice]:
    spec = read_spec(directory)
    model = Llava(spec, load_weights(directory))
    oracle = TorchBackend(model, RowStore(PAGES, spec.text.kv_shape(model.dtype.itemsize), model.dtype))
    backend, device = backend_for(directory, PAGES, module, warps)
    sides = [Side(each, spec, model.dtype.itemsize, PAGES) for each in (oracle, backend)]
    return sides[0], sides[1], device


def _membership(cache: SequenceCache) -> list[tuple[list[int], list[int], list[bool]]]:
    """Which tokens each layer holds, and in which tier, whatever rows they lie in."""
    return [(r.text_positions.tolist(), r.image_positions.tolist(), r.core.tolist()) for r in cache.rows.layers]


def _run_both(oracle: Side, ours: Side, requests: Sequence[tuple[Prompt, Method]], tolerance: float) -> None:
    """Sequences join one after the other; every step's logits and rows are compared, the oracle's tokens go on."""
    held: list[list[SequenceCache]] = [[], []]
    tokens: list[int] = []
    waiting = list(requests)
    for turn in range(STEPS + len(waiting)):
        if waiting:
            prompt, method = waiting.pop(0)
            started = [side.start(prompt, method) for side in (oracle, ours)]
            for caches, (cache, _) in zip(held, started, strict=True):
                caches.append(cache)
            _close(started[1][1], started[0][1], tolerance)
            tokens.append(int(started[0][1].argmax()))
        expected, got = (side.backend.decode(tokens, caches) for side, caches in zip((oracle, ours), held, strict=True))
        _close(got, expected, tolerance)
        for theirs, own in zip(*held, strict=True):
            assert _membership(own) == _membership(theirs), turn
            assert (own.rows_read, own.rows_full, own.refreshes) == (
                theirs.rows_read,
                theirs.rows_full,
                theirs.refreshes,
            )
        tokens = expected.argmax(-1).tolist()
        if turn == 4 and len(tokens) > 1:  # somebody leaves: the batch changes its bucket and its order
            for side, caches in zip((oracle, ours), held, strict=True):
                caches.pop(0).close()
                side.pool.check_integrity(cache.rows for cache in caches)
            tokens.pop(0)


def _close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.device.type == "cpu"
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama-gqa-full", "qwen2-gqa", "mistral-wide"])
def test_the_whole_path_equals_the_oracle(checkpoint: Checkpoints, name: str, method: str) -> None:
    """float32 rows, which only the reference kernels take, so that both sides round alike and choose the same rows."""
    oracle, ours, _ = _both(checkpoint(name))
    prompts = [
        _prompt(oracle.spec, seed, text, images)[0] for seed, text, images in ((0, 12, 1), (1, 20, 2), (2, 5, 0))
    ]
    _run_both(oracle, ours, [(prompt, METHODS[method]) for prompt in prompts], 1e-4)


def test_methods_share_a_batch(checkpoint: Checkpoints) -> None:
    oracle, ours, device = _both(checkpoint("llama-mha"))
    requests = [(_prompt(oracle.spec, seed)[0], method) for seed, method in enumerate(METHODS.values())]
    _run_both(oracle, ours, requests, 1e-4)
    waits = device.log.count("synchronize")
    assert waits == device.log.count("replay"), "a step waits once"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
def test_half_precision_is_as_close_as_its_rounding(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    """Full attention, which chooses nothing that a rounding could turn over."""
    oracle, ours, _ = _both(checkpoint("llama-gqa-full", dtype=dtype))
    requests = [(_prompt(oracle.spec, seed)[0], Full()) for seed in range(3)]
    _run_both(oracle, ours, requests, 8 * torch.finfo(dtype).eps)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], EmulatedModule]:
    """The CUDA source for the small checkpoints' shape: heads of 16, two query heads per key/value head, bfloat16."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulation with")
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    source = Path(__file__).parents[1] / "plugins" / "emulation" / "driver.cpp"
    macros = ("-DHEAD_DIM=16", "-DGROUP=2", "-DROW=Bfloat", f"-DWARPS={WARPS}")
    options = ("-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-Wno-unknown-pragmas")
    subprocess.run([compiler, *options, *macros, str(source), "-o", str(library)], check=True, timeout=300)
    return lambda: EmulatedModule(library)


WARPS = 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "avl-often", "h2o"])
def test_the_whole_path_on_the_emulated_source(
    checkpoint: Checkpoints, emulated: Callable[[], EmulatedModule], method: str
) -> None:
    """Against the reference kernels, which sum in another order: rows must be the same, logits but for a rounding."""
    directory = checkpoint("llama-bf16")
    spec = read_spec(directory)
    sides = [Side(backend_for(directory, PAGES, *rest)[0], spec, 2, PAGES) for rest in ((), (emulated(), WARPS))]
    requests = [(_prompt(spec, seed)[0], METHODS[method]) for seed in range(2)]
    _run_both(sides[0], sides[1], requests, 0.03)


def test_greedy_tokens_are_those_of_the_logits(checkpoint: Checkpoints) -> None:
    directory = checkpoint("llama-gqa-full")
    spec = read_spec(directory)
    sides = [Side(backend_for(directory, PAGES)[0], spec, 4, PAGES) for _ in range(2)]
    held = [[side.start(_prompt(spec, seed)[0], Avl())[0] for seed in range(3)] for side in sides]
    tokens = [5, 6, 7]
    for _ in range(STEPS):
        expected = sides[0].backend.decode(tokens, held[0]).argmax(-1).tolist()
        tokens = sides[1].backend.decode_greedy(tokens, held[1])
        assert tokens == expected
        assert len(tokens) == 3, "the bucket has four places"


def test_a_step_is_recorded_once_and_reads_its_lists_anew(checkpoint: Checkpoints) -> None:
    """A selection that grows, shrinks and changes its core is the same recording, with scores or without."""
    _, ours, device = _both(checkpoint("llama-mha"))
    cache, _ = ours.start(_prompt(ours.spec, 0)[0], Avl(refresh=3, text_keep=100))
    for _ in range(2 * STEPS):
        ours.backend.decode([5], [cache])
    assert device.log.count("record") == 2, "one for steps with scores, one for those without"
    assert device.log.count("replay") == 2 * STEPS


def test_only_a_dozen_recordings_are_kept(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avl_edge.cuda_backend.backend._RECORDED", 2)
    _, ours, device = _both(checkpoint("llama-mha"))
    caches = [ours.start(_prompt(ours.spec, seed)[0], Full())[0] for seed in range(3)]
    for batch in (1, 2, 3, 3, 2, 1):
        ours.backend.decode([5] * batch, caches[:batch])
    assert len(ours.backend._steps) == 2
    assert device.log.count("record") == 4, "three sizes, and the first once more"


def test_logits_are_the_callers_own(checkpoint: Checkpoints) -> None:
    _, ours, _ = _both(checkpoint("llama-mha"))
    cache, _ = ours.start(_prompt(ours.spec, 0)[0], Full())
    first = ours.backend.decode([5], [cache])
    before = first.clone()
    ours.backend.decode([6], [cache])
    assert torch.equal(first, before)


def test_after_an_interrupted_step_nothing_is_filled_before_the_device_is_done(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours, device = _both(checkpoint("llama-mha"))
    caches = [ours.start(_prompt(ours.spec, seed)[0], Full())[0] for seed in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(SequenceCache, "settle", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours.backend.decode([5], caches[:1])
    assert device.log[-1] == "replay"
    device.log.clear()
    ours.backend.decode([5], caches[1:])
    assert device.log == ["synchronize", "replay", "synchronize"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_packed_rows_are_refused_before_anything_is_computed(checkpoint: Checkpoints) -> None:
    _, ours, _ = _both(checkpoint("llama-mha"))
    prompt = _prompt(ours.spec, 0, images=0)[0]
    cache = ours.admit(prompt, Full(), Formats("int8", "int8", "int8"))
    with pytest.raises(BadInput, match="use --device cpu"):
        ours.backend.prefill(prompt, None, cache)
    cache.close()
    ours.pool.check_integrity([])


def test_a_method_that_chooses_within_a_step_is_refused(checkpoint: Checkpoints) -> None:
    _, ours, _ = _both(checkpoint("llama-mha"))
    prompt = _prompt(ours.spec, 0, images=0)[0]
    cache = ours.admit(prompt, Coarse())
    with pytest.raises(BadInput, match="use --device cpu"):
        ours.backend.prefill(prompt, None, cache)


def test_scores_of_a_long_prompt_come_in_pieces(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint("llama-gqa-full")
    whole, pieces = (_both(directory)[1] for _ in range(2))
    prompt = _prompt(whole.spec, 3, text=20)[0]
    expected, logits = whole.start(prompt, H2O())
    launched = pieces.backend._kernels._module.launched
    monkeypatch.setattr("avl_edge.cuda_backend.backend._LOGITS_BYTES", 4 * 4 * len(prompt) * 7)
    cache, got = pieces.start(prompt, H2O())
    assert launched.count("avl_prompt_logits") == 4 * -(-(len(prompt) + 1) // 7)
    assert _membership(cache) == _membership(expected)
    assert torch.equal(got, logits)


# Tables


@given(
    sequences=st.integers(1, 40),
    rows=st.integers(0, 70000),
)
def test_buckets_hold_what_they_are_for_and_not_twice_as_much(sequences: int, rows: int) -> None:
    bucket = Bucket.of(sequences, rows, False)
    assert sequences <= bucket.batch < 2 * sequences or sequences == bucket.batch == 1
    assert rows <= bucket.capacity
    assert bucket.capacity == 256 or bucket.capacity < 1.5 * rows + 1


@settings(max_examples=60)
@given(data=st.data())
def test_tables_say_on_the_device_what_the_host_filled_in(data: st.DataObject) -> None:
    layers, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    bucket = Bucket(1 << (count - 1).bit_length(), 256, False)
    tables = StepTables(HostDevice(), layers, bucket)
    for _ in range(2):  # the second time over what the first one left
        count = data.draw(st.integers(1, count))
        lengths = data.draw(
            st.lists(st.lists(st.integers(0, 50), min_size=count, max_size=count), min_size=layers, max_size=layers)
        )
        rows = [
            [np.arange(n, dtype=np.int32) + 1000 * layer + i for i, n in enumerate(own)]
            for layer, own in enumerate(lengths)
        ]
        slots = np.arange(layers * count).reshape(layers, count)
        tables.fill(list(range(count)), list(range(100, 100 + count)), slots, rows)
        tables.upload()
        for layer in range(layers):
            ends = np.cumsum(lengths[layer]).tolist()
            assert tables.device_offsets[layer].tolist() == [0, *ends] + [ends[-1]] * (bucket.batch - count)
            listed = tables.device_rows[layer, : ends[-1]].tolist()
            assert listed == [int(row) for own in rows[layer] for row in own]
            assert tables.device_slots[layer].tolist() == slots[layer].tolist() + [-1] * (bucket.batch - count)
        assert tables.device_tokens[:count].tolist() == list(range(count))
        assert tables.device_positions[:count].tolist() == list(range(100, 100 + count))


def test_without_a_gpu_it_is_one_clear_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: tools/gpu/check.py is for that")
    with pytest.raises(NoCuda, match=r"install a torch for CUDA|nvidia-smi") as error:
        CudaDevice()
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


class Elsewhere(HostDevice):
    """A device whose tensors have shapes and places, but no values: what needs one raises."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses an operator over two devices, as a GPU would; numbers of no dimension may come from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        places = {each.device.type for each in tensors if each.dim() or each.device.type == "meta"}
        assert len(places) < 2, f"{func} over {places}"
        return func(*args, **(kwargs or {}))


class Nothing:
    """A module whose kernels do nothing."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def launch(self, kernel: str, *_: object) -> None:
        self.launched.append(kernel)


class UncheckedRope(Rope):
    """Without the look at its frequencies, at load, which have no values here."""

    def __init__(self, head_dim: int, parameters: Mapping[str, Any]) -> None:
        self._frequencies, self._magnitude = _KINDS[parameters["rope_type"]](head_dim, parameters)


@pytest.mark.parametrize("scores", [False, True])
def test_the_step_stays_on_the_device_and_asks_the_host_for_nothing(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, scores: bool
) -> None:
    monkeypatch.setattr("avl_edge.models.decoder.Rope", UncheckedRope)
    monkeypatch.setattr("avl_edge.cuda_backend.step.address", lambda _: 16)
    spec, device, module = read_spec(checkpoint("llama3-rope")), Elsewhere(), Nothing()
    with torch.inference_mode():
        model = load_model(spec, load_weights(checkpoint("llama3-rope")), device.device)
        kernels, pool = Kernels(module, KernelShape(16, 2, "Half")), Pool(16, 16, 2, 32, 16, 32, 16)
        step = DecodeStep(model, kernels, pool, device, Bucket(2, 256, scores), splits=2)
        with OneDevice():
            step.run()
            with pytest.raises(AssertionError, match="over"):
                model.decoder.embed(torch.zeros(2, dtype=torch.int32))
        assert all(output.device == device.device for output in step._outputs.values())
        pixels = np.zeros((1, 3, spec.vision.image_size, spec.vision.image_size), dtype=np.float32)
        features = model.encode_images(pixels)
        assert features.shape == (1, spec.tokens_per_image, spec.text.hidden_size)
        span = ImageSpan("", 1, spec.tokens_per_image)
        embedded = model.embed((1,) * (spec.tokens_per_image + 3), (span,), features)
        assert {features.device, embedded.device} == {device.device}
    launched = ["avl_append", "avl_attend", "avl_merge"] + ["avl_scores"] * scores
    assert module.launched == launched * spec.text.layers
