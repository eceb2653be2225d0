"""The specification: every kernel in plain NumPy, one formula each. The kernels equal it bit for bit."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from fastopt import _core

# ---- sums ---------------------------------------------------------------------------------------------------

SUMS = _core.SUMS  # sizes that define the order of sums; cpp/kernels/contract.hpp explains them


def stretches(n, size):
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]


def partial_sums(terms, count):
    """Term k of the last axis is added to partial sum k % count, from left to right."""
    *shape, n = terms.shape
    steps = 1 - n // -count
    padded = np.zeros((*shape, steps * count), terms.dtype)
    padded[..., count : count + n] = terms
    return np.add.accumulate(padded.reshape(*shape, steps, count), axis=-2)[..., -1, :]


def tree(sums):
    """The sum over the last axis, a power of two: its upper half is added to the lower one, until one is left."""
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


# ---- optimizers -------------------------------------------------------------------------------------------


class Hyper(NamedTuple):
    """The numbers of one step; cpp/kernels/contract.hpp explains them."""

    step_size: float
    weight_decay: float = 0.0
    decay: float = 1.0
    decay1: float = 0.0
    blend1: float = 1.0
    decay2: float = 0.0
    blend2: float = 1.0
    eps: float = 0.0
    grad_scale: float = 1.0
    shrink: float = 0.0
    keep_zeros: bool = False


def flush(x):
    """Subnormal numbers become zero of their sign, before and after every operation of an optimizer."""
    tiny = np.finfo(x.dtype).tiny
    return np.where(np.abs(x) < tiny, np.copysign(x.dtype.type(0), x), x)


class Flushed:
    """An array whose every operation flushes; scalars are rounded to its dtype first, as the kernels do."""

    def __init__(self, x):
        self.x = flush(np.asarray(x))

    def _with(self, other, op, swap=False):
        other = other.x if isinstance(other, Flushed) else flush(self.x.dtype.type(other))
        with np.errstate(all="ignore"):
            return Flushed(op(other, self.x) if swap else op(self.x, other))

    def __add__(self, other):
        return self._with(other, np.add)

    def __sub__(self, other):
        return self._with(other, np.subtract)

    def __mul__(self, other):
        return self._with(other, np.multiply)

    def __truediv__(self, other):
        return self._with(other, np.divide)

    def __radd__(self, other):
        return self._with(other, np.add, swap=True)

    def __rmul__(self, other):
        return self._with(other, np.multiply, swap=True)

    def sqrt(self):
        with np.errstate(all="ignore"):
            return Flushed(np.sqrt(self.x))


# Which states are never negative, by rule.
POSITIVE = {
    "sgd": (),
    "momentum": (False,),
    "nesterov": (False,),
    "adagrad": (True,),
    "rmsprop": (True,),
    "rmsprop_momentum": (True, False),
    "rmsprop_centered": (True, False),
    "rmsprop_centered_momentum": (True, False, False),
    "adam": (False, True),
    "amsgrad": (False, True, True),
    "lion": (False,),
}


def step(rule, h, w, g, states):
    """One step of `rule` with the numbers `h`: the new w and states."""
    before, zero, one = flush(w), w.dtype.type(0), w.dtype.type(1)
    w, g, s = Flushed(w), Flushed(g), [Flushed(x) for x in states]
    smallest = np.finfo(before.dtype).tiny
    eps = max(h.eps, float(smallest))
    scale, rescale = h.grad_scale, 1.0
    if 0 < abs(scale) < 2**-126:  # it would be flushed, though its products may be normal numbers
        scale, rescale = scale / 2**-126, 2**-126
    g = g * rescale * scale
    if h.weight_decay != 0:
        g = g + h.weight_decay * w
    w = w * h.decay
    if rule == "sgd":
        w = w - h.step_size * g
    elif rule == "momentum":
        s[0] = h.decay1 * s[0] + h.blend1 * g
        w = w - h.step_size * s[0]
    elif rule == "nesterov":
        s[0] = h.decay1 * s[0] + h.blend1 * g
        w = w - h.step_size * (g + h.decay1 * s[0])
    elif rule == "adagrad":  # Duchi, Hazan and Singer, 2011
        s[0] = s[0] + g * g
        w = w - h.step_size * g / (s[0].sqrt() + eps)
    elif rule.startswith("rmsprop"):  # Tieleman and Hinton, 2012; centered: Graves, 2013
        s[0] = h.decay2 * s[0] + h.blend2 * g * g
        variance = s[0]
        if "centered" in rule:
            s[-1] = s[-1] + h.blend2 * (g - s[-1])
            variance = variance - s[-1] * s[-1]
            least = 64 * np.finfo(before.dtype).eps * s[0]  # below, it is but rounding errors
            variance = Flushed(np.where(variance.x < least.x, least.x, variance.x))
        direction = g / (variance.sqrt() + eps)
        if "momentum" in rule:
            s[1] = direction = h.decay1 * s[1] + direction
        w = w - h.step_size * direction
    elif rule in ("adam", "amsgrad"):  # Kingma and Ba, 2015, in the order of its section 2; Reddi et al., 2018
        s[0] = s[0] + h.blend1 * (g - s[0])
        s[1] = h.decay2 * s[1] + h.blend2 * g * g
        squares = s[1]
        if rule == "amsgrad":  # chosen, not computed: as it was stored
            largest = np.where(s[1].x <= s[2].x, states[2], s[1].x)
            squares = Flushed(largest)
        w = w - h.step_size * s[0] / (squares.sqrt() + eps)
    elif rule == "lion":  # Chen et al., 2023
        blend = h.decay1 * s[0] + h.blend1 * g
        sign = Flushed(np.where(blend.x > 0, one, np.where(blend.x < 0, -one, blend.x)))
        s[0] = h.decay2 * s[0] + h.blend2 * g
        w = w - h.step_size * sign
    else:
        raise ValueError(rule)
    if h.shrink != 0:  # proximal step of the L1 norm
        most = w.x.dtype.type(h.shrink)
        w = w - Flushed(np.clip(w.x, -most, most))
    result = np.where(before == 0, zero, w.x) if h.keep_zeros else w.x
    return result, [*(x.x for x in s[:2]), largest] if rule == "amsgrad" else [x.x for x in s]


# ---- narrow parameters and states -------------------------------------------------------------------------


def random_bits(n, noise):
    """32 bits of chance for each element: multiples of the golden ratio, from a start that is mixed of the noise.

    The start is the last step of MurmurHash3 (Appleby, 2011). Multiples of the golden ratio lie more evenly than
    random numbers do (Weyl, 1916).
    """
    h = np.array([noise], np.uint32)
    h = (h ^ h >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    h = (h ^ h >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return (h ^ h >> np.uint32(16)) + np.arange(n, dtype=np.uint32) * np.uint32(0x9E3779B9)


def chance_of(random, state, bits):
    """So many bits of it, others for each state; parameters are rounded by the lowest."""
    return random << np.uint32((0, 12, 6)[state]) >> np.uint32(32 - bits)


def raised(x, chance):
    """Bits of float32, with chance added to what is about to be dropped; NaN stay as they are."""
    return x.view(np.uint32) + np.where(np.isnan(x), np.uint32(0), chance)


def bf16_bits(x, chance=None):
    """Upper 16 bits of float32, rounded half to even, or up or down by chance."""
    if chance is not None:
        return (raised(x, chance) >> np.uint32(16)).astype(np.uint16)
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (np.where(np.isnan(x), bits | np.uint32(0x400000), rounded) >> np.uint32(16)).astype(np.uint16)


def f16_bits(x, chance=None):
    """float16 bits of float32, rounded half to even, or up or down by chance."""
    if chance is None:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    sign, rest, chance = (
        bits >> np.uint32(16) & np.uint32(0x8000),
        bits & np.uint32(0x7FFFFFFF),
        chance & np.uint32(0x1FFF),
    )
    half = (rest - np.uint32(112 << 23) + chance) >> np.uint32(13)
    with np.errstate(all="ignore"):
        steps = flush(rest.view(np.float32)) * np.float32(2**24) + chance.astype(np.float32) * np.float32(2**-13)
        half = np.where(rest < 0x38800000, np.where(rest < 0x38800000, steps, 0).astype(np.uint32), half)
    half = np.where(rest >= 0x47800000, np.uint32(0x7C00), half)
    half = np.where(rest > 0x7F800000, np.uint32(0x7E00), half)
    return (sign | half).astype(np.uint16)


def widen_bits(bits, dtype):
    """float32 of the 16 bits of a float16 or bfloat16."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def widen_u8(codes, exponents, positive):
    """8-bit state: 3 bits of mantissa and 4 of exponent, counted from that of the block of 256, behind a sign.

    States that are never negative have 5 bits of exponent, and a code 0 that is not zero unless the whole block is.
    """
    code = codes.astype(np.uint32)
    base = np.repeat(exponents.astype(np.uint32), 256)[: codes.size] << np.uint32(3)
    if positive:
        return ((code + base) << np.uint32(20)).view(np.float32)
    rest = code & np.uint32(127)
    bits = np.where(rest == 0, np.uint32(0), (rest + base) << np.uint32(20))
    return (bits + (code << np.uint32(24) & np.uint32(0x80000000))).view(np.float32)


