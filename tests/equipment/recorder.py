"""A record of the logits that a runtime's backend gives."""

from __future__ import annotations

from torch import Tensor

from avl_edge import Runtime


class Recorder:
    """A backend in the place of a runtime's own, which computes and whose ``logits`` it remembers: ``[vocabulary]`` for
    every prompt, and for every step of the first sequence in it."""

    def __init__(self, runtime: Runtime) -> None:
        inner = runtime.debug.backend
        assert inner is not None, "the weights are not loaded"
        self._inner = inner
        self.name, self.rows = inner.name, inner.rows
        self.encode_images, self.prefill_prefix = inner.encode_images, inner.prefill_prefix
        self.logits: list[Tensor] = []
        runtime.debug.replace_backend(self)

    def prefill(self, *arguments: object) -> Tensor:
        logits = self._inner.prefill(*arguments)  # type: ignore[arg-type]
        self.logits.append(logits)
        return logits

    def decode(self, *arguments: object) -> Tensor:
        logits = self._inner.decode(*arguments)  # type: ignore[arg-type]
        self.logits.append(logits[0])
        return logits

    def decode_greedy(self, *arguments: object) -> list[int]:
        tokens: list[int] = self.decode(*arguments).argmax(-1).tolist()
        return tokens
