"""What the backend asks of a GPU beside torch's own operators: a stream, memory for copies, and recorded steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...attention.cuda import NoCuda


class Accelerator(Protocol):
    """A device with a queue of work. Tests put the CPU here, which does everything at once."""

    device: torch.device

    def stream(self) -> int:
        """The handle of the stream that torch queues work on now."""
        ...

    def host_memory(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the CPU that copies to and from the device run on without waiting for them."""
        ...

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """``step`` as something to launch again and again, over the same memory. It may run once meanwhile."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        ...


class CudaDevice:
    """GPU number ``index`` through torch. Raises :class:`~avl_edge.attention.cuda.NoCuda` where torch has none."""

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            built = torch.version.cuda is not None
            reason = "finds no GPU" if built else "is built for the CPU"
            cure = "check the driver with nvidia-smi" if built else "install a torch for CUDA"
            raise NoCuda(f"torch {torch.__version__} {reason}: {cure}, or use --device cpu")
        if index >= torch.cuda.device_count():
            raise NoCuda(f"there is no GPU {index}, this machine has {torch.cuda.device_count()}: choose another")
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self._graphs = torch.cuda.graph_pool_handle()

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def host_memory(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph. All of them share one pool of scratch memory: no two run at once, and what they leave for
        others lies outside of it."""
        # Libraries set themselves up at their first call, which must not fall into the recording.
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread's allocation does not spoil the recording of this one.
        with torch.cuda.graph(graph, pool=self._graphs, capture_error_mode="thread_local"):
            step()
        replay: Callable[[], None] = graph.replay
        return replay

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
