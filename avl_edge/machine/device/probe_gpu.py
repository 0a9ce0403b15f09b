"""The GPUs: Jetson's own through sysfs, discrete ones through NVIDIA's driver."""

from __future__ import annotations

from .facts import Gpu, Identity
from .finder import Finder
from .jetson_text import sm_of_soc
from .nvidia_text import parse_gpu_information, parse_nvidia_smi
from .values import hertz, integer

_LOADS = (
    "/sys/devices/platform/gpu.0/load",
    "/sys/devices/platform/17000000.gpu/load",
    "/sys/devices/platform/bus@0/17000000.gpu/load",
)
# `17000000.gpu` or `.ga10b` on Orin, other chips' names before and after it.
_DEVFREQ = ("*.gpu", "*.ga10b", "*.gv11b", "*.gp10b", "gpu-gpc-0")
_NODES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvmap")


def has_gpu_nodes(find: Finder) -> bool:
    """Are there device nodes through which a program reaches a GPU? A container has them only if it was given them."""
    return any(find.tree.exists(path) for path in _NODES)


def find_gpus(find: Finder, identity: Identity) -> tuple[Gpu, ...]:
    """The GPUs, Jetson's integrated one first."""
    return (_integrated(find, identity),) if identity.kind == "jetson" else _discrete(find)


def _integrated(find: Finder, identity: Identity) -> Gpu:
    sm = sm_of_soc(identity.soc) if identity.soc else None
    if sm:
        find.derived["gpus.sm"] = f"from the chip, {identity.soc}"
    else:
        find.unknown["gpus.sm"] = f"not known for the chip {identity.soc}"
    folder = next(iter(path for kind in _DEVFREQ for path in find.tree.glob(f"/sys/class/devfreq/{kind}")), None)
    if folder is None:
        find.unknown["gpus.max_hz"] = "no GPU under /sys/class/devfreq"
    clocks = [find.quietly(f"{folder}/{name}_freq", hertz) if folder else None for name in ("cur", "min", "max")]
    offered = find.quietly(f"{folder}/available_frequencies", clocks_of) if folder else None
    load = find.first("gpus.load_percent", *((path, lambda text: integer(text, 0, 1000)) for path in _LOADS))
    return Gpu(
        name=f"{(identity.soc or 'tegra').capitalize()} GPU",
        integrated=True,
        sm=sm,
        cur_hz=clocks[0],
        min_hz=clocks[1],
        max_hz=clocks[2],
        most_hz=max(offered, default=None) if offered else None,
        load_percent=None if load is None else load / 10,  # the kernel gives per mille
    )


def clocks_of(text: str) -> tuple[int, ...]:
    """Clocks in Hz, with blanks between them."""
    return tuple(clock for word in text.split()[:256] if (clock := hertz(word)))


def _discrete(find: Finder) -> tuple[Gpu, ...]:
    """nvidia-smi tells all; without it the driver's files tell the name."""
    if not find.tree.exists("/proc/driver/nvidia/version"):
        return ()
    listed = find.first("gpus.sm", ("nvidia-smi", parse_nvidia_smi))
    if listed:
        return tuple(gpu for gpu, _ in listed)
    folders = find.tree.glob("/proc/driver/nvidia/gpus/*")
    names = [find.quietly(f"{folder}/information", parse_gpu_information) for folder in folders]
    return tuple(Gpu(name) for name in names if name)
