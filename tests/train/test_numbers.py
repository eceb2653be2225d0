"""Numbers at the edge of their range: none makes a step silently wrong."""

import math

import ml_dtypes
import numpy as np
import pytest
from helpers import dtype_of, same_bits

import fastopt as fo

pytestmark = pytest.mark.kernel

TINY, HUGE = float(np.finfo("f4").tiny), float(np.finfo("f4").max)
CLASSES = [fo.SGD, fo.Adagrad, fo.RMSprop, fo.Adam, fo.AdamW, fo.Lion]


# ---- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cls", CLASSES)
def test_options_are_what_float32_can_hold(cls, dtype):
    def make(**options):
        return cls(np.ones(2, dtype_of(dtype)), **options)

    names = [key for key, value in make().param_groups[0].items() if type(value) is float and key != "alpha"]
    assert {"lr", "weight_decay", "l1"} <= set(names)
    for name in names:
        with pytest.raises(ValueError, match=f"^{name}: expected at most 3.4028235e\\+38, which float32 can hold"):
            make(**{name: 1e39})
        opt = make()
        opt.param_groups[0][name] = 1e39
        with pytest.raises(ValueError, match=f"^{name}: expected at most"):
            opt.step(np.ones(2, dtype_of(dtype)))
        if name not in ("lr", "eps"):
            with pytest.raises(ValueError, match=f"^{name}: expected 0, or at least 1.1754944e-38"):
                make(**{name: 1e-40})
    cls(np.ones(2), **dict.fromkeys(names, 1e39))  # float64 can hold it


@pytest.mark.parametrize(("cls", "name", "value"), [
    (fo.Adam, "betas", (0.9, 1 - 1e-9)), (fo.Lion, "betas", (1 - 1e-9, 0.9)), (fo.RMSprop, "alpha", 1 - 1e-9),
])  # fmt: skip
def test_a_decay_that_float32_rounds_to_1_is_refused(cls, name, value):
    with pytest.raises(ValueError, match=f"{name}: expected less than 1 in float32"):
        cls(np.ones(2, "f4"), **{name: value})
    cls(np.ones(2), **{name: value})


@pytest.mark.parametrize("eps", [0.0, 1e-45, TINY / 2, TINY, 1e-300])
@pytest.mark.parametrize("cls", [fo.Adagrad, fo.RMSprop, fo.Adam, fo.AdamW])
@pytest.mark.parametrize("options", [{}, {"centered": True}, {"amsgrad": True}])
def test_a_tiny_eps_keeps_zero_gradients_from_nan(isa, cls, eps, options):
    try:
        cls(np.ones(2, "f4"), **options)
    except TypeError:
        return
    for w in (np.ones(2, "f4"), np.ones(300, ml_dtypes.bfloat16), np.ones(2)):
        before, g = w.copy(), np.zeros_like(w)
        g[1] = 1
        opt = cls(w, lr=0.1, eps=eps, **options)
        for _ in range(3):
            opt.step(g)
        assert w[0] == before[0] or cls is fo.AdamW
        assert np.isfinite(w.astype("f8")).all()
        assert w[1] < before[1]


@pytest.mark.parametrize("lr", [1e39, 1e300, lambda step: 1e39, fo.schedules.exponential(1.0, gamma=10.0)])
def test_a_learning_rate_that_float32_cannot_hold_changes_nothing(lr):
    w = np.ones(2, "f4")
    with pytest.raises(ValueError, match=r"^lr: expected at most"):  # noqa: PT012 - either may raise
        opt = fo.SGD(w, lr=lr)
        for _ in range(40):
            opt.step(np.zeros(2, "f4"))
    assert (w == 1).all()


