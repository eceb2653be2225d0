"""The classes of optimizers."""

import copy
import pickle
import signal
import threading

import ml_dtypes
import numpy as np
import pytest
from helpers import dtype_of, same_bits

import fastopt as fo

pytestmark = pytest.mark.kernel


def test_adam_minimizes_and_resumes_bit_for_bit(rng):
    target = rng.standard_normal((20, 30)).astype("f4")
    w = {"w": np.zeros((20, 30), "f4")}
    opt = fo.Adam(w, lr=0.1)
    for _ in range(200):
        opt.step({"w": w["w"] - target})
    assert abs(w["w"] - target).max() < 1e-2
    copy = {"w": w["w"].copy()}
    resumed = fo.Adam(copy, lr=0.5)
    resumed.load_state_dict(opt.state_dict())
    for _ in range(5):
        opt.step({"w": w["w"] - target})
        resumed.step({"w": copy["w"] - target})
    assert same_bits(w["w"], copy["w"])


def adam_in_double(w, g, m, v, t, lr=1e-3, b1=0.9, b2=0.999, eps=1e-8, wd=0.0, decoupled=False):
    """The textbook's Adam, in float64."""
    if decoupled:
        w = w * (1 - lr * wd)
    else:
        g = g + wd * w
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps), m, v


@pytest.mark.parametrize(("cls", "decoupled"), [(fo.Adam, False), (fo.AdamW, True)])
def test_adam_is_the_textbooks(cls, decoupled, rng):
    w = rng.standard_normal(50)
    want, m, v = w.copy(), np.zeros(50), np.zeros(50)
    opt = cls(w, lr=0.01, weight_decay=0.1)
    for t in range(1, 101):
        g = rng.standard_normal(50)
        opt.step(g)
        want, m, v = adam_in_double(want, g, m, v, t, lr=0.01, wd=0.1, decoupled=decoupled)
    np.testing.assert_allclose(w, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgd_is_the_textbooks(nesterov, dampening, rng):
    if nesterov and dampening:
        with pytest.raises(ValueError, match="dampening: expected 0 with nesterov"):
            fo.SGD(np.zeros(1), momentum=0.9, dampening=0.5, nesterov=True)
        return
    w = rng.standard_normal(50)
    want, buf = w.copy(), None
    opt = fo.SGD(w, lr=0.1, momentum=0.9, dampening=dampening, nesterov=nesterov)
    for _ in range(20):
        g = rng.standard_normal(50)
        opt.step(g)
        buf = g.copy() if buf is None else 0.9 * buf + (1 - dampening) * g
        want -= 0.1 * (g + 0.9 * buf if nesterov else buf)
    np.testing.assert_allclose(w, want, rtol=1e-12, atol=1e-14)


def test_options_of_a_step():
    w = np.array([0.0, 1.0, -0.04, 0.5], "f4")
    fo.SGD(w, lr=0.1, l1=0.5).step(np.zeros(4, "f4"))
    np.testing.assert_array_equal(w, np.array([0, 0.95, 0, 0.45], "f4"))
    fo.SGD(w, lr=0.1, keep_zeros=True).step(np.ones(4, "f4"))
    assert w[0] == w[2] == 0
    assert w[1] < 0.95
    before = w.copy()
    fo.SGD(w, lr=0.1, maximize=True).step(np.ones(4, "f4"), grad_scale=2.0)
    np.testing.assert_array_equal(w, before + np.float32(0.1) * 2)


def test_lr_may_be_a_function_of_the_step():
    seen = []
    w = np.zeros(1, "f4")
    opt = fo.SGD(w, lr=lambda step: seen.append(step) or 1.0 / (step + 1))
    for _ in range(3):
        opt.step(np.ones(1, "f4"))
    assert seen == [0, 1, 2]
    assert w[0] == np.float32(-1) - np.float32(0.5) - np.float32(1 / 3)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    "tree",
    [
        lambda a, b: a,
        lambda a, b: [a, b],
        lambda a, b: {"a": a, "b": b},
        lambda a, b: {"a": a, "b": [b]},
        lambda a, b: [{"params": [a], "lr": 0.25}, {"params": {"b": b}}],
    ],
)
def test_a_step_with_nothing_new_equals_one_that_is_looked_at(tree, copied, rng):
    arrays, others = ([np.ones(5, "f4"), np.ones((2, 3), "f4")] for _ in range(2))
    opt = fo.Adam(tree(*arrays), lr=0.5, l1=0.01, maximize=True)
    other = fo.Adam(tree(*others), lr=0.5, l1=0.01, maximize=True, max_norm=1e30)  # Python takes the norm
    if copied:
        opt, arrays = pickle.loads(pickle.dumps((opt, arrays)))
    for step in range(4):
        grads = tree(*(rng.standard_normal(w.shape).astype("f4") for w in others))
        if len(opt.param_groups) > 1:
            grads = [group["params"] for group in grads]
        for each in (opt, other):
            if step == 2:
                each.param_groups[0].update(lr=0.125, betas=(0.5, 0.75))
            each.step(grads)
        assert all(same_bits(a, b) for a, b in zip(arrays, others, strict=True))
    assert opt.steps == other.steps == 4


