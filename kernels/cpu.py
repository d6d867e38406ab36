"""The walk back on the CPU: a table of operations, run sample by sample by one compiled function.

Arrays in, arrays out: nothing here knows graphs or methods. A gradient lives in a *sheet*,
channels last: `pixels` rows of `channels` floats, `stride` floats apart, in one arena per sample. A
byte per pixel says whether the row holds anything; a row that does not has never been cleared, and
counts as zero. Activations are channels last too, weights are (C_out, kh, kw, C_in per group).

RectGrad keeps about 2 % of a layer's units, so what passes an activation is a list of nonzeros by
pixel (CSR), and a convolution's transpose adds a row of weights per nonzero and kernel row:

    g[ih, iw + j, :] += v · w[co, i, j, :]        ih = oh·sh + i·dh − pad_top, iw likewise,

a run of kw · C_in contiguous floats where dw = 1. Which path a step takes depends on shapes and on
how many nonzeros there are, and on nothing else.

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
    ACTIVATE, RATIO, SCATTER, STORE, COMPACT, MAX_POOL, AVERAGE_POOL, ADD, SCALE, FORGET, STOP
) = range(11)  # fmt: skip

# Columns of the table: what an operation reads (source), adds to (target), and its geometry.
(
    OP, S_OFFSET, S_STRIDE, S_TOUCHED, S_H, S_W, S_C, T_OFFSET, T_STRIDE, T_TOUCHED, T_H, T_W, T_C,
    A_OFFSET, A_LENGTH, A_STRIDE, W_OFFSET, KH, KW, SH, SW, DH, DW, TOP, LEFT, GROUP, BORDER, MODE,
    RANK_LOW, RANK_HIGH, DENSE, COUNT_PAD, C_FIRST, C_LAST, PADDED_H, PADDED_W, STRICT, S_BASE,
    B_OFFSET, B_LENGTH, COLUMNS,
) = range(41)  # fmt: skip
# Columns of the float table. Activations that reach the ceiling have slope 0; NaN: there is none.
FRACTION, TAU, EPS, CEILING, GUESS, FLOATS = range(6)

# What an activation lets pass, from its output a and the gradient r that arrives.
PASS_ACTIVE, PASS_POSITIVE, PASS_BOTH, PASS_AR, PASS_ABS_AR, PASS_A_EPS_R = range(6)

# What a gradient is multiplied by at a Relu: of its output to its input with ε added to the latter
# away from 0, or of the differences of both from those at a baseline.
BY_EPSILON, BY_DIFFERENCE = range(2)

# Shared words of a team: the threshold or its bound, whether it is final, whether what passes the
# activation is no list, because it is too much, but all that its sheet holds; and the last τ.
THRESHOLD, FINAL, FILLED, PREVIOUS, SHARED = 0, 8, 16, 24, 32
_PARTS = 4  # of a picture for each member of a team
_SAMPLED_LEAST, _SAMPLED_MOST = 128, 1024
_GUESSED = 0.5  # part of what τ should be; about twice as many units exceed it
BINS = 256


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
def _share(n, member, members):
    return n * member // members, n * (member + 1) // members


@_inlined
def _parts(members):
    """Into how many parts a team cuts a picture, of which each member takes every so many-th.

    What passes lies together in it, so that halves would hold very different numbers of units.
    """
    return 1 if members == 1 else _PARTS * members


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
def _emit(first, r, mask, end, channels, values):
    """Append the lanes of a mask, the channels from `first` on; returns the new end.

    What is written behind them is nothing yet: each vector has sixteen places of its own.
    """
    simd.append(channels, end, simd.numbers_from(first), mask)
    simd.append(values, end, r, mask)
    return end + simd.lanes_in(mask)


@_inlined
def _emit_passing(arena, row, active, where, width, condition, end, channels, values):
    """Append the gradients that pass; returns the new end."""
    blocks = width - width % simd.LANES
    for c in range(0, blocks, simd.LANES):
        r = simd.load(arena, row + c)
        mask = _passing(condition, simd.load(active, where + c), r)
        end = _emit(c, r, mask, end, channels, values)
    for c in range(blocks, width):
        r = arena[row + c]
        if _lets_pass(condition, active[where + c], r):
            channels[end] = c
            values[end] = r
            end += 1
    return end


@_inlined
def _keep_passing(arena, row, active, where, width, condition):
    """Clear the gradients that do not pass."""
    blocks = width - width % simd.LANES
    for c in range(0, blocks, simd.LANES):
        r = simd.load(arena, row + c)
        mask = _passing(condition, simd.load(active, where + c), r)
        simd.store(arena, row + c, simd.keep(r, mask))
    for c in range(blocks, width):
        if not _lets_pass(condition, active[where + c], arena[row + c]):
            arena[row + c] = 0


@_inlined
def _count_passing(arena, row, active, where, width, condition):
    """How many nonzero gradients pass."""
    blocks, n = width - width % simd.LANES, 0
    for c in range(0, blocks, simd.LANES):
        a, r = simd.load(active, where + c), simd.load(arena, row + c)
        n += simd.lanes_in(_passing(condition, a, r))
    for c in range(blocks, width):
        n += _lets_pass(condition, active[where + c], arena[row + c])
    return n


@_inlined
def _emit_above(
    arena, row, active, where, width, mode, eps, bound, end, channels, values, scores
):  # fmt: skip
    """Append the units whose score is above `bound`; returns the new end."""
    blocks = width - width % simd.LANES
    for c in range(0, blocks, simd.LANES):
        r = simd.load(arena, row + c)
        score = _scores(mode, simd.load(active, where + c), r, eps)
        mask = simd.above(score, bound)
        simd.append(scores, end, score, mask)
        end = _emit(c, r, mask, end, channels, values)
    for c in range(blocks, width):
        r = arena[row + c]
        s = _score(mode, active[where + c], r, eps)
        if s > bound:
            channels[end] = c
            values[end] = r
            scores[end] = s
            end += 1
    return end


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _extremes(values, n):
    """The least and the largest of the first `n`, numbers all."""
    low, high = values[0], values[0]
    for i in range(n):
        low, high = min(low, values[i]), max(high, values[i])
    return low, high


@_kernel
def nth_largest(values, k, counts):
    """The k-th largest (0-based) of `values`, which are overwritten, as are the BINS `counts`.

    Histograms narrow the choice down until a bin is small; then quickselect. All are numbers.
    """
    n = values.size
    while n > BINS // 4:
        low, high = _extremes(values, n)
        if k == n - 1:
            return low
        span = high - low
        if not (span > 0 and span < np.inf):
            break
        scale = np.float32(BINS - 1) / span
        if not scale < np.inf:
            break
        counts[:] = 0
        # Rounding is monotonic, and so is the bin of a value.
        for i in range(n):
            counts[int((values[i] - low) * scale)] += 1
        bin_, above = BINS - 1, 0
        while above + counts[bin_] <= k:
            above += counts[bin_]
            bin_ -= 1
        if counts[bin_] == n:
            break
        kept = 0
        for i in range(n):
            v = values[i]
            values[kept] = v
            kept += int((v - low) * scale) == bin_
        n, k = kept, k - above
    return _quickselect(values, n, k)


@_kernel
def _quickselect(values, n, k):
    """The k-th largest of the first `n`, by three-way partitions."""
    low, high = 0, n - 1
    while low < high:
        a, b, c = values[low], values[(low + high) // 2], values[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, lt, gt = low, low, high
        while i <= gt:
            v = values[i]
            if v > pivot:
                values[i] = values[lt]
                values[lt] = v
                lt += 1
                i += 1
            elif v < pivot:
                values[i] = values[gt]
                values[gt] = v
                gt -= 1
            else:
                i += 1
        if k < lt:
            high = lt - 1
        elif k > gt:
            low = gt + 1
        else:
            return pivot
    return values[low]


@_kernel
def _sampled_bound(op, arena, touched, active, mode, eps, rank, work, counts, found):
    """A score that, by a sample, somewhat more than `rank` units exceed; at least 0.

    Pixels that nothing has touched score 0, so that only the others, listed in `found`, are asked.
    """
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
        s = _score(mode, active[op[A_OFFSET] + p * op[A_STRIDE] + c], r, eps)
        work[i] = s if s == s else np.float32(0)  # it is not where an activation has overflowed
    expected = (rank + 1) / max(units, 1) * taken
    wanted = int(expected + 4 * np.sqrt(expected) + 4)
    if wanted >= taken:
        return np.float32(0)
    return max(nth_largest(work[:taken], wanted, counts), np.float32(0))


@_kernel
def _all_scores(op, arena, touched, active, mode, eps, work):
    """The scores of all units, 0 where one is no number; returns how many there are."""
    width, pixels = op[S_C], op[S_H] * op[S_W]
    for p in range(pixels):
        row, where = op[S_OFFSET] + p * op[S_STRIDE], op[A_OFFSET] + p * op[A_STRIDE]
        scores = work[p * width : (p + 1) * width]
        if not touched[op[S_TOUCHED] + p]:
            scores[:] = 0
            continue
        r, a = arena[row : row + width], active[where : where + width]
        for c in range(width):
            s = _score(mode, a[c], r[c], eps)
            scores[c] = s if s == s else np.float32(0)
    return pixels * width


@_kernel
def _scan(op, member, members, arena, touched, active, condition, bound, csr):
    """Collect this member's units above a bound; where it is negative, those that pass."""
    parts = _parts(members)
    for part in range(member, parts, members):
        first, last = _share(op[S_H] * op[S_W], part, parts)
        _scan_part(op, first, last, arena, touched, active, condition, bound, csr)