def reach(magnitude, before, positive):
    """The magnitude that the codes of a block have to reach; it had the exponent `before`.

    NaN and infinity do not count. Nor do up to 4 elements that are more than 5 binades (10, if the state is never
    negative) above what the codes could reach before and above all other elements: a bad gradient must not make the
    others zero. Where a few elements are larger than that for good, the exponent follows in a few steps.
    """
    exponents, binades = (31, 10) if positive else (15, 5)
    if magnitude.max() < 0x7F8 and magnitude.max() >> 3 <= before + exponents + binades:
        return magnitude.max()
    ranked = np.sort(np.where(magnitude < 0x7F8, magnitude, 0))[::-1]
    others = max((before + exponents << 3) + 7 if before > 0 else 0, ranked[4] if ranked.size > 4 else 0)
    return min(ranked[0], others + (binades << 3)) if others > 0 else ranked[0]


def narrow_u8(x, positive, chance, before=None):
    """Codes and exponents of a state, rounded by 20 bits of chance; `before` are the exponents that it had.

    What is beyond the codes, and NaN, becomes the largest code. Without `before` nothing is an outlier.
    """
    bits = (np.minimum(x.view(np.uint32), 0x7FF00000) + chance if positive else raised(x, chance)) >> np.uint32(20)
    magnitude = (bits & np.uint32(0x7FF)).astype(np.int64)
    blocks = [magnitude[at : at + 256] for at in range(0, x.size, 256)]
    if before is None:
        largest = np.array([m.max() for m in blocks], np.int64)
    else:
        largest = np.array([reach(m, int(b), positive) for m, b in zip(blocks, before, strict=True)], np.int64)
    exponents = np.maximum((largest >> 3) - (31 if positive else 15), 0)
    code = magnitude - np.repeat(exponents << 3, 256)[: x.size]
    code = np.clip(code, 0, 255 if positive else 127).astype(np.uint32)
    if not positive:
        code |= bits >> np.uint32(4) & np.uint32(0x80)
    return code.astype(np.uint8), exponents.astype(np.uint8)


def step_narrow(rule, h, w, dtype, g, g_dtype, states, state_dtype, noise, stochastic=False, master=None):
    """A step of parameters given as 16 bits (float32 as it is), gradients likewise, states as stored.

    `states`: float32, 16 bits of bfloat16, or pairs of codes and exponents. Returns w, states and master.
    A parameter that is not its rounded master was changed by its owner, and takes the place of the master.
    """
    random = random_bits(w.size, noise)
    wide_w = w if dtype == "float32" else widen_bits(w, dtype)
    if master is not None:
        rounded = f16_bits(master) if dtype == "float16" else bf16_bits(master)
        master = np.where(rounded == w, master, wide_w)
        if h.keep_zeros:
            master = np.where(flush(wide_w) == 0, wide_w, master)
    wide_g = g if g_dtype == "float32" else widen_bits(g, g_dtype)
    positive = POSITIVE[rule]
    if state_dtype == "float32":
        wide_s = states
    elif state_dtype == "bfloat16":
        wide_s = [widen_bits(s, "bfloat16") for s in states]
    else:
        wide_s = [widen_u8(*s, p) for s, p in zip(states, positive, strict=True)]
    new, new_s = step(rule, h, wide_w if master is None else master, wide_g, wide_s)
    if state_dtype == "bfloat16":
        new_s = [bf16_bits(s, chance_of(random, i, 16)) for i, s in enumerate(new_s)]
    elif state_dtype == "uint8":
        new_s = [
            narrow_u8(s, p, chance_of(random, i, 20), old[1])
            for i, (s, p, old) in enumerate(zip(new_s, positive, states, strict=True))
        ]
    chance = random & np.uint32(0xFFFF) if stochastic and master is None else None
    if dtype == "float32":
        return new, new_s, None
    bits = f16_bits(new, chance) if dtype == "float16" else bf16_bits(new, chance)
    return bits, new_s, None if master is None else new


