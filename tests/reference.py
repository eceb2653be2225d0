"""The specification: every kernel in plain NumPy, one formula each. The kernels equal it bit for bit."""

import numpy as np

# ---- optimizers -------------------------------------------------------------------------------------------


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


def step(rule, h, w, g, states):
    """One step of `rule` with the numbers `h` (fastopt.optim.Hyper): the new w and states."""
    before = flush(w)
    w, g, s = Flushed(w), Flushed(g), [Flushed(x) for x in states]
    g = g * h.grad_scale
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
    elif rule == "adam":  # Kingma and Ba, 2015, algorithm 1
        s[0] = s[0] + h.blend1 * (g - s[0])
        s[1] = h.decay2 * s[1] + h.blend2 * g * g
        w = w - h.step_size * s[0] / (s[1].sqrt() * h.root_scale + h.eps)
    else:
        raise ValueError(rule)
    if h.shrink != 0:  # proximal step of the L1 norm
        above, below = (w - h.shrink).x, (w + h.shrink).x
        w = Flushed(np.where(above > 0, above, np.where(below < 0, below, w.x.dtype.type(0))))
    result = np.where(before == 0, w.x.dtype.type(0), w.x) if h.keep_zeros else w.x
    return result, [x.x for x in s]


# ---- quantization -----------------------------------------------------------------------------------------


def grid(low, high, bits, half):
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
            exact = (high / top - low / top, low, f(0.5), low * f(0.5), high * f(0.5) - low * f(0.5), top)
        else:
            scale = width / top
            if scale < np.finfo(f).tiny:
                # Subnormal, and so too coarse for width / top: round up, code against what is stored.
                scale = np.nextafter(scale, f(np.inf)) if scale * top < width else scale
                exact = (scale, low, f(1), low, scale, f(1))
            else:
                exact = (scale, low, f(1), low, width, top)
        if not half:
            return exact, True
        rounded = f(np.float16(low))
        smallest = f(2**-14)
        if exact[0] == 0:
            fits = abs(rounded) <= 65504 and (low == 0 or abs(rounded) >= smallest)
            return (f(0), rounded, f(0), f(0), f(1), f(0)), bool(fits)
        scale = f(np.float16((high - rounded) / top))
        fits = smallest <= scale <= 65504 and abs(rounded - low) <= exact[0] * f(0.5)
        return (scale, rounded, f(1), rounded, scale, f(1)), bool(fits)


def quantize(w, bits, group_size, half):
    """Codes (one a byte), scale and minimum of a matrix; float32 parameters where float16 does not fit."""
    rows, cols = w.shape
    size = {None: cols, -1: cols}.get(group_size, group_size)
    groups = -(-cols // size) if cols else 0
    codes = np.zeros((rows, cols), np.uint8)
    shape = (1, 1) if group_size is None else (rows, groups)
    scale, minimum = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for r in range(rows):
        for g in range(groups):
            part = slice(g * size, min((g + 1) * size, cols))
            values = w if group_size is None else w[r, part]
            # + 0 makes -0 into +0: which of the two a minimum is would depend on the order
            low, high = values.min() + np.float32(0), values.max() + np.float32(0)
            (s, m, factor, offset, divisor, levels), fits = grid(low, high, bits, half)
            if half and not fits:
                return quantize(w, bits, group_size, half=False)
            with np.errstate(over="ignore"):
                exact = (w[r, part] * factor - offset) / divisor * levels
            codes[r, part] = np.clip(np.round(exact), 0, 2**bits - 1)
            at = (0, 0) if group_size is None else (r, g)
            scale[at], minimum[at] = s, m
    dtype = np.float16 if half else np.float32
    return codes, scale.astype(dtype), minimum.astype(dtype)


def pack(codes, bits):
    """Lowest bits first, along the last axis, which is filled up with zeros to whole bytes."""
    per_byte = 8 // bits
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_byte) * per_byte), np.uint8)
    padded[..., : codes.shape[-1]] = codes
    parts = padded.reshape(*codes.shape[:-1], -1, per_byte)
    return np.bitwise_or.reduce(parts << (np.arange(per_byte, dtype=np.uint8) * bits), axis=-1)


def dequantize(codes, scale, minimum, group_size):
    """minimum + scale * code in float32, for codes of one byte each; halved where scale * code could overflow."""
    scale, minimum = scale.astype(np.float32), minimum.astype(np.float32)
    if group_size is not None and group_size != -1:
        scale, minimum = (np.repeat(p, group_size, axis=1)[:, : codes.shape[1]] for p in (scale, minimum))
    twice = np.where(scale > np.float32(2.0**119), np.float32(2), np.float32(1))
    return (minimum / twice + scale / twice * codes.astype(np.float32)) * twice


# ---- linear -----------------------------------------------------------------------------------------------


def linear(x, w, bias=None):
    """x @ w.T in float32: stretches of 512 columns, 16 partial sums each, added as a tree."""
    y = np.zeros((x.shape[0], w.shape[0]), np.float32)
    with np.errstate(all="ignore"):
        for begin in range(0, w.shape[1], 512):
            xs, ws = x[:, begin : begin + 512], w[:, begin : begin + 512]
            partial = np.zeros((*y.shape, 16), np.float32)
            for c in range(xs.shape[1]):
                partial[:, :, c % 16] += xs[:, None, c] * ws[None, :, c]
            for half in (8, 4, 2, 1):
                partial = partial[:, :, :half] + partial[:, :, half:]
            y += partial[:, :, 0]
        return y if bias is None else y + bias


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


def prune(w, kept):
    return np.where(kept, w, w.dtype.type(0))


# ---- sparse storage ---------------------------------------------------------------------------------------


def compress(w):
    """Mask bits (lowest first, rows on bytes), row offsets and non-zeros of a matrix."""
    nonzero = w != 0
    mask = np.packbits(nonzero, axis=1, bitorder="little")
    row_offsets = np.concatenate([[0], np.cumsum(nonzero.sum(axis=1))]).astype(np.int64)
    return mask, row_offsets, w[nonzero]


def expand(mask, values, cols):
    nonzero = np.unpackbits(mask, axis=1, count=cols, bitorder="little").astype(bool)
    w = np.zeros(nonzero.shape, values.dtype)
    w[nonzero] = values
    return w