@_kernel
def _scan_part(op, first, last, arena, touched, active, condition, bound, csr):
    begins, ends, channels, values, scores = csr
    mode, eps = condition[:2]
    width, marks = op[S_C], op[S_TOUCHED]
    source, stride, read, read_stride = op[S_OFFSET], op[S_STRIDE], op[A_OFFSET], op[A_STRIDE]
    end = first * width
    for p in range(first, last):
        begins[p] = end
        if touched[marks + p]:
            row, where = source + p * stride, read + p * read_stride
            if bound < 0:
                end = _emit_passing(
                    arena, row, active, where, width, condition, end, channels, values
                )
            else:
                end = _emit_above(
                    arena, row, active, where, width, mode, eps, bound, end, channels, values,
                    scores,
                )  # fmt: skip
        ends[p] = end


@_kernel
def _filter(op, member, members, active, tau, ceiling, csr):
    """Keep the collected units whose score is above τ and whose activation is below the ceiling."""
    parts = _parts(members)
    for part in range(member, parts, members):
        first, last = _share(op[S_H] * op[S_W], part, parts)
        _filter_part(op, first, last, active, tau, ceiling, csr)


@_kernel
def _filter_part(op, first, last, active, tau, ceiling, csr):
    begins, ends, channels, values, scores = csr
    read, read_stride, bounded = op[A_OFFSET], op[A_STRIDE], ceiling == ceiling
    for p in range(first, last):
        at = np.uint64(begins[p])
        for i in range(at, np.uint64(ends[p])):
            c, v = channels[i], values[i]
            passes = (np.float64(scores[i]) > tau) & (v != 0)
            if bounded:
                passes &= active[read + p * read_stride + c] < ceiling
            channels[at] = c
            values[at] = v
            at += np.uint64(passes)
        ends[p] = np.int64(at)


