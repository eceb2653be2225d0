"""The kernels of optimizers, against the reference."""

import ml_dtypes
import numpy as np
import pytest
import reference
from helpers import SIZES, Guarded, dtype_of, same_bits
from hypothesis import given
from hypothesis import strategies as st
from reference import Hyper

from fastopt import _core

pytestmark = pytest.mark.kernel

RULES = {name: len(positive) for name, positive in reference.POSITIVE.items()}
PLAIN = Hyper(step_size=0.01, decay1=0.9, blend1=0.1, decay2=0.999, blend2=0.001, eps=1e-8)
HYPERS = {
    "plain": PLAIN,
    "l2": PLAIN._replace(weight_decay=0.1),
    "decoupled": PLAIN._replace(decay=0.999),
    "l1": PLAIN._replace(shrink=0.05),
    "keep_zeros": PLAIN._replace(keep_zeros=True),
    "scaled": PLAIN._replace(grad_scale=-1 / 1024),
    "all": PLAIN._replace(weight_decay=0.1, decay=0.99, shrink=0.02, keep_zeros=True, grad_scale=0.5),
}


def values(rng, n, dtype):
    """Ordinary numbers, with every special one among them."""
    x = rng.standard_normal(n).astype(dtype)
    info = np.finfo(dtype)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, info.tiny, info.tiny / 4, -info.tiny / 8, info.max, -info.max]
    at = rng.permutation(n)[: n // 3]
    x[at] = np.resize(np.array(special, dtype), at.size)
    return x


def run(rule, hyper, params, grads, states, *, stochastic=False, noise=0):
    """One step of all tensors by the kernels."""
    names = [str(i) for i in range(len(params))]
    states = [tuple(s) for s in states]
    counts, steps = [0] * len(params), [0]
    *numbers, grad_scale, shrink, keep_zeros = hyper
    job = _core.job(
        rule=_core.rule(rule),
        hyper=tuple(numbers),
        grad_scale=grad_scale,
        shrink=shrink,
        keep_zeros=keep_zeros,
        stochastic=stochastic,
        noise=noise,
        names=names,
        params=params,
        grads=grads,
        states=states,
        counts=counts,
        indices=None,
    )
    _core.step([job], steps)
    assert counts == [1] * len(params)
    assert steps == [1]


def test_python_and_the_kernels_name_the_same_numbers():
    given = dict(zip(Hyper._fields[:8], map(float, range(8)), strict=True))
    assert _core.hyper(**dict(reversed(given.items()))) == tuple(given.values())
    assert _core.hyper(step_size=0.5) == (0.5, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    for name in Hyper._fields[1:-1]:  # every number arrives where its name says
        with pytest.raises(ValueError, match=f"^{name}: expected a finite number, got inf"):
            run("sgd", PLAIN._replace(**{name: np.inf}), [np.ones(3)], [np.ones(3)], [()])
    for wrong, message in (({}, "missing argument 'step_size'"), (given | {"lr": 1.0}, "unexpected argument 'lr'")):
        with pytest.raises(TypeError, match=message):
            _core.hyper(**wrong)
    for call in (lambda: _core.hyper(0.5), lambda: _core.job(1), lambda: _core.step([]), lambda: _core.step((), [0])):
        with pytest.raises(TypeError, match="expected"):
            call()
    with pytest.raises(ValueError, match="rule: no optimizer is called 'adamax'"):
        _core.rule("adamax")


CASES = [(name, "float32") for name in HYPERS] + [("plain", "float64"), ("all", "float64")]


@pytest.mark.parametrize(("option", "dtype"), CASES)
@pytest.mark.parametrize("rule", RULES)
def test_step_equals_reference(isa, rule, option, dtype, rng):
    hyper = HYPERS[option]
    for n in SIZES if option == "plain" else SIZES[:-1]:
        w, g = Guarded(values(rng, n, dtype), n % 4), Guarded(values(rng, n, dtype), 1)
        states = [Guarded(np.abs(values(rng, n, dtype)), 3) for _ in range(RULES[rule])]
        want_w, want_states = w.array.copy(), [s.array.copy() for s in states]
        before = g.array.copy()
        for _ in range(3):
            want_w, want_states = reference.step(rule, hyper, want_w, g.array, want_states)
            run(rule, hyper, [w.array], [g.array], [[s.array for s in states]])
        assert same_bits(w.array, want_w), n
        assert all(same_bits(s.array, want) for s, want in zip(states, want_states, strict=True)), n
        assert same_bits(g.array, before)
        assert all(a.intact() for a in (w, g, *states)), n


def fused(a, b, c):
    """float32 of a * b + c, rounded once: in double, where the product is exact, and the sum rounded to odd."""
    product, c = a.astype("f8") * b, c.astype("f8")
    total = product + c
    rest = (product - (total - (total - product))) + (c - (total - product))
    bits = total.view("i8")
    away = np.where((rest > 0) == (total > 0), 1, -1)
    return np.where((rest != 0) & (bits % 2 == 0), bits + away, bits).view("f8").astype("f4")


def test_square_roots_by_products_are_proven():
    """`sqrt_by_products` (cpp/kernels/simd/math.hpp) is the square root for any approximation within its specification.

    It takes y = a / sqrt(x), |a - 1| < 2**-14, and in floats root = x * y, error = 1 / 2 - root * y / 2,
    root1 = root + root * error, half1 = y / 2 + y / 2 * error. With root = (1 + u) * x * y, |u| <= 2**-24, before their
    last rounding root1 / sqrt(x) and half1 * 2 * sqrt(x) lie within a * u / 2 of a * (3 - a**2) / 2, which is 1 or less
    by 1.5 * 2**-28; 2**-36 is more than what smaller terms add. The last steps are monotonic in half1.
    """
    high = 2.0**-25 + 2.0**-36
    low = -high - 1.5 * 2.0**-28
    doubtful = []
    for first in range(0, 1 << 24, 1 << 16):  # [1, 4): other binades are these, scaled
        x = (0x3F800000 + np.arange(first, first + (1 << 16), dtype="u4")).view("f4")
        exact, want = np.sqrt(x.astype("f8")), np.sqrt(x)
        least, most = ((exact * (1 + e)).astype("f4").view("u4") for e in (low, high))
        wrong = most > least + 2
        for k in range(3):
            root1 = np.minimum(least + k, most).astype("u4").view("f4")
            for e in (low, high):
                half1 = (0.5 / exact * (1 + e)).astype("f4")
                wrong |= fused(fused(-root1, root1, x), half1, root1) != want
        doubtful.extend(x[wrong])
    assert len(doubtful) < 10
    for x in np.array(doubtful, "f4"):  # each approximation that there can be
        ends = (np.array([1 - 2.0**-14, 1 + 2.0**-14]) / np.sqrt(np.float64(x))).astype("f4").view("i4")
        y = np.arange(ends[0], ends[1] + 1, dtype="i4").view("f4")
        x, half = np.full_like(y, x), y / 2
        error = fused(-(x * y), half, np.full_like(y, 0.5))
        root1, half1 = fused(x * y, error, x * y), fused(half, error, half)
        assert (fused(fused(-root1, root1, x), half1, root1) == np.sqrt(x)).all()


def test_square_roots_are_correctly_rounded(isa, rng):
    """Those of all significands, and of numbers of any size: Adam divides by them what they should be, and gets 1."""
    same = Hyper(step_size=1, blend1=0, decay2=1, blend2=0)
    any_size = rng.integers(0x00800000, 0x7F800000, 1 << 20, "u4")
    for bits in (*(0x3F800000 + np.arange(1 << 24, dtype="u4")).reshape(16, -1), any_size):
        for x in (bits.view("f4"), np.roll(bits.view("f4"), 16)):  # in vectors of even and odd number
            w = np.zeros_like(x)
            run("adam", same, [w], [np.zeros_like(x)], [(np.sqrt(x), x)])
            assert (w == -1).all()


def bits_of(x, dtype):
    """Return an array as the reference takes it: the 16 bits of a narrow type, or float32 itself."""
    return x if dtype == "float32" else x.view(np.uint16)


def narrow_values(rng, n, dtype):
    x = rng.standard_normal(n).astype("f4")
    at = rng.permutation(n)[: n // 4]
    x[at] = np.resize(np.array([0.0, -0.0, np.inf, np.nan, 1e-7, -3e-5, 7e4, 1e-40], "f4"), at.size)
    with np.errstate(over="ignore"):
        return x.astype(dtype_of(dtype))


def narrow_state(rng, n, state_dtype, positive):
    """A state as it is stored, as the arrays that the kernels take."""
    if state_dtype == "uint8":
        return [rng.integers(0, 256, n, np.uint8), rng.integers(90, 130, -(-n // 256), np.uint8)]
    x = rng.standard_normal(n).astype("f4")
    return [(np.abs(x) if positive else x).astype(dtype_of(state_dtype))]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize(
    ("dtype", "g_dtype"),
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("float16", "float32"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
    ],
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
def test_narrow_step_equals_reference(isa, dtype, g_dtype, state_dtype, rounding, rng):
    if dtype == "float32" and rounding != "nearest":
        return  # float32 parameters are stored as they are
    for n in [0, 1, 15, 63, 64, 255, 256, 257, 1000, 5000]:
        for rule, hyper in [
            ("adam", PLAIN),
            ("lion", HYPERS["all"]),
            ("momentum", HYPERS["keep_zeros"]),
            ("sgd", PLAIN),
            ("rmsprop_centered_momentum", PLAIN),
        ]:
            w, g = Guarded(narrow_values(rng, n, dtype), 3), Guarded(narrow_values(rng, n, g_dtype), 1)
            positive = reference.POSITIVE[rule]
            parts = [narrow_state(rng, n, state_dtype, p) for p in positive]
            states = [Guarded(part[0], 1) for part in parts]
            exponents = [Guarded(part[1], 2) for part in parts] if state_dtype == "uint8" else []
            master = [Guarded(w.array.astype("f4"), 1)] if rounding == "master" else []
            if state_dtype == "uint8":
                stored = [(s.array.copy(), e.array.copy()) for s, e in zip(states, exponents, strict=True)]
            else:
                stored = [bits_of(s.array, state_dtype).copy() for s in states]
            want = bits_of(w.array, dtype).copy()
            want_master = master[0].array.copy() if master else None
            for noise in (1, 0xFFFFFFFF):
                if master and noise != 1:  # its owner changes some of the parameters between the steps
                    changed = narrow_values(rng, n // 3, dtype)
                    w.array[: changed.size] = changed
                    want[: changed.size] = bits_of(changed, dtype)
                want, stored, want_master = reference.step_narrow(
                    rule, hyper, want, dtype, bits_of(g.array, g_dtype), g_dtype, stored, state_dtype,
                    noise, rounding == "stochastic", want_master,
                )  # fmt: skip
                arrays = [a.array for a in (*states, *exponents, *master)]
                run(rule, hyper, [w.array], [g.array], [arrays], stochastic=rounding == "stochastic", noise=noise)
            got = reference.widen_bits(bits_of(w.array, dtype), dtype) if dtype != "float32" else w.array
            assert same_bits(got, want if dtype == "float32" else reference.widen_bits(want, dtype)), (n, rule)
            if master:
                assert same_bits(master[0].array, want_master)
            for i, s in enumerate(states):
                if state_dtype == "uint8":
                    assert np.array_equal(s.array, stored[i][0]), (n, rule, i)
                    assert np.array_equal(exponents[i].array, stored[i][1])
                elif state_dtype == "bfloat16":
                    assert same_bits(s.array, stored[i].view(ml_dtypes.bfloat16))
                else:
                    assert same_bits(s.array, stored[i])
            assert all(a.intact() for a in (w, g, *states, *exponents, *master))


def test_rounding_by_chance_is_fair():
    """The mean of many roundings is the value, for parameters and for states of every kind."""
    n = 1 << 16
    x = np.full(n, 1.0 + 1 / 3 / 128, "f4")
    random = reference.random_bits(n, 12345)
    low = random & np.uint32(0xFFFF)
    for bits, dtype in ((reference.bf16_bits(x, low), "bfloat16"), (reference.f16_bits(x / 8, low), "float16")):
        mean = reference.widen_bits(bits, dtype).astype("f8").mean() * (8 if dtype == "float16" else 1)
        assert abs(mean - x[0]) < 1e-4
    for positive in (True, False):
        for state in (0, 1, 2):
            before = np.zeros(n // 256, np.uint8)
            codes, exponents = reference.narrow_u8(x, positive, reference.chance_of(random, state, 20), before)
            assert abs(reference.widen_u8(codes, exponents, positive).astype("f8").mean() - x[0]) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_sum_of_squares_equals_reference(isa, threads, dtype, rng):
    arrays = [rng.standard_normal(n).astype(dtype_of(dtype)) for n in (*SIZES, 300001)]
    want = 0.0
    for a in arrays:
        chunks = [reference.sum_squares(a[i : i + 4096]) for i in range(0, a.size, 4096)]
        for chunk in chunks:
            want += chunk
    assert _core.sum_squares([str(i) for i in range(len(arrays) + 1)], [*arrays, None]) == want


def test_same_bits_for_any_number_of_threads(isa, threads, rng):
    sizes = [100003, 5, 0, 4096, 4097, 262144]
    params = [rng.standard_normal(n).astype("f4") for n in sizes]
    grads = [rng.standard_normal(n).astype("f4") for n in sizes]
    want = [reference.step("adam", PLAIN, w, g, [np.zeros_like(w)] * 2)[0] for w, g in zip(params, grads, strict=True)]
    states = [(np.zeros_like(w), np.zeros_like(w)) for w in params]
    run("adam", PLAIN, params, grads, states)
    assert all(same_bits(w, e) for w, e in zip(params, want, strict=True))


def test_subnormal_mode_is_restored():
    w, tiny = np.ones(8, "f4"), np.full(8, 1e-40, "f4")
    run("sgd", PLAIN, [w], [tiny], [()])
    assert (tiny * np.float32(1) != 0).all()


@given(
    st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40),
    st.floats(width=32, allow_nan=True),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(sorted(HYPERS)),
)
def test_any_number_steps_like_the_reference(ws, g, rule, hyper):
    w = np.array(ws, "f4")
    grad, states = np.full_like(w, g), [np.full_like(w, 0.5) for _ in range(RULES[rule])]
    want, _ = reference.step(rule, HYPERS[hyper], w, grad, states)
    run(rule, HYPERS[hyper], [w], [grad], [states])
    assert same_bits(w, want)
