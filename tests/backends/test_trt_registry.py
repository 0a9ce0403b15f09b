"""The TensorRT plugin in a registry: a real one, whose parser finds it, and those that cannot take it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from avl_edge.backends.tensorrt.plugin import PluginMissing, register
from tests import ROOT

PARSER = """
import sys
from pathlib import Path
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper
from avl_edge.attention.cuda import FORMATS
from avl_edge.package.export.core_attention import DOMAIN, OPERATOR, OUTPUTS, for_plugin, inputs
from avl_edge.backends.tensorrt import make_creator

creator = make_creator(trt, None)
made = type(creator).create_plugin

def create(self, name, fields, phase):
    plugin = made(self, name, fields, phase)
    print(name, [int(field.data[0]) for field in plugin.get_fields_to_serialize()], phase.name, flush=True)
    return plugin

type(creator).create_plugin = create
registry = trt.get_plugin_registry()
assert registry.register_creator(creator, DOMAIN)
assert registry.get_creator(OPERATOR, "1", DOMAIN) is not None
shapes = [["t", 2, 64]] * 3 + [[8, 2, 64]] * 2 + [[9, "n"], [9, "b"], [9, "t"], ["b"], ["w"], ["u", 4], ["u", 4]]
names = inputs(tuple(FORMATS))
values = [
    helper.make_tensor_value_info(name, TensorProto.FLOAT if at < 5 else TensorProto.INT32, shape)
    for at, (name, shape) in enumerate(zip(names, shapes, strict=True))
]
node = helper.make_node(OPERATOR, names, OUTPUTS, name="node", domain=DOMAIN, layer=7)
outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in OUTPUTS]
graph = helper.make_graph([node], "graph", values, outputs)
opsets = [helper.make_opsetid("", 19), helper.make_opsetid(DOMAIN, 1)]
model = for_plugin(helper.make_model(graph, opset_imports=opsets, ir_version=9))
builder = trt.Builder(trt.Logger())
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
trt.OnnxParser(network, trt.Logger()).parse(model.SerializeToString())
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the package tensorrt-rtx")
def test_the_parser_finds_the_plugin() -> None:
    """A real registry and parser: node, namespace and version lead to our creator, and the layer arrives.

    They are TensorRT-RTX's, whose networks hold no plugins: what it does with the answer, ending the process, is not
    looked at.
    """
    done = subprocess.run([sys.executable, "-c", PARSER], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "node [7] BUILD\n", done.stderr[-2000:]


class TestRegister:
    def test_takes_no_plugins(self) -> None:
        trt = SimpleNamespace(INetworkDefinition=object, __version__="8.6")
        with pytest.raises(PluginMissing, match=r"TensorRT 8\.6 takes no plugins: use TensorRT 10\.3 or later"):
            register(trt)

    @pytest.fixture
    def trt(self) -> Callable[..., Any]:
        """A module whose registry keeps what it is given."""

        class Base:
            def __init__(self) -> None:
                pass

        class Registry:
            def __init__(self, takes: bool) -> None:
                self.takes, self.creators = takes, {}

            def get_creator(self, name: str, version: str, namespace: str) -> Any:
                return self.creators.get((name, version, namespace))

            def register_creator(self, creator: Any, namespace: str) -> bool:
                if self.takes:
                    self.creators[creator.name, creator.plugin_version, namespace] = creator
                return self.takes

        def make(takes: bool) -> Any:
            bases = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One")
            registry = Registry(takes)
            return SimpleNamespace(
                **{name: type(name, (Base,), {}) for name in bases},
                INetworkDefinition=SimpleNamespace(add_plugin_v3=None),
                DataType=SimpleNamespace(HALF=1, BF16=2, FLOAT=3),
                PluginField=lambda *given: given,
                PluginFieldType=SimpleNamespace(INT32=0),
                PluginFieldCollection=list,
                get_plugin_registry=lambda: registry,
                __version__="10.3.0",
            )

        return make

    def test_once(self, trt: Callable[..., Any]) -> None:
        module = trt(True)
        register(module)
        first = dict(module.get_plugin_registry().creators)
        register(module)
        assert list(first) == [("CoreAttention", "1", "avl")]
        assert module.get_plugin_registry().creators == first

    def test_refused(self, trt: Callable[..., Any]) -> None:
        with pytest.raises(PluginMissing, match="refused the plugin avl::CoreAttention"):
            register(trt(False))
