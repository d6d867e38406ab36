"""Sixteen floats at a time, where loops over single ones would be a branch each.

A vector is a value like any other in compiled code; LLVM turns what is done to it into whatever
instructions the processor has. A *mask* is a 16-bit word, one bit per lane, the first lane lowest.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_FLOAT, _INT, _BIT, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(1), ir.IntType(LANES)


class Vector(types.Type):
    """Sixteen numbers of one type, for Numba."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        item = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(item, LANES))


floats, ints = Vector(types.float32), Vector(types.int32)


def _item(context: Any, builder: Any, kind: Any, value: Any, index: Any) -> Any:
    array = context.make_array(kind)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, kind, array, [index], wraparound=False)


def _load(builder: Any, item: Any) -> Any:
    vector = ir.VectorType(item.type.pointee, LANES).as_pointer()
    return builder.load(builder.bitcast(item, vector), align=4)


def _store(builder: Any, item: Any, value: Any) -> None:
    builder.store(value, builder.bitcast(item, value.type.as_pointer()), align=4)


def _splat(builder: Any, value: Any) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(_INT, 0))
    zeros = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
    return builder.shuffle_vector(first, empty, zeros)


def _mask(builder: Any, lanes: Any) -> Any:
    return builder.zext(builder.bitcast(lanes, _WORD), ir.IntType(64))


def _chosen(builder: Any, mask: Any) -> Any:
    return builder.bitcast(builder.trunc(mask, _WORD), ir.VectorType(_BIT, LANES))


def _unary(kind: Any, result: Any, build: Any) -> Any:
    def typed(typing_context: Any, value: Any) -> Any:
        return result(kind), lambda context, builder, signature, args: build(builder, *args)

    return intrinsic(typed)


def _binary(first: Any, second: Any, result: Any, build: Any) -> Any:
    def typed(typing_context: Any, a: Any, b: Any) -> Any:
        return result(first, second), lambda context, builder, signature, args: build(
            builder, *args
        )

    return intrinsic(typed)


def _comparison(second: Any, predicate: str, ordered: bool = True) -> Any:
    """Mask of the lanes of a vector that compare so to another, or all to one number."""

    def build(builder: Any, vector: Any, other: Any) -> Any:
        compare = builder.fcmp_ordered if ordered else builder.fcmp_unordered
        others = other if second is floats else _splat(builder, other)
        return _mask(builder, compare(predicate, vector, others))

    return _binary(floats, second, types.uint64, build)


# False where a lane is no number.
above, below = _comparison(types.float32, ">"), _comparison(types.float32, "<")
equals = _comparison(floats, "==")
# True there; a lane `misses` a number that it does not reach, and what is none.
misses = _comparison(types.float32, "<", ordered=False)
differs = _comparison(types.float32, "!=", ordered=False)

splat = _unary(types.float32, floats, lambda builder, x: _splat(builder, x))
add = _binary(floats, floats, floats, lambda builder, a, b: builder.fadd(a, b))
divide = _binary(
    floats,
    types.float32,
    floats,
    lambda builder, vector, x: builder.fdiv(vector, _splat(builder, x)),
)
# a where it is larger, else b, also where a is no number.
larger = _binary(
    floats,
    floats,
    floats,
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b),
)


def _kept(builder: Any, vector: Any, mask: Any) -> Any:
    return builder.select(_chosen(builder, mask), vector, ir.Constant(vector.type, None))


keep = _binary(floats, types.uint64, floats, _kept)  # 0 in the lanes that the mask lacks


def _counted(builder: Any, first: Any) -> Any:
    ascending = ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES)))
    return builder.add(_splat(builder, builder.trunc(first, _INT)), ascending)


numbers_from = _unary(types.int64, ints, _counted)

# How many lanes a mask has.
lanes_in = _unary(types.uint64, types.int64, lambda builder, mask: builder.ctpop(mask))


@intrinsic
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """The sixteen numbers from array[index] on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _item(context, builder, signature.args[0], *args))

    return Vector(array.dtype)(array, types.intp), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for array[index], which may lie outside, before it is needed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _item(context, builder, signature.args[0], *args)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(ask, [pointer, *(ir.Constant(_INT, word) for word in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write them there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, _item(context, builder, signature.args[0], *args[:2]), args[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, floats), generate


@intrinsic
def append(typing_context: Any, array: Any, index: Any, vector: Any, mask: Any) -> Any:
    """Write the lanes of a mask to array[index …], one after another; behind them, anything.

    In all, sixteen numbers of the array are written.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item = _item(context, builder, signature.args[0], *args[:2])
        vector, lanes = args[2], _chosen(builder, args[3])
        item_type = "f32" if vector.type.element == _FLOAT else "i32"
        name = f"llvm.experimental.vector.compress.v{LANES}{item_type}"
        kind = ir.FunctionType(vector.type, [vector.type, lanes.type, vector.type])
        compress = cgutils.get_or_insert_function(builder.module, kind, name)
        nothing = ir.Constant(vector.type, ir.Undefined)
        _store(builder, item, builder.call(compress, [vector, lanes, nothing]))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.uint64), generate


