"""Rows in packed formats: bytes, layout and store, and whole answers against the oracle of packed rows."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge import BadInput, Formats, Options, Runtime
from avl_edge.config import KvShape
from avl_edge.layout import PAGE_ROWS, UNIT, Format, check, groups, packing, page_bytes
from avl_edge.pool import RowPool, RowStore
from avl_edge.pool.formats import decode, decode_coarse, encode
from tests import oracle_formats
from tests.checkpoints import random_image
from tests.conftest import Checkpoints, Recorder
from tests.oracle import AvlSettings, LayerRows, OracleStep
from tests.oracle_formats import Oracle, TierFormats, packed

LEVELS = {"int8": 127, "int4": 7}
LARGEST_SCALE = 65504.0  # of float16
LEAST_STEP = 2.0**-24  # between two float16 numbers

_packed_names = st.sampled_from(sorted(LEVELS))
_shapes = st.builds(KvShape, st.just(2), st.integers(1, 5), st.integers(1, 48).map(lambda half: 2 * half), st.just(2))


# One row as bytes


def _rows(seed: int, shape: tuple[int, int, int], largest: float) -> Tensor:
    """Normal numbers, each head scaled on its own; one head in four is zero, or has a single value."""
    random_ = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=random_)
    heads = torch.rand(*shape[:2], 1, generator=random_)
    rows = rows / rows.abs().amax() * largest * heads
    rows[heads[..., 0] < 0.125] = 0
    lonely = (heads[..., 0] >= 0.125) & (heads[..., 0] < 0.25)
    rows[lonely] *= torch.arange(shape[2]) == 0
    return rows


def _grouped(rows: Tensor, name: str) -> Tensor:
    """``[n, heads, d]`` with the values that share a scale in the last dimension, float64."""
    size = rows.shape[2] if name == "int8" else math.gcd(rows.shape[2], 32)
    return rows.double().view(*rows.shape[:2], -1, size)


@settings(max_examples=200)
@given(_packed_names, _shapes, st.integers(0, 2**31), st.floats(-12, 6).map(lambda power: 10.0**power))
def test_the_error_is_at_most_half_a_step(name: str, shape: KvShape, seed: int, largest: float) -> None:
    """A value is at most half a scale from what comes back. The largest may lie beyond what its rounded scale reaches,
    by as many halves of the spacing of float16 numbers as there are levels: more than half a scale only where the scale
    is subnormal."""
    rows = _rows(seed, (6, shape.kv_heads, shape.head_dim), largest)
    back = decode(Format(name), encode(Format(name), rows), shape.kv_heads, shape.head_dim)
    assert back.dtype == torch.float32
    values, found = _grouped(rows, name), _grouped(back, name)
    ideal = values.abs().amax(-1, keepdim=True) / LEVELS[name]
    scales = ideal.float().half().double()  # an fp16 number near the ideal one
    spacing = torch.exp2(torch.floor(torch.log2(ideal.clamp(min=2.0**-14))) - 10)
    reach = torch.maximum(scales / 2, LEVELS[name] * spacing / 2) * (1 + 1e-4)
    fits = ideal <= LARGEST_SCALE
    assert bool(((values - found).abs() <= reach)[fits.expand_as(values)].all())
    normal = ideal > 2.0**-14
    assert bool(((values - found).abs() <= scales / 2 * (1 + 1e-4))[(fits & normal).expand_as(values)].all())
    assert torch.equal(found == 0, (found == 0) | (values == 0)), "zero stays zero"


@given(_packed_names, _shapes, st.integers(0, 2**31))
def test_what_comes_back_is_what_the_description_says(name: str, shape: KvShape, seed: int) -> None:
    """The same numbers as another program makes of them, bit for bit."""
    rows = _rows(seed, (5, shape.kv_heads, shape.head_dim), 4.0)
    records = encode(Format(name), rows)
    assert torch.equal(
        decode(Format(name), records, shape.kv_heads, shape.head_dim).double(), packed(rows.double(), name)
    )
    if name == "int8":
        looks = decode_coarse(records, shape.kv_heads, shape.head_dim)
        assert torch.equal(looks.double(), oracle_formats.coarse(rows.double(), name))


@given(_packed_names, _shapes, st.integers(0, 2**31))
def test_packing_what_was_unpacked_changes_nothing(name: str, shape: KvShape, seed: int) -> None:
    """Rows may be moved any number of times between tiers of one format; only the scale is found anew, and it is the
    same number: the largest value lies at the last level, but for heads so small that their scale is subnormal."""
    rows = _rows(seed, (5, shape.kv_heads, shape.head_dim), 4.0)
    shared = _grouped(rows, name)
    rows[(shared.abs().amax(-1, keepdim=True) < 0.01).expand_as(shared).reshape(rows.shape)] = 0
    once = encode(Format(name), rows)
    back = decode(Format(name), once, shape.kv_heads, shape.head_dim)
    again = decode(Format(name), encode(Format(name), back), shape.kv_heads, shape.head_dim)
    assert torch.equal(again, back)


@given(_shapes, st.integers(0, 2**31))
def test_records_lie_as_documented(shape: KvShape, seed: int) -> None:
    """Scales, then nibbles: byte j of a head's d/2 holds dimension j below and j + d/2 above; of int8 the high nibbles
    of all heads come first. Read here byte by byte."""
    heads, dim = shape.kv_heads, shape.head_dim
    rows = _rows(seed, (3, heads, dim), 4.0)
    whole = lambda count: -(-count // UNIT) * UNIT  # noqa: E731
    for name in LEVELS:
        records = encode(Format(name), rows).numpy()
        assert records.shape == (3, Format(name).record_bytes(shape))
        back = decode(Format(name), torch.from_numpy(records), heads, dim).numpy()
        count = 1 if name == "int8" else groups(dim)
        at = whole(2 * heads * count)
        for row in range(3):
            scales = records[row, : 2 * heads * count].view(np.float16).reshape(heads, count)
            for head in range(heads):
                for j in range(dim):
                    byte = at + head * (dim // 2) + j % (dim // 2)
                    nibble = (int(records[row, byte]) >> (4 if j >= dim // 2 else 0)) & 15
                    q = nibble - 8
                    if name == "int8":
                        low = int(records[row, byte + whole(heads * dim // 2)]) >> (4 if j >= dim // 2 else 0) & 15
                        q = 16 * nibble + low - 128
                    assert back[row, head, j] == np.float32(q) * np.float32(scales[head, j * count // dim])


@pytest.mark.parametrize("name", LEVELS)
def test_zeros_stay_zero_and_huge_values_end_at_the_last_level(name: str) -> None:
    rows = torch.zeros(1, 2, 4)
    rows[0, 1] = torch.tensor([1e30, -1e30, 1.0, float("inf")])
    back = decode(Format(name), encode(Format(name), rows), 2, 4)
    end = LEVELS[name] * LARGEST_SCALE
    assert back.tolist() == [[[0.0] * 4, [end, -end, 0.0, end]]]
    tiny = torch.full((1, 1, 4), 1e-9)
    assert not decode(Format(name), encode(Format(name), tiny), 1, 4).any()


@pytest.mark.parametrize("name", LEVELS)
def test_a_nan_spoils_the_values_of_its_scale_and_no_others(name: str) -> None:
    """What is broken is seen to be broken: it does not come back as a number."""
    rows = _rows(3, (4, 3, 64), 1.0) + 0.5
    clean = decode(Format(name), encode(Format(name), rows), 3, 64)
    rows[1, 2, 40] = float("nan")
    back = decode(Format(name), encode(Format(name), rows), 3, 64)
    spoiled = torch.zeros(4, 3, 64, dtype=torch.bool)
    spoiled[1, 2, 32 if name == "int4" else 0 :] = True
    assert torch.equal(back.isnan(), spoiled)
    assert torch.equal(back[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LEVELS)
def test_every_dtype_packs_alike(name: str, dtype: torch.dtype) -> None:
    rows = _rows(5, (4, 3, 32), 2.0).to(dtype)
    assert torch.equal(encode(Format(name), rows), encode(Format(name), rows.float()))


# Names, sizes and pages


@pytest.mark.parametrize(
    "name",
    ["exact", "int8", "int4", "lowrank:1", "lowrank:64", "lowrank:512+int8", "lowrank:64@16", "lowrank:8@8+int8"],
)
def test_names_of_formats(name: str) -> None:
    assert Formats(core=name, secondary=name).by_tier() == {"text": "exact", "core": name, "secondary": name}
    assert Format(name).is_exact == (name == "exact")
    assert (Format(name).rank is None) == (not name.startswith("lowrank"))


@pytest.mark.parametrize(
    "name",
    ["", "int9", "INT8", "int8 ", "exact+int8", "lowrank", "lowrank:", "lowrank:0", "lowrank:-3", "lowrank:a", 8],
)
@pytest.mark.parametrize("tier", ["text", "core", "secondary"])
def test_names_of_no_format_are_one_clear_line(tier: str, name: object) -> None:
    with pytest.raises(BadInput) as refusal:
        Formats(**{tier: name})  # type: ignore[arg-type]
    message = str(refusal.value)
    assert message.startswith(f"the {tier} format must be exact, int8, int4, lowrank:R")
    assert message.endswith(f"not {name!r}")
    assert "\n" not in message


def test_text_is_never_low_rank() -> None:
    with pytest.raises(BadInput, match="text rows cannot be low-rank: choose exact, int8 or int4"):
        Formats("lowrank:8", "lowrank:8", "lowrank:8")


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        (KvShape(2, 2, 15, 4), ("int8", "exact", "exact"), "heads of size 15 cannot be packed: it is odd"),
        (KvShape(2, 1, 16, 2), ("exact", "exact", "int8"), "the secondary format int8 would be no smaller"),
        (KvShape(2, 1, 8, 2), ("int4", "exact", "exact"), "the text format int4 would be no smaller"),
    ],
)
def test_rows_that_a_format_does_not_suit(shape: KvShape, names: tuple[str, str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check(Formats(*names), shape)
    check(Formats(), shape)


def test_sizes_of_records_by_hand() -> None:
    """LLaVA-1.5-7B in fp16: 8192 bytes of K; int8 2 bytes a head and one a value; int4 2 bytes for 32 values."""
    shape = KvShape(32, 32, 128, 2)
    assert (Format("int8").record_bytes(shape), Format("int4").record_bytes(shape)) == (64 + 4096, 256 + 2048)
    assert (Format("exact").coarse_bytes(shape), Format("int4").coarse_bytes(shape)) == (8192, 256 + 2048)
    assert Format("int8").coarse_bytes(shape) == 64 + 2048
    assert page_bytes(shape) == PAGE_ROWS * 2 * 8192
    assert [packing(Format(name), shape).rows for name in ("exact", "int8", "int4")] == [16, 31, 56]
    # Groups of what divides the head; sections in whole units.
    odd = KvShape(1, 3, 20, 4)
    assert groups(20) == 5
    assert (Format("int8").record_bytes(odd), Format("int4").record_bytes(odd)) == (16 + 2 * 32, 32 + 32)


@given(
    st.builds(
        KvShape, st.just(2), st.integers(1, 9), st.integers(1, 100).map(lambda half: 2 * half), st.sampled_from([2, 4])
    ),
    st.integers(1, 5),
)
def test_rows_of_a_format_never_overlap(shape: KvShape, pages: int) -> None:
    """The bytes of every slot of every page, in one arena: each within its own page, none twice."""
    half_page = page_bytes(shape) // 2
    for name in ("exact", "int8", "int4"):
        pack = packing(Format(name), shape)
        size = pack.row_bytes // 2
        unit = shape.row_bytes // 2 if name == "exact" else UNIT
        taken = np.zeros(pages * half_page, dtype=np.int64)
        for page in range(pages):
            for slot in range(pack.rows):
                begin = (page * pack.page_step + slot * pack.row_step) * unit
                assert page * half_page <= begin
                assert begin + size <= (page + 1) * half_page
                taken[begin : begin + size] += 1
        assert taken.max(initial=0) <= 1
        assert name == "exact" or size % UNIT == 0
        assert half_page - pack.rows * size < max(size, 1), "another row would fit"
        if name == "exact":
            assert taken.min() == 1


# The store


@settings(max_examples=60)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 2**31))
def test_what_is_written_is_read_at_scattered_ids(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    """Rows of all formats side by side in one store, in pages of their own; each reads back as it would alone."""
    shape = KvShape(1, 2, 16, dtype.itemsize)
    pool = RowPool(9, shape)
    store = RowStore(pool.pages, shape, dtype)
    store.key_bytes.fill_(255)  # numbers that are none
    store.value_bytes.fill_(255)
    lease, chance = pool.lease(pool.pages), np.random.default_rng(seed)
    written = []
    for name in data.draw(st.permutations(["exact", "int8", "int4"])):
        count = data.draw(st.integers(1, 2 * PAGE_ROWS))
        ids = chance.permutation(pool.allocate(pool.packing(name).rows + count, lease, name))[:count]
        keys, values = (_rows(seed + count + part, (count, 2, 16), 3.0).to(dtype) for part in range(2))
        store.write(torch.from_numpy(ids.astype(np.int64)), keys, values, name)
        written.append((name, ids, keys, values))
    for name, ids, keys, values in written:
        order = chance.permutation(len(ids))
        found = store.read(torch.from_numpy(ids[order].astype(np.int64)), name)
        for rows, back in zip((keys, values), found, strict=True):
            assert back.dtype == dtype
            assert torch.equal(back, packed(rows.double(), name)[order].to(dtype))
    assert store.nbytes == pool.pages * page_bytes(shape)


# Whole answers


STEPS = 24
PROMPT = "What is shown in the picture, and how many boats are there?"
IMAGES = [random_image(1, (70, 90)), random_image(2, (200, 64))]
EVERYTHING = AvlSettings(100, 100, 100, refresh=0, text_keep=100)
TOLERANCE = 1e-5  # of logits of size one to ten: the norms of both programs round to float32


def _held(cache: Any) -> list[LayerRows]:
    return [
        LayerRows(
            tuple(rows.text_positions.tolist()),
            tuple(rows.image_positions[rows.core].tolist()),
            tuple(rows.image_positions[~rows.core].tolist()),
        )
        for rows in cache.rows.layers
    ]


class Ask:
    """One question to a runtime, in float64 unless told, and to the oracle."""

    def __init__(
        self,
        checkpoint: Checkpoints,
        name: str,
        images: int,
        tiers: TierFormats,
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        directory = checkpoint(name, dtype=dtype)
        self.runtime = Runtime.load(directory)
        self.images = IMAGES[:images]
        self.formats = Formats(tiers.text, tiers.core, tiers.secondary)
        self._recorder = Recorder(self.runtime)
        prompt = self.runtime.prepare(self.images, PROMPT).prompt
        pixels = torch.tensor(prompt.pixel_values)
        self.oracle = Oracle(oracle_formats.load_model(directory), list(prompt.token_ids), pixels, tiers)

    def distances(self, expected: list[OracleStep]) -> list[float]:
        """Full attention, the same tokens; how far the logits of each step are from the oracle's."""
        options = Options("full", {}, self.formats, max_new_tokens=len(expected))
        result = self.runtime.generate(self.images, PROMPT, options).result()
        assert list(result.token_ids) == [truth.token for truth in expected]
        pairs = zip(self._recorder.logits, expected, strict=True)
        return [float((ours.double() - truth.logits).abs().max()) for ours, truth in pairs]

    def compare(self, method: str, parameters: dict[str, float], expected: list[OracleStep]) -> None:
        """Token by token: the same choice, logits within rounding, the same rows in every tier of every layer."""
        options = Options(method, parameters, self.formats, max_new_tokens=len(expected))
        generation = self.runtime.generate(self.images, PROMPT, options)
        for step, truth in enumerate(expected):
            event = next(generation)
            torch.testing.assert_close(self._recorder.logits[-1], truth.logits, rtol=0, atol=TOLERANCE)
            assert event.token_id == truth.token, f"step {step}"
            if event.finish_reason is None:
                assert _held(generation.cache) == truth.rows, f"step {step}"
        assert generation.result().formats == self.formats.by_tier()
        assert self.runtime.kv_bytes_in_use == 0