def test_numbers_computed_for_a_step_are_checked_too():
    for options, name in [({"lr": 1e38, "l1": 10.0}, "shrink"), ({"lr": 1e38, "weight_decay": 10.0}, "decay")]:
        w = np.ones(2, "f4")
        opt = fo.AdamW(w, **options)
        with pytest.raises(ValueError, match=f"^{name}: expected a number that float32 can hold, got -?1"):
            opt.step(np.zeros(2, "f4"))
        assert (w == 1).all()
    w = np.ones(2, "f4")
    with pytest.raises(ValueError, match=r"^grad_scale: expected a number that float32 can hold, got 1e\+39"):
        fo.SGD(w).step(np.zeros(2, "f4"), grad_scale=1e39)
    assert (w == 1).all()


def test_a_schedule_may_end_below_what_float32_holds():
    w = np.ones(2, "f4")
    opt = fo.SGD(w, lr=fo.schedules.exponential(1e-3, gamma=1e-20))
    for _ in range(20):
        opt.step(np.ones(2, "f4"))
    assert same_bits(w, np.full(2, np.float32(1) - np.float32(1e-3)))
    assert fo.schedules.exponential(1.0, gamma=2.0)(10**6) == math.inf  # refused by the step


# ---- the norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [
    ("float32", 8e37), ("float32", HUGE), ("bfloat16", 1e38), ("float64", 8e37), ("float64", 1e200), ("float64", 8e307),
    ("float64", 1e-200), ("float64", 1e-300),
])  # fmt: skip
@pytest.mark.parametrize("n", [1, 4, 300])
def test_clipping_is_right_for_gradients_of_any_size(isa, dtype, size, n):
    grad = np.full(n, size, dtype_of(dtype))
    want = float(np.linalg.norm(grad.astype("f8") / size)) * size
    for max_norm in (1.0, math.inf):
        w = np.zeros(n, "f4" if dtype == "bfloat16" else dtype)
        opt = fo.SGD(w, lr=1.0, max_norm=max_norm)
        norm = opt.step(grad)
        if not math.isfinite(want):
            assert opt.skipped == 1
            return
        assert norm == pytest.approx(want, rel=1e-12 if dtype == "float64" else 1e-2)
        if max_norm == 1.0:
            np.testing.assert_allclose(w, -min(1, 1 / want) * grad.astype("f8"), rtol=1e-6 if size > 1 else 1e-15)
        else:
            assert same_bits(w, -grad.astype(w.dtype))