def test_groups_none_and_late_groups():
    a, b, c = np.zeros(3, "f4"), np.zeros(2, "f4"), np.zeros(1, "f8")
    opt = fo.SGD([{"params": [a, b], "lr": 1.0}, {"params": {"c": c}}], lr=0.5)
    opt.step([[np.ones(3, "f4"), None], {"c": np.ones(1, "f8")}])
    assert a.tolist() == [-1, -1, -1]
    assert b.tolist() == [0, 0]
    assert c.tolist() == [-0.5]
    late = np.zeros(1, "f4")
    opt.add_param_group({"params": late})
    opt.step([[None, np.ones(2, "f4")], {"c": None}, np.ones(1, "f4")])
    assert b.tolist() == [-1, -1]
    assert late.tolist() == [-0.5]
    opt.param_groups[2]["lr"] = 0.0
    opt.step([[None, None], {"c": None}, np.ones(1, "f4")])
    assert late.tolist() == [-0.5]
    assert list(opt.state_dict()["state"]) == ["0.0", "0.1", "1.c", "2.0"]
    one = fo.SGD([{"params": late}], lr=0.5)
    with pytest.raises(TypeError, match="expected a list of 1 entries, one a group, got ndarray"):
        one.step(np.ones(1, "f4"))
    assert one.steps == 0


