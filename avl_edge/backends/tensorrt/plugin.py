"""``avl::CoreAttention`` as a TensorRT plugin, for TensorRT 10.3 to 11.

The class is Python, and so is its ``enqueue``: a decode step is captured into a CUDA graph once, and replayed without
any of it. An engine names the plugin and the layer; the kernels are compiled where it is opened.

Shown on a CPU: every method, called with the objects of the real Python bindings of 10.3, 10.16 and 11.4, and the
numbers, by the kernels' source compiled for the CPU. Left to a device: TensorRT's own calls of these methods, the
kernels on a GPU, capture and speed.

The rows that have a slot are written into ``pool_keys`` and ``pool_values``, which are inputs of the engine: they have
to reach the plugin as they were bound, not as a copy. TensorRT does not promise that, so whoever opens an engine looks
(:meth:`avl_edge.backends.tensorrt.backend.EngineBackend.require_rows`). Nothing asks for a copy: inputs of the network
lie as this plugin takes them, in this dtype, and nobody else reads them. Outputs aliased to inputs, a preview of
TensorRT's, would not do: an input that several plugins alias may be copied for each, and there is one pool for all
layers.

Packed rows lie in the same memory: their words, which the reference body reads, are inputs here that nobody looks at.

What a method raises, the bindings print and pass on as a failure of the call that TensorRT was asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import AvlEdgeError, BadInput
from ...package.export.core_attention import DOMAIN, INPUTS, OPERATOR, OUTPUTS
from .attention import Attention, Sizes

VERSION = "1"
LAYER = "layer"
Load = Callable[[int, int, str], Attention]
"""(head_dim, group, dtype) to the kernels."""


class PluginMissing(AvlEdgeError):
    """TensorRT did not take the plugin, or is one that knows no plugins."""


def register(trt: Any, load: Load | None = None) -> None:
    """Make the plugin known to TensorRT's parser and runtime; once is enough, and more does nothing.

    ``trt``: the module ``tensorrt``; ``load``: where kernels come from, this machine's GPU where none is given. Raises
    :class:`PluginMissing`.
    """
    if not takes_plugins(trt):
        raise PluginMissing(f"TensorRT {trt.__version__} takes no plugins: use TensorRT 10.3 or later")
    registry = trt.get_plugin_registry()
    if registry is None:
        raise PluginMissing("TensorRT has no plugin registry: its libraries are not those of its Python package")
    if registry.get_creator(OPERATOR, VERSION, DOMAIN) is not None:
        return
    creator = make_creator(trt, load or Attention.load)
    if not registry.register_creator(creator, DOMAIN):
        raise PluginMissing(f"TensorRT {trt.__version__} refused the plugin {DOMAIN}::{OPERATOR}")
    _keep(creator)


def _keep(thing: Any) -> None:
    """As long as the process, past Python's own end: creators, which TensorRT's registry does not keep alive, and
    plugins, as the bindings of 10.3 damage memory where one is freed. There is a plugin a layer and context."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def takes_plugins(trt: Any) -> bool:
    """Whether a network of this TensorRT can hold a plugin; that of TensorRT-RTX cannot, though it has the classes."""
    return hasattr(trt.INetworkDefinition, "add_plugin_v3")


def make_creator(trt: Any, load: Load) -> Any:
    """What makes plugins for TensorRT: from an attribute of the ONNX node, or from an engine. All share kernels."""
    loaded: dict[tuple[int, int, str], Attention] = {}
    plugin = _plugin_class(trt)

    def once(head_dim: int, group: int, dtype: str) -> Attention:
        key = (head_dim, group, dtype)
        if key not in loaded:
            loaded[key] = load(*key)
        return loaded[key]

    class CoreAttentionCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = OPERATOR, DOMAIN, VERSION
            self._wanted, self.field_names = _fields(trt, [])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:  # noqa: ARG002
            """The plugin of the layer that ``fields`` name."""
            layers = [int(np.asarray(field.data).reshape(-1)[0]) for field in fields if field.name == LAYER]
            if len(layers) != 1 or layers[0] < 0:
                raise BadInput(f"{DOMAIN}::{OPERATOR} needs the attribute {LAYER}, once: build the package again")
            return plugin(layers[0], once, phase == trt.TensorRTPhase.BUILD)

    return CoreAttentionCreator()


def _fields(trt: Any, values: Sequence[int]) -> tuple[Any, Any]:
    """The collection of the one field, and before it what has to live as long: TensorRT sees only addresses."""
    data = np.array(values, dtype=np.int32)
    field = trt.PluginField(LAYER, data, trt.PluginFieldType.INT32)
    return (data, field), trt.PluginFieldCollection([field])