def sum_squares(x):
    """In double: partial sums of every 4096 elements, or every 256 of a 16-bit type; 4096 at a time in order."""
    narrow = x.dtype.itemsize == 2
    total = 0.0
    for at in range(0, x.size, 4096):
        chunk = x[at : at + 4096].astype(np.float64)
        sums = 0.0
        for first in range(0, chunk.size, 256 if narrow else 4096):
            part = chunk[first : first + 256] if narrow else chunk
            sums += tree(partial_sums(part * part, SUMS["partials"]))
        total += sums
    return total


def summed(ranks):
    """The gradients that all ranks step by: for each tensor, those of the ranks added in order in float32."""
    sums = []
    for grads in zip(*ranks, strict=True):
        total = np.zeros(grads[0].shape, np.float32)
        for g in grads:
            total = total + g.astype(np.float32)
        sums.append(total)
    return sums


def scale_and_norm(sums, ranks, grad_scale, max_norm):
    """The factor of the sums, which makes the mean of them and clips it, and the norm of the mean before clipping."""
    scale = grad_scale / ranks
    norm = abs(scale) * np.sqrt(sum(sum_squares(g.reshape(-1)) for g in sums))
    return scale * min(1.0, max_norm / (norm + 1e-6)), norm


# ---- quantization -----------------------------------------------------------------------------------------


FLT_MAX = np.finfo(np.float32).max
# The largest float32 that rounds to a finite number of each dtype.
LIMITS = {
    "float16": np.nextafter(np.float32(65520), np.float32(0)),
    "bfloat16": np.nextafter(np.float32(float.fromhex("0x1.ffp127")), np.float32(0)),
    "float32": FLT_MAX,
    "float64": FLT_MAX,
}


def decoded(code, scale, minimum):
    """minimum + scale * code in float32; halved where scale * code could overflow."""
    with np.errstate(over="ignore"):
        twice = np.where(scale > np.float32(2.0**119), np.float32(2), np.float32(1))
        return (minimum / twice + scale / twice * code) * twice


def bounded(scale, minimum, bits, limit, dtype):
    """The largest scale of a dtype, up to the given one, whose largest code stands for `limit` or less."""
    while decoded(np.float32(2**bits - 1), scale, minimum) > limit:
        scale = np.float32(np.nextafter(dtype(scale), dtype(0)))
    return scale


def grid(low, high, bits, half, limit=FLT_MAX):
    """Scale and minimum as stored, how to code against them, and whether float16 fits.

    code = round((x * half - offset) / divisor * levels)
    """
    f = np.float32
    top = f(2**bits - 1)
    with np.errstate(all="ignore"):
        width = high - low
        if not high > low:
            exact = (f(0), low, f(0), f(0), f(1), f(0))
        elif np.isinf(width):  # the difference overflows: halve both
            scale = bounded(high / top - low / top, low, bits, limit, f)
            exact = (scale, low, f(0.5), low * f(0.5), high * f(0.5) - low * f(0.5), top)
        else:
            scale = width / top
            if scale < np.finfo(f).tiny:
                # Subnormal, and so too coarse for width / top: round up, code against what is stored.
                scale = np.nextafter(scale, f(np.inf)) if scale * top < width else scale
                exact = (scale, low, f(1), low, scale, f(1))
            else:
                exact = (bounded(scale, low, bits, limit, f), low, f(1), low, width, top)
        if not half:
            return exact, True
        rounded = f(np.float16(low))
        smallest = f(2**-14)
        if exact[0] == 0:
            fits = abs(rounded) <= 65504 and (low == 0 or abs(rounded) >= smallest)
            return (f(0), rounded, f(0), f(0), f(1), f(0)), bool(fits)
        scale = f(np.float16((high - rounded) / top))
        fits = smallest <= scale <= 65504 and abs(rounded - low) <= exact[0] * f(0.5)
        if fits:
            scale = bounded(scale, rounded, bits, limit, np.float16)
        return (scale, rounded, f(1), rounded, scale, f(1)), bool(fits)


def fit(x, scale, minimum, bits, size, importance=None):
    """Least squares: codes of the pair, then a pair that fits these codes better (Lloyd, 1982), some times over.

    With u = (x - minimum) / scale, the line a + b * (code - middle) that fits u - code leads to the best pair for these
    codes. All steps but the last go twice as far, unless that would halve the scale or codes have two bits. Groups of
    up to `size` values are fitted alike. The squared error of each value is multiplied by its importance.
    """
    f = np.float32
    top = f(2**bits - 1)
    middle = top / f(2)
    steps = next(steps for most, steps in ((32, 3), (128, 4), (512, 5), (np.inf, 8)) if size <= most)
    if bits == 2:
        steps = 8
    real = f if size <= 512 else np.float64

    def totals(*values):
        return [real(total) for total in tree(partial_sums(np.stack(values), SUMS["partials"]))]

    n, least, v = real(f(len(x))), scale * f(2**-20), f(1)
    noise = real(2.0**-16 if size <= 512 else 0.0 if importance is None else 2.0**-20)
    if importance is not None:
        (n,), v = totals(importance), importance
    for step in range(steps):
        u = (x - minimum) * (f(1) / scale)
        code = np.clip(np.rint(u), f(0), top)
        d, r = code - middle, u - code
        sd, sdd, sr, srd = totals(v * d, v * d * d, v * r, v * r * d)
        spread = n * sdd - sd * sd
        if not spread > n * sdd * noise:
            continue
        b = (n * srd - sd * sr) / spread
        a = (sr - b * sd) / n
        far = real(scale) * (1 if step + 1 == steps or bits == 2 or b < real(-0.25) else 2)
        better = f(real(scale) + far * b), f(real(minimum) + far * (a - b * real(middle)))
        if least <= better[0] <= 2.0**100:
            scale, minimum = better
    return scale, minimum


