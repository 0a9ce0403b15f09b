"""An engine from an exported graph, by TensorRT's parser and builder, which come with the device.

The calls are the same from TensorRT 10.3 to 11 and in TensorRT-RTX. Networks are strongly typed: every tensor has the
dtype that the graph says, as 11 knows nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableSequence, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ...config import Progress
from ..export import Binding
from .errors import BuildFailed

Sizes = tuple[int, int, int]
"""The smallest, the usual and the largest of what varies."""


def find_tensorrt() -> ModuleType | None:
    """The module ``tensorrt``, or None where it is not installed."""
    try:
        import tensorrt
    except ImportError:
        return None
    module: ModuleType = tensorrt
    return module


def build_engine(
    trt: Any,
    graph: Path,
    inputs: Sequence[Binding],
    profiles: Sequence[Mapping[str, Sizes]],
    workspace: int,
    timings: bytes = b"",
    progress: Progress | None = None,
) -> tuple[memoryview, bytes]:
    """The engine of ``graph`` for this machine, in TensorRT's own memory, as a copy would hold all weights once more;
    and the timing cache that makes the next build short.

    ``inputs`` are the graph's; a profile gives :data:`Sizes` to each name of a dimension in them, and to each input
    that is itself a size. ``workspace`` is the most memory, in bytes, that a layer may take for itself; ``timings`` is
    an earlier cache, of no effect if it is another machine's. Raises :class:`BuildFailed` with TensorRT's own words.
    """
    words: list[str] = []
    # Named here, as TensorRT does not keep them alive.
    logger, monitor = make_logger(trt, words), _monitor(trt, progress)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # how its bindings say that there is no CUDA device, or no driver for it
        raise _failure(graph, words) from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        words += [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _failure(graph, words)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.progress_monitor = monitor
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")  # another machine's would be kept for ever, and never used
        config.set_timing_cache(cache, ignore_mismatch=False)
    for sizes in profiles:
        config.add_optimization_profile(_profile(builder.create_optimization_profile(), network, inputs, sizes))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _failure(graph, words)
    return memoryview(engine), bytes(cache.serialize())


def _profile(profile: Any, network: Any, inputs: Sequence[Binding], sizes: Mapping[str, Sizes]) -> Any:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    is_size = {tensor.name for tensor in tensors if tensor.is_shape_tensor}
    for binding in inputs:
        if binding.name in is_size:
            profile.set_shape_input(binding.name, *((size,) for size in sizes[binding.name]))
        else:
            dims = [[dim if isinstance(dim, int) else sizes[dim][which] for dim in binding.shape] for which in range(3)]
            profile.set_shape(binding.name, *dims)
    return profile


def _failure(graph: Path, words: Sequence[str]) -> BuildFailed:
    return BuildFailed(f"TensorRT cannot build {graph.name}: {reason(words)}")


def reason(words: Collection[str]) -> str:
    """The last of TensorRT's words in one line."""
    return " ".join(" ".join(list(words)[-3:]).split()) or "no reason was given"


def make_logger(trt: Any, words: MutableSequence[str]) -> Any:
    """A logger for TensorRT that keeps what it says of errors; warnings are many and for its developers."""
    mildest = trt.ILogger.Severity.ERROR

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= mildest:
                words.append(message)

    return Logger()


def _monitor(trt: Any, progress: Progress | None) -> Any:
    """Counts the steps of all phases, of which more become known as the build goes on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._known = self._done = 0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self._known += steps

        def step_complete(self, name: str, step: int) -> bool:  # noqa: ARG002
            self._done += 1
            if progress:
                progress(min(self._done, self._known), self._known)
            return True

        def phase_finish(self, name: str) -> None:
            """Phases overlap; only steps count."""

    return Monitor()
