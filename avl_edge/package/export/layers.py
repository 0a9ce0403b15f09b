"""The layers that the graphs share, each the counterpart of one in `avl_edge.model.network.layers`. Tensors are
two-dimensional."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...errors import BadModel
from .graph import Graph


def linear(graph: Graph, name: str, x: str, outputs: int, inputs: int, *, bias: bool) -> str:
    """``[n, inputs] -> [n, outputs]``; the weight stays as it is stored, Gemm reads it transposed."""
    return graph.add("Gemm", x, *graph.linear(name, outputs, inputs, bias=bias), transB=1)


def layer_norm(graph: Graph, name: str, x: str, size: int, eps: float) -> str:
    weight, bias = graph.weight(f"{name}.weight", size), graph.weight(f"{name}.bias", size)
    return graph.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)


def rms_norm(graph: Graph, name: str, x: str, size: int, eps: float) -> str:
    """In float32 whatever the model's dtype: squares of half precision overflow."""
    wide = graph.widen(x)
    mean = graph.add("ReduceMean", graph.add("Mul", wide, wide), graph.constant([-1]), keepdims=1)
    root = graph.add("Sqrt", graph.add("Add", mean, graph.constant(eps, "float32")))
    normed = graph.narrow(graph.add("Div", wide, root))
    return graph.add("Mul", graph.weight(f"{name}.weight", size), normed)


def activation(graph: Graph, kind: str, x: str) -> str:
    """The activation that config.json calls ``kind``, in float32: it costs nothing beside the matrices around it."""
    if kind not in _ACTIVATIONS:
        raise BadModel(f"activation {kind!r} is not supported: it must be one of {', '.join(_ACTIVATIONS)}")
    return graph.narrow(_ACTIVATIONS[kind](graph, graph.widen(x)))


def _scaled(graph: Graph, x: str, factor: float) -> str:
    return graph.add("Mul", x, graph.constant(factor, "float32"))


def _gelu(graph: Graph, x: str) -> str:
    erf = graph.add("Erf", _scaled(graph, x, math.sqrt(0.5)))
    return _scaled(graph, graph.add("Mul", x, graph.add("Add", erf, graph.constant(1.0, "float32"))), 0.5)


def _gelu_tanh(graph: Graph, x: str) -> str:
    cube = graph.add("Mul", x, graph.add("Mul", x, x))
    inner = graph.add("Add", x, _scaled(graph, cube, 0.044715))
    tanh = graph.add("Tanh", _scaled(graph, inner, math.sqrt(2 / math.pi)))
    return _scaled(graph, graph.add("Mul", x, graph.add("Add", tanh, graph.constant(1.0, "float32"))), 0.5)


def _quick_gelu(graph: Graph, x: str) -> str:
    return graph.add("Mul", x, graph.add("Sigmoid", _scaled(graph, x, 1.702)))


def _silu(graph: Graph, x: str) -> str:
    return graph.add("Mul", x, graph.add("Sigmoid", x))


def _relu(graph: Graph, x: str) -> str:
    return graph.add("Relu", x)


_ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "quick_gelu": _quick_gelu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
    "silu": _silu,
}