def quantize(w, bits, group_size, half, refit=False, limit=FLT_MAX, importance=None):
    """Codes (one a byte), scale and minimum of a matrix; float32 parameters where float16 does not fit.

    `importance` has the shape of `w`. Its largest number is brought below 1 by a power of 2.

    No code stands for a value beyond `limit`: a scale is lowered, and a fitted pair is given up, where one would.
    """
    f = np.float32
    rows, cols = w.shape
    size = {None: cols, -1: cols}.get(group_size, group_size)
    groups = -(-cols // size) if cols else 0
    codes = np.zeros((rows, cols), np.uint8)
    shape = (1, 1) if group_size is None else (rows, groups)
    scale, minimum = np.zeros(shape, f), np.zeros(shape, f)
    if importance is not None and importance.size:
        importance = np.ldexp(importance, -np.frexp(importance.max())[1])
    for r in range(rows):
        for g in range(groups):
            part = slice(g * size, min((g + 1) * size, cols))
            values = w.reshape(-1) if group_size is None else w[r, part]
            # + 0 makes -0 into +0: which of the two a minimum is would depend on the order
            low, high = values.min() + f(0), values.max() + f(0)
            (s, m, factor, offset, divisor, levels), fits = grid(low, high, bits, half, limit)
            exact = grid(low, high, bits, False, limit)[0]

            def within(s, m):
                return m >= -limit and decoded(f(2**bits - 1), s, m) <= limit

            if refit and exact[2] == 1 and 2.0**-100 <= exact[0] <= 2.0**100:
                weight = None
                if importance is not None:
                    weight = importance.reshape(-1) if group_size is None else importance[r, part]
                most = len(values) if group_size is None else min(size, cols)
                best = fit(values, exact[0], exact[1], bits, most, weight)
                if within(*best):
                    pair = best
                    if half:
                        with np.errstate(over="ignore"):
                            pair = f(np.float16(best[0])), f(np.float16(best[1]))
                        good = 2.0**-14 <= pair[0] <= 65504 and abs(pair[1] - best[1]) <= best[0] * f(0.5)
                        fits = good and (fits or within(*pair))
                    if within(*pair):
                        s, m = pair
                        factor, offset, divisor, levels = f(1), m, s, f(1)
            if half and not fits:
                return quantize(w, bits, group_size, False, refit, limit, importance)
            with np.errstate(over="ignore"):
                scaled = (w[r, part] * factor - offset) / divisor * levels
            codes[r, part] = np.clip(np.round(scaled), 0, 2**bits - 1)
            at = (0, 0) if group_size is None else (r, g)
            scale[at], minimum[at] = s, m
    dtype = np.float16 if half else f
    return codes, scale.astype(dtype), minimum.astype(dtype)


def cholesky(a):
    """The lower factor of a symmetric matrix; the products of an entry are subtracted in the order of their columns."""
    n = len(a)
    lower = np.tril(a)
    for j in range(n):
        for k in range(j):
            lower[j:, j] -= lower[j:, k] * lower[j, k]
        lower[j, j] = np.sqrt(lower[j, j])
        lower[j + 1 :, j] /= lower[j, j]
    return lower


def gptq(w, products, count, bits, group_size, half, sweeps, limit=FLT_MAX, two_level=None):
    """Codes, scale and minimum by GPTQ (Frantar et al., 2022), for products X^T X of `count` rows.

    For parameters in two levels, `two_level` is their bits, floats [rows, parts, 2 or 3], and the groups of a part.
    Scale and minimum are then codes: those nearest to a pair that is free, or neighbours of them with less error.

    Groups are visited by falling mean square of their inputs, and so are the columns of a group. Each code is the
    nearest to its weight plus what makes good for the errors of the codes before it; pairs are fitted to the same.
    Each sweep then gives each code the value that is best beside all others.
    """
    f = np.float32
    rows, cols = w.shape
    size, top = cols if group_size == -1 else group_size, f(2**bits - 1)
    squares = products.diagonal() / products.diagonal().max()
    groups = [range(at, min(at + size, cols)) for at in range(0, cols, size)]
    visited = sorted(range(len(groups)), key=lambda g: -math.fsum(squares[groups[g]]) / len(groups[g]))
    parts = [sorted(groups[g], key=lambda c: -squares[c]) for g in visited]
    order = [c for part in parts for c in part]
    h = products[np.ix_(order, order)] / products.diagonal().max()
    h[np.diag_indices(cols)] += 0.05 * max(1.0, cols / count) * (math.fsum(squares) / cols)
    lower = cholesky(h[::-1, ::-1])
    m = (lower / lower.diagonal())[::-1, ::-1].astype(f)  # h = m d m^T, m upper triangular with ones on its diagonal
    h = h.astype(f)

    def summed(start, factors, errors):
        for factor, error in zip(factors, errors, strict=True):
            start = start + error * factor
        return start

    def fit_codes(v, h, g):
        param_bits, floats, part = two_level
        most, numbers = f(2**param_bits - 1), floats[:, g // part, :, None].astype(f)
        d, dm, m0 = (numbers[:, i] if i < floats.shape[2] else np.zeros((rows, 1), f) for i in range(3))
        down = np.where(d > 0, np.ldexp(f(1), 1 - np.frexp(d)[1]), f(1))
        x = (v * down).T[..., None]
        h = np.broadcast_to(h[:, None, None], x.shape)
        s, b = _free_pairs(x, h, top)
        b = np.minimum(b, f(0)) if floats.shape[2] == 2 else b
        scaled = d * down, dm * down, m0 * down
        q, k = _codes_of_pairs(s, b, *scaled, top, most)
        for _ in range(2):
            q, k = _best_neighbours(x, h, q, k, *scaled, top, most)
        return q[:, 0], k[:, 0], (d * q)[:, 0], (m0 - dm * k)[:, 0]

    def nearest(v, g):
        inverse = np.divide(f(1), scale[:, g], out=np.zeros(rows, f), where=scale[:, g] > 0)
        return np.clip(np.rint((v - minimum[:, g]) * inverse), f(0), top)

    scale, minimum = np.zeros((rows, len(groups)), f), np.zeros((rows, len(groups)), f)
    scale_codes, minimum_codes = np.zeros(scale.shape, np.uint8), np.zeros(scale.shape, np.uint8)
    codes, e = np.zeros((rows, cols), f), np.zeros((cols, rows), f)
    at = 0
    for g, part in zip(visited, parts, strict=True):
        start = np.stack([summed(w[:, c], m[:at, at + i], e[:at]) for i, c in enumerate(part)], axis=1)
        weight = h.diagonal()[at : at + len(part)]
        if two_level is not None:
            scale_codes[:, g], minimum_codes[:, g], scale[:, g], minimum[:, g] = fit_codes(start, weight, g)
        else:
            _, s, b = quantize(start, bits, -1, half, True, limit, np.broadcast_to(weight, start.shape))
            if half and s.dtype != np.float16:
                return gptq(w, products, count, bits, group_size, False, sweeps, limit)
            scale[:, g], minimum[:, g] = s[:, 0], b[:, 0]
        for c in part:
            codes[:, c] = nearest(summed(w[:, c], m[:at, at], e[:at]), g)
            e[at] = w[:, c] - (minimum[:, g] + scale[:, g] * codes[:, c])
            at += 1
    places = list(enumerate(g for g, part in zip(visited, parts, strict=True) for _ in part))
    for _ in range(sweeps):
        for _, slab in itertools.groupby(places, key=lambda place: (place[1], place[0] // 32)):
            slab = list(slab)
            gradients = [summed(np.zeros(rows, f), h[:, at], e) for at, _ in slab]
            for i, (at, g) in enumerate(slab):
                c, before = order[at], e[at].copy()
                codes[:, c] = nearest((w[:, c] - before) + gradients[i] * (f(1) / h[at, at]), g)
                e[at] = w[:, c] - (minimum[:, g] + scale[:, g] * codes[:, c])
                for j in range(i + 1, len(slab)):
                    gradients[j] = gradients[j] + (e[at] - before) * h[at, slab[j][0]]
    if two_level is not None:
        return codes.astype(np.uint8), scale_codes, minimum_codes
    dtype = np.float16 if half else f
    return codes.astype(np.uint8), scale.astype(dtype), minimum.astype(dtype)


def pack(codes, bits):
    """One stream of bits along the last axis, lowest bits first, which is filled up with zeros to whole bytes."""
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")


def dequantize(codes, scale, minimum, group_size):
    """minimum + scale * code in float32, for codes of one byte each; halved where scale * code could overflow."""
    scale, minimum = scale.astype(np.float32), minimum.astype(np.float32)
    if group_size is not None and group_size != -1:
        scale, minimum = (np.repeat(p, group_size, axis=1)[:, : codes.shape[1]] for p in (scale, minimum))
    return decoded(codes.astype(np.float32), scale, minimum)


# ---- parameters in two levels -------------------------------------------------------------------------------
#
# The scale and the minimum of a group are codes of `param_bits` under floats for each `param_group` columns (-1: a
# row): scale = d * code, from 1 on, and minimum = m0 - dm * code. With two floats instead of three m0 is 0, as in
# ggml's K-quants. A decoder computes both in float32, each operation rounded, and goes on as with stored pairs.


def two_level_pairs(floats, qs, qm, group_size, param_group):
    """Scale and minimum of each group from its codes [rows, groups] and floats [rows, parts, 2 or 3]."""
    f = np.float32
    per_part = qs.shape[1] if param_group == -1 else param_group // group_size
    numbers = np.repeat(floats.astype(f), max(per_part, 1), axis=1)[:, : qs.shape[1]]
    d, dm, m0 = (numbers[..., i] if i < floats.shape[-1] else f(0) for i in range(3))
    return d * qs.astype(f), m0 - dm * qm.astype(f)


def quantize_two_level(w, bits, group_size=16, param_bits=4, param_group=-1, half=True, importance=None):
    """Codes [rows, cols], codes of scale and minimum [rows, groups], and floats [rows, parts, 3; 2 with 256 columns].

    cpp/kernels/quant/two_level.inl tells the steps. Each group is fitted by itself, but for the floats: all sums over
    its values run in the order of the columns.
    """
    rows, cols = w.shape
    step = cols if param_group == -1 else param_group
    groups, parts, count = -(-cols // group_size), -(-cols // max(step, 1)), 3 if param_group == -1 else 2
    codes = np.zeros((rows, cols), np.uint8)
    qs, qm = np.ones((rows, groups), np.uint8), np.zeros((rows, groups), np.uint8)
    floats = np.zeros((rows, parts, count), np.float16 if half else np.float32)
    if importance is not None:
        importance = np.ldexp(importance, -np.frexp(importance.max())[1])
    for part in range(parts):
        columns = slice(part * step, min((part + 1) * step, cols))
        mine = slice(columns.start // group_size, -(-columns.stop // group_size))
        v = None if importance is None else np.broadcast_to(importance, w.shape)[:, columns]
        found = _fit_part(w[:, columns], bits, group_size, 2**param_bits - 1, half, count, v)
        if found is None:
            return quantize_two_level(w, bits, group_size, param_bits, param_group, False, importance)
        floats[:, part], qs[:, mine], qm[:, mine], codes[:, columns] = found
    return codes, qs, qm, floats


def _inverse(scale):
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale >= np.float32(2**-100))


def _clamped(code, limit):
    return np.clip(np.rint(code), np.float32(0), limit)


def _line_sums(x, h, scale, minimum, top):
    """Sums over the values of each group: x and their importance h are [size, rows, groups], pairs [rows, groups]."""
    sums = np.zeros((5, *scale.shape), np.float32)
    for value, v in zip(x, h, strict=True):
        u = (value - minimum) * _inverse(scale)
        code = _clamped(u, top)
        d, r = code - top * np.float32(0.5), u - code
        sums += np.stack([v, v * d, v * d * d, v * r, v * r * d])
    return sums


def _free_pairs(x, h, top):
    """A pair for each group: that of its range, moved three times by least squares."""
    f = np.float32
    minimum = x.min(0) + f(0)
    scale = (x.max(0) - x.min(0)) / top
    for _ in range(3):
        n, d, dd, r, rd = _line_sums(x, h, scale, minimum, top)
        with np.errstate(all="ignore"):
            spread = n * dd - d * d
            b = (n * rd - d * r) / spread
            a = (r - b * d) / n
            better = scale + scale * b
            good = (spread > n * dd * f(2**-16)) & (better >= scale * f(2**-10))
            minimum = np.where(good, minimum + scale * (a - b * (top * f(0.5))), minimum)
            scale = np.where(good, better, scale)
    return scale, minimum


def _codes_of_pairs(scale, minimum, d, dm, m0, top, most):
    """The codes of pairs that are nearest under floats."""
    q = np.maximum(np.minimum(np.rint(scale * _inverse(d)), most), np.float32(1))
    moved = minimum + (scale - d * q) * (top * np.float32(0.5))
    return q, _clamped((m0 - moved) * _inverse(dm), most)


def _best_neighbours(x, h, q, k, d, dm, m0, top, most):
    """The codes of pairs, or neighbours of them with less error."""
    f = np.float32
    scale, minimum, least, best_q, best_k = d * q, m0 - dm * k, np.full_like(q, np.inf), q, k
    for step in (0, -1, 1):
        new_q = np.clip(q + f(step), f(1), most)
        new_scale = d * new_q
        moved = minimum + (scale - new_scale) * (top * f(0.5))
        near = _clamped((m0 - moved) * _inverse(dm), most) if step else k
        for new_k in (near, np.maximum(near - f(1), f(0)), np.minimum(near + f(1), most)):
            error, new_minimum = np.zeros_like(q), m0 - dm * new_k
            for value, v in zip(x, h, strict=True):
                u = (value - new_minimum) * _inverse(new_scale)
                error += v * ((u - _clamped(u, top)) * (u - _clamped(u, top)))
            error = error * (new_scale * new_scale)
            better = error < least
            least, best_q, best_k = (
                np.where(better, t, o) for t, o in ((error, least), (new_q, best_q), (new_k, best_k))
            )
    return best_q, best_k


def _fit_part(w, bits, group_size, most, half, count, importance):
    """The same for one part of all rows; None where float16 cannot hold its floats."""
    f = np.float32
    rows, size = w.shape
    groups = -(-size // group_size)
    top, middle, most = f(2**bits - 1), f(2**bits - 1) * f(0.5), f(most)
    exponent = np.clip(np.frexp(np.abs(w).max(1))[1], -126, 126)
    up, down = np.ldexp(f(1), exponent), np.ldexp(f(1), -exponent)

    def in_groups(values, missing):
        padded = np.empty((rows, groups * group_size), f)
        padded[:, :size] = values
        padded[:, size:] = missing
        return np.moveaxis(padded.reshape(rows, groups, group_size), -1, 0).copy()

    x = in_groups(w * down[:, None], w[:, [(groups - 1) * group_size]] * down[:, None])
    h = in_groups(1 if importance is None else importance, 0)

    def rounded(values):
        if not half:
            return values
        with np.errstate(over="ignore"):
            return np.float16(values * up[:, None]).astype(f) * down[:, None]

    # 1. a pair for each group
    scale, minimum = _free_pairs(x, h, top)

    # 2. floats that span the pairs, and codes of these
    widest, high, low = (t[:, None] for t in (scale.max(1), minimum.max(1), minimum.min(1)))
    if count == 2:
        high, low, minimum = np.zeros_like(high), np.minimum(low, f(0)), np.minimum(minimum, f(0))
    with np.errstate(invalid="ignore", over="ignore"):
        d, m0 = widest / most, rounded(high) + f(0)
        dm = np.maximum(m0 - low, f(0)) / most
        room = np.where(widest > 0, widest * f(0.5), np.maximum(abs(high), abs(low)) * f(2**-11))
        fits = abs(rounded(d) - d) <= d * f(2**-8)
        fits &= (abs(m0 - high) <= room) & (abs(rounded(dm) - dm) * most <= room)
    if not fits.all():
        return None
    d, dm = rounded(d), rounded(dm)
    q, k = _codes_of_pairs(scale, minimum, d, dm, m0, top, most)

    def refitted(d, dm, m0):
        n, sd, sdd, sr, srd = (t.astype(float) for t in _line_sums(x, h, d * q, m0 - dm * k, top))
        qq, kk, mid, unit = q.astype(float), k.astype(float), float(middle), d.astype(float)
        c = sd + mid * n
        cc = sdd + mid * (sd + c)
        r = unit * qq * sr
        rc = unit * qq * srd + mid * r
        terms = (qq * qq * cc, -(qq * kk * c), qq * c, kk * kk * n, -(kk * n), n, qq * rc, -(kk * r), r)
        s = [tree(partial_sums(t, SUMS["partials"]))[:, None] for t in terms]
        with np.errstate(all="ignore"):
            by_d1, by_d2 = s[1] / s[0], s[2] / s[0]
            a11, a12, y1 = s[3] - by_d1 * s[1], s[4] - by_d1 * s[2], s[7] - by_d1 * s[6]
            has_dm = a11 > s[3] * 2.0**-30
            by_dm = np.where(has_dm, a12 / a11, 0)
            a22, y2 = s[5] - by_d2 * s[2] - by_dm * a12, s[8] - by_d2 * s[6] - by_dm * y1
            z2 = np.where((count == 3) & (a22 > s[5] * 2.0**-30), y2 / a22, 0)
            z1 = np.where(has_dm, (y1 - a12 * z2) / a11, 0)
            z0 = (s[6] - s[1] * z1 - s[2] * z2) / s[0]
            old = d, dm, m0
            new = [rounded((t.astype(float) + z).astype(f)) for t, z in zip(old, (z0, z1, z2), strict=True)]
            z0, z1, z2 = (t.astype(float) - o.astype(float) for t, o in zip(new, old, strict=True))
            rise = (
                z0 * (z0 * s[0] + 2 * (z1 * s[1] + z2 * s[2] - s[6]))
                + z1 * (z1 * s[3] + 2 * (z2 * s[4] - s[7]))
                + z2 * (z2 * s[5] - 2 * s[8])
            )
            good = (s[0] > 0) & (new[0] >= d * f(0.5)) & (new[1] >= 0) & (rise < 0)
        return [np.where(good, t, o) for t, o in zip(new, old, strict=True)]

    # 3. floats by least squares, and neighbours of the codes
    for _ in range(2):
        d, dm, m0 = refitted(d, dm, m0)
        q, k = _best_neighbours(x, h, q, k, d, dm, m0, top, most)

    # 4. floats once more, and the codes
    d, dm, m0 = refitted(d, dm, m0)
    codes = _clamped((x - (m0 - dm * k)) * _inverse(d * q), top)
    floats = np.concatenate([d, dm, m0][:count], axis=1) * up[:, None]
    return floats, q, k, np.moveaxis(codes, 0, -1).reshape(rows, -1)[:, :size]


# ---- products ---------------------------------------------------------------------------------------------
#
# Every user may rely on this: a product is the same, bit for bit, on every instruction set and for any number of
# threads. With quantized weights x is rounded to integers, and sums of integers are exact in any order. So only the
# order in which floats are added must be fixed. One pattern serves all products: the columns of a row are cut into
# stretches; the terms of a stretch go to partial sums in turn, and these are added as a tree.
#
# SUMS holds the sizes of stretches and how many partial sums they have.


def linear_floats(x, w, bias=None):
    """x @ w.T in float32, stretch by stretch."""
    y = np.zeros((len(x), len(w)), np.float32)
    with np.errstate(all="ignore"):
        for part in stretches(w.shape[1], SUMS["float_stretch"]):
            y += tree(partial_sums(x[:, None, part] * w[None, :, part], SUMS["partials"]))
        return y if bias is None else y + bias


def rounded(x, span, precision):
    """Integers n and, for every span of columns, a scale, with x ~ scale * n; NaN where a span is not finite."""
    f = np.float32
    spans = np.pad(x, ((0, 0), (0, -x.shape[1] % span))).reshape(len(x), -(-x.shape[1] // span), span)
    largest = abs(spans).max(axis=2)
    if precision == "int8":  # |n| <= 127
        scale = np.maximum(largest / f(127), np.finfo(f).tiny)
    else:  # |n| <= 0x7f7f7f, three signed bytes; a power of two, so that what is exact in 24 bits stays so
        exponent = np.maximum(np.frexp(largest * f(1.0078125))[1], -125)
        scale = np.ldexp(f(1), exponent - 1 - 22)
    scale = np.where(largest * f(1 if precision == "int8" else 1.0078125) < np.inf, scale, f(np.nan)).astype(f)
    n = np.rint(spans / scale[..., None])
    return np.where(np.isnan(n), 0, n).astype(np.int64).reshape(len(x), -1), scale


def dot_products(n, codes, width):
    """Exact products of every `width` columns: [rows of n, rows of codes, parts]."""
    parts = -(-max(n.shape[1], codes.shape[1]) // width)
    n, codes = (np.pad(a, ((0, 0), (0, parts * width - a.shape[1]))) for a in (n, codes))
    n, codes = (a.reshape(len(a), parts, width) for a in (n, codes))
    return np.einsum("bpk,rpk->brp", n, codes)


def linear(x, codes, scale, minimum, bits, group_size, bias=None, precision="exact"):
    """x @ w.T for codes of one byte each.

    A weight is scale * code + middle, where codes count from the middle of their range, those of two bits in half
    steps. So the product with a group is scale * (x . codes) + middle * (sum of x).
    """
    f = np.float32
    rows, cols = codes.shape
    size = cols if group_size in (None, -1) else group_size
    groups = -(-cols // size) if cols else 0
    with np.errstate(all="ignore"):
        in_floats = linear_floats(x, dequantize(codes, scale, minimum, group_size), bias)
        if cols == 0 or (groups > 1 and size % 16):
            return in_floats
        steps, middle = (2, 3) if bits == 2 else (1, 2 ** (bits - 1))
        codes = codes.astype(np.int64) * steps - middle
        scale, minimum = (np.broadcast_to(p.astype(f), (rows, groups)) for p in (scale, minimum))
        span = 32 if groups == 1 or size % 32 == 0 else 16
        n, x_scale = rounded(x, span, precision)
        # The sum of x in each group, in double, sixteen columns at a time.
        sums = n.reshape(len(x), n.shape[1] // 16, 16).sum(axis=2) * np.repeat(x_scale, span // 16, axis=1).astype(
            float
        )
        x_sums = np.zeros((len(x), groups))
        for i in range(-(-cols // 16)):
            x_sums[:, i * 16 // size] += sums[:, i]

        weight = codes, scale, minimum + scale * f(middle / steps), bits, size
        rest = len(x) % SUMS["panel_width"]
        in_panels = len(x) if rest >= SUMS["least_panel"] else len(x) - rest
        prepared = n, x_scale / f(steps), x_sums
        many, few = ([a[part] for a in prepared] for part in (slice(in_panels), slice(in_panels, None)))
        y = np.concatenate([product_of_panels(*many, *weight, precision), product_of_rows(*few, *weight)])
        if groups == 1:  # the parameters come last, in double
            scale, minimum = scale[:, 0].astype(float), minimum[:, 0].astype(float)
            y = y * scale + x_sums * (minimum + scale * (middle / steps))
        y = y.astype(f)
        return np.where(np.isfinite(y), y if bias is None else y + bias, in_floats)


def product_of_rows(n, x_scale, x_sums, codes, scale, middles, bits, size):
    """Few rows of x: a term for each word of codes; a stretch has whole runs of one word for each sum.

    A word has 32 bits of codes, or 8 codes of a width that does not divide 32.
    """
    f = np.float32
    partials, word = SUMS["partials"], 8 if 32 % bits else 32 // bits
    groups, span = scale.shape[1], n.shape[1] // x_scale.shape[1]
    terms = dot_products(n, codes, word).astype(f)
    column = np.arange(terms.shape[2]) * word
    terms *= x_scale[:, None, column // span]
    if groups > 1:
        terms *= scale[None, :, column // size]
    runs = runs_of(terms)
    # Before the codes of as many groups as there are sums come their middles, times the sums of x.
    rests = runs_of(middles * x_sums[:, None].astype(f)) if groups > 1 else []
    total = np.zeros((*terms.shape[:2], partials), f)
    for part in stretches(len(runs), SUMS["run_stretch"]):
        sums = np.zeros_like(total)
        for run in range(part.start, part.stop):
            if groups > 1 and run % (size // word) == 0:
                sums += rests[run // (size // word)]
            sums += runs[run]
        total += sums
    return tree(total.astype(np.float64))


def runs_of(terms):
    """The last axis cut into runs of one term for each partial sum; the runs come first."""
    padded = np.pad(terms, ((0, 0), (0, 0), (0, -terms.shape[2] % SUMS["partials"])))
    return [padded[..., k : k + SUMS["partials"]] for k in range(0, padded.shape[2], SUMS["partials"])]


def product_of_panels(n, x_scale, x_sums, codes, scale, middles, bits, size, precision):
    """Many rows of x: a term for each span, added from left to right in a group; groups in order in a stretch."""
    f = np.float32
    groups, span = scale.shape[1], n.shape[1] // x_scale.shape[1]
    if bits > 4 and precision == "exact":  # the lowest byte by itself: 32 bits hold either sum
        low = (n + 128) % 256 - 128
        terms = dot_products(n - low >> 8, codes, span).astype(f) * f(256) + dot_products(low, codes, span).astype(f)
    else:
        terms = dot_products(n, codes, span).astype(f)
    terms *= x_scale[:, None]
    if groups == 1:
        scale, middles, size = np.ones_like(scale), np.zeros_like(middles), n.shape[1]
    total = np.zeros(terms.shape[:2])
    for part in stretches(n.shape[1], SUMS["panel_stretch"]):
        sums = np.zeros(terms.shape[:2], f)
        for g in range(part.start // size, -(-part.stop // size)):
            begin, end = max(part.start, g * size), min(part.stop, (g + 1) * size)
            group = partial_sums(terms[..., begin // span : end // span], 1)[..., 0] * scale[:, g]
            if begin == g * size:  # a group that began in the stretch before has been given its middle
                group += middles[:, g] * x_sums[:, g, None].astype(f)
            sums += group
        total += sums
    return total


# ---- pruning ----------------------------------------------------------------------------------------------


def magnitudes(w):
    """Magnitudes in an order that has NaN above infinity."""
    magnitude = np.abs(w.astype(np.float64))
    return np.where(np.isnan(magnitude), np.inf, magnitude), np.isnan(magnitude)


def kept_above(w, threshold):
    """Keep |w| > threshold, and NaN."""
    with np.errstate(over="ignore"):
        limit = np.abs(np.asarray(threshold).astype(w.dtype)).astype(np.float64)
    magnitude, nan = magnitudes(w)
    return (magnitude > limit) | nan


def kept_of_share(w, sparsity):
    """Remove round(sparsity * size) elements: smallest first, of equal ones the later first."""
    magnitude, nan = magnitudes(w.reshape(-1))
    order = np.lexsort((-np.arange(w.size), nan, magnitude))
    kept = np.ones(w.size, bool)
    kept[order[: round(sparsity * w.size)]] = False
    return kept.reshape(w.shape)


def kept_of_groups(w, n, m):
    """Of every m elements of a row keep the n largest, of equal ones the earlier."""
    kept = np.ones(w.shape, bool)
    for row in range(w.shape[0]):
        for begin in range(0, w.shape[1], m):
            part = (row, slice(begin, begin + m))
            magnitude, nan = magnitudes(w[part])
            order = np.lexsort((np.arange(magnitude.size), ~nan, -magnitude))
            kept[part][order[n:]] = False
    return kept


def kept_blocks(w, **choice):
    """Blocks of 16 columns by their L2 norm, with the threshold or the sparsity that is given."""
    rows = w.reshape(w.shape[0] if w.ndim > 1 else 1, -1) if w.size else w
    count = -(-rows.shape[1] // 16)
    norms = np.zeros((rows.shape[0], count))
    for c in range(rows.shape[1]):
        norms[:, c // 16] += rows[:, c].astype(np.float64) ** 2
    norms = np.sqrt(norms)
    kept = kept_above(norms, **choice) if "threshold" in choice else kept_of_share(norms, **choice)
    return np.repeat(kept, 16, axis=1)[:, : rows.shape[1]].reshape(w.shape)


def prune(w, kept):
    return np.where(kept, w, w.dtype.type(0))


# ---- sparse storage ---------------------------------------------------------------------------------------


def compress(w):
    """Mask bits (lowest first, rows on bytes), row offsets and non-zeros of a matrix."""
    nonzero = w != 0
    mask = np.packbits(nonzero, axis=1, bitorder="little")
    row_offsets = np.concatenate([[0], np.cumsum(nonzero.sum(axis=1))]).astype(np.int64)
    return mask, row_offsets, w[nonzero]


def stored(layout, positions, row_offsets, rows, cols):
    """Which elements of a matrix a layout stores; of blocks also those behind the last column."""
    if layout == "1x16":
        blocks = np.unpackbits(positions, axis=1, count=-(-cols // 16), bitorder="little").astype(bool)
        return np.repeat(blocks, 16, axis=1)
    if not layout.startswith("index"):
        return np.unpackbits(positions, axis=1, count=cols, bitorder="little").astype(bool)
    result = np.zeros((rows, cols), bool)
    for r in range(rows):
        columns = positions[row_offsets[r] : row_offsets[r + 1]].astype(np.int64)
        result[r, np.cumsum(columns + 1) - 1 if layout == "index8" else columns] = True
    return result


def expand(stored, values, cols):
    w = np.zeros(stored.shape, values.dtype)
    w[stored] = values
    return w[:, :cols]


def linear_sparse(x, w, stored, by_column, bias=None):
    """x @ w.T in float32: the terms are the products with stored elements, also with those that are zero.

    Few rows of x: a term counts its column under a mask, and its entry elsewhere; the partial sums of all stretches are
    added up before they are added as a tree. Many rows: tiles of 64, 32 or 16 rows; a term counts its entry in the
    stretch.
    """
    batch, cols = x.shape
    y = np.zeros((batch, len(w)), np.float32)
    for r, row in enumerate(stored[:, :cols]):
        columns = np.flatnonzero(row)
        terms = x[:, columns] * w[r, columns]
        if batch < SUMS["least_tile"]:
            placed = np.zeros_like(x)
            placed[:, columns if by_column else np.arange(len(columns))] = terms
            total = np.zeros((batch, SUMS["partials"]), np.float32)
            for part in stretches(cols, SUMS["sparse_stretch"]):
                total += partial_sums(placed[:, part], SUMS["partials"])
            y[:, r] = tree(total)
            continue
        first = 0
        while first < batch:
            left = batch - first
            width = 64 if left > 32 else 32 if left > 16 else 16
            tile = slice(first, first + width)
            for part in stretches(cols, SUMS["tile_numbers"] // width):
                inside = terms[tile, (columns >= part.start) & (columns < part.stop)]
                y[tile, r] += tree(partial_sums(inside, SUMS["tile_partials"] // width))
            first += width
    return y if bias is None else y + bias
