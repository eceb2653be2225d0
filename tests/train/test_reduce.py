"""Steps by the mean of the gradients of several ranks, which are threads here."""

import copy
import math
import pickle
import re
import threading

import ml_dtypes
import numpy as np
import pytest
import reference
from helpers import same_bits

import fastopt as fo

pytestmark = pytest.mark.kernel

SHAPES = {"w": (33, 17), "b": (33,), "half": (5, 40)}


class Ranks:
    """Ranks that sum a buffer in their order."""

    def __init__(self, count):
        self.count = count
        self._barrier, self._buffers = threading.Barrier(count, timeout=30), [None] * count

    def reduce(self, rank):
        def reduce(buffer):
            assert buffer.dtype == np.float32
            assert buffer.ndim == 1
            self._buffers[rank] = buffer
            self._barrier.wait()
            total = np.zeros_like(buffer)
            with np.errstate(over="ignore", invalid="ignore"):
                for other in self._buffers:
                    total += other
            self._barrier.wait()
            buffer[:] = total

        return reduce

    def run(self, work):
        """Call work(rank, reduce) on every rank; return what each returned, or the error that it raised."""
        results = [None] * self.count

        def call(rank):
            try:
                results[rank] = work(rank, self.reduce(rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    made = {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    return made | {"half": made["half"].astype(ml_dtypes.bfloat16)}


def grads_of(rank, step=0):
    rng = np.random.default_rng((rank, step))
    made = {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    return made | {"half": made["half"].astype(ml_dtypes.bfloat16)}


def same(a, b):
    return all(same_bits(a[name].astype("f4"), b[name].astype("f4")) for name in a)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.5}, {"grad_scale": 1 / 1024}, {"max_norm": 1e-3, "grad_scale": 8}]
)
def test_all_ranks_step_by_the_mean(ranks, options):
    max_norm, grad_scale = options.get("max_norm"), options.get("grad_scale")

    def work(rank, reduce):
        params = params_of()
        opt = fo.SGD(params, lr=0.125, max_norm=max_norm)
        norm = opt.step(grads_of(rank), grad_scale=grad_scale, reduce=reduce)
        return norm, params, opt.steps

    sums = reference.summed([list(grads_of(rank).values()) for rank in range(ranks)])
    scale, norm = reference.scale_and_norm(sums, ranks, grad_scale or 1.0, max_norm or math.inf)
    want = params_of()
    for name, g in zip(("w", "b"), sums, strict=False):
        factor = np.float32(scale)
        want[name] = want[name] - np.float32(0.125) * (g * factor)
    plain = params_of()
    opt = fo.SGD(plain, lr=0.125, max_norm=max_norm)
    assert opt.step(dict(zip(SHAPES, sums, strict=True)), grad_scale=(grad_scale or 1.0) / ranks) == norm
    for got_norm, params, steps in Ranks(ranks).run(work):
        assert got_norm == norm
        assert steps == 1
        assert same(params, plain)
        assert all(same_bits(params[name], want[name]) for name in ("w", "b"))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: fo.Adam(p, lr=fo.schedules.cosine(0.1, steps=9), max_norm=1.0),
        lambda p: fo.AdamW(p, lr=0.1, state_dtype="uint8", stochastic_rounding=True, seed=3),
        lambda p: fo.Lion([{"params": {"w": p["w"]}, "lr": 0.5}, {"params": {k: p[k] for k in ("b", "half")}}], lr=0.1),
        lambda p: fo.RMSprop(p, master_weights=True, maximize=True, l1=0.01),
    ],
)
def test_many_steps(make):
    def work(rank, reduce):
        params = params_of()
        opt = make(params)
        if rank == 1:  # a copy has a buffer of its own
            opt, params = copy.deepcopy((opt, params))
        for step in range(4):
            opt.step(grads_of(rank, step), reduce=reduce)
            if rank == 2:
                opt, params = pickle.loads(pickle.dumps((opt, params)))
        return params, opt.state_dict()["state"]

    params = params_of()
    opt = make(params)
    for step in range(4):
        sums = reference.summed([list(grads_of(rank, step).values()) for rank in range(3)])
        opt.step(dict(zip(SHAPES, sums, strict=True)), grad_scale=1 / 3)
    want = opt.state_dict()["state"]
    for got, states in Ranks(3).run(work):
        assert same(got, params)
        for name, state in states.items():
            for key, value in state.items():
                assert np.array_equal(value, want[name][key]), (name, key)


