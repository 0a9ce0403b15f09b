"""The decode step as one native call, against torch's; and that batch and threads change no bit of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from avl_edge import Options, Runtime
from avl_edge.attention.decoder import NativeDecoder
from avl_edge.backends.cpu import native
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.backends.cpu.native import NativeBackend
from avl_edge.backends.decode_loop import DecodeLoop
from avl_edge.config import Formats
from avl_edge.errors import BadInput
from avl_edge.kv.store import RowStore
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.serving.requests import Request
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.decode_attention import needs_native
from tests.equipment.processes import run_python

pytestmark = needs_native

FAMILIES = ("qwen3_vl", "qwen2_vl", "internvl-qwen3")
STEPS = 8
FORMATS = {
    "exact": Formats(),
    "int8": Formats("int8", "int8", "int8"),
    "int4": Formats("int4", "int4", "int4"),
    "int8/int4": Formats("int8/int4", "int8/int4", "int8/int4"),
    "tiers": Formats(text="exact", core="int8", secondary="int4"),
}
METHODS: dict[str, dict[str, float]] = {
    "full": {},
    "avl": {"text_keep": 50, "text_floor": 4},
    "h2o": {},
    "streaming": {},
    "distinct": {},
    "fastv": {},
}
LOW_RANK = Options("full", formats=Formats(core="lowrank:16", secondary="lowrank:16"))
Made = Callable[[str], tuple[VisionLanguageModel, Runtime]]


@pytest.fixture(scope="module")
def made(checkpoint: Checkpoints, family: Checkpoints) -> Made:
    """A network and a runtime that prepares its requests."""

    def make(name: str) -> tuple[VisionLanguageModel, Runtime]:
        directory = family(name) if name in FAMILIES else checkpoint(name)
        spec = read_spec(directory)
        return VisionLanguageModel(spec, load_weights(directory, prefixes=spec.prefixes)), Runtime.open(directory)

    return make


def _requests(runtime: Runtime, options: Sequence[Options]) -> list[Request]:
    asked = [([random_image(3, (120, 80))], "What is it?"), ([], "How many are there?"), ([random_image(4, 60)], "So?")]
    return [runtime.prepare(*asked[number % 3], each) for number, each in enumerate(options)]


def _run(backend: TorchBackend, requests: Sequence[Request], forced: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Logits ``[steps, sequences, vocabulary]`` after the prompts and of each step; of tokens that are chosen greedily
    or ``forced`` ``[steps][sequences]``."""
    with DecodeLoop(backend) as loop:
        logits = [torch.stack([loop.prefill(each.prompt, loop.encode(each.prompt), each.plan) for each in requests])]
        for step in range(STEPS):
            tokens = logits[-1].argmax(-1).tolist() if forced is None else forced[step]
            logits.append(loop.decode(tokens))
    return torch.stack(logits)


def _assert_alike(own: TorchBackend, oracle: TorchBackend, requests: Sequence[Request]) -> list[list[int]]:
    """Logits within 2e-4 of the oracle's and the same tokens, which are given; each step from the oracle's rows.

    A number on the border of two codes may be packed as either. That is nobody's error, but shows in the logits, so a
    step whose new packed rows differ, in a few bytes at most, may be off by ten times as much.
    """
    packed = all(request.plan.formats.text != "exact" for request in requests)
    mine, theirs = own.rows.store.all_bytes, oracle.rows.store.all_bytes
    with DecodeLoop(own) as loop, DecodeLoop(oracle) as other:
        for each in (loop, other):
            firsts = [each.prefill(request.prompt, each.encode(request.prompt), request.plan) for request in requests]
        newest, tokens, borders = torch.stack(firsts), [], 0
        for _ in range(STEPS):
            mine.copy_(theirs)
            tokens.append(newest.argmax(-1).tolist())
            found, expected = loop.decode(tokens[-1]), other.decode(tokens[-1])
            differing = int((mine != theirs).sum()) if packed else 0
            borders += differing > 0
            assert differing <= 8
            assert torch.allclose(found, expected, rtol=0, atol=2e-3 if differing else 2e-4), (
                (found - expected).abs().max()
            )
            assert torch.equal(found.argmax(-1), expected.argmax(-1))
            newest = expected
    assert borders <= STEPS // 2
    return tokens


