"""Whether the packages that have to be the device's own are: by what is installed, as nothing of them can be loaded
while an image is built, without the driver.

    python check_packages.py tensorrt
    python check_packages.py cuda        # prints cuda-python==MAJOR.*, a line for pip's constraints
    python check_packages.py torch       # prints torch==VERSION, likewise

Exit code 0, or 1 with one line that says what to do. It runs before anything else is installed: standard library only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

CUDA = Path("/usr/local/cuda/version.json")


def tensorrt() -> str:
    """Nothing, where its Python package is installed."""
    if find_spec("tensorrt") is None:
        raise SystemExit("there is no TensorRT for this Python: apt install python3-libnvinfer, which JetPack has")
    return ""


def cuda() -> str:
    """``cuda-python==MAJOR.*`` of the device's CUDA, whose compiler builds the kernels."""
    try:
        version = str(json.loads(CUDA.read_text())["cuda"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(f"{CUDA} does not tell the version of CUDA: apt install cuda-toolkit, from JetPack") from None
    return f"cuda-python=={version.split('.')[0]}.*\n"


def torch() -> str:
    """``torch==VERSION`` of a torch that has CUDA and takes its libraries from the device."""
    try:
        found = distribution("torch")
    except PackageNotFoundError:
        raise SystemExit("torch is not installed: TORCH_INDEX has none for this Python") from None
    if not any(file.name == "libtorch_cuda.so" for file in found.files or ()):
        raise SystemExit(f"torch {found.version} has no CUDA: give a TORCH_INDEX with torch for this JetPack")
    if foreign := [line for line in found.requires or () if line.startswith("nvidia-") and "extra ==" not in line]:
        name = foreign[0].split()[0]
        raise SystemExit(f"torch {found.version} brings CUDA of its own ({name}): give a TORCH_INDEX for this JetPack")
    return f"torch=={found.version}\n"


CHECKS: dict[str, Callable[[], str]] = {"tensorrt": tensorrt, "cuda": cuda, "torch": torch}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CHECKS:
        sys.exit(f"give one of {', '.join(CHECKS)}")
    print(CHECKS[sys.argv[1]](), end="")
