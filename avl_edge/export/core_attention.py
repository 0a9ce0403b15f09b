"""``avl::CoreAttention``: the node, and what it computes, as a function of ONNX's own operators.

The package's docstring says what the inputs mean. The body is for checking, not for speed: it forms all weights at
once, in float32, and masks what a token must not see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .graph import OPSET, Nodes

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto

DOMAIN = "avl"
OPERATOR = "CoreAttention"
INPUTS = (
    "query",  # [t, H, d]
    "key",  # [t, H_kv, d]
    "value",  # [t, H_kv, d]
    "pool_keys",  # [R, H_kv, d]
    "pool_values",  # [R, H_kv, d]
    "rows",  # [L, N]
    "row_offsets",  # [L, B + 1]
    "slots",  # [L, t]
    "token_offsets",  # [B + 1]
    "score_queries",  # [W]
)
OUTPUTS = (
    "attended",  # [t, H, d], zeros for a token that sees nothing
    "row_scores",  # [N]
    "token_scores",  # [2, t]
)
_LOWEST = -3.0e38


def for_plugin(model: ModelProto) -> ModelProto:
    """A copy without the reference body, with what TensorRT's parser needs to find the plugin."""
    copy = type(model)()
    copy.CopyFrom(model)
    del copy.functions[:]
    for node in copy.graph.node:
        if node.domain == DOMAIN:
            for name, value in (("plugin_namespace", DOMAIN), ("plugin_version", "1")):
                attribute = node.attribute.add(name=name, s=value.encode())
                attribute.type = attribute.STRING
    return copy


def reference_function(heads: int, kv_heads: int, head_dim: int) -> FunctionProto:
    """The body for a decoder of this shape; the layer is an attribute of the node."""
    body = Body(heads, kv_heads, head_dim)
    body.build()
    function: FunctionProto = body.onnx.helper.make_function(
        DOMAIN,
        OPERATOR,
        list(INPUTS),
        list(OUTPUTS),
        body.nodes,
        [body.onnx.helper.make_opsetid("", OPSET)],
        attributes=["layer"],
    )
    return function


