"""What the TensorRT plugin launches, and which shapes it takes: without a GPU, a compiler or TensorRT."""

from __future__ import annotations

from typing import Any

import pytest

from avl_edge.attention.cuda import Kernels
from avl_edge.backends.tensorrt.attention import Attention, Sizes
from avl_edge.backends.tensorrt.kernels import TokenKernels
from avl_edge.errors import BadInput
from avl_edge.package.export.core_attention import INPUTS, WORDS
from tests.equipment.trt_calls import SHAPES, Shape, inputs_of, make_call


class Recorder:
    """A module that keeps what it would have launched: kernels, grids and arguments."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def launch(self, kernel: str, grid: Any, threads: int, stream: int, arguments: Any) -> None:
        self.launched.append((kernel, grid, threads, stream, [argument.value for argument in arguments]))


ADDRESSES = [[4096 * at for at in range(1, 1 + len(INPUTS))], [4096 * at for at in range(20, 23)], 4096 * 30]


@pytest.mark.parametrize(
    ("dtype", "tokens", "parts"),
    [
        ("float16", 2, 1),
        ("bfloat16", 2, 2),
        ("float16", 2, 3),
        ("float16", 300, 1),
        ("bfloat16", 30, 3),
        ("float32", 2, 1),
    ],
)
def test_launches_follow_from_shapes_alone(dtype: str, tokens: int, parts: int) -> None:
    """So a recorded step holds whatever its buffers hold later. Addresses are such as nobody could read."""
    shape, recorder = Shape(64, 2, dtype), Recorder()
    core = Kernels(recorder, shape.core, packed=lambda _: recorder)
    attention = Attention(core, TokenKernels(recorder, shape.tokens, lambda: recorder))
    sizes = Sizes(tokens, 2, 500, 3, 2000, 8, 4, 64, 32, parts)
    inputs, outputs, workspace = ADDRESSES
    for layer in (0, 31):
        attention.run(sizes, layer, inputs, outputs, workspace, 7)
    first, second = recorder.launched[: len(recorder.launched) // 2], recorder.launched[len(recorder.launched) // 2 :]
    step = dtype != "float32" and tokens == 2
    of_step = [*["attend"] * parts, "merge", "token_join", "scores", "token_sums"]
    names = [*["append"] * parts, *(of_step if step else ["token_attend", "token_scores"])]
    assert [kernel for kernel, *_ in first] == [f"avl_{name}" for name in names]
    assert [launch[:4] for launch in first] == [launch[:4] for launch in second]
    moved = {
        a: b for one, two in zip(first, second, strict=True) for a, b in zip(one[4], two[4], strict=True) if a != b
    }
    tables = {"rows": 500, "row_offsets": 2 * parts + 1, "slots": tokens * parts}
    starts = {inputs[INPUTS.index(name)]: 31 * 4 * n for name, n in tables.items()}
    offsets, slots = (inputs[INPUTS.index(name)] for name in ("row_offsets", "slots"))
    for part in range(parts):
        starts[slots + 4 * tokens * part] = starts[slots]
        if step:  # a list ends where the next one begins
            starts |= {offsets + 4 * (2 * part + more): starts[offsets] for more in (0, 1)}
    assert moved == {start: start + further for start, further in starts.items()}


def test_nobody_asks_for_scores() -> None:
    """Then their kernels are not launched, and a step's logits not written."""
    for tokens, names in ((2, ["append", "attend", "merge", "token_join"]), (9, ["append", "token_attend"])):
        shape, recorder = Shape(64, 2, "bfloat16"), Recorder()
        attention = Attention(Kernels(recorder, shape.core), TokenKernels(recorder, shape.tokens))
        attention.run(Sizes(tokens, 2, 500, 0, 2000, 8, 4, 64, 32), 0, *ADDRESSES, 7)
        assert [kernel for kernel, *_ in recorder.launched] == [f"avl_{name}" for name in names]
        null = {"avl_attend": 1, "avl_token_join": 1}
        for kernel, *_, arguments in recorder.launched:
            assert arguments.count(None) == null.get(kernel, 0)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_shapes_that_contradict_each_other(parts: int) -> None:
    call = make_call(SHAPES[0], "step", [1, 1], 0, parts)
    inputs = inputs_of(call)
    shapes = [list(tensor.shape) for tensor in inputs.values()]
    sizes = Sizes.of(shapes)
    assert (sizes.sequences, sizes.parts, sizes.formats) == (2, parts, ("exact", "int8", "int4")[:parts])
    for at, name in enumerate(inputs):
        for axis in {0, -1} if name in WORDS else {-1}:
            wrong = [list(shape) for shape in shapes]
            wrong[at][axis] += 1
            if name in ("rows", "score_queries"):
                continue  # their room is their own
            with pytest.raises(BadInput, match="was given shapes"):
                Sizes.of(wrong)
    if parts > 1:
        with pytest.raises(BadInput, match="was given shapes"):
            Sizes.of(shapes[: len(INPUTS)])


def test_there_is_no_fifth_format() -> None:
    call = make_call(SHAPES[0], "step", [1, 1], 0)
    shapes = {name: list(tensor.shape) for name, tensor in inputs_of(call).items()}
    shapes |= {"slots": [3, 5 * 2], "row_offsets": [3, 5 * 2 + 1]}
    with pytest.raises(BadInput, match="was given shapes"):
        Sizes.of(list(shapes.values()))
