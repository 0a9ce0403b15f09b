"""Versions: L4T, JetPack, CUDA, TensorRT, driver, Python, compiler."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from .facts import Identity, Software
from .finder import Finder
from .jetson_text import jetpack_of_l4t, jetpack_series, parse_release
from .linux_text import parse_packages
from .live import has_jtop
from .nvidia_text import (
    cuda_of_packages,
    jetpack_of_packages,
    parse_cuda_version,
    parse_driver_version,
    parse_nvidia_smi,
    tensorrt_of_packages,
    upstream_version,
    version_key,
)

MAX_PACKAGE_DATABASE = 64 << 20
_COMPILERS = ("g++", "c++", "clang++")


def page_bytes(find: Finder) -> int:
    """The size of a memory page; a recorded tree does not tell it, and Orin's kernels have 4096 bytes."""
    return os.sysconf("SC_PAGE_SIZE") if find.tree.live else 4096


def find_software(find: Finder, identity: Identity, telemetry: str = "sysfs") -> Software:
    """The versions that engines and profiles depend on. ``telemetry``: who gave readings, which is there then."""
    jetson = identity.kind == "jetson"
    status = find.tree.read("/var/lib/dpkg/status", MAX_PACKAGE_DATABASE)
    packages = parse_packages(status.text or "") or {}
    l4t = find.first("software.l4t", ("/etc/nv_tegra_release", parse_release)) if jetson else None
    installed = jetpack_of_packages(packages)
    implied = _implied_jetpack(find, l4t) if l4t else None
    if jetson and installed is None and implied is None:
        find.unknown["software.jetpack"] = "no nvidia-jetpack package, and the L4T release is not one that is known"
    if installed and implied and not _agree(installed, implied):
        find.warnings.append(
            f"the nvidia-jetpack package says {installed}, L4T {l4t} is known as {implied}: "
            f"the package is believed; was the system upgraded half way?"
        )
    return Software(
        l4t=l4t,
        jetpack=installed or implied,
        jetpack_package=installed,
        jetpack_from_l4t=implied,
        cuda=_find_cuda(find, packages),
        tensorrt=_find_tensorrt(find, packages),
        nvidia_driver=_find_driver(find),
        python=_find_python(find),
        compiler=_find_compiler(find),
        jetson_stats=telemetry == "jetson-stats" or has_jtop(find.tree),
    )


def _implied_jetpack(find: Finder, l4t: str) -> str | None:
    implied = jetpack_of_l4t(l4t)
    if implied is not None:
        find.derived["software.jetpack_from_l4t"] = f"the JetPack release that carries L4T {l4t}"
        return implied
    series = jetpack_series(l4t)
    if series is None:
        find.warnings.append(f"L4T {l4t} is not a release that this program knows: facts are read as usual, check them")
    else:
        find.derived["software.jetpack_from_l4t"] = f"L4T {l4t} itself is not known to this program, its series is"
    return series


def _agree(installed: str, implied: str) -> bool:
    """``7.1`` with ``7.0 or 7.1``; any of a series with ``6.x``."""
    return installed in implied.split(" or ") or (implied.endswith(".x") and installed.startswith(implied[:-1]))


def _find_cuda(find: Finder, packages: dict[str, str]) -> str | None:
    """The toolkit that is in use where several are installed, else the newest runtime library."""
    active = find.quietly("/usr/local/cuda/version.json", parse_cuda_version)
    found = active or cuda_of_packages(packages)
    if found is None:
        find.unknown["software.cuda"] = "no /usr/local/cuda/version.json and no package cuda-cudart"
    return found


def _find_tensorrt(find: Finder, packages: dict[str, str]) -> str | None:
    """The system's library, or the Python package of this environment."""
    found = tensorrt_of_packages(packages)
    if found is None and find.tree.live:
        with suppress(PackageNotFoundError):
            found = upstream_version(version("tensorrt"))
    if found is None:
        find.unknown["software.tensorrt"] = "no package libnvinfer or tensorrt is installed"
    return found


def _find_driver(find: Finder) -> str | None:
    """The driver's own file, or nvidia-smi; asked only where the driver is loaded."""
    if not find.tree.exists("/proc/driver/nvidia/version"):
        return None
    return find.first(
        "software.nvidia_driver",
        ("/proc/driver/nvidia/version", parse_driver_version),
        ("nvidia-smi", lambda text: listed[0][1] if (listed := parse_nvidia_smi(text)) else None),
    )


def _find_python(find: Finder) -> str | None:
    """The Python that runs this, or the newest of a recorded tree."""
    if find.tree.live:
        return ".".join(str(part) for part in sys.version_info[:3])
    names = [path.rpartition("/python")[2] for path in find.tree.glob("/usr/bin/python3.*")]
    versions = [name for name in names if re.fullmatch(r"3\.[0-9]{1,3}", name)]
    if not versions:
        find.unknown["software.python"] = "no /usr/bin/python3.N"
    return max(versions, key=version_key, default=None)


def _find_compiler(find: Finder) -> str | None:
    """The path of a C++ compiler."""
    if find.tree.live:
        found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    else:
        found = next((f"/usr/bin/{name}" for name in _COMPILERS if find.tree.exists(f"/usr/bin/{name}")), None)
    if found is None:
        find.unknown["software.compiler"] = f"none of {', '.join(_COMPILERS)}"
    return found
