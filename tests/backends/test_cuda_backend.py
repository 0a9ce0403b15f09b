"""The GPU backend against the oracle, the torch backend on the CPU: the whole path from prompt to rows and tokens.

No GPU is needed: `tests/equipment/cuda_on_cpu.py` brings a device that works at once, and kernels by reference or
emulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.attention.cuda import NoCuda
from avl_edge.backends.steps import Bucket, CudaDevice, Reads, StepTables
from avl_edge.config import Formats
from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.methods import H2O, Avl, Coarse, Full, Method
from avl_edge.kv.pool import RowTable
from avl_edge.kv.selection import Selection
from avl_edge.model.families import read_spec
from tests.conftest import Checkpoints
from tests.equipment.cuda_on_cpu import HostDevice, backend_for
from tests.equipment.cuda_sides import (
    FORMATS_OF,
    METHODS,
    PAGES,
    STEP_OF,
    STEPS,
    Side,
    both,
    membership,
    prefixes,
    random_prompt,
    run_both,
)
from tests.equipment.emulated_kernels import COMPILER, Shape
from tests.equipment.emulated_module import EmulatedModule


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama-gqa-full", "qwen2-gqa", "mistral-wide"])
def test_the_whole_path_equals_the_oracle(checkpoint: Checkpoints, name: str, method: str) -> None:
    """float32 rows, which only the reference kernels take, so that both sides round alike and choose the same rows."""
    oracle, ours, _ = both(checkpoint(name))
    prompts = [
        random_prompt(oracle.spec, seed, text, images) for seed, text, images in ((0, 12, 1), (1, 20, 2), (2, 5, 0))
    ]
    run_both(oracle, ours, [(prompt, METHODS[method], Formats()) for prompt in prompts], 1e-4)


@pytest.mark.parametrize("formats", FORMATS_OF)
@pytest.mark.parametrize("method", ["full", "avl-often", "h2o"])
def test_packed_rows_equal_the_oracles(checkpoint: Checkpoints, method: str, formats: str) -> None:
    """Text that is packed as it comes, tiers of several formats in one softmax, rows that move between tiers."""
    oracle, ours, _ = both(checkpoint("llama-gqa-full"))
    chosen = FORMATS_OF[formats]
    prompts = [random_prompt(oracle.spec, seed, images=images) for seed, images in enumerate((1, 2))]
    run_both(oracle, ours, [(prompt, METHODS[method], chosen) for prompt in prompts], STEP_OF[chosen.text])


@pytest.mark.parametrize(
    "chosen",
    [Formats("exact", image, image) for image in ("exact", "int8", "int4")] + [Formats("int8", "int4", "int4")],
    ids=["exact", "int8", "int4", "text packed"],
)
def test_a_core_picked_on_the_device_is_the_oracles(checkpoint: Checkpoints, chosen: Formats) -> None:
    oracle, ours, device = both(checkpoint("llama-gqa-full"))
    methods = (Coarse(), Coarse(secondary=80, core=30, mass=60, by_mass=1), Coarse(mass=100), Full())
    requests = [(random_prompt(oracle.spec, seed), method, chosen) for seed, method in enumerate(methods)]
    requests.append((random_prompt(oracle.spec, 4, images=0), Coarse(), chosen))  # nothing to choose from
    run_both(oracle, ours, requests, STEP_OF[chosen.text])
    assert device.log.count("synchronize") == device.log.count("replay") + len(requests), (
        "a prompt and a step wait once each"
    )


def test_a_method_that_picks_its_core_answers_a_text_alone(checkpoint: Checkpoints) -> None:
    oracle, ours, _ = both(checkpoint("llama-mha"))
    run_both(
        oracle, ours, [(random_prompt(oracle.spec, 4, images=0), Coarse(), Formats("exact", "int8", "int8"))], 1e-4
    )


def test_formats_and_methods_share_a_batch(checkpoint: Checkpoints) -> None:
    oracle, ours, device = both(checkpoint("llama-mha"))
    mixed = [Formats(), *FORMATS_OF.values()]
    methods = [METHODS["avl-often"], Full(), METHODS["avl-often"], H2O(), Coarse(core=30)]
    chosen = [(m, f if f.core == f.secondary else FORMATS_OF["int4"]) for m, f in zip(methods, mixed, strict=True)]
    requests = [(random_prompt(oracle.spec, seed), *each) for seed, each in enumerate(chosen)]
    requests.append((random_prompt(oracle.spec, 9), Avl(refresh=2), FORMATS_OF["falling"]))
    run_both(oracle, ours, requests, STEP_OF["int4"])
    assert device.log.count("synchronize") == device.log.count("replay") + len(requests), (
        "a prompt and a step wait once each"
    )


def test_exact_steps_launch_nothing_for_other_formats(checkpoint: Checkpoints) -> None:
    """Also after a neighbour with packed rows has left, and beside secondary rows that this step does not read."""
    _, ours, device = both(checkpoint("llama-mha"))
    exact = ours.start(random_prompt(ours.spec, 0), Full())[0]
    packed = ours.start(random_prompt(ours.spec, 1), Avl(text_keep=100), Formats("exact", "exact", "int4"))[0]
    launched = device.launched
    for caches in ([exact, packed], [exact, packed], [exact]):
        ours.backend.decode([5] * len(caches), caches)
        assert not any(" " in kernel for kernel in launched)
        assert launched[-3:] == ["avl_append", "avl_attend", "avl_merge"]
    ours.backend.decode([5], [packed])
    assert launched[-5:] == ["avl_append", "avl_attend", "avl_attend int4", "avl_merge", "avl_scores"], "a refresh"


def test_methods_share_a_batch(checkpoint: Checkpoints) -> None:
    oracle, ours, device = both(checkpoint("llama-mha"))
    requests = [(random_prompt(oracle.spec, seed), method, Formats()) for seed, method in enumerate(METHODS.values())]
    run_both(oracle, ours, requests, 1e-4)
    waits = device.log.count("synchronize")
    assert waits == device.log.count("replay") + len(requests), "a prompt and a step wait once each"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
def test_half_precision_is_as_close_as_its_rounding(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    """Full attention, which chooses nothing that a rounding could turn over."""
    oracle, ours, _ = both(checkpoint("llama-gqa-full", dtype=dtype))
    requests = [(random_prompt(oracle.spec, seed), Full(), Formats()) for seed in range(3)]
    run_both(oracle, ours, requests, 8 * torch.finfo(dtype).eps)


@pytest.fixture(scope="module")
def emulated(shared_folder: Path) -> Callable[[str], EmulatedModule]:
    """The CUDA source for the small checkpoints' shape, by who reads the rows: heads of 16, two query heads per
    key/value head, bfloat16."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulation with")
    shape = Shape(16, 2, torch.bfloat16, WARPS)
    return lambda format_: EmulatedModule(shape.library(shared_folder, format_))