def test_a_skipped_tensor_keeps_its_own_step_count():
    w = [np.ones(1, "f4"), np.ones(1, "f4")]
    opt = fo.Adam(w, lr=0.1)
    opt.step([np.ones(1, "f4"), None])
    opt.step([np.ones(1, "f4"), np.ones(1, "f4")])
    assert w[1] == np.float32(0.9)  # a first step, with a first step's bias correction


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fo.Adam([np.zeros(2)], lr=-1), ValueError, "lr: expected a finite number, 0 or more, got -1"),
        (lambda: fo.Adam([np.zeros(2)], lr="1"), TypeError, "lr: expected a number, got str"),
        (lambda: fo.Adam([np.zeros(2)], betas=(0.9, 1.0)), ValueError, r"betas: expected two numbers in \[0, 1\)"),
        (lambda: fo.Adam([np.zeros(2)], betas=0.9), TypeError, "betas: expected two numbers, got 0.9"),
        (lambda: fo.Adam([np.zeros(2)], betas=("a", 0.9)), TypeError, "betas: expected two numbers"),
        (lambda: fo.Adam([np.zeros(2)], seed="x"), TypeError, "seed: expected an integer, got 'x'"),
        (lambda: fo.Adam([np.zeros(2)], seed=True), TypeError, "seed: expected an integer, got True"),
        (lambda: fo.Adam([np.zeros(2)], lr=10**400), ValueError, "lr: expected a finite number, 0 or more, got 1000"),
        (lambda: fo.Adam([np.zeros(2)], state_dtype=["uint8"]), ValueError, "state_dtype: expected one of"),
        (lambda: fo.SGD([np.zeros(2)], keep_zeros="no"), TypeError, "keep_zeros: expected a bool, got str"),
        (lambda: fo.SGD(5), TypeError, "params: expected an array, a list, a dict or groups, got int"),
        (lambda: fo.Adam([np.zeros(2)], eps=np.nan), ValueError, "eps: expected a finite number"),
        (lambda: fo.SGD([np.zeros(2)], nesterov=True), ValueError, "momentum: expected more than 0 with nesterov"),
        (lambda: fo.SGD([np.zeros(2)], weight_decay=np.inf), ValueError, "weight_decay: expected a finite number"),
        (lambda: fo.SGD([np.zeros(2)], l1=-0.1), ValueError, "l1: expected a finite number"),
        (lambda: fo.SGD([[1.0]]), TypeError, "array '0.0': expected a NumPy array, got float"),
        (lambda: fo.SGD([np.zeros(2, int)]), TypeError, "array '0': expected float32, float64"),
        (lambda: fo.SGD([np.zeros((4, 4))[:, ::2]]), ValueError, "array '0': must be C-contiguous"),
        (lambda: fo.SGD([np.broadcast_to(0.0, 3)]), ValueError, "array '0': must be C-contiguous"),
        (
            lambda: fo.SGD([{"params": np.zeros(2), "momentun": 0.9}]),
            ValueError,
            "group: unknown option 'momentun'; did you mean 'momentum'",
        ),
        (lambda: fo.SGD([{"params": np.zeros(2), "seed": 1}]), ValueError, "group: seed is an option of the whole"),
        (lambda: fo.SGD({np.zeros(2).tobytes()}), TypeError, "params: expected an order, which a set does not have"),
        (lambda: fo.SGD([("a", np.zeros(2)), ("a", np.zeros(1))]), ValueError, "params: expected names that differ"),
        *(
            (lambda nothing=nothing: fo.Adam(nothing), ValueError, "params: expected at least one array, got none")
            for nothing in ([], {}, iter([]), [{"params": []}], {"a": {}}, [[], {}])
        ),
        (lambda: fo.SGD([{"lr": 1}]), ValueError, "params: missing"),
        (
            lambda: fo.SGD([{"params": 3.0}]),
            TypeError,
            "params: expected an array, a list, a dict or groups",
        ),
    ],
)
def test_bad_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_shared_memory_is_refused():
    w = np.zeros(10, "f4")
    with pytest.raises(ValueError, match="array '1': shares memory with array '0'"):
        fo.SGD([w, w])
    with pytest.raises(ValueError, match="shares memory"):
        fo.SGD([w[:6], w[5:]])
    fo.SGD([w[:5], w[5:]])
    opt = fo.SGD(w)
    with pytest.raises(ValueError, match="shares memory with"):
        opt.step(w)


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({"a": np.zeros(3, "f4")}, ValueError, r"grads: expected the names of params; missing \['b'\]"),
        ({"a": np.zeros(3, "f4"), "b": np.zeros(2, "f4"), "c": 0}, ValueError, r"unexpected \['c'\]"),
        ([np.zeros(3, "f4"), np.zeros(2, "f4")], TypeError, "grads: expected a dict like params, got list"),
        ({"a": np.ones(3, "f4"), "b": np.ones(3, "f4")}, ValueError, r"of 'b': expected shape \(2,\), got \(3,\)"),
        (
            {"a": np.ones(3, "f4"), "b": np.ones(2)},
            TypeError,
            "of 'b': expected float32, float16 or bfloat16, got float64",
        ),
        ({"a": np.ones(3, "f4"), "b": np.ones(2, ">f4")}, TypeError, "of 'b': expected float32, .*byte order"),
        ({"a": np.ones(3, "f4"), "b": [1.0, 2.0]}, TypeError, "of 'b': expected a NumPy array, got list"),
    ],
)
def test_bad_gradients_change_nothing(grads, error, message):
    params = {"a": np.full(3, 5, "f4"), "b": np.full(2, 6, "f4")}
    opt = fo.Adam(params)
    with pytest.raises(error, match=message):
        opt.step(grads)
    assert params["a"].tolist() == [5, 5, 5]
    assert params["b"].tolist() == [6, 6]
    assert all(s["step"] == 0 and not s["exp_avg"].any() for s in opt.state_dict()["state"].values())


