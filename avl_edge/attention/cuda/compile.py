"""The kernels of ``plugins/cuda``, compiled once per shape, row format, architecture and compiler, then cached.

    shape = KernelShape.of(head_dim=128, heads=32, kv_heads=8, dtype="bfloat16")
    image = cubin("sm_87", shape)                  # bytes; needs NVRTC, no GPU
    packed = cubin("sm_87", shape, "int8")
    low_rank = cubin("sm_87", shape, LOW_RANK)     # of all ranks

:class:`avl_edge.attention.cuda.launch.Kernels` does this for the GPU at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import require
from ...kv.layout import Format
from . import nvrtc as compilers
from . import source
from .store import CubinStore

DTYPES = {"float16": "Half", "bfloat16": "Bfloat"}
"""By the name that torch and safetensors use: the type of rows, queries and results."""

FORMATS = {
    "exact": ("-DKEYS=Exact", "-DVALUES=Exact"),
    "int8": ("-DKEYS=Int8", "-DVALUES=Int8"),
    "int4": ("-DKEYS=Int4", "-DVALUES=Int4"),
    "int8/int4": ("-DKEYS=Int8", "-DVALUES=Int4"),
}
"""The row formats that have kernels of their own, in the order in which a step's parts stand, and how they are
compiled."""
LOW_RANK = "lowrank"
"""The kernel that all low-rank formats share; their parts stand behind the others'."""


def reader(format_: str) -> str:
    """Whose kernels read rows of a format: its own, or :data:`LOW_RANK`'s."""
    return format_ if Format(format_).rank is None else LOW_RANK


def in_order(formats: Collection[str]) -> tuple[str, ...]:
    """Row formats in the order in which a step's parts stand."""
    return (*(name for name in FORMATS if name in formats), *sorted(set(formats) - FORMATS.keys()))


@dataclass(frozen=True)
class KernelShape:
    """What a set of kernels is compiled for.

    ``head_dim``: elements of a head, a multiple of 8 up to 256; ``group``: query heads per key/value head, 1 to 8;
    ``row``: "Half" or "Bfloat"; ``warps``: of a block. :class:`~avl_edge.errors.BadInput` for any other.
    """

    head_dim: int
    group: int
    row: str
    warps: int = 4

    def __post_init__(self) -> None:
        dim, group = self.head_dim, self.group
        require(8 <= dim <= 256 and dim % 8 == 0, f"the GPU kernels take head sizes of 8, 16, ... 256, not {dim}")
        require(1 <= group <= 8, f"the GPU kernels take 1 to 8 query heads per key/value head, not {group}")
        require(self.row in DTYPES.values(), f"the GPU kernels take Half or Bfloat rows, not {self.row!r}")
        require(self.warps in (1, 2, 4), f"a block of the GPU kernels has 1, 2 or 4 warps, not {self.warps}")

    @classmethod
    def of(cls, head_dim: int, heads: int, kv_heads: int, dtype: str) -> KernelShape:
        """For a decoder's sizes and its weights' dtype ("float16" or "bfloat16")."""
        message = f"the GPU kernels take {' or '.join(DTYPES)}, not {dtype}: convert the checkpoint"
        require(dtype in DTYPES, message)
        require(heads % kv_heads == 0, f"{heads} query heads cannot share {kv_heads} key/value heads")
        return cls(head_dim, heads // kv_heads, DTYPES[dtype])

    @property
    def tile(self) -> int:
        """Rows that a warp takes at once, as the source derives it: four 16-byte loads of each lane."""
        lanes = 1 << (self.head_dim // 8 - 1).bit_length()
        return 4 * (32 // lanes)

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        return f"-DHEAD_DIM={self.head_dim}", f"-DGROUP={self.group}", f"-DROW={self.row}", f"-DWARPS={self.warps}"


def cubin(
    arch: str,
    shape: KernelShape,
    format_: str = "exact",
    *,
    newest: tuple[int, int] | None = None,
    folder: Path | None = None,
) -> bytes:
    """The kernels of a :func:`reader` as a module for one architecture; as :func:`compiled`."""
    if format_ == LOW_RANK:
        return compiled(source.LOW_RANK, arch, shape.options, newest, folder)
    return compiled(source.NAME, arch, (*shape.options, *FORMATS[format_]), newest, folder)


def compiled(
    name: str, arch: str, options: Sequence[str], newest: tuple[int, int] | None = None, folder: Path | None = None
) -> bytes:
    """A source of ``plugins/cuda`` as a module for one architecture, from the cache where it is there.

    Args:
        name: of the ``.cu`` file.
        arch: "sm_87", "sm_90", ...: a compute capability of 8.0 or later.
        options: sizes and types, as macros.
        newest: the CUDA version of the driver that will load it; a compiler of a later major version is left out.
        folder: of the cache; None takes the user's own.

    Raises :class:`~avl_edge.attention.cuda.errors.NoCuda` where no compiler is installed, and
    :class:`~avl_edge.attention.cuda.errors.CompileFailed` with its log.
    """
    compiler = compilers.find(newest)
    identity = "\n".join((name, arch, *options, str(compiler), source.identity(name)))
    store = CubinStore(folder)
    image = store.get(identity)
    if image is None:
        image = compiler.compile(source.read(name), name, arch, options).cubin
        store.put(identity, image)
    return image
