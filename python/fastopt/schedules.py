"""Learning rates as functions of the step: what an optimizer takes as ``lr``.

Steps are counted from 0. Each function returns a function; they have no state, so resuming needs nothing saved.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int], float]


def _check(name: str, value: float, least: float = 0.0, most: float = math.inf) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and least <= value <= most):
        limit = f"from {least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
        raise ValueError(f"{name}: expected a finite number, {limit}, got {value!r}")


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
        If something is no number.
    ValueError
        If `lr` is negative or not finite.

    Examples
    --------
    >>> from fastopt import schedules
    >>> schedules.constant(0.1)(1000)
    0.1
    """
    _check("lr", lr)
    return lambda step: lr


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
        If something is no number.
    ValueError
        If a number is negative or not finite, or `step_size` is below 1.

    Examples
    --------
    >>> from fastopt import schedules
    >>> rate = schedules.step(1.0, step_size=10, gamma=0.5)
    >>> [rate(s) for s in (0, 9, 10, 25)]
    [1.0, 1.0, 0.5, 0.25]
    """
    _check("lr", lr)
    _check("step_size", step_size, 1)
    _check("gamma", gamma)
    return lambda step: lr * gamma ** (step // step_size)


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
        If something is no number.
    ValueError
        If a number is negative or not finite.

    Examples
    --------
    >>> from fastopt import schedules
    >>> schedules.exponential(1.0, gamma=0.5)(3)
    0.125
    """
    _check("lr", lr)
    _check("gamma", gamma)
    return lambda step: lr * gamma**step


def cosine(lr: float, *, steps: int, final: float = 0.0) -> Schedule:
    """Half a cosine from `lr` down to `final` at step `steps`, and `final` from there on.

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
        If something is no number.
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
    _check("lr", lr)
    _check("steps", steps, 1)
    _check("final", final)
    return lambda step: final + (lr - final) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def linear(lr: float, *, steps: int, start: float = 0.0) -> Schedule:
    """Go in a line from `start` to `lr` at step `steps`, and stay: a warm-up, or with `start` above a decay.

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
        If something is no number.
    ValueError
        If a number is negative or not finite, or `steps` is below 1.

    Examples
    --------
    >>> from fastopt import schedules
    >>> rate = schedules.linear(1.0, steps=4)
    >>> [rate(s) for s in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    _check("lr", lr)
    _check("steps", steps, 1)
    _check("start", start)
    return lambda step: start + (lr - start) * min(step / steps, 1.0)


def one_cycle(lr: float, *, steps: int, warmup: float = 0.3, initial: float = 0.04, final: float = 4e-6) -> Schedule:
    """Rise to `lr` and fall again, both along half a cosine.

    Parameters
    ----------
    lr : float
        The highest.
    steps : int
        Of the whole cycle; the last rate stays.
    warmup : float
        Share of the steps that rise.
    initial, final : float
        First and last rate, as shares of `lr`.

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If something is no number.
    ValueError
        If a number is out of range.

    References
    ----------
    Smith and Topin, "Super-convergence", 2019; with the defaults of ``torch.optim.lr_scheduler.OneCycleLR``.

    Examples
    --------
    >>> from fastopt import schedules
    >>> rate = schedules.one_cycle(1.0, steps=100)
    >>> [round(rate(s), 3) for s in (0, 30, 100)]
    [0.04, 1.0, 0.0]
    """
    _check("lr", lr)
    _check("steps", steps, 1)
    _check("warmup", warmup, 0, 1)
    _check("initial", initial, 0, 1)
    _check("final", final, 0, 1)
    top = warmup * steps

    def rate(step: int) -> float:
        if step < top:
            return lr * (initial + (1 - initial) * (1 - math.cos(math.pi * step / top)) / 2)
        if step >= steps:
            return lr * final
        return lr * (final + (1 - final) * (1 + math.cos(math.pi * (step - top) / (steps - top))) / 2)

    return rate


def chain(parts: Sequence[tuple[int, Schedule]], last: Schedule) -> Schedule:
    """Run schedules one after the other, each counting its steps from 0.

    Parameters
    ----------
    parts : sequence of (steps, schedule)
    last : schedule
        From when the parts are over.

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If something is no schedule.
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

    def rate(step: int) -> float:
        for steps, schedule in parts:
            if step < steps:
                return schedule(step)
            step -= steps
        return last(step)

    return rate