def test_a_parameter_that_became_read_only_is_refused():
    w = np.zeros(3, "f4")
    opt = fo.SGD(w)
    w.flags.writeable = False
    with pytest.raises(ValueError, match="parameter '0': is read-only"):
        opt.step(np.ones(3, "f4"))


def test_non_finite_numbers_of_a_step_are_refused():
    w = np.ones(1, "f4")
    with pytest.raises(ValueError, match="grad_scale: expected a finite number"):
        fo.SGD(w).step(w.copy(), grad_scale=np.inf)
    with pytest.raises(ValueError, match="lr: expected a finite number, 0 or more, got nan"):
        fo.SGD(w, lr=lambda step: np.nan).step(w.copy())
    assert w[0] == 1


@pytest.mark.parametrize(
    ("cls", "change", "error", "message"),
    [
        (fo.SGD, {"lr": np.nan}, ValueError, "lr: expected a finite number, 0 or more, got nan"),
        (fo.SGD, {"lr": "a"}, TypeError, "lr: expected a number, got str"),
        (fo.SGD, {"lr": lambda step: "a"}, TypeError, "lr: expected a number, got str"),
        (fo.SGD, {"weight_decay": np.nan}, ValueError, "weight_decay: expected a finite number"),
        (fo.SGD, {"momentum": 0.9}, ValueError, r"group: expected options that need \(\), got \('momentum_buffer',\)"),
        (fo.SGD, {"weight_decai": 1}, ValueError, "group: unknown option 'weight_decai'; did you mean 'weight_decay'"),
        (fo.SGD, {"state_dtype": "uint8"}, ValueError, "state_dtype: expected 'float32', as the states were made for"),
        (fo.SGD, {"master_weights": True}, ValueError, "master_weights: expected False, as the states were made for"),
        (fo.SGD, {"lr": None}, TypeError, "lr: expected a number, got NoneType"),
        (fo.Adam, {"betas": (1.0, 1.0)}, ValueError, r"betas: expected two numbers in \[0, 1\)"),
        (fo.Adam, {"maximize": "no"}, TypeError, "maximize: expected a bool"),
    ],
)
def test_options_that_are_changed_are_checked(cls, change, error, message):
    w = np.ones(2, "f4")
    opt = cls(w)
    opt.param_groups[0].update(change)
    with pytest.raises(error, match=message):
        opt.step(np.ones(2, "f4"))
    assert w.tolist() == [1, 1]
    assert opt.state_dict()["steps"] == 0


def test_an_option_that_was_removed_is_missed():
    opt = fo.SGD(np.ones(2))
    del opt.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"group: expected all options, got none for \['lr'\]"):
        opt.step(np.ones(2))


def test_8_bit_states_are_refused_by_group_too():
    with pytest.raises(ValueError, match="with amsgrad, got 'uint8'"):
        fo.Adam([{"params": np.zeros(2, "f4"), "amsgrad": True}], state_dtype="uint8")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_comes_before_a_step_or_after_it():
    """Weights, states, their counts and the number of steps go together, wherever the signal is raised."""
    w, g = np.zeros(3_000_000, "f4"), np.ones(3_000_000, "f4")
    opt = fo.SGD(w, lr=lambda step: 1.0)
    interrupts = 0
    for delay in np.linspace(1e-3, 2e-2, 20):
        timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            while timer.is_alive():
                opt.step(g)
        except KeyboardInterrupt:
            interrupts += 1
        try:
            timer.join()  # a signal that came at the end of the loop is raised here
        except KeyboardInterrupt:
            interrupts += 1
            timer.join()
        state = opt.state_dict()
        assert w.min() == w.max() == -state["steps"]
        assert state["state"]["0"]["step"] == state["steps"]
    assert interrupts == 20


