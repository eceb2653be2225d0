"""Steps of tensors that are given by their addresses, as fastopt.torch gives them."""

import numpy as np
import pytest
from helpers import same_bits

from fastopt import _core

F16, F32, F64 = 0, 2, 3
WIDE, BF16, U8 = range(3)
SIZE = 300


def at(array, number, size=SIZE):
    return array.ctypes.data, size, number


def step(param, grad, state, rule="momentum"):
    numbers = (0.5, 0.0, 1.0, 0.5, 1.0, 0.0, 1.0, 0.0)
    work = _core.job(
        rule=_core.rule(rule),
        hyper=numbers,
        grad_scale=1.0,
        shrink=0.0,
        keep_zeros=False,
        stochastic=False,
        noise=0,
        names=["w"],
        params=[param],
        grads=[grad],
        states=[state],
        counts=[0],
        indices=None,
    )
    _core.step([work], [0])


def test_steps_as_arrays_do(rng):
    w, g, state = (rng.standard_normal(SIZE).astype("f4") for _ in range(3))
    w2, state2 = w.copy(), state.copy()
    step(at(w, F32), at(g, F32), (WIDE, state.ctypes.data))
    step(w2, g, (state2,))
    assert same_bits(w, w2)
    assert same_bits(state, state2)


MEMORY = np.zeros(8 * SIZE, "f8")
A, B, C, D = (MEMORY[i * SIZE :] for i in range(4))
STATE = (WIDE, C.ctypes.data)


@pytest.mark.parametrize(
    ("param", "grad", "state", "fault"),
    [
        (at(A, F32), at(B, F32, SIZE - 1), STATE, "gradient of 'w': does not fit"),
        (at(A, F64), at(B, F32), STATE, "gradient of 'w': does not fit"),
        (at(A, F32), B, STATE, "gradient of 'w': expected an address"),
        (at(A, F32), at(B, F32)[:2], STATE, "gradient of 'w': expected an address"),
        (at(A, 4), at(B, F32), STATE, "parameter 'w': expected an address"),
        (at(A, F32), at(B, F32), (WIDE,), "state of 'w': does not fit"),
        (at(A, F32), at(B, F32), (), "state of 'w': does not fit"),
        (at(A, F32), at(B, F32), [C], "state of 'w': does not fit"),
        (at(A, F32), at(B, F32), (3, C.ctypes.data), "state of 'w': does not fit"),
        (at(A, F32), at(B, F32), (U8, C.ctypes.data), "state of 'w': does not fit"),
        (at(A, F64), at(B, F64), (BF16, C.ctypes.data), "state of 'w': does not fit"),
        (at(A, F32), at(B, F32), (*STATE, D.ctypes.data), "state of 'w': does not fit"),  # a master of float32
        (at(A, F16), at(B, F16), (*STATE, D.ctypes.data, D.ctypes.data), "state of 'w': does not fit"),
        (at(A, F32), at(A, F32), STATE, "shares memory"),
        (at(A, F32), at(B, F32), (WIDE, A.ctypes.data + 4), "shares memory"),
    ],
)
def test_parts_must_fit(param, grad, state, fault):
    with pytest.raises(ValueError, match=fault):
        step(param, grad, state)
    assert not MEMORY.any()


def test_sums_of_squares_are_checked():
    assert _core.sum_squares(["w"], [at(A, F32)]) == 0
    with pytest.raises(ValueError, match="expected an address"):
        _core.sum_squares(["w"], [at(A, F32)[:2]])
    with pytest.raises(ValueError, match="as many as names"):
        _core.sum_squares([], [at(A, F32)])
