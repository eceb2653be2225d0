"""State dicts and training checkpoints that torch saved, read by torch without running code of theirs."""

import errno
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fastopt._types import Array
from fastopt.files.atomic import open_regular
from fastopt.files.safetensors_file import MOST_OF_ONE_BYTE
from fastopt.files.weights import Source

# Keys under which training scripts store the state dict of a model.
_MODEL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "module",
    "net",
    "network",
    "weights",
    "params",
)
# Beginnings of keys under which they store other tensors.
_OTHER_KEYS = ("optim", "sched", "lr_sched", "scaler", "grad_scaler", "amp", "rng", "random", "torch_rng", "cuda_rng")
_DEEPEST, _MOST = 100, 1_000_000
# Dtypes of torch that its .numpy() does not know: an integer of the same size, and NumPy's dtype.
_VIEWS = {
    "bfloat16": ("int16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": ("uint8", ml_dtypes.float8_e8m0fnu),
    "float8_e4m3fnuz": ("uint8", ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": ("uint8", ml_dtypes.float8_e5m2fnuz),
}


def torch_sources(path: Path, key: str | None, skipped: Callable[[str], bool]) -> dict[str, Source]:
    """Return the tensors of a state dict or a checkpoint but for the skipped ones.

    Raises
    ------
    ValueError
        If the file is not sound, if several of its parts could be the model and `key` chooses none, or if a tensor
        has a layout or a dtype that NumPy does not have.
    """
    with open_regular(path) as file:
        start = file.read(32)
        size = file.seek(0, 2)
        if start.startswith(b"PK") and _is_script(file):
            raise ValueError(f"{path}: is a TorchScript archive, expected a state dict: save model.state_dict()")
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path}: a file of torch needs torch: pip install torch") from error
    if not start:
        raise ValueError(f"{path}: not a state dict of torch: the file is empty")
    state = _loaded(torch, path, mapped=start.startswith(b"PK"))
    try:
        chosen = _chosen(state, key, lambda value: isinstance(value, torch.Tensor))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    sources: dict[str, Source] = {}
    left = MOST_OF_ONE_BYTE * size
    for name, tensor in chosen.items():
        if not skipped(name):
            try:
                source = _of_tensor(torch, tensor, f"{path}: {name!r}")
            except ValueError as error:
                raise ValueError(f"{error}; skip leaves it out") from error
            left -= source.nbytes
            if left < 0:
                raise ValueError(
                    f"{path}: {name!r} takes {source.nbytes} bytes, the file has {size}; skip leaves it out"
                )
            sources[name] = source
    return sources


def _is_script(file: Any) -> bool:
    try:
        return any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(file).namelist())
    except Exception:  # torch says what is wrong with it
        return False


