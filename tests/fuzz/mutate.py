"""Mutators that know the structure of a format, so that most of what they make passes its outer checks.

Each takes the bytes of an input, a largest size and a seed, and ``flip(data, max_size)``, which changes any bytes.
"""

import ast
import copy
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

Flip = Callable[[bytes, int], bytes]
Mutate = Callable[[bytes, int, int, Flip], bytes]

NUMBERS = [0, 1, -1, 2, 3, 4, 8, 16, 255, 1 << 31, 1 << 62, 1 << 64, 10**21, 1.5, float("inf"), float("nan")]
NAMES = ["", "float32", "none", "\x1b[2J", "a/b", "..", "\ud800"]
DTYPES = ["<f4", ">f4", "<f8", "<f2", "|u1", "<u2", "<i8", "|O", "|V0", "|V4", "<U1", "|S0", "<M8[s]", "<c8", "float16"]
VALUES: list[Any] = [None, True, *NUMBERS, *NAMES, *DTYPES, [], {}, [1], [0, 1 << 61], [["a", "<f4"]]]
LINES = [
    b"bits = 4",
    b"bits = none",
    b'bits = "none"',
    b"group_size = -1",
    b"sparsity = 0.5",
    b"threshold = nan",
    b"threshold = 1e400",
    b'pattern = "2:4"',
    b'param_dtype = "float32"',
    b'fit = "lsq"',
    b"outliers = 1979-05-27",
    b"min_size = 99999999999999999999",
    b'include = ["*", "[!"]',
    b"[overrides]",
    b'[overrides."*"]',
    b'"w" = {bits = 8}',
    b"exclude = " + b"[" * 3000,
]


def any_bytes(data: bytes, max_size: int, seed: int, flip: Flip) -> bytes:
    return flip(data, max_size)


def integers(data: bytes, max_size: int, seed: int, flip: Flip) -> bytes:
    """Change a little-endian integer of a binary file, as a count or a size, or any bytes."""
    rng = random.Random(seed)
    if len(data) < 16 or rng.random() < 0.3:
        return flip(data, max_size)
    width = rng.choice([1, 4, 8])
    at = rng.choice([rng.randrange(len(data) - width), rng.randrange(min(len(data) - width, 256))])
    value = rng.choice([0, 1, 2, 3, 8, 14, 255, 1 << 31, 1 << 62, (1 << 64) - 1, rng.randrange(100)])
    number = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return (data[:at] + number + data[at + width :])[:max_size]


