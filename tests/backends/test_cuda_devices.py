"""Where the GPU backend computes: no operator of a prompt or a step mixes devices or waits for the host.

The device is torch's `meta`: tensors have shapes and side, but no values, and what needs one raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avl_edge.attention.cuda import Kernels, KernelShape, Pool
from avl_edge.backends.base import LayerTask, run_whole
from avl_edge.backends.cuda.model import load_model
from avl_edge.backends.cuda.step import DecodeStep, rope_table
from avl_edge.backends.prefill import Prefill
from avl_edge.backends.steps import Bucket
from avl_edge.backends.stored import StoredRows
from avl_edge.config import Formats, KvShape
from avl_edge.kv.methods import AttentionPack, Avl, FastV, Full, Method
from avl_edge.kv.store import RowStore
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.network.rope import ROPE_TYPES, Rope
from avl_edge.request import ImageSpan
from tests.conftest import Checkpoints
from tests.equipment.cuda_on_cpu import HostDevice
from tests.equipment.cuda_sides import Side, prefixes, random_prompt
from tests.equipment.pixels import as_pictures
from tests.equipment.settled import settle_at_random


class Elsewhere(HostDevice):
    """A device whose tensors have shapes and side, but no values: what needs one raises."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses an operator over two devices, as a GPU would; numbers of no dimension may come from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        devices = {each.device.type for each in tensors if each.dim() or each.device.type == "meta"}
        assert len(devices) < 2, f"{func} over {devices}"
        return func(*args, **(kwargs or {}))


class Nothing:
    """A module whose kernels do nothing."""

    def __init__(self, format_: str = "", launched: list[str] | None = None) -> None:
        self.launched = [] if launched is None else launched
        self._format = format_

    def packed(self, format_: str) -> Nothing:
        return Nothing(f"{format_} ", self.launched)

    def launch(self, kernel: str, *_: object) -> None:
        self.launched.append(self._format + kernel)


class UncheckedRope(Rope):
    """Without the check of its frequencies, at load, which have no values here."""

    def __init__(self, head_dim: int, parameters: Mapping[str, Any]) -> None:
        self._frequencies, self._magnitude = ROPE_TYPES[parameters["rope_type"]](head_dim, parameters)


