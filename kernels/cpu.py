"""The walk back on the CPU: a table of operations, run sample by sample by one compiled function.

Arrays in, arrays out: nothing here knows graphs or methods. A gradient lives in a *sheet*,
channels last: `pixels` rows of `channels` floats, `stride` floats apart, in one arena per sample. A
byte per pixel says whether the row holds anything; a row that does not has never been cleared, and
counts as zero. Weights are (C_out, kh, kw, C_in per group). Activations are channels last too, or
in blocks of sixteen channels, (C/16, pixels, 16), the last of which is filled up: channel c of
pixel p is

    p · A_STRIDE + ⌊c/16⌋ · 16 · A_STEP + c mod 16

floats behind the first, where A_STEP is 1, or the number of pixels.

RectGrad keeps about 2 % of a layer's units, so what passes an activation is a list of nonzeros by
pixel, and a convolution's transpose adds a row of weights per nonzero and kernel row:

    g[ih, iw + j, :] += v · w[co, i, j, :]        ih = oh·sh + i·dh − pad_top, iw likewise,

a run of kw · C_in contiguous floats where dw = 1. Which path a step takes depends on shapes and on
how many nonzeros there are, and on nothing else.

Where windows of a max-pool do not overlap, the activation before it is asked about their maxima
only, with the gradient at the pool's output: all others get 0, which passes nothing, and score 0
(the table says how many these are). What passes then goes to where the maxima lie.

All threads of a team run the same code on the same sample. They share the pixels of an activation
by ranges, and the result of a scatter by rows or by channels; so every float is summed by one
thread, in one order, whatever the team's size.

Rows that nobody has touched are never scored, so a score that is no number (∞ · 0, where an
activation has overflowed) counts as 0; to the reference it is the largest.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .team import total, wait

# Operations.
(
    ACTIVATE, COMPACT, LIST, UNPOOL, SCATTER, STORE, RATIO, MAX_POOL, AVERAGE_POOL, ADD, SCALE,
    FORGET, STOP,
) = range(13)  # fmt: skip

# Columns of the table: what an operation reads (source), adds to (target), and its geometry.
(
    OP, S_OFFSET, S_STRIDE, S_TOUCHED, S_H, S_W, S_C, T_OFFSET, T_STRIDE, T_TOUCHED, T_H, T_W, T_C,
    A_OFFSET, A_LENGTH, A_STRIDE, W_OFFSET, KH, KW, SH, SW, DH, DW, TOP, LEFT, GROUP, BORDER, MODE,
    RANK_LOW, RANK_HIGH, DENSE, COUNT_PAD, C_FIRST, C_LAST, PADDED_H, PADDED_W, STRICT, S_BASE,
    B_OFFSET, B_LENGTH, A_STEP, B_STRIDE, B_STEP, ZEROS, COLUMNS,
) = range(45)  # fmt: skip
# Columns of the float table. Activations that reach the ceiling have slope 0; NaN: there is none.
FRACTION, TAU, EPS, CEILING, GUESS, FLOATS = range(6)

# What an activation lets pass, from its output a and the gradient r that arrives.
PASS_ACTIVE, PASS_POSITIVE, PASS_BOTH, PASS_AR, PASS_ABS_AR, PASS_A_EPS_R = range(6)

# What a gradient is multiplied by at a Relu: the ratio of its output to its input with ε added to
# the latter away from 0, which is a / (a + ε), or 0 where the output a is; or the ratio of the
# differences of both from those at a baseline.
BY_EPSILON, BY_DIFFERENCE = range(2)

# Shared words of a team: the threshold or its bound, whether it is final, and the last τ.
THRESHOLD, FINAL, PREVIOUS, SHARED = 0, 8, 16, 24
WIDE = simd.WIDE * simd.LANES
# A team's lists. What passes an activation is so many runs, found[0]: run n holds the gradients
# values[begins[n] … ends[n]] of pixels[n], whose channels are `units` of the same places. Before, a
# unit is pixel and channel in one word, with its score. found[1 …] says where those that each part
# of the picture collected end, each from the place of its first pixel on; then, where its runs end.
PIXELS, BEGINS, ENDS, UNITS, VALUES, SCORES, FOUND = range(7)
_AHEAD = 2048  # floats that are asked for before a scan comes to them
_PARTS = 4  # of a picture for each member of a team
_SAMPLED_LEAST, _SAMPLED_MOST = 128, 1024
_GUESSED = 0.5  # part of what τ should be; about twice as many units exceed it


# Arrays are borrowed from the caller: counting references, at each branch that a loop takes, costs
# more than the arithmetic. What allocates is compiled without this.
_kernel = njit(nogil=True, cache=True, _nrt=False)
_inlined = njit(nogil=True, cache=True, _nrt=False, forceinline=True)


@_inlined
def _score(mode, a, r, eps):
    if mode == PASS_AR:
        return a * r
    if mode == PASS_ABS_AR:
        return abs(a * r)
    return (a + eps) * r


@_inlined
def _passes(mode, a, r, eps):
    """What passes without a threshold: also RectGrad at τ = 0, decided on signs."""
    if mode == PASS_ACTIVE:
        return a > 0
    if mode == PASS_POSITIVE:
        return r > 0
    if mode == PASS_BOTH:
        return a > 0 and r > 0
    if mode == PASS_AR:
        return (a > 0 and r > 0) or (a < 0 and r < 0)
    if mode == PASS_ABS_AR:
        return a != 0
    return (a + eps > 0 and r > 0) or (a + eps < 0 and r < 0)


@_inlined
def _behind(c, step):
    """How far a channel lies behind the first of its pixel; of whole blocks, c · step."""
    return (c & ~(simd.LANES - 1)) * step + (c & (simd.LANES - 1))


@_inlined
def _activation(op, active, p, c):
    return active[op[A_OFFSET] + p * op[A_STRIDE] + _behind(c, op[A_STEP])]


@_inlined
def _share(n, member, members):
    return n * member // members, n * (member + 1) // members


@_inlined
def _parts(members):
    """Into how many parts a team cuts a picture, of which each member takes every so many-th.

    What passes lies together in it, so that halves would hold very different numbers of units.
    """
    return 1 if members == 1 else _PARTS * members


def found_by(members):
    """How many words a team needs to say what it found."""
    return 1 + _parts.py_func(members)


@_inlined
def _scores(mode, a, r, eps):
    """The scores of a vector."""
    shift = eps if mode == PASS_A_EPS_R else np.float32(0)
    sign = np.uint32(0x7FFFFFFF if mode == PASS_ABS_AR else 0xFFFFFFFF)
    return simd.score(a, r, shift, sign)


@_inlined
def _lets_pass(condition, a, r):
    """Whether a nonzero gradient passes by signs, or its score exceeds a negative floor."""
    mode, eps, ceiling, strict, floor = condition
    if r == 0 or a >= ceiling:
        return False
    if floor < 0:
        return _score(mode, a, r, eps) > floor and (a > 0 or not strict)
    return _passes(mode, a, r, eps)


@_inlined
def _passing(condition, a, r):
    """The same of a vector, as a mask."""
    mode, eps, ceiling, strict, floor = condition
    zero = np.float32(0)
    mask = simd.differs(r, zero) & simd.misses(a, ceiling)
    if floor < 0:
        if strict:
            mask &= simd.above(a, zero)
        return mask & simd.above(_scores(mode, a, r, eps), floor)
    if mode == PASS_ACTIVE:
        return mask & simd.above(a, zero)
    if mode == PASS_POSITIVE:
        return mask & simd.above(r, zero)
    if mode == PASS_BOTH:
        return mask & simd.above(a, zero) & simd.above(r, zero)
    if mode == PASS_ABS_AR:
        return mask & simd.differs(a, zero)
    level = -eps if mode == PASS_A_EPS_R else zero
    up = simd.above(a, level) & simd.above(r, zero)
    down = simd.below(a, level) & simd.below(r, zero)
    return mask & (up | down)


@_inlined
def _shift(op):
    """By how many bits a unit's pixel is above its channel."""
    shift = 0
    while 1 << shift < op[S_C]:
        shift += 1
    return shift


