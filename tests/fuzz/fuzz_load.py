"""Fuzz the reading of files, guided by the coverage of the code: ``nox -s fuzz -- 600`` does it for ten minutes.

Options are libFuzzer's. A file that makes anything but a ValueError is written to the folder ``-artifact_prefix``; put
it into the corpus when it is mended.
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["fastopt"]):
    import fastopt  # noqa: F401

from target import load_and_use

PATH = Path(tempfile.mkdtemp()) / "m.safetensors"
VALUES = [
    None,
    True,
    0,
    1,
    -1,
    2,
    3,
    4,
    8,
    16,
    255,
    1 << 31,
    1 << 62,
    1 << 64,
    1.5,
    "",
    "float32",
    [],
    {},
    [1],
    [0, 1 << 61],
]


def test_one_input(data: bytes) -> None:
    PATH.write_bytes(data)
    load_and_use(PATH)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change header, description or data of a file, mostly such that the others still fit."""
    rng = random.Random(seed)
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = data[8:end], data[end:]
    kind = rng.choice(["bytes", "header", "body", "tree", "tree", "tree"])
    if kind == "bytes":
        return atheris.Mutate(data, max_size)
    if kind == "body":
        changed = atheris.Mutate(body, max(len(body), 1))
        body = changed[: len(body)].ljust(len(body), b"\0")
    elif kind == "header":
        header = atheris.Mutate(header, len(header) + 64)
    else:
        try:
            tree = json.loads(header)
            metadata = tree.get("__metadata__", {})
            about = json.loads(metadata["fastopt"]) if rng.random() < 0.8 else None
            change(rng, tree if about is None else about)
            if about is not None:
                metadata["fastopt"] = json.dumps(about)
            header = json.dumps(tree).encode()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            header = atheris.Mutate(header, len(header) + 64)
    header += b" " * (-(8 + len(header)) % 64)
    return (len(header).to_bytes(8, "little") + header + body)[:max_size]


def change(rng: random.Random, tree: Any) -> None:
    """Put another value into some place of a JSON tree: one of VALUES, one nearby, or one from elsewhere in it."""
    places = list(places_of(tree))
    if not places:
        return
    node, key = rng.choice(places)
    other, other_key = rng.choice(places)
    old = node[key]
    near = old + rng.choice([-1, 1, -8, 8]) if type(old) is int else rng.choice(VALUES)
    node[key] = rng.choice([near, rng.choice(VALUES), json.loads(json.dumps(other[other_key]))])
    if isinstance(node, dict) and rng.random() < 0.1:
        del node[key]


def places_of(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from places_of(value)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()
