"""The native library: where it is, what its functions take, and what to do when it is not there.

`pip install` builds plugins/cpu/core_attention.cpp into avl_edge/_core_attention.*, a shared library with a C interface
that ctypes loads; it is no Python module. Without it the package works, only slower, by gathering rows in torch; the
first use then warns, once, with the reason and the cure.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

# The library takes its OpenMP runtime from the process instead of bringing one, and torch is what loads it: imported
# first, both run on the same threads.
import torch  # noqa: F401

_DIRECTORY = Path(__file__).resolve().parent
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Part(ctypes.Structure):
    """Rows of one format, as the library's `Part` has them; `format` is a number of FORMATS."""

    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values", "rows", "offsets")),
        *((name, _LONG) for name in ("key_row", "key_head", "value_row", "value_head", "places")),
        ("format", _INT),
    )


FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "coarse int8": 5}
_ARGUMENTS: tuple[Any, ...] = (
    _POINTER,  # query
    ctypes.POINTER(Part),
    *[_INT] * 5,  # parts, batch, heads, kv heads, head size
    _FLOAT,  # scale
    _INT,  # threads
    *[_POINTER] * 2,  # out or null, scores or null
)


@lru_cache(maxsize=1)
def core_attention() -> Any | None:
    """The C function `avl_core_attention`, or None, after one warning, when it is missing or cannot be loaded."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := _DIRECTORY / f"_core_attention{suffix}").is_file()]
    try:
        if not found:
            raise OSError("the library was not built")
        function = ctypes.CDLL(str(found[0])).avl_core_attention
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"Decoding is slower than it could be, because the native attention kernel is missing ({error}): install "
            "g++ or clang, then avl-edge once more from its source, with `pip install --force-reinstall --no-deps .`.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    function.argtypes, function.restype = _ARGUMENTS, _INT
    return function


def available() -> bool:
    """Whether decode attention runs natively, for CPU tensors of every format but float64."""
    return core_attention() is not None
