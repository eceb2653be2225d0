"""Learning-rate schedules: functions of the step that an optimizer takes as ``lr``.

Steps are counted from 0. Each function here returns a schedule. A schedule has no state, so a resumed run needs nothing
saved, and it can be pickled and copied with its optimizer.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from fastopt._checks import as_float
from fastopt._text import shown

Schedule: TypeAlias = Callable[[int], float]


def _check(name: str, value: float, least: float = 0.0, most: float = math.inf) -> float:
    """Return a number as a float, or raise."""
    given, value = value, as_float(value, name)
    if not (math.isfinite(value) and least <= value <= most):
        limit = f"from {least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
        raise ValueError(f"{name}: expected a finite number, {limit}, got {shown(given)}")
    return value


def _power(lr: float, gamma: float, times: float) -> float:
    """Return ``lr * gamma**times``; infinity, which an optimizer refuses, where a float cannot hold it."""
    try:
        return float(lr * gamma**times)
    except OverflowError:
        return math.inf if lr else 0.0


def constant(lr: float) -> Schedule:
    """Return `lr` at every step.

    Parameters
    ----------
    lr : float

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If an argument is not a number.
    ValueError
        If `lr` is negative or not finite.

    Examples
    --------
    >>> from fastopt import schedules
    >>> schedules.constant(0.1)(1000)
    0.1
    """
    lr = _check("lr", lr)
    return partial(_constant, lr)


def _constant(lr: float, step: int) -> float:
    return lr


def step(lr: float, *, step_size: int, gamma: float = 0.1) -> Schedule:
    """Multiply by `gamma` every `step_size` steps: ``lr * gamma ** (step // step_size)``.

    Parameters
    ----------
    lr : float
    step_size : int
    gamma : float

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If an argument is not a number.
    ValueError
        If a number is negative or not finite, or `step_size` is below 1.

    Examples
    --------
    >>> from fastopt import schedules
    >>> rate = schedules.step(1.0, step_size=10, gamma=0.5)
    >>> [rate(s) for s in (0, 9, 10, 25)]
    [1.0, 1.0, 0.5, 0.25]
    """
    lr = _check("lr", lr)
    _check("step_size", step_size, 1)
    gamma = _check("gamma", gamma)
    return partial(_step, lr, step_size, gamma)


def _step(lr: float, step_size: int, gamma: float, step: int) -> float:
    return _power(lr, gamma, step // step_size)


def exponential(lr: float, *, gamma: float) -> Schedule:
    """Multiply by `gamma` every step: ``lr * gamma ** step``.

    Parameters
    ----------
    lr : float
    gamma : float

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If an argument is not a number.
    ValueError
        If a number is negative or not finite.

    Examples
    --------
    >>> from fastopt import schedules
    >>> schedules.exponential(1.0, gamma=0.5)(3)
    0.125
    """
    lr = _check("lr", lr)
    gamma = _check("gamma", gamma)
    return partial(_exponential, lr, gamma)


def _exponential(lr: float, gamma: float, step: int) -> float:
    return _power(lr, gamma, step)


def cosine(lr: float, *, steps: int, final: float = 0.0) -> Schedule:
    """Fall along half a cosine from `lr` to `final` at step `steps`, and stay there.

    Parameters
    ----------
    lr : float
    steps : int
    final : float

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If an argument is not a number.
    ValueError
        If a number is negative or not finite, or `steps` is below 1.

    References
    ----------
    Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017, without the restarts.

    Examples
    --------
    >>> from fastopt import schedules
    >>> rate = schedules.cosine(1.0, steps=100)
    >>> [round(rate(s), 3) for s in (0, 50, 100, 200)]
    [1.0, 0.5, 0.0, 0.0]
    """
    lr = _check("lr", lr)
    _check("steps", steps, 1)
    final = _check("final", final)
    return partial(_cosine, lr, steps, final)


def _cosine(lr: float, steps: int, final: float, step: int) -> float:
    return _between(lr, final, min(step / steps, 1.0))


def _between(start: float, end: float, fraction: float) -> float:
    """Return the rate on half a cosine from `start` (fraction 0) to `end` (fraction 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def linear(lr: float, *, steps: int, start: float = 0.0) -> Schedule:
    """Go in a straight line from `start` to `lr` at step `steps`, and stay: a warm-up, or a decay if `start` is higher.

    Parameters
    ----------
    lr : float
    steps : int
    start : float

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If an argument is not a number.
    ValueError
        If a number is negative or not finite, or `steps` is below 1.

    Examples
    --------
    >>> from fastopt import schedules
    >>> rate = schedules.linear(1.0, steps=4)
    >>> [rate(s) for s in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    lr = _check("lr", lr)
    _check("steps", steps, 1)
    start = _check("start", start)
    return partial(_linear, lr, steps, start)


def _linear(lr: float, steps: int, start: float, step: int) -> float:
    return start + (lr - start) * min(step / steps, 1.0)


def one_cycle(lr: float, *, steps: int, warmup: float = 0.3, initial: float = 0.04, final: float = 4e-6) -> Schedule:
    """Rise to `lr` and fall again, each along half a cosine.

    Parameters
    ----------
    lr : float
        The highest rate.
    steps : int
        Length of the cycle: step ``steps - 1`` has the last rate, and so have all steps after it.
    warmup : float
        Fraction of the steps that rise.
    initial, final : float
        First and last rate, as fractions of `lr`.

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If an argument is not a number.
    ValueError
        If a number is out of range.

    References
    ----------
    Smith and Topin, "Super-convergence", 2019; the rates and defaults of
    ``torch.optim.lr_scheduler.OneCycleLR(total_steps=steps)``.

    Examples
    --------
    >>> from fastopt import schedules
    >>> rate = schedules.one_cycle(1.0, steps=100)
    >>> [round(rate(s), 3) for s in (0, 29, 99)]
    [0.04, 1.0, 0.0]
    """
    lr = _check("lr", lr)
    _check("steps", steps, 1)
    warmup = _check("warmup", warmup, 0, 1)
    initial = _check("initial", initial, 0, 1)
    final = _check("final", final, 0, 1)
    return partial(_one_cycle, lr, steps, warmup, lr * initial, lr * final)


def _one_cycle(lr: float, steps: int, warmup: float, first: float, last: float, step: int) -> float:
    top, end = warmup * steps - 1, steps - 1  # the last step is `end`, as in OneCycleLR
    if top > 0 and step <= top:
        return _between(first, lr, step / top)
    if step >= end:
        return last
    return _between(lr, last, (step - top) / (end - top))


def chain(parts: Sequence[tuple[int, Schedule]], last: Schedule) -> Schedule:
    """Run schedules one after the other, each counting its steps from 0.

    Parameters
    ----------
    parts : sequence of (steps, schedule)
    last : schedule
        Used after all parts, from its own step 0.

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If an argument is not a schedule.
    ValueError
        If a part has less than one step.

    Examples
    --------
    >>> from fastopt import schedules
    >>> warm = schedules.linear(1.0, steps=10)
    >>> rate = schedules.chain([(10, warm)], schedules.cosine(1.0, steps=90))
    >>> [round(rate(s), 3) for s in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    parts = list(parts)
    for steps, schedule in parts:
        _check("parts", steps, 1)
        if not callable(schedule):
            raise TypeError(f"parts: expected schedules, got {type(schedule).__name__}")
    if not callable(last):
        raise TypeError(f"last: expected a schedule, got {type(last).__name__}")

    return partial(_chain, parts, last)


def _chain(parts: Sequence[tuple[int, Schedule]], last: Schedule, step: int) -> float:
    for steps, schedule in parts:
        if step < steps:
            return schedule(step)
        step -= steps
    return last(step)


def cubic_sparsity(final: float, steps: int, *, initial: float = 0.0, begin: int = 0) -> Schedule:
    """Raise the sparsity while training: fast at first, then ever slower.

    Parameters
    ----------
    final : float
        Sparsity at step ``begin + steps`` and after it.
    steps : int
        Number of steps from `initial` to `final`.
    initial : float
        Sparsity until step `begin`.
    begin : int

    Returns
    -------
    callable from step to sparsity
        ``final + (initial - final) * (1 - (step - begin) / steps)**3`` in between (Zhu and Gupta, 2017).

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> from fastopt.schedules import cubic_sparsity
    >>> schedule = cubic_sparsity(0.8, steps=100)
    >>> [round(schedule(step), 3) for step in (0, 50, 100, 200)]
    [0.0, 0.7, 0.8, 0.8]
    """
    final = _check("final", final, most=1)
    initial = _check("initial", initial, most=1)
    _check("steps", steps, least=1)
    return partial(_cubic_sparsity, final, steps, initial, begin)


def _cubic_sparsity(final: float, steps: int, initial: float, begin: int, step: int) -> float:
    left = (1 - min(max((step - begin) / steps, 0), 1)) ** 3
    return initial * left + final * (1 - left)