def _backend(model: VisionLanguageModel, requests: Sequence[Request], threads: int = 0) -> TorchBackend:
    pages = sum(request.plan.pages for request in requests)
    store = RowStore(pages, model.spec.text.kv_shape(model.dtype.itemsize), model.dtype)
    return NativeBackend(model, store, threads) if threads else TorchBackend(model, store)


def _options(method: str, formats: str) -> Options:
    return Options(method, METHODS.get(method, {}), FORMATS[formats], max_new_tokens=STEPS + 1)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_torch_in_any_batch_and_with_any_threads(made: Made, method: str, formats: str) -> None:
    model, runtime = made("qwen2-outliers")
    requests = _requests(runtime, [_options(method, formats)] * 3)
    backend = _backend(model, requests, 2)
    tokens = _assert_alike(backend, _backend(model, requests), requests)
    assert isinstance(backend, NativeBackend)
    assert (backend.native_steps, backend.torch_steps) == (STEPS, 0)
    together = _run(_backend(model, requests, 2), requests, tokens)
    for number, request in enumerate(requests):
        alone = _run(_backend(model, [request], 1), [request], [[step[number]] for step in tokens])
        assert torch.equal(alone[:, 0], together[:, number])


@pytest.mark.parametrize(
    "name",
    [
        *FAMILIES,
        "llama-bias",
        "llama-tied",
        "mistral-wide",
        "mistral-yarn",
        "qwen2-gqa",
        "llama3-rope",
        "llama-gqa-full",
    ],
)
def test_every_kind_of_decoder(made: Made, name: str) -> None:
    """Odd sizes, biases, norms of heads, a tied head, RoPE's kinds; in a batch, formats and methods of their own."""
    model, runtime = made(name)
    pairs = [("full", "exact"), ("avl", "tiers"), ("distinct", "int8")]
    requests = _requests(runtime, [_options(*pair) for pair in pairs])
    _assert_alike(_backend(model, requests, 2), _backend(model, requests), requests)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_nearer_to_wide_arithmetic_than_torch(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    """Against the same weights in float32: torch rounds after every operator, a native step only in front of products
    with bfloat16."""
    directory = checkpoint("qwen2-gqa", dtype)
    runtime, weights = Runtime.open(directory), load_weights(directory)
    requests = _requests(runtime, [_options("full", "exact")] * 2)
    narrow = VisionLanguageModel(runtime.spec, weights)
    expected = _run(_backend(narrow, requests), requests)
    tokens = expected.argmax(-1).tolist()
    weights.dtype = torch.float32
    wide = VisionLanguageModel(runtime.spec, weights)
    exact = _run(_backend(wide, requests), requests, tokens)[1:]
    native_error = (_run(_backend(narrow, requests, 2), requests, tokens)[1:] - exact).square().mean()
    torch_error = (expected[1:].float() - exact).square().mean()
    assert native_error < torch_error


@pytest.mark.parametrize("options", [Options("coarse", {"core": 20}), LOW_RANK], ids=lambda o: o.method)
def test_what_is_known_within_the_step_alone_is_torchs(made: Made, options: Options) -> None:
    model, runtime = made("llama-gqa-full")
    requests = _requests(runtime, [replace(options, max_new_tokens=STEPS + 1)])
    backend = _backend(model, requests, 1)
    assert torch.equal(_run(backend, requests), _run(_backend(model, requests), requests))
    assert isinstance(backend, NativeBackend)
    assert (backend.native_steps, backend.torch_steps) == (0, STEPS)


def test_what_is_not_served_is_torchs(made: Made, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("llama-tied")
    assert native.serves(model)
    with monkeypatch.context() as patch:
        patch.setattr(native.native, "available", lambda: False)
        assert not native.serves(model)
    directory = checkpoint("llama-tied")
    with pytest.raises(BadInput, match="threads must be 1 or more, not 0"):
        Runtime.load(directory, device="cpu", threads=0)
    runtime = Runtime.load(directory, device="cpu", threaded=False, threads=2)
    result = runtime.generate([], "What?", Options(max_new_tokens=2)).result()
    assert result.backend == "torch-cpu+native-step"
    runtime.close()


def test_bad_arguments_are_refused_and_nothing_is_written(made: Made) -> None:
    model, runtime = made("llama-gqa-full")
    requests = _requests(runtime, [Options("full", max_new_tokens=32)])
    backend = _backend(model, requests, 1)
    with DecodeLoop(backend) as loop:
        loop.prefill(requests[0].prompt, loop.encode(requests[0].prompt), requests[0].plan)
        before = backend.rows.store.all_bytes.clone()
        for token in (-1, model.spec.text.vocab_size):
            with pytest.raises(IndexError, match="outside its table"):
                loop.decode([token])
        step = NativeDecoder.step

        def spoiled(name: str, value: int) -> None:
            def call(decoder: NativeDecoder, tables: object, scores: object = None) -> Tensor:
                table = np.array(getattr(tables, name))
                table.flat[-1] = value
                return step(decoder, replace(tables, **{name: table}), scores)  # type: ignore[type-var,arg-type]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(NativeDecoder, "step", call)
                loop.decode([5])

        limit = len(backend.rows.store.keys)
        for name, value, error in [
            ("slots", limit, IndexError),
            ("slots", -1, IndexError),
            ("smoothing", limit, IndexError),
            ("rows", limit, IndexError),
            ("rows", -1, IndexError),
            ("written", 4, ValueError),
            ("offsets", 2**30, ValueError),
            ("offsets", -1, ValueError),
        ]:
            with pytest.raises(error):
                spoiled(name, value)
        assert torch.equal(backend.rows.store.all_bytes, before)


def test_no_such_decoder(made: Made) -> None:
    model, _ = made("llama-tied")
    weights = native.decoder_weights(model)
    keys, values = torch.zeros(2, 16, 4, 16).unbind()
    with pytest.raises(ValueError, match="do not fit together"):
        NativeDecoder(weights, keys, values, 0)
    with pytest.raises(ValueError, match="do not fit together"):
        NativeDecoder(weights, keys[:, :3], values[:, :3], 1)
    with pytest.raises(ValueError, match="do not fit together"):
        NativeDecoder(weights, keys, keys, 1)


TWO_RUNTIMES = """
    from avl_edge import Options, Runtime
    answers, runtimes = [], [Runtime.load("demo", device="cpu") for _ in range(2)]
    ask = lambda each: each.generate([], "What is in the picture?", Options(max_new_tokens=4)).result().text
    answers = [ask(each) for each in runtimes for _ in range(2)]
    assert len(set(answers)) == 1, answers
"""


def test_two_runtimes_in_one_process_that_ends_with_their_threads_asleep() -> None:
    run_python(TWO_RUNTIMES)


def test_a_forked_process_goes_on_by_itself() -> None:
    """None of the threads is there; closing the decoder waits for none of them."""
    run_python(
        """
        import os, torch
        from avl_edge.attention.decoder import Matrix, NativeDecoder, Layer, Weights, Step
        import numpy as np
        ones = torch.ones(32)
        of = lambda o, i: Matrix(torch.randn(o, i, generator=torch.Generator().manual_seed(o + i)))
        layer = Layer(ones, ones, [of(*s) for s in [(32, 32)] * 4 + [(64, 32), (64, 32), (32, 64)]])
        keys, values = torch.zeros(2, 16, 2, 16).unbind()
        decoder = NativeDecoder(Weights([layer], ones, of(500, 32), of(500, 32), 2, 1e-5), keys, values, 3)
        zero = np.zeros((1, 1), dtype=np.int32)
        offsets = np.array([[0, 1, 1, 1, 1]], dtype=np.int32)
        angle = np.ones((1, 16), dtype=np.float32), np.zeros((1, 16), dtype=np.float32)
        step = Step(np.array([3], dtype=np.int32), *angle, zero, np.zeros(1, dtype=np.int32), zero - 1, zero, offsets)
        expected = decoder.step(step)
        child = os.fork()
        if not child:
            same = torch.equal(decoder.step(step), expected)
            del decoder
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(decoder.step(step), expected)
        """
    )
