"""Inner loops of kernels in LLVM's own vectors, where it is said which sums stay in registers. Imports numba.

Addresses are integers, strides are in bytes, and memory holds float32, that of weights bfloat16 too. What
is called size, heads, tokens, panels or bits is a constant in the caller's code. A sum adds up in its loop's
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _INT16, _INT32, _INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FUSED = ("contract",)


class _Code:
    """Instructions on vectors of `lanes` float32."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder = builder
        self.lanes = lanes
        self.type = ir.VectorType(_FLOAT, lanes)
        self.zero = ir.Constant(self.type, [0.0] * lanes)

    def at(self, address: Any, offset: Any) -> Any:
        """`address` plus bytes, a number or a value."""
        return self.builder.add(address, _INT64(offset) if isinstance(offset, int) else offset)

    def load(self, address: Any, kind: Any = None) -> Any:
        kind = kind or self.type
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=_bytes(kind))

    def store(self, value: Any, address: Any) -> None:
        at = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, at, align=_bytes(value.type))

    def widened(self, address: Any) -> Any:
        """Bfloat16 numbers as float32: their upper halves."""
        narrow = self.load(address, ir.VectorType(_INT16, self.lanes))
        wide = ir.VectorType(_INT32, self.lanes)
        bits = self.builder.shl(self.builder.zext(narrow, wide), ir.Constant(wide, [16] * self.lanes))
        return self.builder.bitcast(bits, self.type)

    def everywhere(self, number: Any) -> Any:
        """A float32 in every lane."""
        one = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), number, _INT32(0))
        return self.of([0] * self.lanes, one)

    def add_product(self, a: Any, b: Any, to: Any) -> Any:
        return self.builder.fadd(self.builder.fmul(a, b, flags=_FUSED), to, flags=_FUSED)

    def totals(self, vectors: list[Any]) -> Any:
        """Lane i: the sum of the lanes of vector i, of as many vectors as there are lanes."""
        lanes = range(self.lanes)
        while half := len(vectors) // 2:
            kept = [i + self.lanes if i & half else i for i in lanes]
            added = [i + self.lanes - half if i & half else i + half for i in lanes]
            pairs = list(zip(vectors[:half], vectors[half:], strict=True))
            vectors = [self.builder.fadd(self.of(kept, a, b), self.of(added, a, b)) for a, b in pairs]
        return vectors[0]

    def of(self, lanes: Sequence[int], a: Any, b: Any = None) -> Any:
        """A vector of these lanes of a, and counted on from there, of b."""
        chosen = ir.Constant(ir.VectorType(_INT32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(a, a if b is None else b, chosen)

    def sum(self, start: Any) -> Any:
        """A place for a running sum, which becomes a register."""
        return cgutils.alloca_once_value(self.builder, start)


def _bytes(kind: Any) -> int:
    """What memory is aligned to: one element."""
    return {_FLOAT: 4, _INT16: 2, _INT64: 8}[getattr(kind, "element", kind)]


WIDEST_VECTOR = 16 if get_host_cpu_features().get("avx512f") else 8
"""Floats: the registers hold the sums of this many such vectors."""
PANEL = 2 * WIDEST_VECTOR
"""Columns of a weight that are read as one: `multiply_tile`'s."""


def lanes(size: int) -> int:
    """Of the widest vector that divides a head of this size."""
    return min(WIDEST_VECTOR, size & -size)


@intrinsic(prefer_literal=True)
def dot_products(
    context: Any, q: Any, k: Any, offsets: Any, count: Any, out: Any, strides: Any, size: Any, heads: Any
) -> Any:
    """Dot products of each of `heads` queries with the same `count` keys of `size` floats.

    The int64s at `offsets` say where the keys lie, in bytes from `k`. `strides` are those of q's heads and of
    out's, whose products lie side by side. Keys are read several at a time, up to 16, the last ones too: so
    many offsets must be there, and room for their products.
    """
    of, most = size.literal_value, heads.literal_value

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(builder, lanes(of))
        q_at, k_at, offsets_at, n, out_at, apart = arguments[:6]
        q_next, out_next = (builder.extract_value(apart, i) for i in range(2))
        queries = [builder.add(q_at, builder.mul(q_next, _INT64(head))) for head in range(most)]
        outs = [builder.add(out_at, builder.mul(out_next, _INT64(head))) for head in range(most)]
        together = max(1, code.lanes // most)
        with cgutils.for_range_slice(builder, _INT64(0), n, _INT64(together)) as (key, _):
            first = builder.add(offsets_at, builder.mul(key, _INT64(8)))
            keys_at = [builder.add(k_at, code.load(code.at(first, 8 * i), _INT64)) for i in range(together)]
            sums = [code.zero] * (most * together)
            for offset in range(0, 4 * of, 4 * code.lanes):
                keys = [code.load(code.at(key_at, offset)) for key_at in keys_at]
                parts = [code.load(code.at(query, offset)) for query in queries]
                pairs = [(part, key) for part in parts for key in keys]
                sums = [code.add_product(a, b, s) for (a, b), s in zip(pairs, sums, strict=True)]
            for head, into in enumerate(outs):
                first_sum = head * together
                whole = first_sum // code.lanes * code.lanes
                ours = range(first_sum - whole, first_sum - whole + together)
                totals = code.of(ours, code.totals(sums[whole : whole + code.lanes]))
                code.store(totals, builder.add(into, builder.mul(key, _INT64(4))))
        return target.get_dummy_value()

    return types.void(q, k, offsets, count, out, strides, size, heads), generate


@intrinsic(prefer_literal=True)
def add_weighted(
    context: Any,
    weights: Any, v: Any, offsets: Any, count: Any, total: Any, shrink: Any, strides: Any,
    size: Any, heads: Any,
) -> Any:  # fmt: skip
    """For each of `heads`: `total * shrink` and the weighted sum of the same `count` values of `size` floats.

    The int64s at `offsets` say where the values lie, in bytes from `v`. `strides` are those of the heads'
    weights, of their totals and of their shrinks, each of which is one float.
    """
    of, most = size.literal_value, heads.literal_value

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(builder, lanes(of))
        weights_at, v_at, offsets_at, n, total_at, shrink_at, apart = arguments[:7]
        weights_next, total_next, shrink_next = (builder.extract_value(apart, i) for i in range(3))
        parts = range(0, 4 * of, 4 * code.lanes)
        totals = [builder.add(total_at, builder.mul(total_next, _INT64(head))) for head in range(most)]
        sums = []
        for head, at in enumerate(totals):
            shrinks = builder.add(shrink_at, builder.mul(shrink_next, _INT64(head)))
            factor = code.everywhere(code.load(shrinks, _FLOAT))
            sums.append([code.sum(builder.fmul(code.load(code.at(at, o)), factor)) for o in parts])
        with cgutils.for_range(builder, n) as loop:
            behind = code.load(builder.add(offsets_at, builder.mul(loop.index, _INT64(8))), _INT64)
            value_at = builder.add(v_at, behind)
            values = [code.load(code.at(value_at, o)) for o in parts]
            weight_at = builder.add(weights_at, builder.mul(loop.index, _INT64(4)))
            for head, places in enumerate(sums):
                at = builder.add(weight_at, builder.mul(weights_next, _INT64(head)))
                weight = code.everywhere(code.load(at, _FLOAT))
                for value, place in zip(values, places, strict=True):
                    builder.store(code.add_product(weight, value, builder.load(place)), place)
        for at, places in zip(totals, sums, strict=True):
            for o, place in zip(parts, places, strict=True):
                code.store(builder.load(place), code.at(at, o))
        return target.get_dummy_value()

    return types.void(weights, v, offsets, count, total, shrink, strides, size, heads), generate


@intrinsic(prefer_literal=True)
def multiply_tile(
    context: Any,
    x: Any,
    weight: Any,
    out: Any,
    inputs: Any,
    strides: Any,
    tokens: Any,
    panels: Any,
    bits: Any,
) -> Any:
    """out `[tokens, panels * PANEL]` = x `[tokens, inputs]` times weight `[panels, inputs, PANEL]`.

    `strides` are those of x's tokens, of the weight's panels and inputs, and of out's tokens. The weight is
    of bfloat16 if `bits` is 16, else of float32.
    """
    rows, columns, narrow = tokens.literal_value, panels.literal_value, bits.literal_value == 16

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Code(builder, WIDEST_VECTOR)
        x_at, weight_at, out_at, n, apart = arguments[:5]
        x_next, panel_next, input_next, out_next = (builder.extract_value(apart, i) for i in range(4))
        tokens_at = [builder.add(x_at, builder.mul(x_next, _INT64(row))) for row in range(rows)]
        panels_at = [builder.add(weight_at, builder.mul(panel_next, _INT64(i))) for i in range(columns)]
        read, size = (code.widened, 2) if narrow else (code.load, 4)
        parts = range(0, PANEL, code.lanes)
        sums = [[code.sum(code.zero) for _ in panels_at for _ in parts] for _ in tokens_at]
        with cgutils.for_range(builder, n) as loop:
            row_next = builder.mul(loop.index, input_next)
            rows_at = [builder.add(panel, row_next) for panel in panels_at]
            weights = [read(code.at(row, size * part)) for row in rows_at for part in parts]
            behind = builder.mul(loop.index, _INT64(4))
            for token_at, places in zip(tokens_at, sums, strict=True):
                factor = code.everywhere(code.load(builder.add(token_at, behind), _FLOAT))
                for of_weight, place in zip(weights, places, strict=True):
                    builder.store(code.add_product(factor, of_weight, builder.load(place)), place)
        for row, places in enumerate(sums):
            at = builder.add(out_at, builder.mul(out_next, _INT64(row)))
            for part, place in enumerate(places):
                code.store(builder.load(place), code.at(at, 4 * code.lanes * part))
        return target.get_dummy_value()

    return types.void(x, weight, out, inputs, strides, tokens, panels, bits), generate