@_kernel
def _collected(op, csr, members, work):
    """Copy the scores of all candidates together; returns how many there are."""
    _, ends, _, _, scores = csr
    parts, n = _parts(members), 0
    for part in range(parts):
        # What is found in one part lies without a gap.
        first, last = _share(op[S_H] * op[S_W], part, parts)
        if first < last:
            begin, end = first * op[S_C], ends[last - 1]
            to, found = work[n:], scores[begin:end]
            for i in range(found.size):
                to[i] = found[i]
            n += found.size
    return n


@_kernel
def _reach_zero(op, wanted, arena, touched, active, mode, eps):
    """Whether more than `wanted` scores are not negative, as in rows that nothing has touched."""
    width, marks, pixels = op[S_C], op[S_TOUCHED], op[S_H] * op[S_W]
    found, left = pixels * width, 0
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
                found += not _score(mode, active[op[A_OFFSET] + p * op[A_STRIDE] + c], r, eps) < 0
    return found > wanted


@_kernel
def _between(lower, upper, fraction):
    """The interpolated percentile, in double precision from the rounded scores."""
    bottom, top = np.float64(lower), np.float64(upper)
    return bottom if fraction == 0 else bottom + (top - bottom) * fraction


@_kernel
def _tau_of_all(op, floats, found, arena, touched, active, mode, eps, work, counts):
    """τ where only `found` scores are positive, too few for it to be."""
    low, high = op[RANK_LOW], op[RANK_HIGH]
    if found <= high and _reach_zero(op, low, arena, touched, active, mode, eps):
        return 0.0
    n = _all_scores(op, arena, touched, active, mode, eps, work)
    upper = lower = nth_largest(work[:n], high, counts)
    if low != high:
        _all_scores(op, arena, touched, active, mode, eps, work)
        lower = nth_largest(work[:n], low, counts)
    return _between(lower, upper, floats[FRACTION])


