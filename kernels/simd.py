"""Sixteen floats at a time, where loops over single ones would be a branch each.

LLVM turns these into whatever vector instructions the processor has. A *mask* is a 16-bit word, one
bit per lane, the first lane lowest.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

_FLOAT, _WORD = ir.FloatType(), ir.IntType(LANES)


def _item(context: Any, builder: Any, kind: Any, value: Any, index: Any) -> Any:
    array = context.make_array(kind)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, kind, array, [index], wraparound=False)


def _load(builder: Any, item: Any, lanes: int) -> Any:
    vector = ir.VectorType(_FLOAT, lanes).as_pointer()
    return builder.load(builder.bitcast(item, vector), align=4)


def _store(builder: Any, item: Any, value: Any) -> None:
    builder.store(value, builder.bitcast(item, value.type.as_pointer()), align=4)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, empty, zeros)


def _mask(context: Any, builder: Any, lanes: Any) -> Any:
    return builder.zext(builder.bitcast(lanes, _WORD), context.get_value_type(types.uint64))


def _comparison(predicate: str) -> Any:
    """Mask of array[index …] `predicate` bound; false where a lane is no number."""

    def typed(typing_context: Any, array: Any, index: Any, bound: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            item = _item(context, builder, signature.args[0], args[0], args[1])
            lanes = _load(builder, item, LANES)
            bounds = _splat(builder, args[2], LANES)
            return _mask(context, builder, builder.fcmp_ordered(predicate, lanes, bounds))

        return types.uint64(array, types.intp, types.float32), generate

    return typed


above = intrinsic(_comparison(">"))
below = intrinsic(_comparison("<"))


@intrinsic
def nonzero(typing_context: Any, array: Any, index: Any) -> Any:
    """Mask of array[index …] ≠ 0, which what is no number is too."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _load(builder, _item(context, builder, signature.args[0], *args), LANES)
        zeros = ir.Constant(lanes.type, None)
        return _mask(context, builder, builder.fcmp_unordered("!=", lanes, zeros))

    return types.uint64(array, types.intp), generate


@intrinsic
def score_above(
    typing_context: Any, a: Any, i: Any, r: Any, j: Any, eps: Any, sign: Any, bound: Any
) -> Any:
    """Mask of (a[i …] + eps) · r[j …] > bound; its absolute value where `sign` is 0x7FFFFFFF."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        active = _load(builder, _item(context, builder, kinds[0], args[0], args[1]), LANES)
        gradient = _load(builder, _item(context, builder, kinds[2], args[2], args[3]), LANES)
        shifted = builder.fadd(active, _splat(builder, args[4], LANES))
        score = builder.fmul(shifted, gradient)
        words = ir.VectorType(ir.IntType(32), LANES)
        kept = builder.and_(builder.bitcast(score, words), _splat(builder, args[5], LANES))
        magnitude = builder.bitcast(kept, score.type)
        bounds = _splat(builder, args[6], LANES)
        return _mask(context, builder, builder.fcmp_ordered(">", magnitude, bounds))

    numbers = (types.float32, types.uint32, types.float32)
    return types.uint64(a, types.intp, r, types.intp, *numbers), generate


@intrinsic
def keep(typing_context: Any, array: Any, index: Any, mask: Any) -> Any:
    """Clear the lanes of array[index …] that `mask` lacks."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item = _item(context, builder, signature.args[0], args[0], args[1])
        lanes = _load(builder, item, LANES)
        chosen = builder.bitcast(builder.trunc(args[2], _WORD), ir.VectorType(ir.IntType(1), LANES))
        _store(builder, item, builder.select(chosen, lanes, ir.Constant(lanes.type, None)))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), generate


@intrinsic
def lowest(typing_context: Any, mask: Any) -> Any:
    """The first lane of a mask that has any."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def lanes_in(typing_context: Any, mask: Any) -> Any:
    """How many lanes a mask has."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


def _adder(lanes: int, registers: int) -> Any:
    """out[at + j] += Σ values[i] · weights[start + channels[i]·per_filter + j], begin ≤ i < end.

    For lanes · registers indices j, whose sums stay in registers; begin < end. Every sum is taken
    in the order of i.
    """

    def typed(
        typing_context: Any, out: Any, at: Any, weights: Any, start: Any, per_filter: Any,
        channels: Any, values: Any, begin: Any, end: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def item(position: int, index: Any) -> Any:
                return _item(context, builder, signature.args[position], args[position], index)

            def shifted(index: Any, register: int) -> Any:
                return builder.add(index, ir.Constant(index.type, register * lanes))

            places = [item(0, shifted(args[1], n)) for n in range(registers)]
            before = [_load(builder, place, lanes) for place in places]
            entry, loop = builder.block, builder.append_basic_block("nonzeros")
            done = builder.append_basic_block("summed")
            builder.branch(loop)
            builder.position_at_end(loop)
            i = builder.phi(args[7].type)
            sums = [builder.phi(value.type) for value in before]
            channel = builder.sext(builder.load(item(5, i)), args[3].type)
            filter_ = builder.add(args[3], builder.mul(channel, args[4]))
            factor = _splat(builder, builder.load(item(6, i)), lanes)
            after = []
            for n, total in enumerate(sums):
                row = _load(builder, item(2, shifted(filter_, n)), lanes)
                product = builder.fmul(factor, row, flags=("contract",))
                after.append(builder.fadd(total, product, flags=("contract",)))
            following = builder.add(i, ir.Constant(i.type, 1))
            for phi, first, next_ in zip(
                (i, *sums), (args[7], *before), (following, *after), strict=True
            ):
                phi.add_incoming(first, entry)
                phi.add_incoming(next_, loop)
            builder.cbranch(builder.icmp_signed("<", following, args[8]), loop, done)
            builder.position_at_end(done)
            for place, total in zip(places, after, strict=True):
                _store(builder, place, total)
            return context.get_dummy_value()

        at_, n = types.intp, types.intp
        kinds = (out, at_, weights, n, n, channels, values, n, n)
        return types.void(*kinds), generate

    return intrinsic(typed)


add_128, add_64, add_32 = _adder(16, 8), _adder(16, 4), _adder(16, 2)
add_16, add_4, add_1 = _adder(16, 1), _adder(4, 1), _adder(1, 1)
