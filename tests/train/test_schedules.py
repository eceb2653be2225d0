import copy
import math
import pickle

import numpy as np
import pytest

import fastopt as fo
from fastopt import schedules


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (schedules.constant(0.5), lambda s: 0.5),
        (schedules.step(0.5, step_size=7, gamma=0.3), lambda s: 0.5 * 0.3 ** (s // 7)),
        (schedules.exponential(0.5, gamma=0.9), lambda s: 0.5 * 0.9**s),
        (
            schedules.cosine(0.5, steps=39, final=0.01),
            lambda s: 0.01 + 0.49 * (1 + math.cos(math.pi * min(s, 39) / 39)) / 2,
        ),
        (schedules.linear(0.5, steps=10, start=0.1), lambda s: 0.1 + 0.04 * min(s, 10)),
        (schedules.linear(0.0, steps=10, start=0.1), lambda s: 0.1 - 0.01 * min(s, 10)),
    ],
)
def test_formulas(schedule, formula):
    np.testing.assert_allclose([schedule(s) for s in range(60)], [formula(s) for s in range(60)], rtol=1e-12)


def test_one_cycle_rises_and_falls():
    rate = schedules.one_cycle(2.0, steps=100)
    rates = [rate(s) for s in range(120)]
    assert rates[0] == pytest.approx(0.08)
    assert rates[29] == max(rates) == pytest.approx(2.0)
    assert rates[99] == rates[119] == pytest.approx(8e-6)
    assert all(np.diff(rates[:30]) > 0)
    assert all(np.diff(rates[29:100]) < 0)


@pytest.mark.parametrize(
    ("steps", "warmup", "rates"),  # as OneCycleLR(max_lr=1.0, total_steps=steps, pct_start=warmup) prints them
    [
        (5, 0.4, [0.04, 1.0, 0.750001, 0.250003, 4e-6, 4e-6]),
        (4, 0.5, [0.04, 1.0, 0.500002, 4e-6, 4e-6]),
        (2, 0.5, [1.0, 4e-6, 4e-6]),
        (3, 1.0, [0.04, 0.52, 1.0, 4e-6]),
        (1, 0.3, [4e-6, 4e-6]),
    ],
)
def test_one_cycle_is_that_of_torch(steps, warmup, rates):
    rate = schedules.one_cycle(1.0, steps=steps, warmup=warmup)
    np.testing.assert_allclose([rate(s) for s in range(len(rates))], rates, rtol=1e-6)


SCHEDULES = [
    schedules.constant(0.5),
    schedules.step(0.5, step_size=7),
    schedules.exponential(0.5, gamma=0.9),
    schedules.cosine(0.5, steps=39),
    schedules.linear(0.5, steps=10),
    schedules.one_cycle(0.5, steps=20),
    schedules.chain([(3, schedules.linear(1.0, steps=3))], schedules.cosine(1.0, steps=9)),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_pickled_with_its_optimizer(schedule):
    for again in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert [again(s) for s in range(50)] == [schedule(s) for s in range(50)]
    w = np.zeros(1)
    opt = fo.SGD(w, lr=schedule)
    w2, opt2 = pickle.loads(pickle.dumps((w, opt)))
    for _ in range(5):
        opt.step(np.ones(1))
        opt2.step(np.ones(1))
    assert w[0] == w2[0] != 0


def test_a_chain_keeps_what_it_was_given():
    parts = [(2, schedules.constant(1.0))]
    rate, once = (schedules.chain(p, schedules.constant(2.0)) for p in (parts, iter(parts)))
    parts.clear()
    assert [rate(s) for s in range(4)] == [once(s) for s in range(4)] == [1.0, 1.0, 2.0, 2.0]


def test_an_optimizer_follows_a_schedule():
    w = np.zeros(1)
    opt = fo.SGD(w, lr=schedules.chain([(2, schedules.linear(1.0, steps=2))], schedules.constant(0.25)))
    for _ in range(4):
        opt.step(np.ones(1))
    assert w[0] == -(0 + 0.5 + 0.25 + 0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant(-1.0), "lr: expected a finite number, 0 or more, got -1.0"),
        (lambda: schedules.step(1.0, step_size=0), "step_size: expected a finite number, 1 or more, got 0"),
        (lambda: schedules.exponential(1.0, gamma=math.nan), "gamma: expected a finite number"),
        (lambda: schedules.cosine(1.0, steps=0), "steps: expected"),
        (lambda: schedules.one_cycle(1.0, steps=9, warmup=2), "warmup: expected a finite number, from 0 to 1, got 2"),
        (lambda: schedules.chain([(0, schedules.constant(1.0))], schedules.constant(1.0)), "parts: expected"),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant("a"), "lr: expected a number, got str"),
        (lambda: schedules.cosine(1.0, steps=None), "steps: expected a number, got NoneType"),
        (lambda: schedules.chain([(5, 0.1)], schedules.constant(1.0)), "parts: expected schedules, got float"),
        (lambda: schedules.chain([], 0.1), "last: expected a schedule, got float"),
    ],
)
def test_what_is_no_number_or_schedule(make, message):
    with pytest.raises(TypeError, match=message):
        make()
