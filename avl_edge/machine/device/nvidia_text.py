"""CUDA, TensorRT, JetPack and discrete GPUs, from packages and NVIDIA's driver. Pure functions of text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from .facts import Gpu
from .values import decimal, integer, line_of

_VERSION = re.compile(r"(?:[0-9]{1,4}:)?([0-9]{1,5}(?:\.[0-9]{1,5}){0,4})")
_DRIVER = re.compile(r"^NVRM version:.*?\s([0-9]{3,4}\.[0-9]{1,4}(?:\.[0-9]{1,4})?)\s", re.MULTILINE)
_MODEL = re.compile(r"^Model:[ \t]*(\S.*)$", re.MULTILINE)
_CUDART = re.compile(r"cuda-cudart-([0-9]{1,3})-([0-9]{1,3})")


def upstream_version(version: str) -> str | None:
    """``6.2`` of the package version ``6.2+b77``, ``10.3.0.30`` of ``10.3.0.30-1+cuda12.5``."""
    match = _VERSION.match(version)
    return match[1] if match else None


def jetpack_of_packages(packages: Mapping[str, str]) -> str | None:
    """The JetPack release that is installed: its meta-package, or the half of it that is meant for running."""
    for name in ("nvidia-jetpack", "nvidia-jetpack-runtime"):
        if name in packages:
            return upstream_version(packages[name])
    return None


def tensorrt_of_packages(packages: Mapping[str, str]) -> str | None:
    """The newest TensorRT runtime library (``libnvinfer10``), or the meta-package's version."""
    names = [name for name in packages if re.fullmatch(r"libnvinfer[0-9]{1,3}", name)] or ["tensorrt"]
    versions = [version for name in names if (version := upstream_version(packages.get(name, "")))]
    return max(versions, key=version_key, default=None)


def cuda_of_packages(packages: Mapping[str, str]) -> str | None:
    """The newest CUDA runtime that is installed, as major.minor."""
    found = [match for name in packages if (match := _CUDART.fullmatch(name))]
    return max((f"{match[1]}.{match[2]}" for match in found), key=version_key, default=None)


def version_key(version: str) -> tuple[int, ...]:
    """What versions are ordered by: ``10.16`` is newer than ``10.3``."""
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version))


def parse_cuda_version(text: str) -> str | None:
    """The toolkit's release, as major.minor, of ``/usr/local/cuda/version.json``."""
    try:
        version = json.loads(text)["cuda"]["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    match = re.match(r"([0-9]{1,3}\.[0-9]{1,3})(?:\.|$)", version) if isinstance(version, str) else None
    return match[1] if match else None


def parse_driver_version(text: str) -> str | None:
    """The driver's version of ``/proc/driver/nvidia/version``."""
    match = _DRIVER.search(text)
    return match[1] if match else None


def parse_gpu_information(text: str) -> str | None:
    """The GPU's name of ``/proc/driver/nvidia/gpus/*/information``."""
    match = _MODEL.search(text)
    return line_of(match[1]) if match else None


def parse_nvidia_smi(text: str) -> tuple[tuple[Gpu, str | None], ...] | None:
    """(GPU, driver version) of each line of ``nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version``."""
    found = []
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        name = line_of(words[0])
        sm = decimal(words[1], 1, 99) if len(words) == 4 and re.fullmatch(r"[0-9]{1,2}\.[0-9]", words[1]) else None
        if name and sm is not None:
            mib = integer(words[2].removesuffix("MiB"), 1, 1 << 30)
            gpu = Gpu(name, sm=f"sm_{words[1].replace('.', '')}", memory_bytes=mib and mib << 20)
            found.append((gpu, upstream_version(words[3])))
    return tuple(found) or None