WARPS = 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "formats", "sequences"),
    [
        (METHODS["full"], Formats(), 2),
        (METHODS["avl-often"], Formats(), 2),
        (METHODS["h2o"], Formats(), 2),
        (Coarse(), Formats("int4", "int8", "int8"), 1),
        (METHODS["attentionpack"], Formats("exact", "lowrank:7", "lowrank:7@2"), 2),
        pytest.param(METHODS["avl-often"], Formats("int8", "int8", "int4"), 2, marks=pytest.mark.long),
    ],
    ids=["full", "avl-often", "h2o", "coarse-packed", "attentionpack", "avl-packed"],
)
def test_the_whole_path_on_the_emulated_source(
    checkpoint: Checkpoints,
    emulated: Callable[[str], EmulatedModule],
    method: Method,
    formats: Formats,
    sequences: int,
) -> None:
    """Against the reference kernels, which sum in another order: rows must be the same, logits but for a rounding."""
    directory = checkpoint("llama-bf16")
    spec = read_spec(directory)
    sides = [Side(backend_for(directory, PAGES, *rest)[0], spec, 2, PAGES) for rest in ((), (emulated, WARPS))]
    requests = [(random_prompt(spec, seed), method, formats) for seed in range(sequences)]
    run_both(sides[0], sides[1], requests, 0.03, steps=STEPS if sequences > 1 else 2)