def test_no_gradient_on_any_rank():
    def work(rank, reduce):
        params = params_of()
        opt = fo.Adam(params)
        opt.step({**grads_of(rank), "b": None}, reduce=reduce)
        return same_bits(params["b"], params_of()["b"]), [state["step"] for state in opt.state_dict()["state"].values()]

    assert Ranks(2).run(work) == [(True, [1, 0, 1])] * 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_gradients_that_are_not_finite_are_skipped_on_all_ranks(bad):
    """3e38 is finite on each rank, but not their sum."""

    def work(rank, reduce):
        params, grads = params_of(), grads_of(rank)
        if rank != 0:
            grads["w"][3, 4] = bad
        opt = fo.Adam(params)
        norm = opt.step(grads, reduce=reduce)
        return math.isfinite(norm), opt.skipped, opt.steps, same(params, params_of())

    assert Ranks(3).run(work) == [(False, 1, 0, True)] * 3


def failing(change):
    """The errors of three ranks, the second of which calls change(opt, grads, params) before its second step."""

    def work(rank, reduce):
        params = params_of()
        opt = fo.Adam(params, lr=0.1)
        opt.step(grads_of(rank), reduce=reduce)
        before = {name: param.copy() for name, param in params.items()}
        grads = grads_of(rank, 1)
        if rank == 1:
            grads = change(opt, grads, params) or grads
        try:
            opt.step(grads, reduce=reduce)
        finally:
            assert same(before, {name: params[name] for name in before}) or rank == 1
            assert opt.steps == 1
        return

    return Ranks(3).run(work)


def set_option(key, value):
    return lambda opt, grads, params: opt.param_groups[0].update({key: value})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda o, g, p: {**g, "w": g["b"]}, ValueError, r"gradient of 'w': expected shape \(33, 17\)"),
        (lambda o, g, p: {**g, "w": g["w"].astype("f8")}, TypeError, "gradient of 'w': expected float32, float16 or"),
        (lambda o, g, p: {"w": g["w"]}, ValueError, "grads"),
        (lambda o, g, p: p.update(w=np.zeros((33, 17), "f4")), ValueError, "params: expected the arrays"),
        (lambda o, g, p: o.param_groups.append(o.param_groups[0]), ValueError, "param_groups: expected 1 groups"),
        (set_option("lr", -1.0), ValueError, "lr"),
        (set_option("lr", lambda step: 1 / 0), ZeroDivisionError, ""),
    ],
)
def test_a_rank_that_fails_fails_on_all(change, kind, message):
    errors = failing(change)
    assert isinstance(errors[1], kind)
    assert re.search(message, str(errors[1]))
    for other in (errors[0], errors[2]):
        assert isinstance(other, RuntimeError)
        assert str(other) == "reduce: another rank failed, and no rank has stepped"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o, g, p: {**g, "b": None}, "gradient of 'b': only some ranks have one; no rank has stepped"),
        (set_option("lr", 0.2), "reduce: the ranks differ in parameters, options or number of steps; no rank has"),
        (set_option("betas", (0.8, 0.9)), "reduce: the ranks differ"),
        (lambda o, g, p: o._steps.__setitem__(0, 1) or setattr(o, "max_norm", 3.0), "reduce: the ranks differ"),
    ],
)
def test_ranks_that_differ_all_fail(change, message):
    for error in failing(change):
        assert isinstance(error, ValueError)
        assert str(error).startswith(message)


def test_functions_that_do_not_sum_in_place():
    def halve(buffer):
        buffer *= 0.5

    opt = fo.SGD(np.zeros(3, "f4"))
    with pytest.raises(TypeError, match="reduce: expected a function that sums in place and returns None, got array"):
        opt.step(np.ones(3, "f4"), reduce=lambda buffer: buffer + 0)
    with pytest.raises(TypeError, match="reduce: expected a function, got int"):
        opt.step(np.ones(3, "f4"), reduce=3)
    with pytest.raises(ValueError, match=r"reduce: expected the sum of the buffer over all ranks, got 0\.5"):
        opt.step(np.ones(3, "f4"), reduce=halve)
    assert opt.steps == 0
    opt.step(np.ones(3, "f4"), reduce=lambda buffer: buffer)
    assert opt.steps == 1


def test_float64_is_refused():
    opt = fo.SGD({"w": np.zeros(3), "v": np.zeros(3, "f4")})
    with pytest.raises(ValueError, match=r"reduce: expected no float64 parameters, .*, got \['w'\]"):
        opt.step({"w": np.ones(3), "v": np.ones(3, "f4")}, reduce=lambda buffer: None)
