"""A record of the logits that a runtime's backend gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from avl_edge import Runtime
from avl_edge.backends.base import ForwardTask
from avl_edge.backends.step_batch import StepResult
from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.shared_prefix import SharedPrefixCache


class Recorder:
    """A backend in the place of a runtime's own, which computes and whose ``logits`` it remembers: ``[vocabulary]`` for
    every prompt, and for every step of the first sequence in it."""

    def __init__(self, runtime: Runtime) -> None:
        inner = runtime.debug.backend
        assert inner is not None, "the weights are not loaded"
        self._inner = inner
        self.name, self.rows, self.begin_encode = inner.name, inner.rows, inner.begin_encode
        self.logits: list[Tensor] = []
        runtime.debug.replace_backend(self)

    def begin_prefill(self, prompt: Any, features: Any, cache: SequenceCache) -> Any:
        task = self._inner.begin_prefill(prompt, features, cache)
        return task if isinstance(cache, SharedPrefixCache) else Recorded(task, self.logits)

    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], *, greedy: bool = False) -> StepResult:
        result = self._inner.decode(token_ids, caches)
        assert result.logits is not None
        self.logits.append(result.logits[0])
        tokens = result.logits.argmax(-1).tolist()
        return StepResult(tokens, failures=result.failures) if greedy else result


class Recorded:
    """A task whose result is kept in ``logits`` too."""

    def __init__(self, task: ForwardTask[Tensor], logits: list[Tensor]) -> None:
        self._task, self._logits = task, logits

    def advance(self, layers: int) -> Tensor | None:
        result = self._task.advance(layers)
        if result is not None:
            self._logits.append(result)
        return result
