"""The CUDA source itself as a module of kernels, compiled as C++ by `plugins/emulation`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from avl_edge.attention.cuda.driver import Argument, Grid


class EmulatedModule:
    """The CUDA source as a shared library of `plugins/emulation`."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def launch(self, kernel: str, grid: Grid, threads: int, stream: int, arguments: Sequence[Argument]) -> None:
        assert stream == 7
        assert threads in (32, 64, 128)
        addresses = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        assert self._library.avl_launch(kernel.encode(), *grid, 0, addresses) == 0
