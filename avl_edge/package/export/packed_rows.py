"""Packed rows by ONNX's operators: records read as :mod:`avl_edge.kv.formats` decodes them, rows as they hold
them.

A graph cannot look at numbers as bytes. Records come to it as 32-bit words, of which half words and nibbles are what
divisions leave, and a scale is put together from the fields of its float16.
"""

from __future__ import annotations

from ...config import KvShape
from ...kv.layout import UNIT, Format, groups, padded
from .graph import Nodes

_WORD = 4
_LARGEST_SCALE = 65504.0
_LAST_BITS = (2.0**-24, *(2.0 ** (exponent - 25) for exponent in range(1, 31)), float("nan"))
"""What the last bit of a float16 is worth, by its exponent's field."""


class PackedRows:
    """The keys or the values of one packed format, of ``heads`` heads of ``dim`` elements, as nodes that are added to
    ``nodes``; ``kind``: "key" or "value"."""

    def __init__(self, nodes: Nodes, form: Format, kind: str, heads: int, dim: int) -> None:
        self._nodes, self._heads, self._dim = nodes, heads, dim
        shape, own = KvShape(1, heads, dim, 2), form.keys if kind == "key" else form.values
        self.is_mixed = form.is_mixed
        self._first = form.keys.record_bytes(shape) // UNIT if form.is_mixed and kind == "value" else 0
        self._size = own.record_bytes(shape)
        self._planes, self._bias, self._bounds = (2, 128, (-127, 127)) if own.name == "int8" else (1, 8, (-8, 7))
        self._groups = heads * (1 if own.name == "int8" else groups(dim))

    def read(self, words: str, ids: str) -> str:
        """The rows with ``ids``, int32 ``[n]``: float32 ``[n, heads * dim]``. ``words`` int32 ``[U, 4]``: the arena of
        which ids count the units; of a format that names two all keys, then all values."""
        add, constant = self._nodes.add, self._nodes.constant
        units = constant(list(range(self._first, self._first + self._size // UNIT)), "int32")
        at = add("Add", add("Unsqueeze", ids, constant([1])), units)
        record = add("Reshape", add("Gather", words, at, axis=0), constant([-1, self._size // _WORD]))
        begin, length = padded(2 * self._groups), padded(self._heads * self._dim // 2)
        scales = self._scales(self._digits(record, 0, begin, 16, self._groups))
        planes = [self._plane(record, begin + plane * length, length) for plane in range(self._planes)]
        numbers = planes[0]
        for plane in planes[1:]:
            numbers = add("Add", add("Mul", numbers, constant(16, "int32")), plane)
        numbers = self._nodes.cast(add("Sub", numbers, constant(self._bias, "int32")), "float32")
        return self._flat(add("Mul", self._grouped(numbers), scales))

    def packed(self, rows: str) -> str:
        """float32 rows ``[n, heads * dim]`` as their records hold them, likewise."""
        add, constant = self._nodes.add, self._nodes.constant
        grouped = self._grouped(rows)
        limits = [constant(limit, "float32") for limit in (-_LARGEST_SCALE, _LARGEST_SCALE)]
        scale = add("Clip", self._largest_scale(grouped), *limits)
        scale = self._nodes.cast(self._nodes.cast(scale, "float16"), "float32")
        zero = constant(0.0, "float32")
        numbers = add("Where", add("Equal", scale, zero), zero, add("Div", grouped, scale))
        bounds = [constant(float(bound), "float32") for bound in self._bounds]
        return self._flat(add("Mul", add("Clip", add("Round", numbers), *bounds), scale))

    def _largest_scale(self, grouped: str) -> str:
        """The value of largest magnitude over the number that it becomes, ``[n, groups, 1]``."""
        add, constant = self._nodes.add, self._nodes.constant
        high = add("ReduceMax", grouped, constant([2]), keepdims=1)
        low = add("ReduceMin", grouped, constant([2]), keepdims=1)
        opposite = add("Neg", low)
        if self._planes == 2:
            return add("Div", add("Max", high, opposite), constant(float(self._bounds[1]), "float32"))
        largest = add("Where", add("GreaterOrEqual", high, opposite), high, low)
        return add("Div", largest, constant(float(self._bounds[0]), "float32"))

    def _digits(self, record: str, begin: int, length: int, bits: int, count: int) -> str:
        """The first ``count`` numbers of ``bits`` bits in ``length`` bytes of each record: int32 ``[n, count]``."""
        add, constant = self._nodes.add, self._nodes.constant
        bounds = [constant([at // _WORD]) for at in (begin, begin + length)]
        words = add("Unsqueeze", add("Slice", record, *bounds, constant([1])), constant([2]))
        # Remainders are never negative, also of a negative word: what is left is divided without a rest.
        places = constant([1 << place for place in range(0, 32, bits)], "int32")
        above = add("Div", add("Sub", words, add("Mod", words, places)), places)
        digits = add("Mod", above, constant(1 << bits, "int32"))
        flat = add("Reshape", digits, constant([-1, length * 8 // bits]))
        return add("Slice", flat, constant([0]), constant([count]), constant([1]))

    def _scales(self, halves: str) -> str:
        """The bits of float16 numbers as float32 ``[n, groups, 1]``."""
        add, constant = self._nodes.add, self._nodes.constant
        fraction = constant(1 << 10, "int32")
        exponent = add("Mod", add("Div", halves, fraction), constant(32, "int32"))
        leading = add("Mul", add("Min", exponent, constant(1, "int32")), fraction)
        bits = self._nodes.cast(add("Add", leading, add("Mod", halves, fraction)), "float32")
        worth = add("Gather", constant(_LAST_BITS, "float32"), exponent, axis=0)
        is_negative = self._nodes.cast(add("Div", halves, constant(1 << 15, "int32")), "float32")
        sign = add("Sub", constant(1.0, "float32"), add("Mul", constant(2.0, "float32"), is_negative))
        worth = add("Mul", worth, sign)
        return add("Unsqueeze", add("Mul", bits, worth), constant([2]))

    def _plane(self, record: str, begin: int, length: int) -> str:
        """A nibble for each dimension, int32 ``[n, heads * dim]``: a byte holds one of a head's first half, and one of
        its second."""
        add, constant = self._nodes.add, self._nodes.constant
        nibbles = self._digits(record, begin, length, 4, self._heads * self._dim)
        pairs = add("Reshape", nibbles, constant([-1, self._heads, self._dim // 2, 2]))
        return self._flat(add("Transpose", pairs, perm=[0, 1, 3, 2]))

    def _grouped(self, rows: str) -> str:
        shape = self._nodes.constant([-1, self._groups, self._heads * self._dim // self._groups])
        return self._nodes.add("Reshape", rows, shape)

    def _flat(self, rows: str) -> str:
        return self._nodes.add("Reshape", rows, self._nodes.constant([-1, self._heads * self._dim]))