@intrinsic
def score(typing_context: Any, a: Any, r: Any, eps: Any, sign: Any) -> Any:
    """(a + eps) · r; its absolute value where `sign` is 0x7FFFFFFF instead of all ones."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        active, gradient, eps, sign = args
        product = builder.fmul(builder.fadd(active, _splat(builder, eps)), gradient)
        words = builder.bitcast(product, ir.VectorType(_INT, LANES))
        return builder.bitcast(builder.and_(words, _splat(builder, sign)), product.type)

    return floats(floats, floats, types.float32, types.uint32), generate


def _adder(rows: int, vectors: int, *, masked: bool = False) -> Any:
    """Add the rows of weights that the nonzeros begin … end choose, begin < end:

        out[at + i·step + j] += Σ values[n] · weights[start + channels[n]·per_filter + i·w_step + j]

    for i < rows and j < 16 · vectors, or j < size ≤ 16 where `masked`. All sums stay in registers,
    and each is taken in the order of n.
    """

    def typed(
        typing_context: Any, out: Any, at: Any, step: Any, weights: Any, start: Any, w_step: Any,
        per_filter: Any, size: Any, channels: Any, values: Any, begin: Any, end: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, at, step, _, start, w_step, per_filter, size = args[:8]
            index = at.type
            lanes = _lanes_below(builder, size) if masked else None

            def item(position: int, where: Any) -> Any:
                return _item(context, builder, signature.args[position], args[position], where)

            def tile(position: int, first: Any, step: Any) -> list[Any]:
                """Where the vectors of an array lie."""
                lines = [first]
                for _ in range(rows - 1):
                    lines.append(builder.add(lines[-1], step))
                return [
                    item(position, builder.add(line, ir.Constant(index, n * LANES)))
                    for line in lines
                    for n in range(vectors)
                ]

            places = tile(0, at, step)
            before = [_load_lanes(builder, place, lanes) for place in places]
            entry, loop = builder.block, builder.append_basic_block("nonzeros")
            done = builder.append_basic_block("summed")
            builder.branch(loop)
            builder.position_at_end(loop)
            n = builder.phi(index)
            sums = [builder.phi(value.type) for value in before]
            channel = builder.sext(builder.load(item(8, n)), index)
            filter_ = builder.add(start, builder.mul(channel, per_filter))
            factor = _splat(builder, builder.load(item(9, n)))
            after = []
            for total, place in zip(sums, tile(3, filter_, w_step), strict=True):
                product = builder.fmul(
                    factor, _load_lanes(builder, place, lanes), flags=("contract",)
                )
                after.append(builder.fadd(total, product, flags=("contract",)))
            following = builder.add(n, ir.Constant(index, 1))
            for phi, first, next_ in zip(
                (n, *sums), (args[10], *before), (following, *after), strict=True
            ):
                phi.add_incoming(first, entry)
                phi.add_incoming(next_, loop)
            builder.cbranch(builder.icmp_signed("<", following, args[11]), loop, done)
            builder.position_at_end(done)
            for place, total in zip(places, after, strict=True):
                _store_lanes(builder, place, total, lanes)
            return context.get_dummy_value()

        n = types.intp
        return types.void(out, n, n, weights, n, n, n, n, channels, values, n, n), generate

    return intrinsic(typed)


def _lanes_below(builder: Any, size: Any) -> Any:
    lanes = ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES)))
    return builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(size, _INT)))


def _load_lanes(builder: Any, item: Any, lanes: Any) -> Any:
    """A vector; only some lanes of it, and 0 in the others."""
    if lanes is None:
        return _load(builder, item)
    vector = ir.VectorType(_FLOAT, LANES)
    pointer = builder.bitcast(item, vector.as_pointer())
    kind = ir.FunctionType(vector, [pointer.type, _INT, lanes.type, vector])
    load = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.load.v16f32.p0")
    return builder.call(load, [pointer, ir.Constant(_INT, 4), lanes, ir.Constant(vector, None)])


def _store_lanes(builder: Any, item: Any, value: Any, lanes: Any) -> None:
    if lanes is None:
        _store(builder, item, value)
        return
    pointer = builder.bitcast(item, value.type.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, _INT, lanes.type])
    store = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.store.v16f32.p0")
    builder.call(store, [value, pointer, ir.Constant(_INT, 4), lanes])


# With 32 registers of sixteen floats, 18 sums fit; elsewhere a vector takes at least two of 16.
WIDE = 6 if get_host_cpu_features().get("avx512f") else 2
add_3_wide, add_3, add_3_last = _adder(3, WIDE), _adder(3, 1), _adder(3, 1, masked=True)
add_wide, add_1, add_last = _adder(1, WIDE), _adder(1, 1), _adder(1, 1, masked=True)