@pytest.mark.slow
def test_a_shared_prefix_on_the_emulated_source(
    checkpoint: Checkpoints, emulated: Callable[[str], EmulatedModule]
) -> None:
    """A question whose policy looks at its prompt's attention, which begins where the prefix ends."""
    directory, formats = checkpoint("llama-bf16"), Formats("exact", "int8", "int8")
    backends = [backend_for(directory, PAGES, *rest)[0] for rest in ((), (emulated, WARPS))]
    sides = [Side(backend, read_spec(directory), 2, PAGES) for backend in backends]
    of_sessions, prompts = prefixes(sides, 2, Full(), formats)
    method = Avl(secondary=100, prefill_keep=100, core=30, prompt_mean=1)
    run_both(*of_sessions, [(prompts[0], method, formats)], 0.03, steps=2)


def test_greedy_tokens_are_those_of_the_logits(checkpoint: Checkpoints) -> None:
    directory = checkpoint("llama-gqa-full")
    spec = read_spec(directory)
    sides = [Side(backend_for(directory, PAGES)[0], spec, 4, PAGES) for _ in range(2)]
    held = [[side.start(random_prompt(spec, seed), Avl())[0] for seed in range(3)] for side in sides]
    tokens = [5, 6, 7]
    for _ in range(STEPS):
        expected = sides[0].backend.decode(tokens, held[0]).logits.argmax(-1).tolist()
        tokens = sides[1].backend.decode(tokens, held[1], greedy=True).tokens
        assert tokens == expected
        assert len(tokens) == 3, "the bucket has four places"


def test_a_step_is_recorded_once_and_reads_its_lists_anew(checkpoint: Checkpoints) -> None:
    """A selection that grows, shrinks and changes its core is the same recording, with scores or without."""
    _, ours, device = both(checkpoint("llama-mha"))
    cache, _ = ours.start(random_prompt(ours.spec, 0), Avl(refresh=3, text_keep=100))
    for _ in range(2 * STEPS):
        ours.backend.decode([5], [cache])
    assert device.log.count("record") == 2, "one for steps with scores, one for those without"
    assert device.log.count("replay") == 2 * STEPS


