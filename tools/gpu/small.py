"""The small part of the numerics that a sanitizer runs, on the GPU: ``python -m tools.gpu.small``."""

from __future__ import annotations

import sys

from avl_edge.attention.cuda import KernelShape, NoCuda
from avl_edge.backends.steps import CudaDevice
from avl_edge.resources import BrokenInstallation
from tools.gpu import low_rank, numerics, packed
from tools.gpu.dut import GpuUnderTest

SHAPES = (KernelShape(80, 2, "Half"), KernelShape(128, 7, "Bfloat"))
"""One whose rows leave lanes without work, and one of a large group."""


def main() -> None:
    """Every kernel once; what it computes is checked too."""
    try:
        dut = GpuUnderTest(CudaDevice())
        for shape in SHAPES:
            numerics.check_shape(dut, shape)
            packed.check_shape(dut, shape)
            low_rank.check_shape(dut, shape)
    except (NoCuda, BrokenInstallation) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