class MetaSide(Side):
    """A model and rows on a device without values, where prompts run under scores of chance and without their waits.
    Whatever runs here under :class:`OneDevice` takes nothing of the host but ids and other numbers."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("avl_edge.model.network.decoder.Rope", UncheckedRope)
        monkeypatch.setattr("avl_edge.backends.cuda.step.address", lambda _: 16)
        self.device, spec = Elsewhere(), read_spec(directory)
        with torch.inference_mode():
            self.model = load_model(spec, load_weights(directory), self.device.device)
        super().__init__(self, spec, self.model.dtype.itemsize, 1024)
        self.rows = StoredRows(RowStore(1024, self.shape, self.model.dtype, "meta"), self.model.decoder.angles)
        self._prefill = Prefill(self.model, self.rows, self._score)
        self.prompt = random_prompt(spec, 0)

    def begin_encode(self, pictures: Any) -> LayerTask:
        return LayerTask(self.model.encode(pictures))

    def begin_prefill(self, *arguments: Any) -> LayerTask:
        return LayerTask(self._prefill.run(*arguments))

    @staticmethod
    def _score(query: Tensor, key: Tensor, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert all(len(key) - len(query) <= index < len(key) for index in queries)
        last, total = np.random.default_rng(0).random((2, len(key)))
        return last, total


@pytest.mark.parametrize(
    "method", [Avl(prompt_mean=1), FastV(), AttentionPack()], ids=["avl", "fastv", "attentionpack"]
)
@pytest.mark.parametrize("formats", [Formats(), Formats("int8", "int4", "lowrank:8")], ids=["exact", "packed"])
def test_a_prompt_stays_on_the_device(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, formats: Formats, method: Method
) -> None:
    """But for what a policy looks at. Tokens that go, rows of every format, and a question over a shared prefix."""
    side = MetaSide(checkpoint("llama3-rope"), monkeypatch)
    with torch.inference_mode(), OneDevice():
        assert side.start(side.prompt, method, formats)[1].device == side.device.device
        of_sessions, prompts = prefixes([side], 2, Full(), Formats("exact", "int8", "int8"))
        question = Avl(secondary=100, prefill_keep=100, prompt_mean=1)
        assert of_sessions[0].start(prompts[0], question, Formats("exact", "int8", "int8"))[1].is_meta


def test_an_operator_over_two_devices_is_noticed(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    side = MetaSide(checkpoint("llama3-rope"), monkeypatch)
    monkeypatch.setattr(RowStore, "index", lambda _, ids: torch.from_numpy(ids.astype(np.int64)))
    with torch.inference_mode(), OneDevice(), pytest.raises(AssertionError, match="over"):
        side.start(side.prompt, AttentionPack(), Formats("exact", "lowrank:8", "lowrank:8"))


def test_ids_go_to_a_gpu_from_memory_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: (pinned.append(self), self)[1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        index = RowStore(4, KvShape(1, 2, 32, 2), torch.float16, "cuda").index(np.array([5, 3], dtype=np.int32))
    assert (index.device.type, index.dtype, len(pinned)) == ("cuda", torch.int64, 1)


@pytest.mark.parametrize("name", ["exact", "int8", "int4"])
def test_rows_are_packed_read_and_moved_where_they_lie(name: str) -> None:
    """Whatever the host knows of them are ids, which may come from the CPU."""
    store = RowStore(4, KvShape(1, 2, 32, 2), torch.float16, "meta")
    ids, rows = torch.tensor([0, 9, 18]), torch.empty(3, 2, 32, dtype=torch.float16, device="meta")
    with OneDevice():
        store.write(ids, rows, rows, name)
        assert {each.device.type for each in store.read(ids, name)} == {"meta"}
        store.copy(ids, ids + 27, name)


CHOICE = ("avl_log_sums", "avl_scores", "avl_nucleus")
STEP_KINDS = {
    "exact": (Bucket(2, 256, False), ["avl_append", "avl_attend", "avl_merge"]),
    "scores": (Bucket(2, 256, True), ["avl_append", "avl_attend", "avl_merge", "avl_scores"]),
    "packed": (
        Bucket(2, 256, False, ("exact", "int8", "int4"), ("int8",)),
        ["int8 avl_append", "avl_attend", "int8 avl_attend", "int4 avl_attend", "avl_merge"],
    ),
    "coarse": (
        Bucket(2, 256, False, ("exact", "int8"), ("exact",), 256, ("int8",)),
        ["avl_append", "int8 avl_scan", *CHOICE, "avl_attend", "int8 avl_attend", "avl_merge"],
    ),
    "low-rank": (
        Bucket(2, 256, True, ("exact", "lowrank:8", "lowrank:8@2")),
        ["avl_append", "avl_attend", *["lowrank avl_attend_low_rank"] * 2, "avl_merge", "avl_scores"],
    ),
}


@pytest.mark.parametrize("kind", STEP_KINDS)
def test_the_step_stays_on_the_device_and_asks_the_host_for_nothing(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bucket, launched = STEP_KINDS[kind]
    monkeypatch.setattr("avl_edge.model.network.decoder.Rope", UncheckedRope)
    monkeypatch.setattr("avl_edge.backends.cuda.step.address", lambda _: 16)
    spec, device, module = read_spec(checkpoint("llama3-rope")), Elsewhere(), Nothing()
    with torch.inference_mode():
        model = load_model(spec, load_weights(checkpoint("llama3-rope")), device.device)
        kernels = Kernels(module, KernelShape(16, 2, "Half"), packed=module.packed)
        pool = Pool(16, 16, 2, 32, 16, 32, 16)
        with OneDevice():
            angles = rope_table(model, device.device) if bucket.rank else None
            step = DecodeStep(model, kernels, pool, device, bucket, 2, angles)
            step.run()
            with pytest.raises(AssertionError, match="over"):
                model.decoder.embed(torch.zeros(2, dtype=torch.int32))
        assert all(output.device == device.device for output in step.outputs.values())
        pixels = np.zeros((1, 3, spec.vision.image_size, spec.vision.image_size), dtype=np.float32)
        features = run_whole(LayerTask(model.encode(as_pictures(spec, pixels))))
        assert features.tokens.shape == (spec.tokens_per_image, spec.text.hidden_size)
        span = ImageSpan("", 1, spec.tokens_per_image)
        embedded = model.embed((1,) * (spec.tokens_per_image + 3), (span,), features)
        assert {features.tokens.device, embedded.device} == {device.device}
    assert module.launched == launched * spec.text.layers


def test_low_rank_rows_stay_on_the_device(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fitted, written and moved where they lie; of the host come ids alone."""
    side = MetaSide(checkpoint("llama3-rope"), monkeypatch)
    with torch.inference_mode(), OneDevice():
        kinds: list[tuple[Method, Formats]] = [
            (AttentionPack(), Formats("exact", "lowrank:8", "lowrank:8@2")),
            (Avl(secondary=80, core=30, refresh=1), Formats("int8", "int4", "lowrank:8+int8")),
        ]
        moved = 0
        for cache in [side.start(side.prompt, *each)[0] for each in kinds]:
            cache.begin_step()
            changes = settle_at_random(cache, np.random.default_rng(0))
            moved += sum(len(each.before) for each in changes)
            side.rows.move(cache, changes)
        assert moved, "between int4 and coefficients"