def test_only_a_dozen_recordings_are_kept(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avl_edge.backends.steps.recorded.KEPT_STEPS", 2)
    _, ours, device = both(checkpoint("llama-mha"))
    caches = [ours.start(random_prompt(ours.spec, seed), Full())[0] for seed in range(3)]
    for batch in (1, 2, 3, 3, 2, 1):
        ours.backend.decode([5] * batch, caches[:batch])
    assert len(ours.backend.steps) == 2
    assert device.log.count("record") == 4, "three sizes, and the first once more"


def test_logits_are_the_callers_own(checkpoint: Checkpoints) -> None:
    _, ours, _ = both(checkpoint("llama-mha"))
    cache, _ = ours.start(random_prompt(ours.spec, 0), Full())
    first = ours.backend.decode([5], [cache]).logits
    before = first.clone()
    ours.backend.decode([6], [cache])
    assert torch.equal(first, before)


def test_after_an_interrupted_step_nothing_is_filled_before_the_device_is_done(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours, device = both(checkpoint("llama-mha"))
    caches = [ours.start(random_prompt(ours.spec, seed), Full())[0] for seed in range(2)]
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


def test_scores_of_a_long_prompt_come_in_pieces(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint("llama-gqa-full")
    (_, whole, _), (_, pieces, device) = both(directory), both(directory)
    prompt = random_prompt(whole.spec, 3, text=20)
    expected, logits = whole.start(prompt, H2O())
    monkeypatch.setattr("avl_edge.backends.cuda.backend.LOGITS_BYTES", 4 * 4 * len(prompt) * 7)
    cache, got = pieces.start(prompt, H2O())
    assert device.launched.count("avl_prompt_logits") == 4 * -(-(len(prompt) + 1) // 7)
    assert membership(cache) == membership(expected)
    assert torch.equal(got, logits)


# Tables


def _reads(rows: list[np.ndarray], format_: str = "exact") -> Reads:
    return Reads([_selection(rows, format_)], format_)


def _selection(rows: list[np.ndarray], format_: str) -> Selection:
    table = RowTable(len(rows))
    for layer, ids in enumerate(rows):
        table.put(layer, ids + 1, ids)
    return Selection(format_, table)


@given(sequences=st.integers(1, 40), rows=st.integers(0, 70000))
def test_buckets_hold_what_they_are_for_and_not_twice_as_much(sequences: int, rows: int) -> None:
    nothing = np.empty(0, dtype=np.int32)
    reads = [_reads([np.zeros(rows, dtype=np.int32)]), *[_reads([nothing])] * (sequences - 1)]
    bucket = Bucket.of(reads, False)
    assert sequences <= bucket.batch < 2 * sequences or sequences == bucket.batch == 1
    assert rows <= bucket.capacity
    assert bucket.capacity == 256 or bucket.capacity < 1.5 * rows + 1
    assert (bucket.formats, bucket.written, bucket.scanned) == (("exact",), ("exact",), 0)


@settings(max_examples=60)
@given(data=st.data())
def test_tables_say_on_the_device_what_the_host_filled_in(data: st.DataObject) -> None:
    """Lists of three formats, one after the other, with room behind them for what a scan chooses; the positions and
    bases of low-rank rows."""
    layers, most = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    names = data.draw(st.lists(st.sampled_from(("exact", "int4")), min_size=most, max_size=most))
    formats = ("exact", "int4", "lowrank:9@5")
    bucket = Bucket(1 << (most - 1).bit_length(), 512, False, formats, ("exact", "int4"), 256, ("int4",))
    tables = StepTables(HostDevice(), layers, bucket)
    lengths = st.lists(st.integers(0, 40), min_size=layers, max_size=layers)
    for _ in range(2):  # the second time over what the first one left
        count = data.draw(st.integers(1, most))
        reads = []
        for number in range(count):
            own = [np.arange(n, dtype=np.int32) + 1000 * number for n in data.draw(lengths)]
            seen = _selection([np.arange(n, dtype=np.int32) + 500 for n in data.draw(lengths)], "int4")
            plain = _reads(own, names[number])
            if data.draw(st.booleans()):
                reads.append(replace(plain, scanned=seen, share=0.5, most=7))
                continue
            low = _selection([np.arange(n, dtype=np.int32) + 3000 * number for n in data.draw(lengths)], formats[2])
            basis = [np.arange(9, dtype=np.int32) + 10 * layer + number for layer in range(layers)]
            reads.append(Reads([*plain.rows, low], plain.text, basis=basis))
        slots = np.arange(layers * count).reshape(layers, count)
        tables.fill(list(range(count)), list(range(100, 100 + count)), slots, reads)
        tables.upload()
        for layer in range(layers):
            offsets, scanned = tables.device_offsets[layer].tolist(), tables.device_of_scanned[layer].tolist()
            for part, name in enumerate(bucket.formats):
                for place in range(bucket.batch):
                    at = part * bucket.batch + place
                    each = reads[place] if place < count else Reads([], "")
                    ids = next((own.of(layer).ids.tolist() for own in each.rows if own.format == name), [])
                    seen_ids = each.scanned.of(layer).ids.tolist() if each.scanned and name == "int4" else []
                    listed = slice(offsets[at], offsets[at] + len(ids))
                    assert tables.device_rows[layer, listed].tolist() == ids
                    assert tables.device_row_positions[layer, listed].tolist() == [row + 1 for row in ids]
                    basis = list(each.basis[layer][:5]) if each.basis else []
                    assert tables.device_bases[layer].view(-1, 5)[place, : len(basis)].tolist() == basis
                    assert offsets[at + 1] == offsets[at] + len(ids) + min(7, len(seen_ids))
                    assert tables.device_listed[layer, at] == offsets[at] + len(ids)
                    assert tables.device_scanned[layer, scanned[at] : scanned[at + 1]].tolist() == seen_ids
                    slot = tables.device_slots[layer, at]
                    assert slot == (slots[layer, place] if each.text == name else -1)
        assert tables.device_tokens[:count].tolist() == list(range(count))
        assert tables.device_positions[:count].tolist() == list(range(100, 100 + count))
        for number, each in enumerate(reads):
            assert not each.scanned or tables.device_limits[2 * number : 2 * number + 2].tolist() == [2**29, 7]


def test_without_a_gpu_it_is_one_clear_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: tools/gpu/check.py is for that")
    with pytest.raises(NoCuda, match=r"install a torch for CUDA|nvidia-smi") as error:
        CudaDevice()
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