def test_numbers_of_numpy_are_those_of_python():
    """float32 numbers would make the arithmetic between steps narrower, and a resumed run another one."""
    w, v = np.linspace(-1, 1, 100), np.linspace(-1, 1, 100)
    narrow = fo.AdamW(w, lr=np.float32(1e-3), betas=(np.float32(0.9), 0.999), weight_decay=np.float32(0.1))
    wide = fo.AdamW(
        v, lr=float(np.float32(1e-3)), betas=(float(np.float32(0.9)), 0.999), weight_decay=float(np.float32(0.1))
    )
    for _ in range(3):
        narrow.step(np.ones(100))
        wide.step(np.ones(100))
    narrow.param_groups[0]["lr"] = np.float32(1e-4)
    wide.param_groups[0]["lr"] = float(np.float32(1e-4))
    narrow.step(np.ones(100), grad_scale=np.float32(0.1))
    wide.step(np.ones(100), grad_scale=float(np.float32(0.1)))
    assert same_bits(w, v)
    half = np.ones(4, "f2")
    fo.SGD(half, stochastic_rounding=True, seed=np.int64(7)).step(half.copy())


@pytest.mark.parametrize("params", [{"a": np.zeros(2), "b": np.zeros(1)}, [np.zeros(2), np.zeros(1)], np.zeros(2)])
def test_params_that_were_replaced_are_refused(params):
    """Otherwise the old arrays would be stepped, which nobody looks at any more."""
    keys = [] if isinstance(params, np.ndarray) else list(params) if isinstance(params, dict) else [0, 1]
    opt = fo.SGD(params, lr=1.0)
    grads = copy.deepcopy(params)
    if keys:
        old, params[keys[1]] = params[keys[1]], np.ones(1)
        with pytest.raises(ValueError, match="params: expected the arrays that the optimizer was made for"):
            opt.step(grads)
        params[keys[1]] = old
        opt.step(grads)
    opt.param_groups[0]["params"] = copy.deepcopy(params)
    with pytest.raises(ValueError, match="params: expected the arrays that the optimizer was made for"):
        opt.step(grads)


@pytest.mark.parametrize("params", [{"a": np.zeros(2)}, [np.zeros(2)]])
def test_params_may_get_more_arrays(params):
    """The dict or list is the user's, who may go on with it."""
    params = copy.deepcopy(params)  # of this call: the test may run in parallel threads
    opt = fo.SGD(params, lr=1.0)
    grads = copy.deepcopy(params)
    if isinstance(params, dict):
        params["b"] = np.zeros(3)
    else:
        params.append(np.zeros(3))
    opt.step(grads)
    fo.SGD(params, lr=1.0).step(copy.deepcopy(params))