@_kernel
def _find_tau(
    op, arena, touched, active, csr, work, shared, condition, floats, member, members, barrier
):  # fmt: skip
    """τ of this layer, after which the candidates in `csr` include every unit above it.

    Returns τ; where it is negative or zero the candidates are not complete, because others pass
    too. They exceed a guess, or what a sample says: both only decide how many there are.
    """
    work, counts = work
    mode, eps = condition[:2]
    low, high = op[RANK_LOW], op[RANK_HIGH]
    guess = floats[GUESS]
    bound = np.float32(max(_GUESSED * guess, 0) * shared[PREVIOUS])
    if guess == 0:
        if member == 0:
            shared[THRESHOLD] = _sampled_bound(
                op, arena, touched, active, mode, eps, low, work, counts, csr[0]
            )
        wait(barrier, members)
        bound = np.float32(shared[THRESHOLD])
    while True:
        _scan(op, member, members, arena, touched, active, condition, bound, csr)
        wait(barrier, members)
        if member == 0:
            found = _collected(op, csr, members, work)
            shared[FINAL] = 1
            if found > low:
                upper = lower = nth_largest(work[:found], high, counts)
                if low != high:
                    _collected(op, csr, members, work)
                    lower = nth_largest(work[:found], low, counts)
                shared[THRESHOLD] = _between(lower, upper, floats[FRACTION])
            elif bound > 0:
                less = _sampled_bound(
                    op, arena, touched, active, mode, eps, low, work, counts, csr[0]
                )
                shared[THRESHOLD] = less if less < bound else np.float32(0)
                shared[FINAL] = 0
            else:
                shared[THRESHOLD] = _tau_of_all(
                    op, floats, found, arena, touched, active, mode, eps, work, counts
                )
        wait(barrier, members)
        done, bound = shared[FINAL] == 1, np.float32(shared[THRESHOLD])
        tau = shared[THRESHOLD]
        wait(barrier, members)
        if done:
            return tau


@_kernel
def _on_border(op, p):
    """Whether the padding trick is on and the pixel is the first or last of a spatial axis."""
    if not op[BORDER]:
        return False
    y, x = p // op[S_W], p % op[S_W]
    return not (0 < y < op[S_H] - 1 and 0 < x < op[S_W] - 1)


@_kernel
def _clear_border(op, csr, first, last):
    begins, ends = csr[0], csr[1]
    for p in range(first, last):
        if _on_border(op, p):
            ends[p] = begins[p]


@_kernel
def _count_inside(op, csr, first, last):
    """How many nonzeros are not on the border."""
    begins, ends, n = csr[0], csr[1], 0
    for p in range(first, last):
        if not _on_border(op, p):
            n += ends[p] - begins[p]
    return n


@_kernel
def _activate(op, floats, arena, touched, active, csr, work, shared, member, members, barrier):
    """Collect what passes the activation; or, too much for a scatter, leave it in the sheet."""
    if member == 0:
        shared[FILLED] = 0
    tau, condition = floats[TAU], _condition(op, floats, np.nan)
    thresholded = op[MODE] >= PASS_AR
    if thresholded and np.isnan(tau):
        previous = shared[PREVIOUS]
        tau = _find_tau(
            op, arena, touched, active, csr, work, shared, condition, floats, member, members,
            barrier,
        )  # fmt: skip
        _remember(tau, floats, shared, previous)
        if np.isnan(tau):  # between infinite scores
            tau = np.inf
    elif thresholded and tau > 0:
        _scan(op, member, members, arena, touched, active, condition, np.float32(0), csr)
    if thresholded and tau > 0:
        _filter(op, member, members, active, tau, np.float32(floats[CEILING]), csr)
        wait(barrier, members)
        return
    if thresholded and tau < 0:
        condition = _condition(op, floats, tau)
    if _few_pass(op, arena, touched, active, condition, member, members, barrier):
        _scan(op, member, members, arena, touched, active, condition, np.float32(-1), csr)
    elif member == 0:
        shared[FILLED] = 1
    wait(barrier, members)


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
            n += _count_passing(arena, row, active, where, width, condition)
    if total(n, barrier, member, members) <= op[DENSE]:
        return True
    for p in range(first, last):
        _fill(op, arena, touched, p)
        row, where = op[S_OFFSET] + p * op[S_STRIDE], op[A_OFFSET] + p * op[A_STRIDE]
        _keep_passing(arena, row, active, where, width, condition)
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
def _compact(op, arena, touched, csr, shared, member, members, barrier):
    """A sheet's nonzeros by pixel; or, too many for a scatter, leave them where they are."""
    begins, ends, channels, values, _ = csr
    width, n = op[S_C], 0
    blocks = width - width % simd.LANES
    first, last = _share(op[S_H] * op[S_W], member, members)
    for p in range(first, last):
        if n > op[DENSE]:
            break
        if touched[op[S_TOUCHED] + p] and not _on_border(op, p):
            n += _count_nonzero(arena, op[S_OFFSET] + p * op[S_STRIDE], width)
    few = total(n, barrier, member, members) <= op[DENSE]
    if member == 0:
        shared[FILLED] = not few
    end = first * width
    for p in range(first, last):
        if not few:
            _fill(op, arena, touched, p)
            continue
        begins[p] = end
        if touched[op[S_TOUCHED] + p]:
            row = op[S_OFFSET] + p * op[S_STRIDE]
            for c in range(0, blocks, simd.LANES):
                r = simd.load(arena, row + c)
                end = _emit(c, r, simd.differs(r, np.float32(0)), end, channels, values)
            for c in range(blocks, width):
                if arena[row + c] != 0:
                    channels[end] = c
                    values[end] = arena[row + c]
                    end += 1
        ends[p] = end
    wait(barrier, members)


