"""NVRTC, CUDA's run-time compiler, by ctypes: a few C functions that are the same from CUDA 12 to 13. Needs no GPU.

It comes with CUDA, with torch's wheels for CUDA, or as the wheel ``nvidia-cuda-nvrtc-cu12``. JetPack 6 has 12.6, whose
PTX (ISA 8.5) its driver takes; that driver refuses the PTX of a newer one.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .errors import CompileFailed, NoCuda

_CURE = "install CUDA, or pip install nvidia-cuda-nvrtc-cu12"


@dataclass(frozen=True)
class Compiled:
    """``cubin`` runs on one architecture; ``ptx`` is what a driver could assemble; ``log`` what the compiler said."""

    cubin: bytes
    ptx: str
    log: str


@dataclass(frozen=True)
class Nvrtc:
    """One compiler: its library and its (major, minor) version."""

    library: ctypes.CDLL
    version: tuple[int, int]

    def compile(self, files: Mapping[str, bytes], name: str, arch: str, options: Sequence[str] = ()) -> Compiled:
        """Compile the CUDA C++ file ``name`` of ``files`` for ``arch``, like ``sm_87``; it may include the others.

        Raises :class:`CompileFailed` with the log.
        """
        arguments = [f"--gpu-architecture={arch}", "--std=c++17", *options]
        program = ctypes.c_void_p()
        headers = {other: text for other, text in files.items() if other != name}
        included, names = _texts(headers.values()), _texts(map(str.encode, headers))
        created = self.library.nvrtcCreateProgram(
            ctypes.byref(program), files[name], name.encode(), len(headers), included, names
        )
        self._check(created)
        try:
            texts = _texts(map(str.encode, arguments))
            status = self.library.nvrtcCompileProgram(program, len(arguments), texts)
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileFailed(f"{name} does not compile for {arch} with NVRTC {self}: {log.strip() or status}")
            ptx = self._get(program, "PTX").rstrip(b"\0").decode()
            return Compiled(self._get(program, "CUBIN"), ptx, log)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        content = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, content))
        return content.raw

    def _check(self, status: int) -> None:
        if status:
            raise CompileFailed(f"NVRTC {self} failed with status {status}: {_CURE} once more")

    def __str__(self) -> str:
        return "{}.{}".format(*self.version)


def _texts(texts: Iterable[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    every = list(texts)
    return (ctypes.c_char_p * len(every))(*every)


def find(newest: tuple[int, int] | None = None) -> Nvrtc:
    """The newest NVRTC on this machine, of a major version no newer than that of ``newest``, a driver's CUDA.

    Raises :class:`NoCuda`.
    """
    found = {nvrtc.version: nvrtc for nvrtc in installed()}
    fitting = [version for version in found if newest is None or version[0] <= newest[0]]
    if not fitting:
        there = ", ".join(map(str, found.values())) or "none"
        wanted = "" if newest is None else f" for a driver of CUDA {newest[0]}.{newest[1]}"
        raise NoCuda(f"the GPU kernels need NVRTC{wanted} ({there} was found): {_CURE}")
    return found[max(fitting)]


def installed() -> Iterator[Nvrtc]:
    """Every NVRTC on this machine that can be loaded."""
    for name in _names():
        try:
            library = ctypes.CDLL(name)
            major, minor = ctypes.c_int(), ctypes.c_int()
            if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
                yield Nvrtc(library, (major.value, minor.value))
        except (OSError, AttributeError):
            continue  # built for another machine, or no NVRTC: the next one may do


def _names() -> Iterator[str]:
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from map(str, sorted(Path(folder).glob("cu*/lib/libnvrtc.so.*")))
    yield from map(str, sorted(Path("/usr/local").glob("cuda*/lib64/libnvrtc.so.*")))
    if name := ctypes.util.find_library("nvrtc"):
        yield name


def isa(ptx: str) -> tuple[int, int]:
    """The version of the PTX language that a text asks for."""
    found = re.search(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)
    assert found, "PTX names its version"
    return int(found[1]), int(found[2])