def test_names_that_are_the_same_are_refused():
    with pytest.raises(ValueError, match=r"params: expected names that differ, got \['1'\]"):
        fo.SGD({1: np.zeros(2), "1": np.zeros(2)})
    opt = fo.SGD({"1.0": np.zeros(2)})
    with pytest.raises(ValueError, match=r"got \['1.0'\]"):
        opt.add_param_group({"params": [np.zeros(2)]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_steps_its_own_arrays(copied):
    w = {"w": np.zeros(3)}
    opt = fo.Adam(w, lr=0.1)
    opt.step({"w": np.ones(3)})
    before = w["w"].copy()
    v, twin = copied((w, opt))
    twin.step({"w": np.ones(3)})
    assert same_bits(w["w"], before)
    opt.step({"w": np.ones(3)})
    assert same_bits(w["w"], v["w"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["state"].pop("v"), r"state: expected one of 'v', got \['w'\]"),
        (lambda d: d["state"]["v"].pop("step"), "step of 'v': expected a whole number, 0 or more, got None"),
        (lambda d: d["state"]["v"].update(step=2**64), "step of 'v': expected a number below 2\\*\\*62"),
        (lambda d: d.update(steps=2**64 - 1), "steps: expected a number below"),
        (lambda d: d["state"]["v"].update(step=-1), "step of 'v': expected a whole number, 0 or more, got -1"),
        (lambda d: d["state"]["v"].update(exp_avg=[0.0]), "exp_avg of 'v': expected an array, got \\[0.0\\]"),
        (
            lambda d: d["state"]["v"].update(exp_avg=np.zeros(2, "f2")),
            "exp_avg of 'v': expected float32, got 'float16'",
        ),
        (lambda d: d["state"]["v"].update(dtype="float16"), "dtype of 'v': expected 'float32', got 'float16'"),
        (lambda d: d.update(steps="3"), "steps: expected a whole number, 0 or more, got '3'"),
        (lambda d: d.update(max_norm="x"), "max_norm: expected a number, got str"),
        (lambda d: d["param_groups"][0].update(state_dtype="uint8"), "state_dtype: expected 'float32', got 'uint8'"),
        (lambda d: d["param_groups"][0].update(stochastic_rounding=1), "stochastic_rounding: expected a bool, got int"),
        (lambda d: d["state"]["v"].update(step=2**62), r"step of 'v': expected a number below 2\*\*62, got 4611"),
        (lambda d: d.update(skipped=2**64), "skipped: expected a number below"),
        (lambda d: d["state"]["v"].update(exp_avg_sq=np.array([1, -1], "f4")), "exp_avg_sq of 'v': expected no neg"),
        (lambda d: d["state"]["v"].update(shape=2), r"shape of 'v': expected \(2,\), got 2"),
        (lambda d: d["state"].update(v=3), "state: expected a dict of dicts, got"),
        (lambda d: d.update(state=[1]), r"state: expected a dict of dicts, got \[1\]"),
        (lambda d: d.update(param_groups=[7]), r"param_groups: expected a list of dicts, got \[7\]"),
        (lambda d: d.update(param_groups={"params": []}), "param_groups: expected a list of dicts, got"),
        (lambda d: d["param_groups"][0].update(params=[["w"], "v"]), r"params: expected \['w', 'v'\], got"),
        (lambda d: d["param_groups"][0].update(params=["w", "w", "v"]), r"params: expected \['w', 'v'\], got"),
        (lambda d: d.update(seed="x"), "seed: expected an integer, got 'x'"),
        (lambda d: d["param_groups"][0].pop("params"), "params: expected"),
        (lambda d: d["param_groups"][0].update(lr=np.nan), "lr: expected a finite number, 0 or more, got nan"),
        (lambda d: d["param_groups"][0].update(eps_=1), "group: unknown option 'eps_'; did you mean 'eps'"),
        (lambda d: d["param_groups"][0].update(betas=[0.9]), "betas: expected two numbers"),
    ],
)
def test_a_damaged_state_changes_nothing(change, message):
    params = {"w": np.zeros(3, "f4"), "v": np.zeros(2, "f4")}
    other = fo.Adam(copy.deepcopy(params), lr=0.5)
    other.step({name: np.ones_like(p) for name, p in params.items()})
    damaged = other.state_dict()
    change(damaged)
    opt = fo.Adam(params)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.load_state_dict(damaged)
    state = opt.state_dict()
    assert state["steps"] == state["state"]["w"]["step"] == 0
    assert not state["state"]["w"]["exp_avg"].any()
    assert opt.param_groups[0]["lr"] == 1e-3


def test_a_state_of_another_optimizer_is_refused(rng):
    opt = fo.Adam({"w": np.zeros(3, "f4")})
    for other, message in [
        (fo.AdamW({"w": np.zeros(3, "f4")}), "optimizer: expected 'Adam', got 'AdamW'"),
        (fo.Adam({"v": np.zeros(3, "f4")}), r"params: expected \['w'\], got \['v'\]"),
        (fo.Adam({"w": np.zeros(4, "f4")}), r"shape of 'w': expected \(3,\), got \(4,\)"),
        (fo.Adam({"w": np.zeros(3)}), "dtype of 'w': expected 'float32', got 'float64'"),
        (fo.Adam({"w": np.zeros(3, "f2")}), "dtype of 'w': expected 'float32', got 'float16'"),
        (fo.Adam([{"params": np.zeros(3, "f4")}, {"params": np.zeros(1, "f4")}]), "param_groups: expected 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(other.state_dict())
    assert not opt.state_dict()["state"]["w"]["exp_avg"].any()


def test_zero_dimensional_and_empty_parameters():
    scalar, empty = np.array(1.0, "f4"), np.zeros((0, 5), "f4")
    opt = fo.SGD([scalar, empty], lr=1.0)
    opt.step([np.array(0.5, "f4"), np.zeros((0, 5), "f4")])
    assert scalar == 0.5
    loss = np.ones(3, "f4")
    opt.step([loss.mean(), None])  # a scalar, as NumPy makes it
    fo.SGD(scalar, lr=1.0).step(loss.sum())
    assert scalar == -3.5
    with pytest.raises(TypeError, match="of '0': expected float32, float16 or bfloat16, got float64"):
        opt.step([np.float64(1), None])
    with pytest.raises(TypeError, match="array '0': expected a NumPy array, got float32"):
        fo.SGD([np.float32(1)])


# ---- clipping, loss scales, narrow types -------------------------------------------------------------------------


def test_a_step_with_gradients_that_are_not_finite_is_skipped():
    w, v = np.ones(3, "f4"), np.ones(2, "f4")
    opt = fo.Adam({"w": w, "v": v})
    for bad in (np.inf, np.nan):
        norm = opt.step({"w": np.ones(3, "f4"), "v": np.array([1, bad], "f4")}, grad_scale=0.5)
        assert not np.isfinite(norm)
    assert opt.skipped == 2
    assert (w == 1).all()
    assert (v == 1).all()
    assert opt.state_dict()["state"]["w"]["step"] == 0
    norm = opt.step({"w": np.full(3, 2, "f4"), "v": np.full(2, 2, "f4")}, grad_scale=0.5)
    assert norm == pytest.approx(np.sqrt(5))
    assert opt.skipped == 2
    assert opt.step({"w": np.ones(3, "f4"), "v": np.ones(2, "f4")}) is None


def test_max_norm_scales_all_tensors_together():
    w, v = np.zeros(1, "f4"), np.zeros(1, "f8")
    opt = fo.SGD([w, v], lr=1.0, max_norm=1.0)
    assert opt.step([np.array([3], "f4"), np.array([4.0])]) == 5.0
    np.testing.assert_allclose([w[0], v[0]], [-0.6, -0.8], rtol=1e-6)
    assert opt.step([np.array([0.3], "f4"), None]) == pytest.approx(0.3)
    assert w[0] == pytest.approx(-0.9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"master_weights": True}])
def test_small_steps_are_not_lost(dtype, options):
    """A thousandth of the spacing, a thousand times, moves a weight by one spacing: to nearest it never would."""
    spacing = 2.0**-10 if dtype == "float16" else 2.0**-7
    grad = np.ones(1000, dtype_of(dtype))
    w = np.ones(1000, dtype_of(dtype))
    opt = fo.SGD(w, lr=spacing / 1000, **options)
    stuck = np.ones(1000, dtype_of(dtype))
    opt_stuck = fo.SGD(stuck, lr=spacing / 1000)
    for _ in range(1000):
        opt.step(grad)
        opt_stuck.step(grad)
    assert (stuck == 1).all()
    assert w.astype("f8").mean() == pytest.approx(1 - spacing, abs=0.15 * spacing)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_pruned_between_steps_stay_zero_with_master_weights_too(dtype):
    w = np.linspace(-1, 1, 1000).astype(dtype_of(dtype))
    opt = fo.Adam([w], lr=0.01, master_weights=True, keep_zeros=True)
    grad = np.ones_like(w)
    opt.step([grad])
    mask = fo.prune_(w, sparsity=0.5)
    opt.step([grad])
    assert np.array_equal(w != 0, mask)
    before = w.copy()
    opt.step([None])
    opt.step([grad])
    assert np.array_equal(w != 0, mask)
    assert (w < before)[mask].all()


def test_chance_depends_on_seed_step_and_place_alone(threads):
    def run_with(seed):
        w = np.linspace(-1, 1, 100003, dtype="f4").astype(ml_dtypes.bfloat16)
        opt = fo.Adam(w, lr=1e-4, stochastic_rounding=True, state_dtype="uint8", seed=seed)
        for _ in range(3):
            opt.step(np.ones(w.size, "f4"))
        return w.view("u2")

    first = run_with(0)
    fo.set_num_threads(3)
    assert np.array_equal(run_with(0), first)
    assert not np.array_equal(run_with(1), first)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "uint8"])
