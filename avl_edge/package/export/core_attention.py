"""``avl::CoreAttention``: the node, and what it computes, as a function of ONNX's own operators.

The package's docstring says what the inputs mean. The body is for checking, not for speed: it forms all weights at
once, in float32, and masks what a token must not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...kv.layout import Format
from .graph import OPSET, Nodes
from .packed_rows import PackedRows

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
    "row_offsets",  # [L, P * B + 1]
    "slots",  # [L, P * t]
    "token_offsets",  # [B + 1]
    "score_queries",  # [W]
)
WORDS = ("pool_key_words", "pool_value_words")  # [U, 4]; further inputs where rows may be packed
OUTPUTS = (
    "attended",  # [t, H, d], zeros for a token that sees nothing
    "row_scores",  # [2, N]
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


def inputs(formats: Sequence[str]) -> tuple[str, ...]:
    """The node's inputs in a graph whose rows may have these formats."""
    return INPUTS + WORDS if len(formats) > 1 else INPUTS


def reference_function(heads: int, kv_heads: int, head_dim: int, formats: Sequence[str]) -> FunctionProto:
    """The body for a decoder of this shape and rows of these ``formats``; the layer is an attribute of the node."""
    body = Body(heads, kv_heads, head_dim, formats)
    body.build()
    function: FunctionProto = body.onnx.helper.make_function(
        DOMAIN,
        OPERATOR,
        list(inputs(formats)),
        list(OUTPUTS),
        body.nodes,
        [body.onnx.helper.make_opsetid("", OPSET)],
        attributes=["layer"],
    )
    return function