@_inlined
def _touch(op, arena, touched, p):
    """Make sure that the target's row `p` holds numbers: whoever comes first clears it."""
    if not touched[op[T_TOUCHED] + p]:
        start = op[T_OFFSET] + p * op[T_STRIDE]
        arena[start : start + op[T_C]] = 0
        touched[op[T_TOUCHED] + p] = 1


@_inlined
def _add_rows(out, at, weights, start, size, per_filter, channels, values, begin, end):
    """out[at + j] += Σ v · weights[filter, start + j] over the nonzeros begin … end."""
    j = 0
    while j + 128 <= size:
        simd.add_128(out, at + j, weights, start + j, per_filter, channels, values, begin, end)
        j += 128
    if j + 64 <= size:
        simd.add_64(out, at + j, weights, start + j, per_filter, channels, values, begin, end)
        j += 64
    if j + 32 <= size:
        simd.add_32(out, at + j, weights, start + j, per_filter, channels, values, begin, end)
        j += 32
    if j + 16 <= size:
        simd.add_16(out, at + j, weights, start + j, per_filter, channels, values, begin, end)
        j += 16
    while j + 4 <= size:
        simd.add_4(out, at + j, weights, start + j, per_filter, channels, values, begin, end)
        j += 4
    while j < size:
        simd.add_1(out, at + j, weights, start + j, per_filter, channels, values, begin, end)
        j += 1


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
def _reaches_most(op, csr):
    """Whether a scatter reaches nearly every row, so that to ask at each is more than to clear all.

    The windows of its nonzeros have twice as many cells as the target. Rows lie without gaps.
    """
    n, window = 0, op[KH] * op[KW]
    for p in range(op[S_H] * op[S_W]):
        n += csr[1][p] - csr[0][p]
    without_gaps = op[DW] == 1 and op[T_STRIDE] == op[T_C]
    return without_gaps and n * window >= 2 * op[T_H] * op[T_W]


@_kernel
def _scatter_part(op, arena, touched, weights, csr, at_once, row_first, row_last, c_first, c_last):
    """Add to the target's rows row_first … row_last and channels c_first … c_last.

    With all channels it also clears rows that nobody wrote, and marks them: all `at_once`, or those
    that it reaches.
    """
    begins, ends, channels, values, _ = csr
    width, s_height, s_width = op[T_W], op[S_H], op[S_W]
    kh, kw, sh, sw, dh, dw = op[KH], op[KW], op[SH], op[SW], op[DH], op[DW]
    pad_top, pad_left, depth, stride = op[TOP], op[LEFT], op[T_C], op[T_STRIDE]
    target, marks, w_offset = op[T_OFFSET], op[T_TOUCHED], op[W_OFFSET]
    per_filter, part = kh * kw * depth, c_last - c_first
    whole = part == depth
    one_run = whole and dw == 1 and stride == depth
    if at_once:
        for q in range(row_first * width, row_last * width):
            _touch(op, arena, touched, q)
    for y in range(s_height):
        top = y * sh - pad_top
        i_first, i_last = _rows_within(op, top, row_first, row_last)
        for x in range(s_width):
            begin, end = begins[y * s_width + x], ends[y * s_width + x]
            if begin == end:
                continue
            left = x * sw - pad_left
            j_first, j_last = _kernel_range(left, dw, kw, width)
            for i in range(i_first, i_last):
                q = (top + i * dh) * width + left
                if whole and not at_once:
                    for j in range(j_first, j_last):
                        mark = marks + q + j * dw
                        if not touched[mark]:
                            touched[mark] = 1
                            at = target + (q + j * dw) * stride
                            arena[at : at + depth] = 0
                if one_run:
                    at = target + (q + j_first) * stride
                    start = w_offset + (i * kw + j_first) * depth
                    size = (j_last - j_first) * depth
                    _add_rows(
                        arena, at, weights, start, size, per_filter, channels, values, begin, end
                    )
                    continue
                for j in range(j_first, j_last):
                    at = target + (q + j * dw) * stride + c_first
                    start = w_offset + (i * kw + j) * depth + c_first
                    _add_rows(
                        arena, at, weights, start, part, per_filter, channels, values, begin, end
                    )


