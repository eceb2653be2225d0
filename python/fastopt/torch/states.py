"""States of an optimizer, in torch's format: tensors in the shape of their parameter, and a step count."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastopt._types import Array
from fastopt.train.param_group import STATE_BLOCK

# States that are never negative: their 8-bit codes have no sign, but one more bit of exponent.
POSITIVE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def codes_name(key: str) -> str:
    """Return the name of an 8-bit state: another one, so that torch's optimizers do not take codes for numbers."""
    return f"{key}_codes"


def encode(values: Array, positive: bool) -> tuple[Array, Array]:
    """Return the 8-bit codes of float32 values, and the exponent of each block; rounded to nearest."""
    bits = values.view(np.uint32).astype(np.int64)
    bits = bits + np.where(np.isnan(values), 0, 1 << 19) >> 20
    magnitude = bits & 0x7FF
    starts = np.arange(0, values.size, STATE_BLOCK)
    largest = np.maximum.reduceat(magnitude, starts) if values.size else starts
    exponents = np.maximum((largest >> 3) - (31 if positive else 15), 0)
    codes = np.maximum(magnitude - np.repeat(exponents << 3, STATE_BLOCK)[: values.size], 0)
    if not positive:
        codes |= bits >> 4 & 0x80
    return codes.astype(np.uint8), exponents.astype(np.uint8)


def decode(codes: Array, exponents: Array, positive: bool) -> Array:
    """Return the float32 values of 8-bit codes."""
    code = codes.astype(np.uint32)
    base = np.repeat(exponents.astype(np.uint32), STATE_BLOCK)[: codes.size] << np.uint32(3)
    if positive:
        return (code + base << np.uint32(20)).view(np.float32)
    rest = code & np.uint32(127)
    bits = np.where(rest == 0, np.uint32(0), rest + base << np.uint32(20))
    return (bits | (code & np.uint32(128)) << np.uint32(24)).view(np.float32)


def find_or_make(state: dict[str, Any], key: str, param: torch.Tensor, dtype: torch.dtype, initial: float) -> Any:
    """Return the state `key` of a parameter in `dtype` and the parameter's layout, and keep it in `state`.

    A state that has another dtype or layout, as one that was loaded may have, is converted; one that is missing
    starts from `initial`. 8-bit codes are kept under `codes_name`, and their exponents in the dict ``"exponents"``.
    """
    value = state.pop(key, None)
    codes = state.get(codes_name(key))
    for name, tensor in ((key, value), (codes_name(key), codes)):
        if tensor is not None and tensor.shape != param.shape:
            raise ValueError(
                f"state: expected {name!r} in the shape of its parameter, {tuple(param.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    if dtype == torch.uint8:
        if codes is None or codes.stride() != param.stride():
            if value is None and codes is not None:
                value = _decoded(state, key, codes)
            start = torch.full_like(param, initial, dtype=torch.float32)
            if value is not None:
                start.copy_(value)
            found, exponents = encode(_memory(start).numpy(), key in POSITIVE)
            codes = state[codes_name(key)] = torch.zeros_like(param, dtype=torch.uint8)
            _memory(codes).copy_(torch.from_numpy(found))
            state.setdefault("exponents", {})[key] = torch.from_numpy(exponents)
        return codes
    if value is None and codes is not None:
        value = _decoded(state, key, codes)
        del state[codes_name(key)]
    made = value
    if value is None:
        made = torch.full_like(param, initial, dtype=dtype)
    elif value.dtype != dtype or value.stride() != param.stride() or value.device != param.device:
        made = torch.empty_like(param, dtype=dtype).copy_(value)
    state[key] = made
    return made


def _decoded(state: dict[str, Any], key: str, codes: torch.Tensor) -> torch.Tensor:
    values = torch.empty_like(codes, dtype=torch.float32)
    exponents = state["exponents"].pop(key).numpy()
    _memory(values).copy_(torch.from_numpy(decode(_memory(codes).numpy(), exponents, key in POSITIVE)))
    if not state["exponents"]:
        del state["exponents"]
    return values


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a dense tensor in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