def test_a_scale_that_float32_would_flush_is_two_factors():
    w = np.zeros(2, "f4")
    fo.SGD(w, lr=1.0).step(np.array([1e38, 1e30], "f4"), grad_scale=1e-39)
    np.testing.assert_allclose(w, [-0.1, -1e-9], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_that_are_not_finite(cls, bad):
    """They reach the weights as in torch, unless a norm is asked for: then the step is skipped and counted."""
    w, g = np.ones(300, "f4"), np.ones(300, "f4")
    g[7] = bad
    opt = cls(w, max_norm=math.inf)
    assert not math.isfinite(opt.step(g))
    assert (w == 1).all()
    assert (opt.skipped, opt.steps) == (1, 0)
    opt.step(np.ones(300, "f4"))
    assert (w < 1).all()
    plain, twin = np.ones(300, "f4"), np.ones(300, "f4")
    cls(plain).step(g)
    cls(twin).step(np.ones(300, "f4"))
    assert np.isfinite(np.delete(plain, 7)).all()
    if cls is not fo.Lion or math.isnan(bad):  # the sign of infinity is 1
        assert not np.isfinite(plain[7])
    assert same_bits(np.delete(plain, 7), np.delete(twin, 7))


# ---- states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.inf, np.nan, -np.inf, 1e4, 1e8, -1e12, 1e18, 3e38])
@pytest.mark.parametrize(("cls", "lr"), [(fo.Adam, 1e-2), (fo.RMSprop, 1e-2), (fo.SGD, 1e-2), (fo.Lion, 1e-2)])
@pytest.mark.parametrize("at", [0, 20])
def test_one_bad_gradient_does_not_stop_its_neighbours(isa, cls, lr, bad, at):
    """With 8-bit states, 256 elements share an exponent."""
    options = {"momentum": 0.9} if cls is fo.SGD else {}
    reached = {}
    for state_dtype in ("float32", "uint8"):
        w = np.zeros(600, "f4")
        opt = cls(w, lr=lr, state_dtype=state_dtype, **options)
        for i in range(400):
            g = np.nan_to_num(w - np.float32(1), posinf=1, neginf=-1).clip(-1, 1)
            if i == at:
                g[7] = bad
            opt.step(g)
        reached[state_dtype] = np.delete(w, 7)
    distance = np.abs(reached["uint8"] - 1)
    assert distance.max() < max(0.03, 2 * np.abs(reached["float32"] - 1).max())


def test_neighbours_of_a_weight_that_stays_nan_go_on():
    w = np.zeros(256, "f4")
    opt = fo.Adam(w, lr=1e-2, state_dtype="uint8")
    for _ in range(400):
        g = w - np.float32(1)
        g[7] = np.nan
        opt.step(g)
    assert np.isnan(w[7])
    assert np.abs(np.delete(w, 7) - 1).max() < 0.03


@pytest.mark.parametrize("few", [1, 3])
def test_a_few_active_elements_of_a_block_train(few):
    """Those that are large for good set the exponent, also when they were asleep before."""
    for asleep in (0, 30):
        w = np.zeros(256, "f4")
        opt = fo.Adam(w, lr=1e-2, state_dtype="uint8")
        for i in range(500):
            g = np.full(256, 1e-12, "f4")
            if i >= asleep:
                g[:few] = w[:few] - np.float32(1)
            opt.step(g)
        assert np.abs(w[:few] - 1).max() < 0.05


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 0.2, 1.0])
@pytest.mark.parametrize("alpha", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_centered_rmsprop_takes_no_giant_step(noise, alpha, dtype):
    """A variance below the rounding errors of the mean of squares is taken to be as large as they are."""
    rng = np.random.default_rng(0)
    w, largest = np.zeros(256, dtype), 0.0
    opt = fo.RMSprop(w, lr=1e-3, centered=True, alpha=alpha)
    most = 1e-3 / math.sqrt(64 * np.finfo(dtype).eps) * 1.5
    for _ in range(2000):
        before = w.copy()
        opt.step((1 + noise * rng.standard_normal(256)).astype(dtype))
        largest = max(largest, float(np.abs(w - before).max()))
    assert largest < most
    if noise >= 0.2 and alpha < 0.999:
        assert largest < 0.02


# ---- master weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"state_dtype": "uint8"}, {"l1": 1e-4}])
def test_weights_changed_by_their_owner_are_taken_over(isa, dtype, options, rng):
    """Loaded, clipped or pruned weights go on from where they are; the others keep what the masters remember."""
    w = rng.standard_normal(1000).astype(dtype_of(dtype))
    opt = fo.AdamW(w, lr=1e-4, master_weights=True, **options)
    for _ in range(3):
        opt.step(np.ones_like(w))
    master = opt.state_dict()["state"]["0"]["master"]
    kept, fresh = w.copy(), np.full(100, 5, w.dtype)
    masters = master.copy()
    w[:100] = fresh
    np.copyto(w[100:], np.clip(w[100:], -0.5, 0.5))  # weight clipping
    changed = w.view("u2") != kept.view("u2")
    opt.step(np.zeros_like(w), grad_scale=0.0)
    assert changed[:100].all()
    assert changed[100:].any()
    assert not changed.all()
    assert np.abs(w[:100].astype("f4") - 5).max() < 0.05
    start = np.where(changed, np.concatenate([fresh, np.clip(kept[100:], -0.5, 0.5)]).astype("f4"), masters)
    assert np.abs(master - start).max() < 1e-3


def test_weights_loaded_before_the_first_step_are_taken_over():
    w = np.zeros(2, ml_dtypes.bfloat16)
    opt = fo.AdamW(w, lr=1e-3, master_weights=True)
    w[...] = [5, 6]
    opt.step(np.full(2, 1e-3, w.dtype))
    assert w.tolist() == [5, 6]
    assert opt.state_dict()["state"]["0"]["master"].tolist() == pytest.approx([4.999, 5.999], abs=1e-3)