class Body(Nodes):
    """One call of the function. t new tokens, N listed rows, columns C: the rows, then the tokens."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.scope = "body/"  # a parser that inlines the function must not mix its names with the graph's
        self._heads, self._kv_heads, self._dim = heads, kv_heads, head_dim

    def build(self) -> None:
        rows, row_offsets, slots = (self._of_layer(name) for name in ("rows", "row_offsets", "slots"))
        ends = self._ends("token_offsets")
        tokens = self._range(slots)
        token_owner = self._owner(tokens, ends)
        row_owner = self._owner(self._range(rows), self._ends(row_offsets))
        visible = self._visible(tokens, token_owner, row_owner, slots)
        keys, values = self._columns(rows, row_owner, slots, ends)
        weights = self._weights(keys, visible)
        self._attend(weights, values)
        self._score(weights, tokens, ends, rows)

    def _of_layer(self, table: str) -> str:
        layer = self._name("Constant")
        node = self.onnx.helper.make_node("Constant", [], [layer], name=f"{layer}/node")
        node.attribute.add(name="value_int", ref_attr_name="layer", type=self.onnx.AttributeProto.INT)
        self.nodes.append(node)
        return self.add("Gather", table, layer, axis=0)

    def _ends(self, offsets: str) -> str:
        """Where each sequence ends, ``[B]``."""
        whole = self.constant([2**31 - 1])
        return self.add("Slice", offsets, self.constant([1]), whole, self.constant([0]))

    def _range(self, like: str) -> str:
        """0, 1, ... over a list, int32."""
        count = self.add("Squeeze", self.cast(self.add("Shape", like), "int32"), self.constant([0]))
        return self.add("Range", self.constant(0, "int32"), count, self.constant(1, "int32"))

    def _column(self, x: str) -> str:
        return self.add("Unsqueeze", x, self.constant([1]))

    def _row(self, x: str) -> str:
        return self.add("Unsqueeze", x, self.constant([0]))

    def _count(self, condition: str, axis: int) -> str:
        """How often a condition holds along an axis, int32."""
        return self.add("ReduceSum", self.cast(condition, "int32"), self.constant([axis]), keepdims=0)

    def _owner(self, index: str, ends: str) -> str:
        """The sequence of each entry, B for what lies past the last: the number of ends that are not above it."""
        return self._count(self.add("LessOrEqual", self._row(ends), self._column(index)), 1)

    def _visible(self, tokens: str, token_owner: str, row_owner: str, slots: str) -> str:
        """bool ``[t, C]``."""
        of_rows = self.add("Equal", self._column(token_owner), self._row(row_owner))
        same = self.add("Equal", self._column(token_owner), self._row(token_owner))
        earlier = self.add("LessOrEqual", self._row(tokens), self._column(tokens))
        homeless = self._row(self.add("Less", slots, self.constant(0, "int32")))
        of_tokens = self.add("And", self.add("And", same, earlier), homeless)
        return self.add("Concat", of_rows, of_tokens, axis=1)

    def _columns(self, rows: str, row_owner: str, slots: str, ends: str) -> tuple[str, str]:
        """Keys and values of all columns, ``[C, H_kv, d]`` float32: rows as they are after the new ones are written."""
        named = self.add("Equal", self._column(rows), self._row(slots))
        written = self.add("Greater", self._count(named, 1), self.constant(0, "int32"))
        sequences = self.cast(self.add("Squeeze", self.add("Shape", ends), self.constant([0])), "int32")
        owned = self.add("Less", row_owner, sequences)
        both = []
        for pool, new in (("pool_keys", "key"), ("pool_values", "value")):
            wide = self.cast(new, "float32")
            flat = self.add("Reshape", wide, self.constant([-1, self._kv_heads * self._dim]))
            fresh = self.add("MatMul", self.cast(named, "float32"), flat)
            old = self.cast(self.add("Gather", pool, rows, axis=0), "float32")
            old = self.add("Reshape", old, self.constant([-1, self._kv_heads * self._dim]))
            listed = self.add("Where", self._column(written), fresh, old)
            # Room past the last row may hold anything: a weight of zero does not silence what is not a number.
            listed = self.add("Where", self._column(owned), listed, self.constant(0.0, "float32"))
            columns = self.add("Concat", listed, flat, axis=0)
            both.append(self.add("Reshape", columns, self.constant([-1, self._kv_heads, self._dim])))
        return both[0], both[1]

    def _weights(self, keys: str, visible: str) -> str:
        """Softmax over what is visible, ``[H_kv, G, t, C]``; zeros where nothing is."""
        shape = self.constant([-1, self._kv_heads, self._heads // self._kv_heads, self._dim])
        query = self.add("Transpose", self.add("Reshape", self.cast("query", "float32"), shape), perm=[1, 2, 0, 3])
        query = self.add("Mul", query, self.constant(self._dim**-0.5, "float32"))
        turned = self.add("Unsqueeze", self.add("Transpose", keys, perm=[1, 2, 0]), self.constant([1]))
        logits = self.add("Where", visible, self.add("MatMul", query, turned), self.constant(_LOWEST, "float32"))
        return self.add("Mul", self.add("Softmax", logits, axis=-1), self.cast(visible, "float32"))

    def _attend(self, weights: str, values: str) -> None:
        turned = self.add("Unsqueeze", self.add("Transpose", values, perm=[1, 0, 2]), self.constant([1]))
        out = self.add("Transpose", self.add("MatMul", weights, turned), perm=[2, 0, 1, 3])
        out = self.add("Reshape", out, self.constant([-1, self._heads, self._dim]))
        self.add("CastLike", out, "query", name="attended")

    def _score(self, weights: str, tokens: str, ends: str, rows: str) -> None:
        """The last tokens' weights and the summed ones, as one product of a selection and the mean over heads."""
        mean = self.add("ReduceMean", weights, self.constant([0, 1]), keepdims=0)
        last = self.add("Sub", ends, self.constant(1, "int32"))
        chosen = [
            self._row(self._count(self.add("Equal", self._column(tokens), self._row(queries)), 1))
            for queries in (last, "score_queries")
        ]
        selection = self.cast(self.add("Concat", *chosen, axis=0), "float32")
        scores = self.add("MatMul", selection, mean)
        count, axis, end = self.add("Shape", rows), self.constant([1]), self.constant([2**31 - 1])
        of_rows = self.add("Slice", scores, self.constant([0]), count, axis)
        self.add("Gather", of_rows, self.constant(0), axis=0, name="row_scores")
        self.add("Slice", scores, count, end, axis, name="token_scores")
