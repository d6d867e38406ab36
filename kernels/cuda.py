"""The walk back on a GPU: one kernel a step, all samples of a batch in one launch.

Arrays in, arrays out: nothing here knows graphs or methods. The gradient of a value is a row of
floats per sample, in the value's own axis order (channels first), in one arena: sample n begins at
``base + n · stride``. Activations lie without gaps, as onnxruntime writes them; weights are
(C_out, kh, kw, C_in per group), so that neighbouring threads read neighbouring input channels.

What passes a thresholded activation is a list of nonzeros by pixel, in the order of the channels:
pixel p of sample n has ``counts[n · P + p]`` of them from place ``(n · P + p) · C`` on. The
transpose of a convolution *gathers*: each thread sums what reaches one input unit, window position
by window position and channel by channel, and writes it once. So no float is summed atomically, and
no result depends on the order in which blocks run, or on how many samples there are.

τ is selected in one launch, which reads gradient and activation once. Each block estimates between
which first digits τ lies from the same few units of the sample, lists the scores of its own units
that do, and counts those that are larger. The last block to finish takes the score of the wanted
rank from the list, by the digits of the scores' bits: only integers are counted, so that the order
of the list does not matter. Where the estimate was wrong it does so from all units. A bit for each
unit says which of them lie too low, and these are not read again.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from . import cpu
from .cpu import BY_EPSILON, PASS_AR

_kernel = cuda.jit(cache=True)
_device = cuda.jit(device=True)

# A further mode of an activation: whatever is not zero passes.
EVERYTHING = 6
# A further mode of a score: it is there already.
LISTED = 7

# Threads of a block, at most; and floats of a tile of `transpose`, with one to spare in each row.
THREADS = 512
TILE = 1056

# The bits of a score are read in so many digits, from the highest; the last one may be shorter.
BITS = 11
DIGITS = -(-32 // BITS)
BINS = 2**BITS
# Of each sample is counted how many scores lie above those that are listed, how many of these are
# zero, how many others there are, and how many blocks have finished.
TOTALS = 4
_ABOVE, _ZEROS, _LISTED, _TICKETS = range(TOTALS)
# Scores that a thread asks for at once; neighbours in a sample, of which 8 share a sector.
ITEMS, RUN = 4, 4
LANES = WORD = 32
_ZERO = 0x7FFFFFFF
_GOLDEN = 40503  # of 2¹⁶

_score = _device(cpu._score.py_func)
_passes = _device(cpu._passes.py_func)
_kernel_range = _device(cpu._kernel_range.py_func)
_relu = _device(cpu._relu.py_func)


# --- selection ------------------------------------------------------------------------------------


@_device
def _key(s):
    """The bits of a score as an integer that is the larger, the smaller the score; NaN is first."""
    if s != s:
        return np.uint32(0)
    if s == 0:
        return np.uint32(_ZERO)
    bits = s.view(np.uint32)
    if bits >> np.uint32(31):
        return bits
    return np.uint32(np.uint32(_ZERO) - bits)


@_device
def _score_of(key):
    """The inverse of `_key`."""
    if key >> np.uint32(31):
        return np.uint32(key).view(np.float32)
    return np.uint32(np.uint32(_ZERO) - np.uint32(key)).view(np.float32)


@_device
def _shift(step):
    """How many bits come after a digit."""
    return max(32 - BITS * (step + 1), 0)


@_device
def _digit(key, step):
    bits = min(BITS, 32 - BITS * step)
    return np.int64(key) >> _shift(step) & (1 << bits) - 1


@_device
def _agree(key, prefix, step):
    """Whether the digits before are those of the prefix."""
    known = np.uint32(2**32 - (1 << 32 - BITS * step))
    return (key ^ np.uint32(prefix)) & known == 0


@_device
def _clear(counts):
    for i in range(cuda.threadIdx.x, BINS, cuda.blockDim.x):
        counts[i] = 0
    cuda.syncthreads()


@_device
def _own(begin, i):
    """The i-th place of this thread, of those from `begin` on."""
    return np.int32(begin + i * cuda.blockDim.x + cuda.threadIdx.x)


@_device
def _read(scores, begin, last, apart, gradients, activations, mode, eps):
    """The scores at all places of this thread that lie before `last`.

    None is waited for before all are asked for. Places are units, or, where `apart` > 0, those of
    a sample: of RUN neighbours in each `apart` units, irregularly, as images and channels are
    regular.
    """
    r = cuda.local.array(ITEMS, np.float32)
    a = cuda.local.array(ITEMS, np.float32)
    for i in range(ITEMS):
        u = min(_own(begin, i), last - 1)
        if apart > 0:
            run = u // RUN
            u = run * apart + ((run * _GOLDEN & 0xFFFF) * (apart - RUN) >> 16) + u % RUN
        at = np.uint32(u)  # of an index without a sign Numba need not ask whether it has one
        r[i], a[i] = gradients[at], activations[at]
    for i in range(ITEMS):
        scores[i] = r[i] if mode == LISTED else _score(mode, a[i], r[i], eps)


@_device
def _count(
    counts, prefix, step, zeros, last, apart, gradients, activations, mode, eps
):  # fmt: skip
    """Count the digits of the scores before `last` whose digits before are the known ones.

    Most scores are zero: each thread counts these for itself, from `zeros` on.
    """
    scores = cuda.local.array(ITEMS, np.float32)
    for begin in range(0, last, ITEMS * cuda.blockDim.x):
        _read(scores, begin, last, apart, gradients, activations, mode, eps)
        for i in range(ITEMS):
            s = scores[i]
            if _own(begin, i) >= last:
                continue
            if s == 0:
                zeros += 1
                continue
            key = _key(s)
            if _agree(key, prefix, step):
                cuda.atomic.add(counts, _digit(key, step), 1)
    zero = np.uint32(_ZERO)
    if zeros > 0 and _agree(zero, prefix, step):
        cuda.atomic.add(counts, _digit(zero, step), zeros)
    cuda.syncthreads()


@_device
def _begin(prefixes, ranks, first, second):
    """With two ranks, and nothing known."""
    if cuda.threadIdx.x == 0:
        prefixes[0] = prefixes[1] = 0
        ranks[0], ranks[1] = first, second
    cuda.syncthreads()


@_device
def _narrow(counts, which, step, prefixes, ranks, sums):
    """Find the digit in which a rank lies; it becomes known, and the rank one within it."""
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    part = (BINS + threads - 1) // threads
    first, last = min(thread * part, BINS), min((thread + 1) * part, BINS)
    own, rank = 0, ranks[which]
    for i in range(first, last):
        own += counts[i]
    sums[thread] = own
    cuda.syncthreads()
    reach = 1
    while reach < threads:
        before = sums[thread - reach] if thread >= reach else 0
        cuda.syncthreads()
        sums[thread] += before
        cuda.syncthreads()
        reach *= 2
    above = sums[thread] - own
    if above <= rank < above + own:
        digit = first
        while above + counts[digit] <= rank:
            above += counts[digit]
            digit += 1
        prefixes[which] |= digit << _shift(step)
        ranks[which] = rank - above
    cuda.syncthreads()


@_device
def _finish(prefixes, wanted, fraction, products, tau, sample):
    """The interpolated percentile, in double precision from the rounded scores.

    The product goes through memory, so that it is rounded before it is added.
    """
    lower = np.float64(_score_of(np.uint32(prefixes[0])))
    upper = np.float64(_score_of(np.uint32(prefixes[wanted - 1])))
    if cuda.threadIdx.x == 0:
        products[0] = (upper - lower) * fraction
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        tau[sample] = lower if wanted == 1 else lower + products[0]


@_device
def _words(units):
    """Of a sample's bits."""
    return (units + WORD - 1) // WORD