def _loaded(torch: Any, path: Path, *, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever its parts raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place before the file
            raise
        reason = " ".join(str(error).split("\n\n")[0].split())
        if "weights_only" in str(error) or "Weights only" in str(error):
            found = re.search(r"(?:GLOBAL|class|global:?) ([A-Za-z_]\w*(?:\.\w+)+)", str(error))
            kind = f" ({found[1]})" if found else ""
            reason = f"it holds objects of Python{kind} that are not read, as they could run code; save the state_dict"
        raise ValueError(f"{path}: not a state dict of torch: {reason:.200}") from error


def without_tensors(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a dict whose tensors of torch, if it has any, are arrays over the same memory; torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(weights, dict):
        return weights
    return {
        name: _of_tensor(torch, weight, f"weights: {name!r}").read() if isinstance(weight, torch.Tensor) else weight
        for name, weight in weights.items()
    }


def _chosen(state: Any, key: str | None, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the tensors of the model in a tree of dicts, by names that dots join."""
    if not isinstance(state, Mapping):
        raise ValueError(f"expected a state dict, got a {type(state).__name__}")
    if key is not None:
        for step in [key] if key in state else filter(None, key.split("/")):
            if not isinstance(state, Mapping) or step not in state:
                raise ValueError(f"has no key {key!r}; there are {_keys(state)}")
            state = state[step]
        found = _flat(state, is_tensor)
        if not found:
            raise ValueError(f"key {key!r} has no tensors")
        return found
    node, inside = state, False
    while True:
        # Parts with tensors; those of the optimizer and of random generators are not the model.
        others = {name for name, part in node.items() if _is_other(name, part, inside)}
        parts = [name for name, part in node.items() if isinstance(part, Mapping) and _flat(part, is_tensor)]
        parts = [name for name in parts if name not in others]
        known = [name for name in parts if name in _MODEL_KEYS]
        own = [name for name, value in node.items() if is_tensor(value) and value.ndim]
        own = [name for name in own if not parts or name not in others]
        if len(known) == 1 and not own:
            node, inside = node[known[0]], True
        elif not parts or (inside and not known):
            break
        elif len(parts) == 1 and not own:
            node = node[parts[0]]
        else:
            names = [*(["the tensors beside them ('')"] if own else []), *map(repr, parts)]
            raise ValueError(f"several parts could be the model: {', '.join(names)}; choose one by key")
    mine = {name: v for name, v in node.items() if name not in others or not isinstance(v, Mapping)}
    found = _flat(mine, is_tensor)
    if not found and node:
        name, value = next(iter(node.items()))
        raise ValueError(f"{name!r} is a {type(value).__name__}, expected a tensor")
    return found


def _is_other(name: Any, part: Any, inside: bool) -> bool:
    if isinstance(part, Mapping) and "param_groups" in part:
        return True
    return not inside and isinstance(name, str) and name.lower().startswith(_OTHER_KEYS)


def _flat(node: Any, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the tensors below a node; numbers, texts and lists beside them are not weights."""
    found: dict[str, Any] = {}
    stack: list[tuple[str, Any, int]] = [("", node, 0)]
    count = 0
    while stack:
        at, part, depth = stack.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST:  # a pickle of a few bytes can hold itself
            raise ValueError(f"more than {_DEEPEST} levels or {_MOST:,} entries of dicts in dicts")
        if is_tensor(part):
            if at in found:
                raise ValueError(f"two tensors would have the name {at!r}")
            found[at] = part
        elif isinstance(part, Mapping):
            inner = [(f"{at}.{name}" if at else str(name), value, depth + 1) for name, value in part.items()]
            stack += reversed(inner)
    return found


def _keys(node: Any) -> str:
    names = [str(name) for name in node] if isinstance(node, Mapping) else []
    return ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "") if names else "none"


def _of_tensor(torch: Any, tensor: Any, what: str) -> Source:
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized by torch" if tensor.is_quantized else f"stored as {tensor.layout}"
        raise ValueError(f"{what} is {kind}, expected a dense tensor")
    if tensor.device.type == "meta":
        raise ValueError(f"{what} has no content: it is on the device 'meta'")
    kind = str(tensor.dtype).removeprefix("torch.")

    def read() -> Array:
        plain = tensor.resolve_conj().resolve_neg()
        if kind in _VIEWS:
            integer, dtype = _VIEWS[kind]
            return np.asarray(plain.contiguous().view(getattr(torch, integer)).numpy()).view(dtype)
        return np.asarray(plain.numpy())

    try:
        dtype = torch.zeros(1, dtype=tensor.dtype).numpy().dtype if kind not in _VIEWS else np.dtype(_VIEWS[kind][1])
    except Exception as error:  # torch raises whatever its parts raise
        raise ValueError(f"{what} has dtype {tensor.dtype}, which NumPy does not have") from error
    place = (tensor.data_ptr(), kind, tuple(tensor.shape), tensor.stride()) if tensor.numel() else None
    return Source(tuple(tensor.shape), dtype, read, identity=place)
