"""Memory that an engine gets by its address alone is what the engine was built for, ``python -O`` or not."""

from __future__ import annotations

import pytest
import torch

from avl_edge.backends.tensorrt.engines import Buffers
from avl_edge.package.export import Binding

BINDING = Binding("rows", ("R", 4), "float32")
WHOLE = torch.zeros(100, 4)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 4), r"rows is torch\.float32 \[2, 4\], not contiguous torch\.float32 \[3, 4\]"),
        (torch.zeros(3, 4, dtype=torch.float16), r"rows is torch\.float16"),
        (torch.zeros(4, 3).T, "not contiguous"),
        (WHOLE[1:4], "rows begins within other memory"),
    ],
)
def test_guard_of_an_engines_memory(tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Buffers([BINDING], {"R": 3}, torch.device("cpu"), {"rows": tensor})


def test_memory_that_fits_is_taken() -> None:
    aligned = WHOLE[64:67]  # 1,024 bytes on
    assert Buffers([BINDING], {"R": 3}, torch.device("cpu"), {"rows": aligned})["rows"] is aligned
