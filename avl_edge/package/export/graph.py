"""An ONNX graph in the making: nodes in order, constants inline, weights streamed to a file beside it.

No weight is ever held twice: it goes from the memory-mapped checkpoint straight to the data file. Names are counted,
nothing depends on time or place: the same checkpoint gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ...errors import BadModel
from ...model.checkpoint import Weights
from ...model.weights import Dense
from ...optional import optional
from .bindings import Binding, Bindings

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

OPSET, IR_VERSION = 19, 9
"""Of one time (ONNX 1.14), and known to TensorRT 10.3; nothing here needs what came later."""
_ALIGNMENT = 4096
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _onnx() -> Any:
    """The module onnx; :class:`~avl_edge.errors.BadInput` says how to install it where it is missing."""
    return optional("onnx", "building", "export")


def onnx_type(name: str) -> int:
    """ONNX's number of a dtype: ``float32``, ``float16``, ``bfloat16``, ``int32``, ``int64``."""
    proto: Any = _onnx().TensorProto
    return int(getattr(proto, {"float32": "FLOAT"}.get(name, name.upper())))


class Nodes:
    """The body of a graph or of a function."""

    def __init__(self) -> None:
        self.onnx = _onnx()
        self.nodes: list[NodeProto] = []
        self.scope = ""
        self._constants: dict[tuple[str, str], str] = {}

    def add(self, operator: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """One node with one output, which is ``name`` or counted; gives the output's name."""
        return self.add_many(operator, inputs, [name or self._name(operator)], **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """One node with the named outputs."""
        node = self.onnx.helper.make_node(
            operator, list(inputs), list(outputs), name=f"{outputs[0]}/node", domain=domain, **attributes
        )
        self.nodes.append(node)
        return list(outputs)

    def constant(self, value: float | Sequence[float], dtype: str = "int64") -> str:
        """A small constant: a scalar or a list; the same one is made once."""
        key = (repr(value), dtype)
        if key not in self._constants:
            shape = [len(value)] if isinstance(value, Sequence) else []
            values = list(value) if isinstance(value, Sequence) else [value]
            tensor = self.onnx.helper.make_tensor("value", onnx_type(dtype), shape, values)
            name = f"{self.scope}constant_{len(self._constants)}"
            self._constants[key] = self.add("Constant", name=name, value=tensor)
        return self._constants[key]

    def cast(self, x: str, dtype: str) -> str:
        return self.add("Cast", x, to=onnx_type(dtype))

    def _name(self, operator: str) -> str:
        return f"{self.scope}{operator}_{len(self.nodes)}"


class WeightStore(Protocol):
    """Where a graph's weights go."""

    def write(self, name: str, tensor: Tensor, dtype: str) -> TensorProto:
        """Keep ``tensor`` as ``dtype``; gives the initializer that points at it."""
        ...


class WeightFile:
    """The file beside a graph that holds its weights, written tensor by tensor."""

    def __init__(self, path: Path, wrote: Callable[[], None]) -> None:
        """``wrote`` is called after each tensor."""
        self._name = path.name
        self._file = path.open("wb")
        self._wrote = wrote

    def write(self, name: str, tensor: Tensor, dtype: str) -> TensorProto:
        """As in :class:`WeightStore`; :class:`BadModel` for numbers that ``dtype`` cannot hold."""
        onnx = _onnx()
        stored = tensor.detach().to(DTYPES[dtype]).contiguous()
        if stored.dtype != tensor.dtype and not bool(stored.isfinite().all()):
            raise BadModel(f"{name} holds values beyond the range of {dtype}: build with another --precision")
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        self._file.write(stored.view(-1).view(torch.uint8).numpy().data)
        proto: TensorProto = onnx.TensorProto(name=name, dims=tensor.shape, data_type=onnx_type(dtype))
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self._name), ("offset", offset), ("length", stored.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self._wrote()
        return proto

    def close(self) -> None:
        self._file.close()


class WeightCount:
    """Keeps nothing: counts the tensors and the bytes that a file would hold, but for its alignment."""

    def __init__(self) -> None:
        self.tensors = 0
        self.bytes = 0
        self.largest = 0

    def write(self, name: str, tensor: Tensor, dtype: str) -> TensorProto:
        size = tensor.numel() * DTYPES[dtype].itemsize
        self.tensors += 1
        self.bytes += size
        self.largest = max(self.largest, size)
        proto: TensorProto = _onnx().TensorProto(name=name, dims=tensor.shape, data_type=onnx_type(dtype))
        return proto


class Graph(Nodes):
    """A graph over a checkpoint's weights, all of one dtype."""

    def __init__(self, weights: Weights, dtype: str, store: WeightStore) -> None:
        super().__init__()
        self.dtype = dtype
        self.take = weights.take
        self.has = weights.has
        self._linear = weights.linear
        self._store = store
        self._initializers: dict[str, TensorProto] = {}

    def weight(self, name: str, *shape: int) -> str:
        """The checkpoint's tensor ``name`` as an initializer, written once however often it is used."""
        return name if name in self._initializers else self.tensor(name, self.take(name, *shape))

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool) -> list[str]:
        """The matrix of the checkpoint's linear layer ``name``, and its bias where it has one. A packed matrix is
        written as the numbers that it stands for."""
        layer = self._linear(name, outputs, inputs, bias=bias)
        matrix = layer.weight if isinstance(layer, Dense) else layer.dequantize()
        terms = [self.tensor(f"{name}.weight", matrix)]
        return terms if layer.bias is None else [*terms, self.tensor(f"{name}.bias", layer.bias)]

    def tensor(self, name: str, tensor: Tensor, dtype: str | None = None) -> str:
        """Store ``tensor`` under ``name``, in the graph's dtype where none is given."""
        self._initializers[name] = self._store.write(name, tensor, dtype or self.dtype)
        return name

    def widen(self, x: str) -> str:
        """``x`` of the graph's dtype in float32."""
        return x if self.dtype == "float32" else self.cast(x, "float32")

    def narrow(self, x: str) -> str:
        """float32 ``x`` in the graph's dtype."""
        return x if self.dtype == "float32" else self.cast(x, self.dtype)

    def model(self, name: str, bindings: Bindings, functions: Sequence[FunctionProto] = ()) -> ModelProto:
        """The finished model; the nodes have to produce the outputs by name."""
        helper = self.onnx.helper
        graph = helper.make_graph(
            self.nodes,
            name,
            [_value(helper, binding) for binding in bindings.inputs],
            [_value(helper, binding) for binding in bindings.outputs],
            list(self._initializers.values()),
        )
        domains = dict.fromkeys(function.domain for function in functions)
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model: ModelProto = helper.make_model(
            graph, opset_imports=opsets, functions=list(functions), producer_name="avl-edge", ir_version=IR_VERSION
        )
        return model


def _value(helper: Any, binding: Binding) -> ValueInfoProto:
    value: ValueInfoProto = helper.make_tensor_value_info(binding.name, onnx_type(binding.dtype), binding.shape)
    return value