def test_bytes_of_state(state_dtype):
    opt = fo.Adam(np.zeros(100_000, "f4"), state_dtype=state_dtype)
    arrays = [v for v in opt.state_dict()["state"]["0"].values() if isinstance(v, np.ndarray)]
    each = sum(a.nbytes for a in arrays) / 100_000
    assert each == pytest.approx({"float32": 8, "bfloat16": 4, "uint8": 2 + 2 / 256}[state_dtype], rel=1e-3)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize("cls", [fo.Adam, fo.AdamW, fo.SGD, fo.Lion, fo.RMSprop])
def test_narrow_states_reach_the_same_minimum(cls, state_dtype, rng):
    a = rng.standard_normal((200, 20)).astype("f4")
    target = a @ rng.standard_normal(20).astype("f4")
    options = {"lr": 0.002, "momentum": 0.9} if cls is fo.SGD else {"lr": 0.01}
    losses = {}
    for dtype in ("float32", state_dtype):
        w = np.zeros(20, "f4")
        opt = cls(w, **options, state_dtype=dtype)
        for _ in range(1500):
            opt.step(a.T @ (a @ w - target) / 20)
        losses[dtype] = float(np.mean((a @ w - target) ** 2))
    assert losses[state_dtype] < max(4 * losses["float32"], 1e-2)