@_kernel
def _scatter_grouped(op, arena, weights, csr, touched, row_first, row_last):
    """Grouped and depthwise convolutions: every nonzero reaches its own group's channels only."""
    begins, ends, channels, values, _ = csr
    kh, kw = op[KH], op[KW]
    outs, ins = op[S_C] // op[GROUP], op[T_C] // op[GROUP]
    for y in range(op[S_H]):
        top = y * op[SH] - op[TOP]
        i_first, i_last = _rows_within(op, top, row_first, row_last)
        for x in range(op[S_W]):
            p = y * op[S_W] + x
            if begins[p] == ends[p]:
                continue
            left = x * op[SW] - op[LEFT]
            j_first, j_last = _kernel_range(left, op[DW], op[KW], op[T_W])
            for i in range(i_first, i_last):
                for j in range(j_first, j_last):
                    q = (top + i * op[DH]) * op[T_W] + left + j * op[DW]
                    _touch(op, arena, touched, q)
                    at = op[T_OFFSET] + q * op[T_STRIDE]
                    for k in range(begins[p], ends[p]):
                        co = channels[k]
                        to = at + co // outs * ins
                        w = op[W_OFFSET] + ((co * kh + i) * kw + j) * ins
                        for c in range(ins):
                            arena[to + c] += values[k] * weights[w + c]