def _plugin_class(trt: Any) -> type[Any]:
    """The plugin's class, over the bindings' own base classes."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    dtypes = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16", trt.DataType.FLOAT: "float32"}
    return type("CoreAttentionPlugin", (_CoreAttention, *bases), {"_trt": trt, "_bases": bases, "_dtypes": dtypes})


class _CoreAttention:
    """One layer's attention: the methods that TensorRT calls. :func:`_plugin_class` adds what they are methods of."""

    _trt: Any
    _bases: tuple[type[Any], ...]
    _dtypes: dict[Any, str]

    def __init__(self, layer: int, load: Load, building: bool) -> None:
        """``building``: made for the builder, whose inputs hold no ids while it takes times."""
        for base in self._bases:
            base.__init__(self)
        self.num_outputs = len(OUTPUTS)
        self.plugin_name, self.plugin_namespace, self.plugin_version = OPERATOR, DOMAIN, VERSION
        self._layer, self._load, self._building = layer, load, building
        self._attention: Attention | None = None
        _keep(self)

    def get_capability_interface(self, kind: Any) -> Any:  # noqa: ARG002
        """Core, build and runtime are all this object."""
        return self

    def clone(self) -> Any:
        """One of the same state; the kernels are shared."""
        copy = type(self)(self._layer, self._load, self._building)
        copy._attention = self._attention
        return copy

    # Building

    def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
        """Rows as the query: float16, bfloat16 or float32; scores float32, all else int32; all of it linear."""
        tensor = tensors[position].desc
        if tensor.format != self._trt.TensorFormat.LINEAR:
            return False
        if position < _ROW_INPUTS or position == inputs:
            return tensor.type in self._dtypes and tensor.type == tensors[0].desc.type
        return bool(tensor.type == (self._trt.DataType.FLOAT if position > inputs else self._trt.DataType.INT32))

    def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
        return [inputs[0], self._trt.DataType.FLOAT, self._trt.DataType.FLOAT]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, expressions: Any) -> list[Any]:  # noqa: ARG002
        """attended [t, H, d], row_scores [2, N], token_scores [2, t]."""
        query, rows, two = inputs[0], inputs[INPUTS.index("rows")], expressions.constant(2)
        shapes = [query[0], query[1], query[2]], [two, rows[1]], [two, query[0]]
        return [self._trt.DimsExprs(shape) for shape in shapes]

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:  # noqa: ARG002
        """For the shapes of a profile, which have to agree with one another and to hold the layer."""
        most = self._sizes([tensor.max for tensor in inputs])
        self._prepare(most, inputs[0].desc.type)

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:  # noqa: ARG002
        """Bytes for the largest shapes."""
        most = self._sizes([tensor.max for tensor in inputs])
        return self._prepare(most, inputs[0].desc.type).workspace_bytes(most)

    def get_valid_tactics(self) -> list[int]:
        """One way of doing it: there is nothing to choose from."""
        return []

    # Running

    def attach_to_context(self, context: Any) -> Any:  # noqa: ARG002
        """A clone: nothing of the context is needed."""
        return self.clone()

    def set_tactic(self, tactic: int) -> None:
        """There is one."""

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:  # noqa: ARG002
        """Before an ``enqueue`` of other shapes: load what it launches."""
        self._prepare(self._sizes([tensor.dims for tensor in inputs]), inputs[0].type)

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],  # noqa: ARG002
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Queue the layer on ``stream``; addresses of device memory."""
        if self._building:
            return
        sizes = self._sizes([tensor.dims for tensor in input_desc])
        self._prepare(sizes, input_desc[0].type).run(sizes, self._layer, inputs, outputs, workspace, stream)

    def get_fields_to_serialize(self) -> Any:
        """The layer: shapes and dtype come with the engine."""
        self._serialized, fields = _fields(self._trt, [self._layer])
        return fields

    def _sizes(self, shapes: Sequence[Any]) -> Sizes:
        sizes = Sizes.of([tuple(shape) for shape in shapes])
        if self._layer >= sizes.layers:
            message = f"layer {self._layer} of a decoder of {sizes.layers}"
            raise BadInput(f"{DOMAIN}::{OPERATOR} is for {message}: build the package again")
        return sizes

    def _prepare(self, sizes: Sizes, dtype: Any) -> Attention:
        if self._attention is None:
            group = sizes.heads // sizes.kv_heads
            self._attention = self._load(sizes.head_dim, group, self._dtypes[dtype])
        self._attention.prepare(sizes)
        return self._attention


_ROW_INPUTS = INPUTS.index("rows")
"""Of those, the first inputs: query, key, value and the pool."""