class Body(Nodes):
    """One call of the function. t new tokens, N listed rows, columns C: the rows, then the tokens."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, formats: Sequence[str]) -> None:
        super().__init__()
        self.scope = "body/"  # a parser that inlines the function must not mix its names with the graph's
        self._heads, self._kv_heads, self._dim = heads, kv_heads, head_dim
        self._packed = [
            {kind: PackedRows(self, form, kind, kv_heads, head_dim) for kind in ("key", "value")}
            for form in map(Format, formats[1:])
        ]

    def build(self) -> None:
        rows, row_offsets, slots = (self._of_layer(name) for name in ("rows", "row_offsets", "slots"))
        ends = self._ends("token_offsets")
        tokens = self._range(self._length("key"))
        token_owner = self._owner(tokens, ends)
        row_owner, row_part = self._lists(rows, row_offsets, ends)
        visible = self._visible(tokens, token_owner, row_owner, slots)
        keys, values = self._columns(rows, row_part, slots)
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
        """Where each one ends of what ``offsets`` cut up."""
        whole = self.constant([2**31 - 1])
        return self.add("Slice", offsets, self.constant([1]), whole, self.constant([0]))

    def _length(self, x: str) -> str:
        """Of the first axis, an int32."""
        return self.cast(self.add("Gather", self.add("Shape", x), self.constant(0), axis=0), "int32")

    def _range(self, count: str) -> str:
        """0, 1, ... below ``count``, int32."""
        return self.add("Range", self.constant(0, "int32"), count, self.constant(1, "int32"))

    def _column(self, x: str) -> str:
        return self.add("Unsqueeze", x, self.constant([1]))

    def _row(self, x: str) -> str:
        return self.add("Unsqueeze", x, self.constant([0]))

    def _count(self, condition: str, axis: int) -> str:
        """How often a condition holds along an axis, int32."""
        return self.add("ReduceSum", self.cast(condition, "int32"), self.constant([axis]), keepdims=0)

    def _owner(self, index: str, ends: str) -> str:
        """What each entry belongs to, the number of all for what lies past the last: how many ends are not above it."""
        return self._count(self.add("LessOrEqual", self._row(ends), self._column(index)), 1)

    def _lists(self, rows: str, row_offsets: str, ends: str) -> tuple[str, str]:
        """The sequence of each listed row, and its part; B and -1 for room."""
        lists, batch = self._ends(row_offsets), self._length(ends)
        number = self._owner(self._range(self._length(rows)), lists)
        owned = self.add("Less", number, self._length(lists))
        owner = self.add("Where", owned, self.add("Mod", number, batch), batch)
        return owner, self.add("Where", owned, self.add("Div", number, batch), self.constant(-1, "int32"))

    def _visible(self, tokens: str, token_owner: str, row_owner: str, slots: str) -> str:
        """bool ``[t, C]``."""
        of_rows = self.add("Equal", self._column(token_owner), self._row(row_owner))
        same = self.add("Equal", self._column(token_owner), self._row(token_owner))
        earlier = self.add("LessOrEqual", self._row(tokens), self._column(tokens))
        by_part = self.add("Concat", self.constant([-1]), self.add("Shape", tokens), axis=0)
        slot = self.add("ReduceMax", self.add("Reshape", slots, by_part), self.constant([0]), keepdims=0)
        homeless = self._row(self.add("Less", slot, self.constant(0, "int32")))
        of_tokens = self.add("And", self.add("And", same, earlier), homeless)
        return self.add("Concat", of_rows, of_tokens, axis=1)

    def _columns(self, rows: str, row_part: str, slots: str) -> tuple[str, str]:
        """Keys and values of all columns, ``[C, H_kv, d]`` float32: rows as they are after the new ones are written."""
        slot_part = self.add("Div", self._range(self._length(slots)), self._length("key"))
        named = self.add("Equal", self._column(rows), self._row(slots))
        named = self.add("And", named, self.add("Equal", self._column(row_part), self._row(slot_part)))
        written = self.add("Greater", self._count(named, 1), self.constant(0, "int32"))
        both = []
        every = self.add("Concat", *WORDS, axis=0) if self._packed else ""  # values lie right behind keys
        for kind in ("key", "value"):
            new = self.add("Reshape", self.cast(kind, "float32"), self.constant([-1, self._kv_heads * self._dim]))
            fresh = self.add("MatMul", self.cast(named, "float32"), self._in_slots(kind, new, slots))
            old = self._stored(kind, every, rows, row_part)
            columns = self.add("Concat", self.add("Where", self._column(written), fresh, old), new, axis=0)
            both.append(self.add("Reshape", columns, self.constant([-1, self._kv_heads, self._dim])))
        return both[0], both[1]

    def _in_slots(self, kind: str, new: str, slots: str) -> str:
        """The new rows as each part would hold them, part by part."""
        every = self.add("Concat", new, *(packed[kind].packed(new) for packed in self._packed), axis=0)
        return self.add("Slice", every, self.constant([0]), self.add("Shape", slots), self.constant([0]))

    def _stored(self, kind: str, every: str, rows: str, row_part: str) -> str:
        """Listed rows as the pool holds them, ``[N, H_kv * d]`` float32; zeros for room, which may name anything: a
        weight of zero does not silence what is not a number. ``every``: the words of the pool."""
        zero = self.constant(0, "int32")
        stored = self.constant(0.0, "float32")
        for part in range(1 + len(self._packed)):
            own = self.add("Equal", row_part, self.constant(part, "int32"))
            ids = self.add("Where", own, rows, zero)  # that of another format may lead out of this one's memory
            if part:
                packed = self._packed[part - 1][kind]
                read = packed.read(every if packed.is_mixed else f"pool_{kind}_words", ids)
            else:
                read = self.cast(self.add("Gather", f"pool_{kind}s", ids, axis=0), "float32")
                read = self.add("Reshape", read, self.constant([-1, self._kv_heads * self._dim]))
            stored = self.add("Where", self._column(own), read, stored)
        return stored

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
        self.add("Slice", scores, self.constant([0]), count, axis, name="row_scores")
        self.add("Slice", scores, count, end, axis, name="token_scores")