class OnlyDlpack:
    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnlyArray:
    def __init__(self, array, copies=False):
        self._array, self._copies = array, copies

    def __array__(self, dtype=None, copy=None):
        return self._array.copy() if self._copies else self._array


def test_arrays_of_others_are_stepped_in_place():
    # Before 2.1, NumPy took all memory that came by DLPack for read-only.
    kinds = (OnlyArray, OnlyDlpack) if np.lib.NumpyVersion(np.__version__) >= "2.1.0" else (OnlyArray,)
    for kind in kinds:
        w = np.ones(4, "f4")
        fo.SGD([kind(w)], lr=0.5).step([kind(np.ones(4, "f4"))])
        assert w.tolist() == [0.5] * 4
    with pytest.raises(TypeError, match="array '0': expected a NumPy array, got OnlyArray"):
        fo.SGD([OnlyArray(np.ones(4, "f4"), copies=True)])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: fo.Adam(np.zeros(2), state_dtype="uint8"),
            ValueError,
            "state_dtype: expected float32 for '0' of float64",
        ),
        (lambda: fo.Adam(np.zeros(2), state_dtype="int4"), ValueError, "state_dtype: expected one of"),
        (lambda: fo.Adam(np.zeros(2), amsgrad=True, state_dtype="uint8"), ValueError, "with amsgrad"),
        (lambda: fo.Adagrad(np.zeros(2), state_dtype="uint8"), ValueError, "state_dtype: expected .* for Adagrad"),
        (lambda: fo.RMSprop(np.zeros(2), centered=True, state_dtype="uint8"), ValueError, "if centered"),
        (
            lambda: fo.RMSprop(np.zeros(2, "f4"), centered=True, state_dtype="bfloat16"),
            ValueError,
            "state_dtype: expected 'float32' if centered, got 'bfloat16'",
        ),
        (lambda: fo.Adam(np.zeros(2), max_norm=0.0), ValueError, "max_norm: expected more than 0, got 0.0"),
        (lambda: fo.Adam(np.zeros(2), max_norm=np.nan), ValueError, "max_norm: expected more than 0, got nan"),
        (lambda: fo.Adam(np.zeros(2), speed=1), TypeError, r"Adam: unexpected options \['speed'\]"),
        (lambda: fo.RMSprop(np.zeros(2), alpha=1.0), ValueError, r"alpha: expected a number in \[0, 1\)"),
        (lambda: fo.Lion(np.zeros(2), betas=(0.9,)), ValueError, "betas: expected two numbers"),
        (
            lambda: fo.SGD(np.zeros(2, "f2")).step(np.zeros(2)),
            TypeError,
            "of '0': expected float32, float16 or bfloat16, got float64",
        ),
        (lambda: fo.SGD(np.zeros(2)).step(np.zeros(2, "f4")), TypeError, "of '0': expected float64, got float32"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_adagrad_starts_from_its_initial_value():
    w = np.ones(1)
    fo.Adagrad(w, lr=1.0, initial_accumulator_value=3.0).step(np.ones(1))
    assert w[0] == pytest.approx(0.5)