@_device
def _list(
    listed, totals, sieve, lowest, highest, counts, found, gradients, activations, mode, eps
):  # fmt: skip
    """List the scores of this block's units whose first digit is lowest … highest.

    Zeros are only counted, and so is what lies above.
    """
    sample, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    scores = cuda.local.array(ITEMS, np.float32)
    places = cuda.local.array(ITEMS, np.int32)
    units = gradients.size
    words = _words(units)
    first = words * cuda.blockIdx.y // cuda.gridDim.y
    last = words * (cuda.blockIdx.y + 1) // cuda.gridDim.y
    bits = sample * words
    for i in range(first + thread, last, threads):
        sieve[bits + i] = 0
    cuda.syncthreads()
    first, last = first * WORD, min(last * WORD, units)
    above, zeros = 0, 0
    for begin in range(first, last, ITEMS * threads):
        _read(scores, begin, last, 0, gradients, activations, mode, eps)
        for i in range(ITEMS):
            places[i] = -1
            u, digit = _own(begin, i), _digit(_key(scores[i]), 0)
            if u >= last or digit > highest:
                continue
            if scores[i] != 0:
                cuda.atomic.or_(sieve, bits + u // WORD, np.uint32(1 << u % WORD))
            if digit < lowest:
                above += 1
            elif scores[i] == 0:
                zeros += 1
            else:
                places[i] = cuda.atomic.add(found, 0, 1)
        cuda.syncthreads()
        if thread == 0:
            found[1] = cuda.atomic.add(totals, sample * TOTALS + _LISTED, found[0])
            found[0] = 0
        cuda.syncthreads()
        for i in range(ITEMS):
            if places[i] >= 0:
                listed[found[1] + places[i]] = scores[i]
    # By lanes, so that neighbouring threads do not wait for each other.
    cuda.atomic.add(counts, _ABOVE * LANES + thread % LANES, above)
    cuda.atomic.add(counts, _ZEROS * LANES + thread % LANES, zeros)
    cuda.syncthreads()
    for what in range(thread, 2, threads):
        total = 0
        for i in range(LANES):
            total += counts[what * LANES + i]
        cuda.atomic.add(totals, sample * TOTALS + what, total)


@_device
def _is_last(totals, found):
    """Whether all other blocks of the sample have finished; what they have found."""
    own, thread = cuda.blockIdx.x * TOTALS, cuda.threadIdx.x
    cuda.threadfence()
    cuda.syncthreads()
    if thread == 0:
        found[0] = cuda.atomic.add(totals, own + _TICKETS, 1)
    cuda.syncthreads()
    if found[0] < cuda.gridDim.y - 1:
        return False
    cuda.threadfence()
    cuda.syncthreads()
    for what in range(thread, TOTALS, cuda.blockDim.x):
        found[what] = cuda.atomic.exch(totals, own + what, 0)
    cuda.syncthreads()
    return True


@_kernel
def select(
    arena, base, stride, active, a_base, units, mode, eps, low, high, fraction, tau,
    runs, first, last, values, totals, sieve,
):  # fmt: skip
    """τ of each sample, by `gridDim.y` blocks each.

    Parameters
    ----------
    arena, active : float32 array
        Of which ``arena[base + n · stride + u]`` and ``active[a_base + n · units + u]`` are
        unit u's gradient and activation.
    mode, eps
        The score, see `kernels.cpu`.
    low, high, fraction
        Ranks from the largest score on, 0-based: that of the lower score and that of the upper, and
        how far τ lies from the one to the other.
    tau : float64 array, (N,)
        The result.
    runs, first, last
        Both scores should lie between those of ranks `first` and `last` of a sample of
        RUN · runs units; −1 and RUN · runs: nothing is known.
    values : float32 array, (N · units,)
        To write to.
    totals : int32 array, (N · TOTALS,)
        All zero before and after.
    sieve : uint32 array, (N · ⌈units / WORD⌉,)
        The result, too: a bit for each unit, 0 only where the score is not above τ.
    """
    sample, thread = cuda.blockIdx.x, cuda.threadIdx.x
    counts = cuda.shared.array(BINS, np.int32)
    sums = cuda.shared.array(THREADS, np.int32)
    prefixes = cuda.shared.array(2, np.int64)
    ranks = cuda.shared.array(2, np.int64)
    products = cuda.shared.array(1, np.float64)
    found = cuda.shared.array(TOTALS, np.int32)
    row, where, own = base + sample * stride, a_base + sample * units, sample * units
    gradients, activations = arena[row : row + units], active[where : where + units]
    listed = values[own : own + units]
    _begin(prefixes, ranks, first, last)
    if runs > 0:
        _clear(counts)
        _count(
            counts, 0, 0, 0, RUN * runs, units // runs, gradients, activations, mode, eps
        )  # fmt: skip
        for which in range(2):
            _narrow(counts, which, 0, prefixes, ranks, sums)
    if thread == 0:
        found[0] = 0
    _clear(counts)
    lowest = prefixes[0] >> _shift(0)
    highest = prefixes[1] >> _shift(0) if last < RUN * runs else BINS - 1
    _list(
        listed, totals, sieve, lowest, highest, counts, found, gradients, activations, mode, eps
    )  # fmt: skip
    if not _is_last(totals, found):
        return
    above, zeros, size = found[_ABOVE], found[_ZEROS], found[_LISTED]
    is_listed = above <= high and low < above + zeros + size
    if is_listed:
        gradients, activations, mode = listed, listed, LISTED
    else:  # the sample was not like the others
        above, zeros, size = 0, 0, np.int32(units)
    wanted = 1 if low == high else 2
    zeros = zeros if thread == 0 else 0
    _begin(prefixes, ranks, low - above, high - above)
    for which in range(wanted):
        for step in range(DIGITS):
            _clear(counts)
            _count(
                counts, prefixes[which], step, zeros, size, 0, gradients, activations, mode, eps
            )  # fmt: skip
            _narrow(counts, which, step, prefixes, ranks, sums)
    _finish(prefixes, wanted, fraction, products, tau, sample)
    if not (is_listed and _score_of(np.uint32(prefixes[0])) > 0):
        # More may pass: what was not listed, or, at τ = 0, products that are too small for a float.
        for i in range(thread, _words(units), cuda.blockDim.x):
            sieve[sample * _words(units) + i] = np.uint32(2**WORD - 1)


# --- activations ----------------------------------------------------------------------------------


@_device
def _selected(mode, a, r, eps, ceiling, strict, tau):
    """Whether a gradient passes."""
    if mode == EVERYTHING:
        return True
    if a >= ceiling:
        return False
    if mode < PASS_AR or tau == 0:
        return _passes(mode, a, r, eps)
    return np.float64(_score(mode, a, r, eps)) > tau and (a > 0 or not strict)


@_device
def _pass(
    passed, begin, step, end, gradients, activations, mode, eps, ceiling, strict, fixed, tau, sieve
):  # fmt: skip
    """The gradients of ITEMS units, each `step` after the other, where they pass; else 0.

    All lie before `end`. None is waited for before all are asked for.
    """
    is_open = cuda.local.array(ITEMS, np.uint32)
    r = cuda.local.array(ITEMS, np.float32)
    a = cuda.local.array(ITEMS, np.float32)
    threshold = fixed if fixed == fixed else tau[cuda.blockIdx.x]
    for i in range(ITEMS):
        u = np.uint32(min(begin + i * step, end - 1))
        is_open[i] = begin + i * step < end
        if fixed != fixed:
            is_open[i] &= sieve[u // np.uint32(WORD)] >> u % np.uint32(WORD)
    for i in range(ITEMS):
        u = np.uint32(begin + i * step)
        if is_open[i]:
            r[i] = gradients[u]
            a[i] = activations[u] if mode != EVERYTHING else r[i]
    for i in range(ITEMS):
        passes = is_open[i] and _selected(mode, a[i], r[i], eps, ceiling, strict, threshold)
        passed[i] = r[i] if passes else np.float32(0)


@_kernel
def activate(
    arena, base, stride, active, a_base, units, mode, eps, ceiling, strict, fixed, tau, sieve,
    to, to_stride, adds,
):  # fmt: skip
    """What passes an activation, all of it.

    Parameters
    ----------
    fixed : float
        τ, or NaN: each sample has its own in `tau`, and its bits in `sieve`, see `select`.
    to, to_stride, adds
        Where the result goes, which may be where the gradient lies; whether it is added there.
    """
    sample = cuda.blockIdx.x
    row, where, bits = base + sample * stride, a_base + sample * units, sample * _words(units)
    gradients, activations = arena[row : row + units], active[where : where + units]
    sieve = sieve[bits : bits + _words(units)]
    passed = cuda.local.array(ITEMS, np.float32)
    for begin in range(_first(), units, ITEMS * _step()):
        _pass(
            passed, begin, _step(), units, gradients, activations, mode, eps, ceiling, strict,
            fixed, tau, sieve,
        )  # fmt: skip
        for i in range(ITEMS):
            u = begin + i * _step()
            if u < units:
                _put(arena, to + sample * to_stride + u, passed[i], adds)


@_device
def _first():
    """The first unit of a sample that this thread does."""
    return cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x


@_device
def _step():
    """How far it is to the next."""
    return cuda.gridDim.y * cuda.blockDim.x


@_device
def _put(arena, at, value, adds):
    arena[at] = arena[at] + value if adds else value


@_kernel
def compact(
    arena, base, stride, active, a_base, channels, height, width, border, mode, eps, ceiling,
    strict, fixed, tau, sieve, counts, which, values,
):  # fmt: skip
    """What passes an activation, as a list by pixel; each block does `blockDim.x` pixels.

    Parameters
    ----------
    border : int
        Whether the padding trick is on: the outermost pixels have nothing.
    counts : int32 array, (N · P,); which : int32 array, (N · P · C,); values : float32 array
        How many of each pixel pass, their channels, and their gradients.
    """
    sample, x, y = cuda.blockIdx.x, cuda.threadIdx.x, cuda.threadIdx.y
    pixels = height * width
    p = cuda.blockIdx.y * cuda.blockDim.x + x
    found = cuda.shared.array(THREADS, np.int32)
    passed = cuda.local.array(ITEMS, np.float32)
    units = channels * pixels
    row, where, bits = base + sample * stride, a_base + sample * units, sample * _words(units)
    gradients, activations = arena[row : row + units], active[where : where + units]
    sieve = sieve[bits : bits + _words(units)]
    first, last = 0, 0
    if p < pixels and not (border and _on_border(p, height, width)):
        first = channels * y // cuda.blockDim.y
        last = channels * (y + 1) // cuda.blockDim.y
    own = 0
    for c in range(first, last, ITEMS):
        _pass(
            passed, c * pixels + p, pixels, last * pixels, gradients, activations, mode, eps,
            ceiling, strict, fixed, tau, sieve,
        )  # fmt: skip
        for i in range(ITEMS):
            own += passed[i] != 0
    found[y * cuda.blockDim.x + x] = own
    cuda.syncthreads()
    if p >= pixels:
        return
    before = 0
    for i in range(y):
        before += found[i * cuda.blockDim.x + x]
    if y == cuda.blockDim.y - 1:
        counts[sample * pixels + p] = before + own
    if own == 0:
        return
    end = (sample * pixels + p) * channels + before
    for c in range(first, last, ITEMS):
        _pass(
            passed, c * pixels + p, pixels, last * pixels, gradients, activations, mode, eps,
            ceiling, strict, fixed, tau, sieve,
        )  # fmt: skip
        for i in range(ITEMS):
            if passed[i] != 0:
                which[end] = c + i
                values[end] = passed[i]
                end += 1


@_device
def _on_border(p, height, width):
    y, x = p // width, p % width
    return y == 0 or y == height - 1 or x == 0 or x == width - 1


@_kernel
def ratio(
    arena, base, stride, active, a_base, b_base, b_stride, units, mode, eps, to, to_stride, adds
):  # fmt: skip
    """A gradient times a ratio at a Relu.

    The activations are its inputs, and those at a baseline; of BY_EPSILON, its outputs.

    Parameters
    ----------
    b_base, b_stride
        Where the inputs at the baseline lie in `active`; stride 0: one for all samples.
    """
    sample = cuda.blockIdx.x
    for u in range(_first(), units, _step()):
        r, z = arena[base + sample * stride + u], active[a_base + sample * units + u]
        if mode == BY_EPSILON:
            r = r * z / (z + eps) if z != 0 else np.float32(0)
        else:
            z0 = active[b_base + sample * b_stride + u]
            dz, da = z - z0, _relu(z) - _relu(z0)
            if abs(dz) > eps:
                r = r * (da / dz)
            elif not (z + z0) / np.float32(2) > 0:
                r = r * np.float32(0)
        _put(arena, to + sample * to_stride + u, r, adds)


# --- transposes of linear steps -------------------------------------------------------------------


@_device
def _along(origin, stride, extent):
    """The window of one axis that begins at a padded coordinate, or −1."""
    if stride > 1:
        if origin % stride != 0:
            return -1
        origin //= stride
    return origin if 0 <= origin < extent else -1


@_device
def _window(y, x, sh, sw, s_height, s_width):
    """The output whose window begins at a padded pixel, or −1."""
    oy, ox = _along(y, sh, s_height), _along(x, sw, s_width)
    return oy * s_width + ox if oy >= 0 and ox >= 0 else -1


@_kernel
def transpose(
    arena, to, to_stride, adds, channels, height, width, counts, which, values, s_channels,
    s_height, s_width, weights, w_base, row, kh, kw, sh, sw, dh, dw, top, left, group, tile,
):  # fmt: skip
    """A convolution's transpose from the list of nonzeros of its output's gradient.

    Each block does `tile` pixels and `blockDim.x` channels of one sample: threads along x read
    neighbouring weights, and a tile in shared memory turns the sums round, so that neighbouring
    threads write neighbouring pixels.

    Parameters
    ----------
    channels, height, width
        Of the target.
    s_channels, s_height, s_width
        Of the source.
    row : int
        Weights of one output channel.
    tile : int
        tile · (blockDim.x + 1) ≤ TILE.
    """
    sample, x = cuda.blockIdx.x, cuda.threadIdx.x
    sums = cuda.shared.array(TILE, np.float32)
    pixels, s_pixels = height * width, s_height * s_width
    c_first, p_first = cuda.blockIdx.z * cuda.blockDim.x, cuda.blockIdx.y * tile
    c = c_first + x
    ins, outs = channels // group, s_channels // group
    own, inside = c // ins, c % ins
    for t in range(cuda.threadIdx.y, tile, cuda.blockDim.y):
        p = p_first + t
        if p >= pixels or c >= channels:
            continue
        y0, x0 = p // width + top, p % width + left
        total = np.float32(0)
        for i in range(kh):
            for j in range(kw):
                o = _window(y0 - i * dh, x0 - j * dw, sh, sw, s_height, s_width)
                if o < 0:
                    continue
                place = sample * s_pixels + o
                begin = place * s_channels
                tap = w_base + (i * kw + j) * ins + inside
                for k in range(begin, begin + counts[place]):
                    co = which[k]
                    if group == 1 or co // outs == own:
                        total += values[k] * weights[tap + co * row]
        sums[t * (cuda.blockDim.x + 1) + x] = total
    cuda.syncthreads()
    thread, threads = cuda.threadIdx.y * cuda.blockDim.x + x, cuda.blockDim.x * cuda.blockDim.y
    for i in range(thread, tile * cuda.blockDim.x, threads):
        p, c = p_first + i % tile, c_first + i // tile
        if p < pixels and c < channels:
            at = to + sample * to_stride + c * pixels + p
            _put(arena, at, sums[i % tile * (cuda.blockDim.x + 1) + i // tile], adds)


@_kernel
def add(
    arena, base, stride, to, to_stride, adds, units, pixels, weights, w_base, height, width, border
):  # fmt: skip
    """Copy a gradient or add it to another, times one factor per channel where `w_base` ≥ 0.

    Parameters
    ----------
    border : int
        Whether the padding trick clears the outermost of `height` · `width` pixels.
    """
    sample = cuda.blockIdx.x
    for u in range(_first(), units, _step()):
        r = arena[base + sample * stride + u]
        if w_base >= 0:
            r = r * weights[w_base + u // pixels]
        if border and _on_border(u % pixels, height, width):
            r = np.float32(0)
        _put(arena, to + sample * to_stride + u, r, adds)


# --- pools ----------------------------------------------------------------------------------------


@_kernel
def max_pool(
    arena, base, stride, active, x_base, y_base, to, to_stride, adds, units, height, width,
    s_height, s_width, kh, kw, sh, sw, dh, dw, top, left,
):  # fmt: skip
    """To the first maximum in row-major window order.

    Parameters
    ----------
    x_base, y_base
        Where the pool's input and output lie in `active`.
    units, height, width
        Of the input, which the result has the shape of; `s_height`, `s_width` of the output.
    """
    sample, pixels, s_pixels = cuda.blockIdx.x, height * width, s_height * s_width
    s_units = units // pixels * s_pixels
    for u in range(_first(), units, _step()):
        c, p = u // pixels, u % pixels
        y, x = p // width, p % width
        plane = x_base + sample * units + c * pixels
        own, total = active[plane + p], np.float32(0)
        for i in range(kh):
            for j in range(kw):
                first = y - i * dh, x - j * dw
                o = _window(first[0] + top, first[1] + left, sh, sw, s_height, s_width)
                if o < 0 or own != active[y_base + sample * s_units + c * s_pixels + o]:
                    continue
                if _is_first(active, plane, own, first, i, j, kw, dh, dw, height, width):
                    total += arena[base + sample * stride + c * s_pixels + o]
        _put(arena, to + sample * to_stride + u, total, adds)


@_device
def _is_first(active, plane, maximum, first, i, j, kw, dh, dw, height, width):
    """Whether the maximum is nowhere in the window before kernel offset (i, j)."""
    for k in range(i * kw + j):
        y, x = first[0] + k // kw * dh, first[1] + k % kw * dw
        if 0 <= y < height and 0 <= x < width and active[plane + y * width + x] == maximum:
            return False
    return True


@_device
def _cells(o, height, width, top, left, window):
    """How many cells of height · width the window of output `o` reads."""
    s_width, kh, kw, sh, sw, dh, dw = window
    i_first, i_last = _kernel_range(o // s_width * sh - top, dh, kh, height)
    j_first, j_last = _kernel_range(o % s_width * sw - left, dw, kw, width)
    return (i_last - i_first) * (j_last - j_first)


@_kernel
def spread(
    arena, base, stride, active, x_base, padded_height, padded_width, to, to_stride, adds, units,
    height, width, s_height, s_width, kh, kw, sh, sw, dh, dw, top, left,
):  # fmt: skip
    """To all cells of a window alike.

    Parameters
    ----------
    x_base : int
        Where the pool's input lies in `active`, by which the result is multiplied; −1: by nothing.
    padded_height, padded_width
        0: the cells of the input are counted, and divided by; else those with the padding, which
        is what has these extents; −1: nothing is divided.
    """
    sample, pixels, s_pixels = cuda.blockIdx.x, height * width, s_height * s_width
    for u in range(_first(), units, _step()):
        c, p = u // pixels, u % pixels
        y0, x0, total = p // width + top, p % width + left, np.float32(0)
        for i in range(kh):
            for j in range(kw):
                o = _window(y0 - i * dh, x0 - j * dw, sh, sw, s_height, s_width)
                if o < 0:
                    continue
                r = arena[base + sample * stride + c * s_pixels + o]
                if padded_height >= 0:
                    window = s_width, kh, kw, sh, sw, dh, dw
                    if padded_height > 0:
                        cells = _cells(o, padded_height, padded_width, 0, 0, window)
                    else:
                        cells = _cells(o, height, width, top, left, window)
                    r = r / np.float32(cells)
                total += r
        if x_base >= 0:
            total = active[x_base + sample * units + u] * total
        _put(arena, to + sample * to_stride + u, total, adds)


@_kernel
def share(
    arena, base, stride, active, x_base, eps, to, to_stride, units, height, width, s_height,
    s_width, kh, kw, sh, sw, dh, dw, top, left,
):  # fmt: skip
    """Of proportional redistribution, what each cell of a window gets per unit of activation.

    R / (average + ε) / cells, in the shape of the pool's output, which `units` counts.
    """
    sample, pixels, s_pixels = cuda.blockIdx.x, height * width, s_height * s_width
    s_units = units // s_pixels * pixels
    for u in range(_first(), units, _step()):
        o = u % s_pixels
        y0, x0 = o // s_width * sh - top, o % s_width * sw - left
        i_first, i_last = _kernel_range(y0, dh, kh, height)
        j_first, j_last = _kernel_range(x0, dw, kw, width)
        plane = x_base + sample * s_units + u // s_pixels * pixels
        total = np.float32(0)
        for i in range(i_first, i_last):
            for j in range(j_first, j_last):
                total += active[plane + (y0 + i * dh) * width + x0 + j * dw]
        count = np.float32((i_last - i_first) * (j_last - j_first))
        r = arena[base + sample * stride + u] / (total / count + eps) / count
        arena[to + sample * to_stride + u] = r