@_kernel
def _scatter(op, arena, touched, weights, csr, member, members, barrier):
    """A convolution's transpose from the nonzeros of its output's gradient."""
    if op[GROUP] > 1:
        first, last = _share(op[T_H], member, members)
        _scatter_grouped(op, arena, weights, csr, touched, first, last)
        wait(barrier, members)
        return
    by_channel = members > 1 and op[T_C] >= 64 * members
    if by_channel:
        blocks_first, blocks_last = _share((op[T_C] + 15) // 16, member, members)
        c_first, c_last = blocks_first * 16, min(blocks_last * 16, op[T_C])
        _clear_reached(op, arena, touched, csr, c_first, c_last)
        wait(barrier, members)
        if member == 0:
            _mark_reached(op, touched, csr)
        wait(barrier, members)
        _scatter_part(op, arena, touched, weights, csr, False, 0, op[T_H], c_first, c_last)
    else:
        parts, at_once = _parts(members), _reaches_most(op, csr)
        for part in range(member, parts, members):
            first, last = _share(op[T_H], part, parts)
            _scatter_part(op, arena, touched, weights, csr, at_once, first, last, 0, op[T_C])
    wait(barrier, members)


@_kernel
def _clear_reached(op, arena, touched, csr, c_first, c_last):
    """Clear this thread's channels in every row that the scatter will reach."""
    for y in range(op[S_H]):
        for x in range(op[S_W]):
            p = y * op[S_W] + x
            if csr[0][p] == csr[1][p]:
                continue
            top, left = y * op[SH] - op[TOP], x * op[SW] - op[LEFT]
            i_first, i_last = _kernel_range(top, op[DH], op[KH], op[T_H])
            j_first, j_last = _kernel_range(left, op[DW], op[KW], op[T_W])
            for i in range(i_first, i_last):
                for j in range(j_first, j_last):
                    q = (top + i * op[DH]) * op[T_W] + left + j * op[DW]
                    if not touched[op[T_TOUCHED] + q]:
                        start = op[T_OFFSET] + q * op[T_STRIDE]
                        arena[start + c_first : start + c_last] = 0


@_kernel
def _mark_reached(op, touched, csr):
    for y in range(op[S_H]):
        for x in range(op[S_W]):
            p = y * op[S_W] + x
            if csr[0][p] == csr[1][p]:
                continue
            top, left = y * op[SH] - op[TOP], x * op[SW] - op[LEFT]
            i_first, i_last = _kernel_range(top, op[DH], op[KH], op[T_H])
            j_first, j_last = _kernel_range(left, op[DW], op[KW], op[T_W])
            for i in range(i_first, i_last):
                for j in range(j_first, j_last):
                    q = (top + i * op[DH]) * op[T_W] + left + j * op[DW]
                    touched[op[T_TOUCHED] + q] = 1


@_kernel
def _ratio(op, floats, arena, touched, active, first, last):
    """Multiply a sheet by a ratio at a Relu, of which the activations are the inputs."""
    width, eps = op[S_C], np.float32(floats[EPS])
    for p in range(first, last):
        if not touched[op[S_TOUCHED] + p]:
            continue
        source, where = op[S_OFFSET] + p * op[S_STRIDE], op[A_OFFSET] + p * op[A_STRIDE]
        there = op[B_OFFSET] + p * op[A_STRIDE]
        r, z = arena[source : source + width], active[where : where + width]
        if op[MODE] == BY_EPSILON:
            for c in range(width):
                r[c] = r[c] * _relu(z[c]) / (z[c] + (eps if z[c] >= 0 else -eps))
        else:
            z0 = active[there : there + width]
            for c in range(width):
                dz, da = z[c] - z0[c], _relu(z[c]) - _relu(z0[c])
                large = abs(dz) > eps
                half_way = np.float32((z[c] + z0[c]) / np.float32(2) > 0)
                r[c] *= da / (dz if large else np.float32(1)) if large else half_way


@_inlined
def _relu(z):
    return z if z > 0 else np.float32(0)


@_kernel
def _store(op, arena, touched, csr, first, last):
    """Add a list of nonzeros to a sheet of the same pixels."""
    begins, ends, channels, values, _ = csr
    for p in range(first, last):
        if begins[p] == ends[p]:
            continue
        _touch(op, arena, touched, p)
        at = op[T_OFFSET] + p * op[T_STRIDE]
        for i in range(begins[p], ends[p]):
            arena[at + channels[i]] += values[i]


@_kernel
def _max_pool(op, arena, touched, active, row_first, row_last):
    """To the first maximum in row-major window order, of the channels C_FIRST … C_LAST.

    The activations hold just these channels: a pool of a concatenation takes one such row of the
    table for each part, and the concatenation itself is never needed.
    """
    width = op[C_LAST] - op[C_FIRST]
    blocks = width - width % simd.LANES
    for y in range(op[S_H]):
        top = y * op[SH] - op[TOP]
        own_first, own_last = _rows_within(op, top, row_first, row_last)
        if own_first == own_last:
            continue
        for x in range(op[S_W]):
            p, left = y * op[S_W] + x, x * op[SW] - op[LEFT]
            if not touched[op[S_TOUCHED] + p]:
                continue
            j_first, j_last = _kernel_range(left, op[DW], op[KW], op[T_W])
            for i in range(own_first, own_last):
                for j in range(j_first, j_last):
                    _touch(op, arena, touched, (top + i * op[DH]) * op[T_W] + left + j * op[DW])
            for c in range(0, blocks, simd.LANES):
                _pool_vector(op, arena, active, p, top, left, own_first, own_last, c)
            for c in range(blocks, width):
                _pool_unit(op, arena, active, p, top, left, own_first, own_last, c)


@_inlined
def _pool_vector(op, arena, active, p, top, left, own_first, own_last, c):
    """Sixteen channels of one window, all rows of which hold numbers."""
    r = simd.load(arena, op[S_OFFSET] + p * op[S_STRIDE] + op[C_FIRST] + c)
    waiting = simd.differs(r, np.float32(0))
    if not waiting:
        return
    i_first, i_last = _kernel_range(top, op[DH], op[KH], op[T_H])
    j_first, j_last = _kernel_range(left, op[DW], op[KW], op[T_W])
    best = simd.splat(np.float32(-np.inf))
    for i in range(i_first, i_last):
        for j in range(j_first, j_last):
            q = (top + i * op[DH]) * op[T_W] + left + j * op[DW]
            best = simd.larger(simd.load(active, op[A_OFFSET] + q * op[A_STRIDE] + c), best)
    for i in range(i_first, i_last):
        for j in range(j_first, j_last):
            q = (top + i * op[DH]) * op[T_W] + left + j * op[DW]
            a = simd.load(active, op[A_OFFSET] + q * op[A_STRIDE] + c)
            wins = waiting & simd.equals(a, best)
            waiting ^= wins
            if own_first <= i < own_last:
                at = op[T_OFFSET] + q * op[T_STRIDE] + op[C_FIRST] + c
                simd.store(arena, at, simd.add(simd.load(arena, at), simd.keep(r, wins)))


@_inlined
def _pool_unit(op, arena, active, p, top, left, own_first, own_last, c):
    """One channel of one window."""
    r = arena[op[S_OFFSET] + p * op[S_STRIDE] + op[C_FIRST] + c]
    if r == 0:
        return
    i_first, i_last = _kernel_range(top, op[DH], op[KH], op[T_H])
    j_first, j_last = _kernel_range(left, op[DW], op[KW], op[T_W])
    best, row, winner = np.float32(-np.inf), -1, -1
    for i in range(i_first, i_last):
        for j in range(j_first, j_last):
            q = (top + i * op[DH]) * op[T_W] + left + j * op[DW]
            a = active[op[A_OFFSET] + q * op[A_STRIDE] + c]
            if a > best or (winner < 0 and a == best):
                best, row, winner = a, i, q
    if own_first <= row < own_last:
        arena[op[T_OFFSET] + winner * op[T_STRIDE] + op[C_FIRST] + c] += r


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
    width = op[T_C]
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
            for i in range(own_first, own_last):
                for j in range(j_first, j_last):
                    q = (top + i * op[DH]) * op[T_W] + left + j * op[DW]
                    _touch(op, arena, touched, q)
                    at = op[T_OFFSET] + q * op[T_STRIDE]
                    for c in range(0, blocks, simd.LANES):
                        share = simd.divide(simd.load(arena, source + c), count)
                        simd.store(arena, at + c, simd.add(simd.load(arena, at + c), share))
                    for c in range(blocks, width):
                        arena[at + c] += arena[source + c] / count


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
        for p in range(pixels):
            known, row = touched[n, marks + p] != 0, begin + p * stride
            for c in range(channels):
                result[n, c, p] = arenas[n, row + c] if known else np.float32(0)


@njit(nogil=True, cache=True)
def advance(
    table, floats, first, rows, samples, arenas, touched, active, weights, csr, work, shared,
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
    csr : tuple of arrays
        This team's begins and ends (int64, by pixel), channels (int32), values, scores (float32).
    work : tuple of arrays
        float32, as long as the largest layer has units, and BINS int64.
    shared : float64 array
        Words that the team shares.
    member, members, barrier
        This thread's number, the team's size, and where it meets: before they begin, so that what
        each wrote is there, and when `rows` say where they stopped.
    """
    wait(barrier, members)
    bound = table.copy()
    for sample in samples:
        bound[:, A_OFFSET] = table[:, A_OFFSET] + (first + sample) * table[:, A_LENGTH]
        bound[:, B_OFFSET] = table[:, B_OFFSET] + (first + sample) * table[:, B_LENGTH]
        stopped = _run(
            bound, floats, rows[sample], arenas[sample], touched[sample], active, weights, csr,
            work, shared, member, members, barrier,
        )  # fmt: skip
        wait(barrier, members)
        if member == 0:
            rows[sample] = stopped
    wait(barrier, members)


@_kernel
def _run(
    table, floats, start, arena, touched, active, weights, csr, work, shared, member, members,
    barrier,
):  # fmt: skip
    row = start
    if row == 0:
        shared[PREVIOUS] = 1
    while row < table.shape[0]:
        op = table[row]
        kind = op[OP]
        if kind == STOP:
            return row
        if kind == ACTIVATE:
            _activate(
                op, floats[row], arena, touched, active, csr, work, shared, member, members, barrier
            )
        elif kind == COMPACT:
            _compact(op, arena, touched, csr, shared, member, members, barrier)
        elif kind == SCATTER:
            if _too_many(op, arena, touched, csr, shared, member, members, barrier):
                return row
            _scatter(op, arena, touched, weights, csr, member, members, barrier)
        else:
            _shared(op, floats[row], arena, touched, active, weights, csr, shared, member, members)
            wait(barrier, members)
        row += 1
    return row


@_kernel
def _too_many(op, arena, touched, csr, shared, member, members, barrier):
    """Whether the scatter is left to a dense product; if so, its source is put into its sheet.

    With its border, which a trace shows: the padding trick is then left to the product too.
    """
    if shared[FILLED]:
        return True
    first, last = _share(op[S_H] * op[S_W], member, members)
    inner = total(_count_inside(op, csr, first, last), barrier, member, members)
    if inner > op[DENSE]:
        _spread_out(op, arena, touched, csr, first, last)
    else:
        _clear_border(op, csr, first, last)
    wait(barrier, members)
    return inner > op[DENSE]


@_kernel
def _spread_out(op, arena, touched, csr, first, last):
    """Replace the scatter's source sheet by the list of nonzeros, every row written."""
    begins, ends, channels, values, _ = csr
    for p in range(first, last):
        _fill(op, arena, touched, p)
        at = op[S_OFFSET] + p * op[S_STRIDE]
        arena[at : at + op[S_C]] = 0
        for i in range(begins[p], ends[p]):
            arena[at + channels[i]] = values[i]


@_kernel
def _shared(op, floats, arena, touched, active, weights, csr, shared, member, members):
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
    first, last = _share(op[T_H] * op[T_W], member, members)
    if kind == STORE and not shared[FILLED]:
        _store(op, arena, touched, csr, first, last)
    elif kind == FORGET:
        touched[op[T_TOUCHED] + first : op[T_TOUCHED] + last] = 0
    else:
        _add(op, arena, touched, weights, kind == SCALE, first, last)