@_inlined
def _emit_passing(arena, row, active, where, step, width, condition, number, end, units):
    """Append the units whose gradients pass; returns the new end.

    What `simd.append` writes behind them is nothing yet: each vector has sixteen places of its own.
    """
    blocks = width - width % simd.LANES
    for c in range(0, blocks, simd.LANES):
        r = simd.load(arena, row + c)
        mask = _passing(condition, simd.load(active, where + c * step), r)
        simd.append(units, end, simd.numbers_from(number + c), mask)
        end += simd.lanes_in(mask)
    for c in range(blocks, width):
        units[end] = number + c
        end += _lets_pass(condition, active[where + _behind(c, step)], arena[row + c])
    return end


@_inlined
def _emit_nonzero(arena, row, width, number, end, units):
    """Append the units that have a gradient; returns the new end."""
    blocks = width - width % simd.LANES
    for c in range(0, blocks, simd.LANES):
        mask = simd.differs(simd.load(arena, row + c), np.float32(0))
        simd.append(units, end, simd.numbers_from(number + c), mask)
        end += simd.lanes_in(mask)
    for c in range(blocks, width):
        units[end] = number + c
        end += arena[row + c] != 0
    return end


@_inlined
def _keep_passing(arena, row, active, where, step, width, condition):
    """Clear the gradients that do not pass."""
    blocks = width - width % simd.LANES
    for c in range(0, blocks, simd.LANES):
        r = simd.load(arena, row + c)
        mask = _passing(condition, simd.load(active, where + c * step), r)
        simd.store(arena, row + c, simd.keep(r, mask))
    for c in range(blocks, width):
        if not _lets_pass(condition, active[where + _behind(c, step)], arena[row + c]):
            arena[row + c] = 0


@_inlined
def _count_passing(arena, row, active, where, step, width, condition):
    """How many nonzero gradients pass."""
    blocks, n = width - width % simd.LANES, 0
    for c in range(0, blocks, simd.LANES):
        a, r = simd.load(active, where + c * step), simd.load(arena, row + c)
        n += simd.lanes_in(_passing(condition, a, r))
    for c in range(blocks, width):
        n += _lets_pass(condition, active[where + _behind(c, step)], arena[row + c])
    return n


@_inlined
def _emit_above(
    arena, row, active, where, step, width, mode, eps, bound, number, end, units, scores
):
    """Append the units whose score is above `bound`, with it; returns the new end."""
    blocks = width - width % simd.LANES
    for c in range(0, blocks, simd.LANES):
        r = simd.load(arena, row + c)
        score = _scores(mode, simd.load(active, where + c * step), r, eps)
        mask = simd.above(score, bound)
        simd.append(units, end, simd.numbers_from(number + c), mask)
        simd.append(scores, end, score, mask)
        end += simd.lanes_in(mask)
    for c in range(blocks, width):
        score = _score(mode, active[where + _behind(c, step)], arena[row + c], eps)
        units[end] = number + c
        scores[end] = score
        end += score > bound
    return end