def json_text(data: bytes, max_size: int, seed: int, flip: Flip) -> bytes:
    rng = random.Random(seed)
    try:
        tree = json.loads(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            change(rng, tree)
        return json.dumps(tree).encode()[:max_size]
    except (ValueError, RecursionError):
        return flip(data, max_size)


def lines(data: bytes, max_size: int, seed: int, flip: Flip) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return flip(data, max_size)
    found = data.split(b"\n")
    place = rng.randrange(len(found))
    kind = rng.choice(["insert", "insert", "delete", "flip"])
    if kind == "insert":
        found.insert(place, rng.choice(LINES))
    elif kind == "delete":
        del found[place]
    else:
        found[place] = flip(found[place], len(found[place]) + 8)
    return b"\n".join(found)[:max_size]


def safetensors(data: bytes, max_size: int, seed: int, flip: Flip) -> bytes:
    """Change header, description or data of a file, mostly such that the others still fit."""
    rng = random.Random(seed)
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = data[8:end], data[end:]
    kind = rng.choice(["bytes", "header", "body", "tree", "tree", "tree"])
    if kind == "bytes":
        return flip(data, max_size)
    if kind == "body":
        changed = flip(body, max(len(body), 1))
        body = changed[: len(body)].ljust(len(body), b"\0")
    elif kind == "header":
        header = flip(header, len(header) + 64)
    else:
        try:
            tree = json.loads(header)
            metadata = tree.get("__metadata__", {})
            key = next((key for key in metadata if key.startswith("fastopt")), None)
            about = json.loads(metadata[key]) if key and rng.random() < 0.8 else None
            change(rng, tree if about is None else about)
            if about is not None:
                metadata[key] = json.dumps(about)
            header = json.dumps(tree).encode()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            header = flip(header, len(header) + 64)
    header += b" " * (-(8 + len(header)) % 64)
    return (len(header).to_bytes(8, "little") + header + body)[:max_size]


def npy(data: bytes, max_size: int, seed: int, flip: Flip) -> bytes:
    """Change the header of an array, mostly as the Python dict that it is, and leave its length right."""
    rng = random.Random(seed)
    wide = data[6:7] == b"\2"
    start = 12 if wide else 10
    end = start + int.from_bytes(data[8:start], "little")
    try:
        if data[:6] != b"\x93NUMPY" or rng.random() < 0.2:
            return flip(data, max_size)
        about = ast.literal_eval(data[start:end].decode("latin1").strip())
        about["shape"] = list(about["shape"])
        change(rng, about)
        if isinstance(about.get("shape"), list):
            about["shape"] = tuple(about["shape"])
        header = repr(about).encode("latin1", "replace") + b"\n"
    except (ValueError, SyntaxError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        header = flip(data[start:end], end - start + 64)
    size = len(header).to_bytes(start - 8, "little") if len(header) < 1 << 16 else data[8:start]
    return (data[:8] + size + header + data[end:])[:max_size]


def archive(data: bytes, max_size: int, seed: int, flip: Flip) -> bytes:
    """Change a member of a zip file, or the list of them."""
    rng = random.Random(seed)
    kind = rng.choice(["bytes", "content", "content", "content", "name", "twice", "drop"])
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = [(info.filename, info.compress_type, old.read(info)) for info in old.infolist()]
        place = rng.randrange(len(members))
    except Exception:  # whatever zipfile raises of a file that was changed before
        kind = "bytes"
    if kind == "bytes":
        return flip(data, max_size)
    name, compressed, content = members[place]
    if kind == "content":
        change_content = npy if name.endswith(".npy") else any_bytes
        content = change_content(content, len(content) + 64, seed, flip)
        members[place] = (name, compressed, content)
    elif kind == "name":
        members[place] = (rng.choice([name[::-1], "a", "", "../x.npy", name + "/"]), compressed, content)
    elif kind == "twice":
        members.append(members[place])
    else:
        del members[place]
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w") as new:
        warnings.simplefilter("ignore")  # two members of one name
        for name, compressed, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = compressed if compressed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 0
            new.writestr(info, content)
    return made.getvalue()[:max_size]


def onnx_model(data: bytes, max_size: int, seed: int, flip: Flip) -> bytes:
    """Change fields of a model's protocol buffers."""
    import onnx

    rng = random.Random(seed)
    if rng.random() < 0.1:
        return flip(data, max_size)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            change_message(rng, model)
        return model.SerializeToString()[:max_size]
    except Exception:  # whatever protobuf raises of a file that was changed before
        return flip(data, max_size)


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


def places_of(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from places_of(value)


def change_message(rng: random.Random, root: Any) -> None:
    """Change one field of a protocol buffer: drop it, repeat it, or take its value from elsewhere."""
    places = list(fields_of(root))
    message, field = rng.choice(places)
    others = [m for m, f in places if f.full_name == field.full_name]
    other = getattr(rng.choice(others), field.name)
    mine = getattr(message, field.name)
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif hasattr(mine, "MergeFrom") and hasattr(mine, "__len__"):  # a repeated field
        place = rng.randrange(len(mine))
        kind = rng.choice(["drop", "repeat", "value", "value"])
        if kind == "drop":
            del mine[place]
        elif kind == "repeat" and len(mine) < 50:
            mine.extend([copy.deepcopy(other[rng.randrange(len(other))])])
        elif field.message_type:
            mine[place].CopyFrom(copy.deepcopy(other[rng.randrange(len(other))]))
        else:
            mine[place] = scalar(rng, mine[place], other[rng.randrange(len(other))])
    elif field.message_type:
        mine.CopyFrom(copy.deepcopy(other))  # which may be a part of it
    else:
        setattr(message, field.name, scalar(rng, mine, other))


def scalar(rng: random.Random, mine: Any, other: Any) -> Any:
    if isinstance(mine, str):
        return rng.choice([other, other, "", "\x1b[2J", "x", "w", mine + "_1"])
    if isinstance(mine, bytes):
        return rng.choice([other, b"", mine[:-1], mine + b"\xff", b"w", b"../x"])
    if isinstance(mine, float):
        return rng.choice([other, 0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30])
    return rng.choice([other, mine - 1, mine + 1, 0, 1, 2, 7, 10, 16, 21, 22, -1, (1 << 31) - 1])


def fields_of(message: Any) -> Iterator[tuple[Any, Any]]:
    for field, value in message.ListFields():
        yield message, field
        if field.message_type:
            for inner in value if hasattr(value, "__len__") and hasattr(value, "extend") else [value]:
                yield from fields_of(inner)
