"""Checkpoints: optimizer states, weights, and any other tree of arrays, numbers and strings in one file."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._text import shown
from fastopt.files.container import CHECKPOINT
from fastopt.files.safetensors_file import parse_json, part_of, read_arrays, write

_DEEPEST = 100  # levels of a tree; Python can read some ten times as many
_LARGEST = 10**4000  # Python reads integers of up to 4300 digits


def save_checkpoint(tree: Any, path: str | os.PathLike[str]) -> None:
    """Write a tree of dicts and lists to one safetensors file.

    The leaves are arrays, numbers, strings, booleans or None, as in `Optimizer.state_dict`. The file is written under
    a temporary name and renamed when it is complete and on the disk: a crash leaves either the old file or the new one.

    Parameters
    ----------
    tree : dict, list, tuple, array, number, str, bool or None
        Dict keys must be strings. Tuples are read back as lists.
    path : path-like

    Raises
    ------
    TypeError
        If `tree` holds anything else; the message names the place.
    ValueError
        If `tree` has more than 100 levels.
    OSError
        If the file cannot be written, or `path` is a folder, a pipe or a device.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> opt = fo.Adam({"w": np.zeros(3, dtype=np.float32)})
    >>> fo.save_checkpoint({"epoch": 7, "optimizer": opt.state_dict()}, "checkpoint.safetensors")
    >>> state = fo.load_checkpoint("checkpoint.safetensors")
    >>> state["epoch"]
    7
    >>> opt.load_state_dict(state["optimizer"])
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def plain(node: Any, at: str, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError(f"tree: {at[:100]}... is nested more than {_DEEPEST} levels deep")
        if isinstance(node, np.ndarray):
            name = at
            while name in arrays:  # a key with a slash can look like another path
                name += "#"
            arrays[name] = node
            return {"array": name}
        if isinstance(node, np.generic) and isinstance(node.item(), bool | int | float | str):
            return node.item()
        if isinstance(node, Mapping):
            wrong = [key for key in node if not isinstance(key, str)]
            if wrong:
                raise TypeError(f"tree: {at or 'the root'} has the key {wrong[0]!r}, expected a string")
            return {"dict": {key: plain(value, f"{at}/{key}", depth + 1) for key, value in node.items()}}
        if isinstance(node, list | tuple):
            return [plain(value, f"{at}/{i}", depth + 1) for i, value in enumerate(node)]
        if isinstance(node, int) and abs(node) > _LARGEST:
            raise ValueError(f"tree: {at or 'the root'} is an integer of more than 4000 digits")
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"tree: {at or 'the root'} is a {type(node).__name__}, which a file cannot hold")

    text = json.dumps({"version": 1, "tree": plain(tree, "", 0)})
    write(path, [part_of(name, array) for name, array in arrays.items()], {CHECKPOINT: text})


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint that `save_checkpoint` wrote.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    dict, list, array, number, str, bool or None
        The arrays are writable copies.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not a safetensors file, or `save_checkpoint` did not write it.

    Examples
    --------
    >>> import fastopt as fo
    >>> fo.save_checkpoint({"epoch": 7, "losses": [0.5, 0.25]}, "checkpoint.safetensors")
    >>> fo.load_checkpoint("checkpoint.safetensors")
    {'epoch': 7, 'losses': [0.5, 0.25]}
    """
    arrays, metadata = read_arrays(path)
    try:
        described = parse_json(metadata[CHECKPOINT])
        if described["version"] != 1:
            raise ValueError(f"expected version 1, got {shown(described['version'])}")
        return _built(described["tree"], arrays)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a checkpoint of fastopt: {error!r:.200}") from error


def _built(node: Any, arrays: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_built(value, arrays) for value in node]
    if isinstance(node, dict):
        if "array" in node:
            return arrays.pop(node["array"]).copy()  # only once: a name takes fewer bytes than an array
        return {key: _built(value, arrays) for key, value in node["dict"].items()}
    return node