MODELS = ["llama-mha", "qwen2-gqa", "mistral-wide", "llama-bias"]  # heads of 16 and 10; 4, 2, 3 and 1 of them


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "tiers", [TierFormats("int8", "int8"), TierFormats("exact", "int4"), TierFormats("int4", "int8")]
)
def test_full_attention_over_packed_rows_equals_the_oracle(
    checkpoint: Checkpoints, name: str, tiers: TierFormats
) -> None:
    ask = Ask(checkpoint, name, 1, tiers)
    ask.compare("full", {}, ask.oracle.avl(EVERYTHING, STEPS))


def test_full_attention_in_float32_is_as_close_as_float32_can_be(checkpoint: Checkpoints) -> None:
    """As people run it, by the native kernel where it was built. A value half-way between two levels may fall to
    either: a step of int8 in one number, which logits show as thousandths. It is rare, so most runs show none."""
    worst = []
    for name in MODELS:
        for tiers in TierFormats("int8", "int8"), TierFormats("exact", "int4"), TierFormats("int4", "int8"):
            ask = Ask(checkpoint, name, 1, tiers, dtype=None)
            worst.append(max(ask.distances(ask.oracle.avl(EVERYTHING, STEPS))))
    assert max(worst) < 1e-2
    assert sorted(worst)[len(worst) // 2] < 1e-5


def _avl_case(number: int) -> tuple[str, int, dict[str, int], TierFormats]:
    rng = random.Random(number)
    stored = rng.randint(30, 100)
    parameters = {
        "prefill_keep": rng.randint(stored, 100),
        "secondary": stored,
        "core": rng.randint(10, stored // 2),
        "refresh": rng.randint(1, 4),
        "text_keep": rng.randint(40, 100),
        "text_floor": 4,
        "prune_layer": 1,
        "prompt_mean": number % 2,
    }
    tiers = TierFormats(rng.choice(["exact", "int8"]), rng.choice(["exact", "int8"]), ("int8", "int4")[number % 2])
    return MODELS[number % 4], 1 + number // 4 % 2, parameters, tiers


AVL_CASES = [
    ("llama-mha", 1, {"refresh": 2}, TierFormats("exact", "exact", "int8")),
    ("qwen2-gqa", 2, {"refresh": 1, "secondary": 80}, TierFormats("exact", "exact", "int4")),
    ("mistral-wide", 1, {"refresh": 1, "core": 15}, TierFormats("int4", "int4", "exact")),
    *map(_avl_case, range(10)),
]


@pytest.mark.parametrize(("name", "images", "parameters", "tiers"), AVL_CASES)
def test_avl_with_packed_tiers_equals_the_oracle(
    checkpoint: Checkpoints, name: str, images: int, parameters: dict[str, int], tiers: TierFormats
) -> None:
    """A row that is promoted is its packed self made exact; one that is demoted is packed from what it is now."""
    ask = Ask(checkpoint, name, images, tiers)
    expected = ask.oracle.avl(AvlSettings(**parameters), STEPS)
    assert len({rows.core for step in expected for rows in step.rows[1:2]}) > 1, "the core has to move"
    ask.compare("avl", {**parameters}, expected)


@pytest.mark.parametrize(
    ("name", "images", "tiers", "parameters"),
    [
        ("llama-mha", 1, TierFormats("exact", "int8", "int8"), (100, 50, 60)),
        ("qwen2-gqa", 2, TierFormats("int8", "int8", "int8"), (80, 30, 70)),
        ("mistral-wide", 1, TierFormats("exact", "int4", "int4"), (100, 50, 50)),
        ("llama-bias", 2, TierFormats("int8", "int4", "int4"), (60, 60, 95)),
        ("llama-mha", 2, TierFormats("int4", "exact", "exact"), (90, 20, 100)),
    ],
)
def test_coarse_keys_equal_the_oracle(
    checkpoint: Checkpoints, name: str, images: int, tiers: TierFormats, parameters: tuple[int, int, int]
) -> None:
    """The rows of each step and layer are those that a coarse look at the stored keys picks, and the attention is over
    their packed selves."""
    secondary, core, mass = parameters
    ask = Ask(checkpoint, name, images, tiers)
    expected = ask.oracle.coarse(secondary, core, mass, STEPS)
    sizes = [len(rows.core) for step in expected[1:] for rows in step.rows]
    assert max(sizes) <= core * len(ask.oracle.images) // 100
    assert mass == 100 or len(set(sizes)) > 1, "the nucleus has to vary"
    ask.compare("coarse", {"secondary": secondary, "core": core, "mass": mass}, expected)


def test_packing_is_noticed(checkpoint: Checkpoints) -> None:
    """Each format of each tier changes the logits of a step, so that equality above means something."""
    ask = Ask(checkpoint, "llama-mha", 1, TierFormats())
    settings_ = AvlSettings(100, 80, 40, refresh=1, text_keep=100)
    plain = ask.oracle.avl(settings_, 3)[-1].logits
    for tiers in ("int8", "exact", "exact"), ("exact", "int8", "exact"), ("exact", "exact", "int8"), ("int4",) * 3:
        ask.oracle.formats = TierFormats(*tiers)
        assert (ask.oracle.avl(settings_, 3)[-1].logits - plain).abs().max() > 100 * TOLERANCE