@_kernel
def nth_largest(values, k):
    """The k-th largest (0-based) of `values`, which are overwritten. All are numbers.

    Quickselect, sixteen numbers at a time: what cannot be it is left out, ties with the pivot too.
    """
    n = values.size
    while True:
        a, b, c = values[n // 4], values[n // 2], values[n - 1 - n // 4]
        pivot = max(min(a, b), min(max(a, b), c))
        above, equal = _compared(values, n, pivot)
        if k < above:
            n = _keep_above(values, n, pivot)
        elif k < above + equal:
            return pivot
        else:
            n, k = _keep_below(values, n, pivot), k - above - equal


@_inlined
def _compared(values, n, pivot):
    """How many of the first `n` are larger, and how many equal."""
    blocks, above, equal = n - n % simd.LANES, 0, 0
    pivots = simd.splat(pivot)
    for i in range(0, blocks, simd.LANES):
        vector = simd.load(values, i)
        above += simd.lanes_in(simd.above(vector, pivot))
        equal += simd.lanes_in(simd.equals(vector, pivots))
    for i in range(blocks, n):
        above += values[i] > pivot
        equal += values[i] == pivot
    return above, equal


@_inlined
def _keep_above(values, n, pivot):
    """Move what is larger to the front; returns how many."""
    blocks, end = n - n % simd.LANES, 0
    for i in range(0, blocks, simd.LANES):
        vector = simd.load(values, i)
        mask = simd.above(vector, pivot)
        simd.append(values, end, vector, mask)
        end += simd.lanes_in(mask)
    for i in range(blocks, n):
        v = values[i]
        values[end] = v
        end += v > pivot
    return end


@_inlined
def _keep_below(values, n, pivot):
    """Move what is smaller to the front; returns how many."""
    blocks, end = n - n % simd.LANES, 0
    for i in range(0, blocks, simd.LANES):
        vector = simd.load(values, i)
        mask = simd.below(vector, pivot)
        simd.append(values, end, vector, mask)
        end += simd.lanes_in(mask)
    for i in range(blocks, n):
        v = values[i]
        values[end] = v
        end += v < pivot
    return end


@_kernel
def _sampled_bound(op, arena, touched, active, condition, work, found):
    """A score that, by a sample, somewhat more than RANK_LOW units exceed; at least 0.

    Pixels that nothing has touched score 0, so that only the others, listed in `found`, are asked.
    """
    mode, eps = condition[:2]
    channels, n = op[S_C], 0
    for p in range(op[S_H] * op[S_W]):
        found[n] = p
        n += touched[op[S_TOUCHED] + p] != 0
    units = n * channels
    taken = min(max(units // 64, _SAMPLED_LEAST), _SAMPLED_MOST, units)
    for i in range(taken):
        unit = (i * units + units // 2) // taken
        # Spread over the channels too, whatever divides them.
        p, c = found[unit // channels], (unit + i * 7919) % channels
        r = arena[op[S_OFFSET] + p * op[S_STRIDE] + c]
        s = _score(mode, _activation(op, active, p, c), r, eps)
        work[i] = s if s == s else np.float32(0)  # it is not where an activation has overflowed
    expected = (op[RANK_LOW] + 1) / max(units, 1) * taken
    wanted = int(expected + 4 * np.sqrt(expected) + 4)
    if wanted >= taken:
        return np.float32(0)
    return max(nth_largest(work[:taken], wanted), np.float32(0))


@_kernel
def _all_scores(op, arena, touched, active, condition, work):
    """The scores of all units, 0 where one is no number; returns how many there are."""
    mode, eps = condition[:2]
    width, pixels, step = op[S_C], op[S_H] * op[S_W], op[A_STEP]
    blocks = width - width % simd.LANES
    for p in range(pixels):
        row, where = op[S_OFFSET] + p * op[S_STRIDE], op[A_OFFSET] + p * op[A_STRIDE]
        begin = p * width
        if not touched[op[S_TOUCHED] + p]:
            work[begin : begin + width] = 0
            continue
        for c in range(0, blocks, simd.LANES):
            a, r = simd.load(active, where + c * step), simd.load(arena, row + c)
            scores = _scores(mode, a, r, eps)
            simd.store(work, begin + c, simd.keep(scores, simd.equals(scores, scores)))
        for c in range(blocks, width):
            s = _score(mode, active[where + _behind(c, step)], arena[row + c], eps)
            work[begin + c] = s if s == s else np.float32(0)
    units = pixels * width + op[ZEROS]
    work[pixels * width : units] = 0
    return units


@_kernel
def _scan(op, member, members, arena, touched, active, condition, bound, lists):
    """Collect this member's units above a bound; where it is negative, those that pass."""
    units, scores, found = lists[UNITS], lists[SCORES], lists[FOUND]
    mode, eps = condition[:2]
    width, parts, shift, step = op[S_C], _parts(members), _shift(op), op[A_STEP]
    ahead = -(-_AHEAD // width) * op[A_STRIDE]
    for part in range(member, parts, members):
        first, last = _share(op[S_H] * op[S_W], part, parts)
        end = first * width
        for p in range(first, last):
            if not touched[op[S_TOUCHED] + p]:
                continue
            row, where = op[S_OFFSET] + p * op[S_STRIDE], op[A_OFFSET] + p * op[A_STRIDE]
            for c in range(0, width, simd.LANES):
                simd.prefetch(active, where + c * step + ahead)
            if bound < 0:
                end = _emit_passing(
                    arena, row, active, where, step, width, condition, p << shift, end, units
                )
            else:
                end = _emit_above(
                    arena, row, active, where, step, width, mode, eps, bound, p << shift, end,
                    units, scores,
                )  # fmt: skip
        found[1 + part] = end


@_kernel
def _filter(op, member, members, active, floor, ceiling, lists):
    """Keep the collected units whose score is above τ and whose activation is below the ceiling.

    A float32 is above τ if it is above `floor`, the largest one that is not.
    """
    units, scores, found = lists[UNITS], lists[SCORES], lists[FOUND]
    parts = _parts(members)
    for part in range(member, parts, members):
        begin = _first_pixel(op, part, parts) * op[S_C]
        end, at = found[1 + part], begin
        blocks = end - (end - begin) % simd.LANES
        for i in range(begin, blocks, simd.LANES):
            mask = simd.above(simd.load(scores, i), floor)
            simd.append(units, at, simd.load(units, i), mask)
            at += simd.lanes_in(mask)
        for i in range(blocks, end):
            units[at] = units[i]
            at += scores[i] > floor
        if ceiling == ceiling:
            at = _drop_at_ceiling(op, begin, at, active, ceiling, units)
        found[1 + part] = at


@_kernel
def _drop_at_ceiling(op, begin, end, active, ceiling, units):
    """Leave out the units whose activation reaches it; returns the new end."""
    shift, at = _shift(op), begin
    for i in range(begin, end):
        p, c = _place(units[i], shift)
        units[at] = units[i]
        at += _activation(op, active, p, c) < ceiling
    return at


@_inlined
def _place(unit, shift):
    """The pixel and the channel of a unit."""
    unit = np.int64(unit) & 0xFFFFFFFF
    return unit >> shift, unit & ((1 << shift) - 1)


@_kernel
def _list(op, member, members, arena, lists, barrier):
    """Make of the collected units, which are in order, the runs that the gradient consists of."""
    parts = _parts(members)
    for part in range(member, parts, members):
        _list_part(op, part, parts, arena, lists)
    wait(barrier, members)
    if member == 0:
        _join(op, parts, lists)
    wait(barrier, members)


@_inlined
def _first_pixel(op, part, parts):
    """The first pixel of a part of what is listed: of the source, or of what a pool sees.

    The part's runs are numbered from it on, its units from C times it on.
    """
    if op[OP] == UNPOOL:
        return _share(op[S_H], part, parts)[0] * op[SH] * op[T_W]
    return _share(op[S_H] * op[S_W], part, parts)[0]


@_kernel
def _list_part(op, part, parts, arena, lists):
    """The runs of one part; `found` says where they end."""
    pixels, begins, ends, units, values, _, found = lists
    first = _first_pixel(op, part, parts)
    shift, run, length, before = _shift(op), first - 1, 0, -1
    for i in range(first * op[S_C], found[1 + part]):
        p, c = _place(units[i], shift)
        units[i] = c
        if op[OP] == LIST:
            values[i] = arena[op[S_OFFSET] + p * op[S_STRIDE] + c]
        run += p != before
        length = length + 1 if p == before else 0
        pixels[run], begins[run], ends[run] = p, i - length, i + 1
        before = p
    found[1 + part] = run + 1


@_kernel
def _join(op, parts, lists):
    """Move the runs of all parts together."""
    (pixels, begins, ends), found = lists[:UNITS], lists[FOUND]
    n = found[1]
    for part in range(1, parts):
        first = _first_pixel(op, part, parts)
        for run in range(first, found[1 + part]):
            pixels[n], begins[n], ends[n] = pixels[run], begins[run], ends[run]
            n += 1
    found[0] = n


@_kernel
def _collected(op, lists, members, work):
    """Copy the scores of all candidates together; returns how many there are."""
    scores, found = lists[SCORES], lists[FOUND]
    parts, n = _parts(members), 0
    for part in range(parts):
        # What is found in one part lies without a gap.
        begin = _first_pixel(op, part, parts) * op[S_C]
        to, collected = work[n:], scores[begin : found[1 + part]]
        for i in range(collected.size):
            to[i] = collected[i]
        n += collected.size
    return n


@_kernel
def _reach_zero(op, wanted, arena, touched, active, condition):
    """Whether more than `wanted` scores are not negative, as in rows that nothing has touched."""
    mode, eps = condition[:2]
    width, marks, pixels = op[S_C], op[S_TOUCHED], op[S_H] * op[S_W]
    found, left = pixels * width + op[ZEROS], 0
    for p in range(pixels):
        if touched[marks + p]:
            found -= width
            left += width
    for p in range(pixels):
        if found > wanted or found + left <= wanted:
            break
        if touched[marks + p]:
            left -= width
            for c in range(width):
                r = arena[op[S_OFFSET] + p * op[S_STRIDE] + c]
                found += not _score(mode, _activation(op, active, p, c), r, eps) < 0
    return found > wanted


@_kernel
def _between(lower, upper, fraction):
    """The interpolated percentile, in double precision from the rounded scores."""
    bottom, top = np.float64(lower), np.float64(upper)
    return bottom if fraction == 0 else bottom + (top - bottom) * fraction


@_kernel
def _tau_of_all(op, floats, found, arena, touched, active, condition, work):
    """τ where only `found` scores are positive, too few for it to be."""
    low, high = op[RANK_LOW], op[RANK_HIGH]
    if found <= high and _reach_zero(op, low, arena, touched, active, condition):
        return 0.0
    n = _all_scores(op, arena, touched, active, condition, work)
    upper = lower = nth_largest(work[:n], high)
    if low != high:
        _all_scores(op, arena, touched, active, condition, work)
        lower = nth_largest(work[:n], low)
    return _between(lower, upper, floats[FRACTION])


@_kernel
def _find_tau(
    op, arena, touched, active, lists, work, shared, condition, floats, member, members, barrier
):  # fmt: skip
    """τ of this layer, after which the collected candidates include every unit above it.

    Returns τ; where it is negative or zero the candidates are not complete, because others pass
    too. They exceed a guess, or what a sample says: both only decide how many there are.
    """
    guess = floats[GUESS]
    bound = np.float32(max(_GUESSED * guess, 0) * shared[PREVIOUS])
    if guess == 0:
        if member == 0:
            shared[THRESHOLD] = _sampled_bound(
                op, arena, touched, active, condition, work, lists[PIXELS]
            )
        wait(barrier, members)
        bound = np.float32(shared[THRESHOLD])
    while True:
        _scan(op, member, members, arena, touched, active, condition, bound, lists)
        wait(barrier, members)
        if member == 0:
            shared[FINAL], shared[THRESHOLD] = _tau_or_bound(
                op, floats, bound, arena, touched, active, condition, lists, members, work
            )
        wait(barrier, members)
        done, tau = shared[FINAL] == 1, shared[THRESHOLD]
        wait(barrier, members)
        if done:
            return tau
        bound = np.float32(tau)


@_kernel
def _tau_or_bound(op, floats, bound, arena, touched, active, condition, lists, members, work):
    """Whether the candidates above a bound tell τ, and τ; otherwise a lower bound."""
    low, high = op[RANK_LOW], op[RANK_HIGH]
    found = _collected(op, lists, members, work)
    if found > low:
        upper = lower = nth_largest(work[:found], high)
        if low != high:
            _collected(op, lists, members, work)
            lower = nth_largest(work[:found], low)
        return True, _between(lower, upper, floats[FRACTION])
    if bound > 0:
        less = _sampled_bound(op, arena, touched, active, condition, work, lists[PIXELS])
        return False, np.float64(less if less < bound else np.float32(0))
    return True, _tau_of_all(op, floats, found, arena, touched, active, condition, work)


@_kernel
def _on_border(op, p):
    """Whether the padding trick is on and the pixel is the first or last of a spatial axis."""
    if not op[BORDER]:
        return False
    y, x = p // op[S_W], p % op[S_W]
    return not (0 < y < op[S_H] - 1 and 0 < x < op[S_W] - 1)


@_kernel
def _drop_border(op, lists):
    """Leave out the runs on the border."""
    (pixels, begins, ends), found = lists[:UNITS], lists[FOUND]
    n = 0
    for run in range(found[0]):
        pixels[n], begins[n], ends[n] = pixels[run], begins[run], ends[run]
        n += not _on_border(op, pixels[run])
    found[0] = n


@_kernel
def _count_inside(op, lists, first, last):
    """How many nonzeros of the runs `first` … `last` are not on the border."""
    pixels, begins, ends = lists[:UNITS]
    n = 0
    for run in range(first, last):
        if not _on_border(op, pixels[run]):
            n += ends[run] - begins[run]
    return n


@_kernel
def _activate(op, floats, arena, touched, active, lists, work, shared, member, members, barrier):
    """Collect what passes the activation; or, too much for a list, leave it in the sheet.

    Returns whether it is left there. ZEROS more units than the source has score 0.
    """
    tau, condition = floats[TAU], _condition(op, floats, np.nan)
    thresholded = op[MODE] >= PASS_AR
    if thresholded and np.isnan(tau):
        previous = shared[PREVIOUS]
        tau = _find_tau(
            op, arena, touched, active, lists, work, shared, condition, floats, member, members,
            barrier,
        )  # fmt: skip
        _remember(tau, floats, shared, previous)
        if np.isnan(tau):  # between infinite scores
            tau = np.inf
    elif thresholded and tau > 0:
        _scan(op, member, members, arena, touched, active, condition, np.float32(0), lists)
    if thresholded and tau != 0:
        condition = _condition(op, floats, tau)
    if thresholded and tau > 0:
        _filter(op, member, members, active, condition[4], condition[2], lists)
    elif _few_pass(op, arena, touched, active, condition, member, members, barrier):
        _scan(op, member, members, arena, touched, active, condition, np.float32(-1), lists)
    else:
        wait(barrier, members)
        return True
    return False


@_inlined
def _condition(op, floats, tau):
    """What `_passing` asks: with the largest score that does not exceed τ, NaN if there is none."""
    floor = np.float32(tau)
    if floor > tau:
        floor = np.nextafter(floor, np.float32(-np.inf))
    return op[MODE], np.float32(floats[EPS]), np.float32(floats[CEILING]), op[STRICT] != 0, floor


@_inlined
def _remember(tau, floats, shared, previous):
    """For the next sample: of images with larger gradients, every τ is larger, but not their ratio.

    All members write the same.
    """
    floats[GUESS] = -1
    if 0 < tau < np.inf:
        floats[GUESS] = tau / previous
        shared[PREVIOUS] = tau


@_kernel
def _few_pass(op, arena, touched, active, condition, member, members, barrier):
    """Whether at most DENSE units pass; if not, the others are cleared."""
    first, last = _share(op[S_H] * op[S_W], member, members)
    width, n = op[S_C], 0
    for p in range(first, last):
        if n > op[DENSE]:
            break
        if touched[op[S_TOUCHED] + p] and not _on_border(op, p):
            row, where = op[S_OFFSET] + p * op[S_STRIDE], op[A_OFFSET] + p * op[A_STRIDE]
            n += _count_passing(arena, row, active, where, op[A_STEP], width, condition)
    if total(n, barrier, member, members) <= op[DENSE]:
        return True
    for p in range(first, last):
        _fill(op, arena, touched, p)
        row, where = op[S_OFFSET] + p * op[S_STRIDE], op[A_OFFSET] + p * op[A_STRIDE]
        _keep_passing(arena, row, active, where, op[A_STEP], width, condition)
    return False


@_inlined
def _fill(op, arena, touched, p):
    """Make sure that row `p` of the source's storage holds numbers.

    The sheet may be some channels of a wider one, which shares its marks.
    """
    if not touched[op[S_TOUCHED] + p]:
        row = op[S_BASE] + p * op[S_STRIDE]
        arena[row : row + op[S_STRIDE]] = 0
        touched[op[S_TOUCHED] + p] = 1


@_inlined
def _count_nonzero(arena, row, width):
    blocks, n = width - width % simd.LANES, 0
    for c in range(0, blocks, simd.LANES):
        n += simd.lanes_in(simd.differs(simd.load(arena, row + c), np.float32(0)))
    for c in range(blocks, width):
        n += arena[row + c] != 0
    return n


@_kernel
def _compact(op, arena, touched, lists, member, members, barrier):
    """Collect a sheet's nonzeros; or, too many for a list, leave them there. Returns whether so."""
    width, n = op[S_C], 0
    first, last = _share(op[S_H] * op[S_W], member, members)
    for p in range(first, last):
        if n > op[DENSE]:
            break
        if touched[op[S_TOUCHED] + p] and not _on_border(op, p):
            n += _count_nonzero(arena, op[S_OFFSET] + p * op[S_STRIDE], width)
    if total(n, barrier, member, members) > op[DENSE]:
        for p in range(first, last):
            _fill(op, arena, touched, p)
        wait(barrier, members)
        return True
    units, found, parts, shift = lists[UNITS], lists[FOUND], _parts(members), _shift(op)
    for part in range(member, parts, members):
        first, last = _share(op[S_H] * op[S_W], part, parts)
        end = first * width
        for p in range(first, last):
            if touched[op[S_TOUCHED] + p]:
                row = op[S_OFFSET] + p * op[S_STRIDE]
                end = _emit_nonzero(arena, row, width, p << shift, end, units)
        found[1 + part] = end
    return False


@_kernel
def _unpool(op, filled, arena, touched, active, lists, member, members, barrier):
    """To the first maxima of windows that do not overlap, what the activation before lets pass.

    Either all that the source's sheet holds, if that is `filled`, or the units collected there.
    """
    parts = _parts(members)
    if filled:
        for part in range(member, parts, members):
            first, last = _share(op[T_H], part, parts)
            _max_pool(op, arena, touched, active, first, last)
            _touch_all(op, arena, touched, first * op[T_W], last * op[T_W])
        wait(barrier, members)
        return
    for part in range(member, parts, members):
        _mark_windows(op, part, parts, lists)
    wait(barrier, members)
    for part in range(member, parts, members):
        _emit_maxima(op, part, parts, arena, active, lists)
    _list(op, member, members, arena, lists, barrier)


@_kernel
def _mark_windows(op, part, parts, lists):
    """Make of the collected units masks, one for each sixteen channels of a pixel."""
    units, masks, found = lists[UNITS], lists[SCORES].view(np.int32), lists[FOUND]
    first, last = _share(op[S_H] * op[S_W], part, parts)
    shift, width = _shift(op), op[S_C]
    for p in range(first, last):
        masks[p * width : p * width + width // simd.LANES] = 0
    for i in range(first * width, found[1 + part]):
        p, c = _place(units[i], shift)
        masks[p * width + c // simd.LANES] |= 1 << c % simd.LANES


@_kernel
def _emit_maxima(op, part, parts, arena, active, lists):
    """Collect the first maxima of these windows, in order, with what they get."""
    units, values, found = lists[UNITS], lists[VALUES], lists[FOUND]
    masks = lists[SCORES].view(np.int32)
    shift, width, line = _shift(op), op[S_C], op[DH] * op[T_W]
    a_stride, a_step, b_stride, b_step = op[A_STRIDE], op[A_STEP], op[B_STRIDE], op[B_STEP]
    ahead = -(-_AHEAD // width) * a_stride
    end = _first_pixel(op, part, parts) * width
    for y in range(*_share(op[S_H], part, parts)):
        top = y * op[SH]
        for i in range(*_kernel_range(top, op[DH], op[KH], op[T_H])):
            for x in range(op[S_W]):
                p, left = y * op[S_W] + x, x * op[SW]
                row, best = op[S_OFFSET] + p * op[S_STRIDE], op[B_OFFSET] + p * b_stride
                for j in range(*_kernel_range(left, op[DW], op[KW], op[T_W])):
                    q = top * op[T_W] + left + i * line + j * op[DW]
                    end = _emit_cell(
                        arena, row, active, op[A_OFFSET] + q * a_stride, a_step, ahead, best,
                        b_step, masks, p * width, width, q << shift, end, units, values,
                    )  # fmt: skip
    found[1 + part] = end


@_inlined
def _emit_cell(
    arena, row, active, where, step, ahead, best, best_step, masks, first, width, number, end,
    units, values,
):  # fmt: skip
    """Append the units of one cell that are the first to reach the maxima; returns the new end."""
    for t in range(width // simd.LANES):
        c, own = t * simd.LANES, np.uint64(first + t)  # a signed index would be checked
        simd.prefetch(active, where + c * step + ahead)
        maxima = simd.load(active, best + c * best_step)
        wins = simd.equals(simd.load(active, where + c * step), maxima) & np.uint64(masks[own])
        masks[own] ^= np.int32(wins)
        simd.append(units, end, simd.numbers_from(number + c), wins)
        simd.append(values, end, simd.load(arena, row + c), wins)
        end += simd.lanes_in(wins)
    return end


@_inlined
def _touch(op, arena, touched, p):
    """Make sure that the target's row `p` holds numbers: whoever comes first clears it."""
    if not touched[op[T_TOUCHED] + p]:
        start = op[T_OFFSET] + p * op[T_STRIDE]
        arena[start : start + op[T_C]] = 0
        touched[op[T_TOUCHED] + p] = 1


@_inlined
def _touch_all(op, arena, touched, first, last):
    """The same of the rows `first` … `last`, between which there are no gaps."""
    q = first
    while q < last:
        begin = q
        while q < last and not touched[op[T_TOUCHED] + q]:
            touched[op[T_TOUCHED] + q] = 1
            q += 1
        arena[op[T_OFFSET] + begin * op[T_STRIDE] : op[T_OFFSET] + q * op[T_STRIDE]] = 0
        q += 1


@_inlined
def _add_window(
    out, at, step, weights, start, w_step, rows, size, per_filter, channels, values, begin, end
):  # fmt: skip
    """out[at + i·step + j] += Σ v · weights[filter, start + i·w_step + j], i < rows and j < size.

    Over the nonzeros begin … end. Three rows at a time, as many as most windows have.
    """
    i = 0
    while i + 3 <= rows:
        to, origin, j = at + i * step, start + i * w_step, 0
        while j + WIDE <= size:
            simd.add_3_wide(
                out, to + j, step, weights, origin + j, w_step, per_filter, WIDE, channels, values,
                begin, end,
            )  # fmt: skip
            j += WIDE
        while j + simd.LANES <= size:
            simd.add_3(
                out, to + j, step, weights, origin + j, w_step, per_filter, simd.LANES, channels,
                values, begin, end,
            )  # fmt: skip
            j += simd.LANES
        if j < size:
            simd.add_3_last(
                out, to + j, step, weights, origin + j, w_step, per_filter, size - j, channels,
                values, begin, end,
            )  # fmt: skip
        i += 3
    while i < rows:
        to, origin, j = at + i * step, start + i * w_step, 0
        while j + WIDE <= size:
            simd.add_wide(
                out, to + j, step, weights, origin + j, w_step, per_filter, WIDE, channels, values,
                begin, end,
            )  # fmt: skip
            j += WIDE
        while j + simd.LANES <= size:
            simd.add_1(
                out, to + j, step, weights, origin + j, w_step, per_filter, simd.LANES, channels,
                values, begin, end,
            )  # fmt: skip
            j += simd.LANES
        if j < size:
            simd.add_last(
                out, to + j, step, weights, origin + j, w_step, per_filter, size - j, channels,
                values, begin, end,
            )  # fmt: skip
        i += 1


@_inlined
def _kernel_range(origin, dilation, kernel, extent):
    """Kernel offsets i with 0 ≤ origin + i·dilation < extent."""
    if dilation == 1:
        first, last = max(0, -origin), min(kernel, extent - origin)
    else:
        first = max(0, (-origin + dilation - 1) // dilation)
        last = min(kernel, (extent - origin + dilation - 1) // dilation)
    return first, max(first, last)


@_inlined
def _rows_within(op, top, row_first, row_last):
    """Kernel offsets that lead from `top` to the target's rows row_first … row_last."""
    return _kernel_range(top - row_first, op[DH], op[KH], row_last - row_first)


@_inlined
def _reached(op, p, row_first, row_last):
    """What of the window of the source's pixel `p` lies in the target's rows row_first … row_last.

    As the target's pixel of kernel offset (0, 0), which may lie outside, and ranges of offsets.
    """
    y = np.int64(np.uint32(p) // np.uint32(op[S_W]))
    top, left = y * op[SH] - op[TOP], (p - y * op[S_W]) * op[SW] - op[LEFT]
    i_first, i_last = _rows_within(op, top, row_first, row_last)
    j_first, j_last = _kernel_range(left, op[DW], op[KW], op[T_W])
    return top * op[T_W] + left, i_first, i_last, j_first, j_last


@_inlined
def _reaches_most(op, lists):
    """Whether a scatter reaches nearly every row, so that to ask at each is more than to clear all.

    The windows of its nonzeros have twice as many cells as the target. Rows lie without gaps.
    """
    begins, ends, runs = lists[BEGINS], lists[ENDS], lists[FOUND][0]
    n, window = 0, op[KH] * op[KW]
    for run in range(runs):
        n += ends[run] - begins[run]
    without_gaps = op[DW] == 1 and op[T_STRIDE] == op[T_C]
    return without_gaps and n * window >= 2 * op[T_H] * op[T_W]


@_kernel
def _scatter_part(
    op, arena, touched, weights, lists, at_once, row_first, row_last, c_first, c_last
):  # fmt: skip
    """Add to the target's rows row_first … row_last and channels c_first … c_last.

    With all channels it also clears rows that nobody wrote, and marks them: all `at_once`, or those
    that it reaches.
    """
    pixels, begins, ends, channels, values, _, found = lists
    dw, line = op[DW], op[DH] * op[T_W]
    depth, stride, part = op[T_C], op[T_STRIDE], c_last - c_first
    per_row = op[KW] * depth
    whole = part == depth
    # Neighbours in a row of the kernel are neighbours in the target, if nothing is between.
    in_line = whole and dw == 1 and stride == depth
    if at_once:
        _touch_all(op, arena, touched, row_first * op[T_W], row_last * op[T_W])
    for run in range(found[0]):
        origin, i_first, i_last, j_first, j_last = _reached(op, pixels[run], row_first, row_last)
        if i_first == i_last or j_first == j_last:
            continue
        if whole and not at_once:
            for i in range(i_first, i_last):
                for j in range(j_first, j_last):
                    _touch(op, arena, touched, origin + i * line + j * dw)
        together = j_last - j_first if in_line else 1
        for j in range(j_first, j_last, together):
            q = origin + i_first * line + j * dw
            _add_window(
                arena, op[T_OFFSET] + q * stride + c_first, line * stride, weights,
                op[W_OFFSET] + i_first * per_row + j * depth + c_first, per_row, i_last - i_first,
                together * part, op[KH] * per_row, channels, values, begins[run], ends[run],
            )  # fmt: skip


@_kernel
def _scatter_grouped(op, arena, touched, weights, lists, row_first, row_last):
    """Grouped and depthwise convolutions: every nonzero reaches its own group's channels only."""
    pixels, begins, ends, channels, values, _, found = lists
    kh, kw = op[KH], op[KW]
    outs, ins = op[S_C] // op[GROUP], op[T_C] // op[GROUP]
    for run in range(found[0]):
        origin, i_first, i_last, j_first, j_last = _reached(op, pixels[run], row_first, row_last)
        for i in range(i_first, i_last):
            for j in range(j_first, j_last):
                q = origin + i * op[DH] * op[T_W] + j * op[DW]
                _touch(op, arena, touched, q)
                at = op[T_OFFSET] + q * op[T_STRIDE]
                for k in range(begins[run], ends[run]):
                    co = channels[k]
                    to = at + co // outs * ins
                    w = op[W_OFFSET] + ((co * kh + i) * kw + j) * ins
                    for c in range(ins):
                        arena[to + c] += values[k] * weights[w + c]


@_kernel
def _scatter(op, arena, touched, weights, lists, member, members, barrier):
    """A convolution's transpose from the nonzeros of its output's gradient."""
    if op[GROUP] > 1:
        first, last = _share(op[T_H], member, members)
        _scatter_grouped(op, arena, touched, weights, lists, first, last)
        wait(barrier, members)
        return
    by_channel = members > 1 and op[T_C] >= 64 * members
    if by_channel:
        blocks_first, blocks_last = _share((op[T_C] + 15) // 16, member, members)
        c_first, c_last = blocks_first * 16, min(blocks_last * 16, op[T_C])
        _clear_reached(op, arena, touched, lists, c_first, c_last)
        wait(barrier, members)
        if member == 0:
            _mark_reached(op, touched, lists)
        wait(barrier, members)
        _scatter_part(op, arena, touched, weights, lists, False, 0, op[T_H], c_first, c_last)
    else:
        parts, at_once = _parts(members), _reaches_most(op, lists)
        for part in range(member, parts, members):
            first, last = _share(op[T_H], part, parts)
            _scatter_part(op, arena, touched, weights, lists, at_once, first, last, 0, op[T_C])
    wait(barrier, members)


@_kernel
def _clear_reached(op, arena, touched, lists, c_first, c_last):
    """Clear this thread's channels in every row that the scatter will reach."""
    pixels, found = lists[PIXELS], lists[FOUND]
    for run in range(found[0]):
        origin, i_first, i_last, j_first, j_last = _reached(op, pixels[run], 0, op[T_H])
        for i in range(i_first, i_last):
            for j in range(j_first, j_last):
                q = origin + i * op[DH] * op[T_W] + j * op[DW]
                if not touched[op[T_TOUCHED] + q]:
                    start = op[T_OFFSET] + q * op[T_STRIDE]
                    arena[start + c_first : start + c_last] = 0


@_kernel
def _mark_reached(op, touched, lists):
    pixels, found = lists[PIXELS], lists[FOUND]
    for run in range(found[0]):
        origin, i_first, i_last, j_first, j_last = _reached(op, pixels[run], 0, op[T_H])
        for i in range(i_first, i_last):
            for j in range(j_first, j_last):
                touched[op[T_TOUCHED] + origin + i * op[DH] * op[T_W] + j * op[DW]] = 1


@_kernel
def _ratio(op, floats, arena, touched, active, first, last):
    """Multiply a sheet by a ratio at a Relu.

    The activations are its inputs, and those at a baseline; of BY_EPSILON, its outputs.
    """
    width, eps = op[S_C], np.float32(floats[EPS])
    together = width if op[A_STEP] == 1 and op[B_STEP] <= 1 else simd.LANES
    for p in range(first, last):
        if not touched[op[S_TOUCHED] + p]:
            continue
        row, where = op[S_OFFSET] + p * op[S_STRIDE], op[A_OFFSET] + p * op[A_STRIDE]
        there = op[B_OFFSET] + p * op[B_STRIDE]
        for c in range(0, width, together):
            n = min(together, width - c)
            r, at = arena[row + c : row + c + n], where + c * op[A_STEP]
            a = active[at : at + n]
            if op[MODE] == BY_EPSILON:
                _by_epsilon(r, a, eps)
            else:
                at = there + c * op[B_STEP]
                _by_difference(r, a, active[at : at + n], eps)


@_inlined
def _by_epsilon(r, a, eps):
    for c in range(r.size):
        r[c] = r[c] * a[c] / (a[c] + eps) if a[c] != 0 else np.float32(0)


@_inlined
def _by_difference(r, z, z0, eps):
    for c in range(r.size):
        dz, da = z[c] - z0[c], _relu(z[c]) - _relu(z0[c])
        large = abs(dz) > eps
        half_way = np.float32((z[c] + z0[c]) / np.float32(2) > 0)
        r[c] *= da / (dz if large else np.float32(1)) if large else half_way


@_inlined
def _relu(z):
    return z if z > 0 else np.float32(0)


@_kernel
def _store(op, arena, touched, lists, first, last):
    """Add the runs `first` … `last` to a sheet of the same pixels."""
    pixels, begins, ends, channels, values, _, _ = lists
    for run in range(first, last):
        p = pixels[run]
        _touch(op, arena, touched, p)
        at = op[T_OFFSET] + p * op[T_STRIDE]
        for i in range(begins[run], ends[run]):
            arena[at + channels[i]] += values[i]


@_kernel
def _max_pool(op, arena, touched, active, row_first, row_last):
    """To the first maximum in row-major window order, of the channels C_FIRST … C_LAST.

    The activations hold just these channels: a pool of a concatenation takes one such row of the
    table for each part, and the concatenation itself is never needed.
    """
    width = op[C_LAST] - op[C_FIRST]
    blocks = width - width % simd.LANES
    # Vectors of all channels need not be cleared before something is added to them.
    cleared = blocks != op[T_C]
    a_stride, t_stride, line, step = op[A_STRIDE], op[T_STRIDE], op[DH] * op[T_W], op[DW]
    strides = a_stride, op[A_STEP], t_stride, line, step
    ahead = op[SH] * op[T_W]  # the windows below
    for p in range(op[S_H] * op[S_W]):
        if not touched[op[S_TOUCHED] + p]:
            continue
        origin, own_first, own_last, j_first, j_last = _reached(op, p, row_first, row_last)
        if own_first == own_last:
            continue
        _, i_first, i_last, _, _ = _reached(op, p, 0, op[T_H])
        window = i_first, i_last, j_first, j_last, own_first, own_last
        if cleared:
            for i in range(own_first, own_last):
                for j in range(j_first, j_last):
                    _touch(op, arena, touched, origin + i * line + j * step)
        source = op[S_OFFSET] + p * op[S_STRIDE] + op[C_FIRST]
        places = op[A_OFFSET] + origin * a_stride, op[T_OFFSET] + origin * t_stride + op[C_FIRST]
        marks = op[T_TOUCHED] + origin
        for i in range(i_first, i_last):
            for j in range(j_first, j_last):
                cell = i * line + j * step + ahead
                for c in range(0, blocks, simd.LANES):
                    simd.prefetch(active, places[0] + cell * a_stride + c * op[A_STEP])
                    simd.prefetch(arena, places[1] + cell * t_stride + c)
        for c in range(0, blocks, simd.LANES):
            r = simd.load(arena, source + c)
            _pool_vector(arena, touched, active, r, c, places, marks, strides, window)
        for c in range(blocks, width):
            if arena[source + c] != 0:
                _pool_unit(arena, active, arena[source + c], c, places, strides, window)
        for i in range(own_first, own_last):
            for j in range(j_first, j_last):
                touched[marks + i * line + j * step] = 1


@_inlined
def _pool_vector(arena, touched, active, r, c, places, marks, strides, window):
    """Sixteen channels of one window; they are the first in rows that nobody has touched."""
    read, write = places
    a_stride, a_step, t_stride, line, step = strides
    i_first, i_last, j_first, j_last, own_first, own_last = window
    waiting = simd.differs(r, np.float32(0))
    best = simd.splat(np.float32(-np.inf))
    for i in range(i_first, i_last):
        for j in range(j_first, j_last):
            cell = i * line + j * step
            best = simd.larger(simd.load(active, read + cell * a_stride + c * a_step), best)
    for i in range(i_first, i_last):
        for j in range(j_first, j_last):
            cell = i * line + j * step
            a = simd.load(active, read + cell * a_stride + c * a_step)
            wins = waiting & simd.equals(a, best)
            waiting ^= wins
            if own_first <= i < own_last:
                at = write + cell * t_stride + c
                known = np.uint64(0xFFFF) * np.uint64(touched[marks + cell])
                before = simd.keep(simd.load(arena, at), known)
                simd.store(arena, at, simd.add(before, simd.keep(r, wins)))


@_inlined
def _pool_unit(arena, active, r, c, places, strides, window):
    """One channel of one window, all rows of which hold numbers."""
    read, write = places
    a_stride, a_step, t_stride, line, step = strides
    row, winner = _first_maximum(
        active, read + _behind(c, a_step), (a_stride, line, step), window[:4]
    )
    own_first, own_last = window[4:]
    if own_first <= row < own_last:
        arena[write + winner * t_stride + c] += r


@_inlined
def _first_maximum(active, read, strides, window):
    """Row and cell of a window's first maximum; -1 where it holds no number."""
    a_stride, line, step = strides
    i_first, i_last, j_first, j_last = window
    best, row, winner = np.float32(-np.inf), -1, -1
    for i in range(i_first, i_last):
        for j in range(j_first, j_last):
            cell = i * line + j * step
            a = active[read + cell * a_stride]
            if a > best or (row < 0 and a == best):
                best, row, winner = a, i, cell
    return row, winner


@_kernel
def _divisor(op, top, left, i_count, j_count):
    """Cells that an average counts, with the padding where COUNT_PAD is set.

    What ``ceil_mode`` reads beyond the padded extents never counts.
    """
    if not op[COUNT_PAD]:
        return i_count * j_count
    i_first, i_last = _kernel_range(top + op[TOP], op[DH], op[KH], op[PADDED_H])
    j_first, j_last = _kernel_range(left + op[LEFT], op[DW], op[KW], op[PADDED_W])
    return (i_last - i_first) * (j_last - j_first)


@_kernel
def _average_pool(op, arena, touched, row_first, row_last):
    """To all cells of the window alike."""
    width, line = op[T_C], op[DH] * op[T_W]
    blocks = width - width % simd.LANES
    for y in range(op[S_H]):
        top = y * op[SH] - op[TOP]
        own_first, own_last = _rows_within(op, top, row_first, row_last)
        if own_first == own_last:
            continue
        i_first, i_last = _kernel_range(top, op[DH], op[KH], op[T_H])
        for x in range(op[S_W]):
            p, left = y * op[S_W] + x, x * op[SW] - op[LEFT]
            if not touched[op[S_TOUCHED] + p]:
                continue
            j_first, j_last = _kernel_range(left, op[DW], op[KW], op[T_W])
            count = np.float32(_divisor(op, top, left, i_last - i_first, j_last - j_first))
            source = op[S_OFFSET] + p * op[S_STRIDE]
            cell = top * op[T_W] + left
            for i in range(own_first, own_last):
                for j in range(j_first, j_last):
                    _touch(op, arena, touched, cell + i * line + j * op[DW])
            # A division takes as long as all additions of its result.
            for c in range(0, blocks, simd.LANES):
                share = simd.divide(simd.load(arena, source + c), count)
                for i in range(own_first, own_last):
                    for j in range(j_first, j_last):
                        q = cell + i * line + j * op[DW]
                        at = op[T_OFFSET] + q * op[T_STRIDE] + c
                        simd.store(arena, at, simd.add(simd.load(arena, at), share))
            for c in range(blocks, width):
                share_of_one = arena[source + c] / count
                for i in range(own_first, own_last):
                    for j in range(j_first, j_last):
                        q = cell + i * line + j * op[DW]
                        arena[op[T_OFFSET] + q * op[T_STRIDE] + c] += share_of_one


@_kernel
def _add(op, arena, touched, weights, scaled, first, last):
    """Add a sheet to another of the same shape, times one factor per channel where `scaled`."""
    width = op[T_C]
    factors = weights[op[W_OFFSET] : op[W_OFFSET] + width]
    for p in range(first, last):
        if not touched[op[S_TOUCHED] + p]:
            continue
        _touch(op, arena, touched, p)
        at, source = op[T_OFFSET] + p * op[T_STRIDE], op[S_OFFSET] + p * op[S_STRIDE]
        out, r = arena[at : at + width], arena[source : source + width]
        if scaled:
            for c in range(width):
                out[c] += r[c] * factors[c]
        else:
            for c in range(width):
                out[c] += r[c]


@_kernel
def read(arenas, touched, begin, stride, marks, result):
    """Copy a sheet of all samples to (N, C, P), channels first; a row that holds nothing is 0."""
    samples, channels, pixels = result.shape
    for n in range(samples):
        known = touched[n, marks : marks + pixels]
        for c in range(channels):
            column, out = arenas[n, begin + c :], result[n, c]
            for p in range(pixels):
                out[p] = column[p * stride] if known[p] else np.float32(0)


@njit(nogil=True, cache=True)
def advance(
    table, floats, first, rows, samples, arenas, touched, active, weights, lists, work, shared,
    member, members, barrier,
):  # fmt: skip
    """Run the table for each of `samples`, from row `rows[sample]`, as far as it goes.

    Parameters
    ----------
    table : int64 array, (operations, COLUMNS)
        Offsets into `active` are those of sample 0; sample s lies s · A_LENGTH further on, its
        baseline s · B_LENGTH.
    floats : float64 array, (operations, FLOATS)
        The team's own. GUESS is remembered from sample to sample: how many times the τ of the layer
        before a layer's was; 0 where nothing is known, and negative where it was not positive.
    first : int
        How many samples lie before these in `active`.
    rows : int64 array, (N,)
        Where each sample stands. On return: where it stopped, at a STOP, at a SCATTER with more
        nonzeros than DENSE (which it left undone, its source in a sheet), or at the end.
    samples : int64 array
        Which of the N samples this team runs.
    arenas : float32 array, (N, floats per sample); touched : uint8 array, (N, marks per sample)
    active, weights : float32 array
    lists : tuple of arrays
        This team's, see PIXELS: int64 by pixel three times, int32 by unit, float32 by unit twice,
        and `found_by(members)` int64.
    work : float32 array
        As long as the largest layer has units.
    shared : float64 array
        Words that the team shares.
    member, members, barrier
        This thread's number, the team's size, and where it meets: before they begin, so that what
        each wrote is there, and when `rows` say where they stopped.
    """
    wait(barrier, members)
    op = np.empty(COLUMNS, np.int64)
    for sample in samples:
        stopped = _run(
            table, op, floats, rows[sample], first + sample, arenas[sample], touched[sample],
            active, weights, lists, work, shared, member, members, barrier,
        )  # fmt: skip
        wait(barrier, members)
        if member == 0:
            rows[sample] = stopped
    wait(barrier, members)


@_kernel
def _run(
    table, op, floats, start, sample, arena, touched, active, weights, lists, work, shared, member,
    members, barrier,
):  # fmt: skip
    row, filled = start, False
    if row == 0:
        shared[PREVIOUS] = 1
    while row < table.shape[0]:
        for column in range(COLUMNS):
            op[column] = table[row, column]
        op[A_OFFSET] += sample * op[A_LENGTH]
        op[B_OFFSET] += sample * op[B_LENGTH]
        kind = op[OP]
        if kind == STOP:
            return row
        if kind == ACTIVATE:
            filled = _activate(
                op, floats[row], arena, touched, active, lists, work, shared, member, members,
                barrier,
            )  # fmt: skip
        elif kind == COMPACT:
            filled = _compact(op, arena, touched, lists, member, members, barrier)
        elif kind == LIST:
            if not filled:
                _list(op, member, members, arena, lists, barrier)
        elif kind == UNPOOL:
            _unpool(op, filled, arena, touched, active, lists, member, members, barrier)
        elif kind == SCATTER:
            if filled or _too_many(op, arena, touched, lists, member, members, barrier):
                return row
            _scatter(op, arena, touched, weights, lists, member, members, barrier)
        else:
            _shared(
                op, floats[row], filled, arena, touched, active, weights, lists, member, members
            )
            wait(barrier, members)
        row += 1
    return row


@_kernel
def _too_many(op, arena, touched, lists, member, members, barrier):
    """Whether the scatter is left to a dense product; if so, its source is put into its sheet.

    With its border, which a trace shows: the padding trick is then left to the product too.
    """
    first, last = _share(lists[FOUND][0], member, members)
    inner = total(_count_inside(op, lists, first, last), barrier, member, members)
    if inner > op[DENSE]:
        first, last = _share(op[S_H] * op[S_W], member, members)
        _spread_out(op, arena, touched, lists, first, last)
    elif member == 0 and op[BORDER]:
        _drop_border(op, lists)
    wait(barrier, members)
    return inner > op[DENSE]


@_kernel
def _spread_out(op, arena, touched, lists, first, last):
    """Replace the pixels `first` … `last` of the scatter's source sheet by the runs."""
    pixels, begins, ends, channels, values, _, found = lists
    for p in range(first, last):
        _fill(op, arena, touched, p)
        at = op[S_OFFSET] + p * op[S_STRIDE]
        arena[at : at + op[S_C]] = 0
    for run in range(found[0]):
        p = pixels[run]
        if first <= p < last:
            at = op[S_OFFSET] + p * op[S_STRIDE]
            for i in range(begins[run], ends[run]):
                arena[at + channels[i]] = values[i]


@_kernel
def _shared(op, floats, filled, arena, touched, active, weights, lists, member, members):
    """Operations that every thread does for its own pixels, or rows of the target."""
    kind = op[OP]
    if kind in (MAX_POOL, AVERAGE_POOL):
        parts = _parts(members)
        for part in range(member, parts, members):
            first, last = _share(op[T_H], part, parts)
            if kind == MAX_POOL:
                _max_pool(op, arena, touched, active, first, last)
            else:
                _average_pool(op, arena, touched, first, last)
        return
    if kind == RATIO:
        first, last = _share(op[S_H] * op[S_W], member, members)
        _ratio(op, floats, arena, touched, active, first, last)
        return
    if kind == STORE and not filled:
        first, last = _share(lists[FOUND][0], member, members)
        _store(op, arena, touched, lists, first, last)
        return
    first, last = _share(op[T_H] * op[T_W], member, members)
    if kind == FORGET:
        touched[op[T_TOUCHED] + first : op[T_TOUCHED] + last] = 0
    else:
        _add(op, arena, touched, weights, kind == SCALE, first, last)
