"""ONNX files: their structure in memory, the bytes of their large tensors on the disk.

An ONNX file is one protobuf message. Here it is read without the `raw_data` of large tensors, each of which holds a
token instead, and written with these bytes put back. So the structure of any model is small, whatever tools change it,
and only one tensor is in memory at a time.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt._types import Array
from fastopt.files.atomic import open_regular, replacing
from fastopt.files.safetensors_file import ALIGNMENT

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_LIMIT = (1 << 31) - (1 << 20)  # bytes of a protobuf message, and some for what is not tensors
_SMALL = 1024  # a tensor of up to so many bytes stays in its message
_DEPTH = 100  # of messages in messages, as protobuf itself has it
_BYTES = 2  # the wire type of texts, bytes and messages
_FIXED = {1: 8, 5: 4}  # wire types of fixed size


def _keep() -> None:
    pass


@dataclass(frozen=True)
class Payload:
    """The bytes of a tensor.

    Parameters
    ----------
    nbytes : int
    read : callable
        Returns the bytes, as a buffer.
    release : callable
        Gives back the memory of bytes that were read.
    """

    nbytes: int
    read: Callable[[], Any]
    release: Callable[[], None] = _keep


class Payloads:
    """Bytes of tensors by token; the messages hold the tokens."""

    def __init__(self) -> None:
        self.mark = os.urandom(12)  # random, so that no file can contain it
        self._payloads: list[Payload] = []

    def add(self, payload: Payload) -> bytes:
        """Return the token of new bytes."""
        self._payloads.append(payload)
        return self.mark + (len(self._payloads) - 1).to_bytes(4, "little")

    def of(self, token: bytes) -> Payload | None:
        """Return the payload of a token, or None if these bytes are not a token."""
        if len(token) != len(self.mark) + 4 or not token.startswith(self.mark):
            return None
        return self._payloads[int.from_bytes(token[-4:], "little")]

    def set(self, tensor: TensorProto, payload: Payload) -> None:
        """Set the bytes of a tensor; a small number of bytes is stored in the message."""
        small = payload.nbytes <= _SMALL
        tensor.raw_data = bytes(payload.read()) if small else self.add(payload)

    def nbytes(self, tensor: TensorProto) -> int:
        """Return how many bytes a tensor takes in a file, without its head."""
        payload = self.of(tensor.raw_data)
        return tensor.ByteSize() if payload is None else payload.nbytes


class OnnxFile:
    """An ONNX model whose large tensors are read one at a time.

    Parameters
    ----------
    path : Path
        Tensors that it keeps in other files of its folder are read too.

    Attributes
    ----------
    model : ModelProto
        With tokens for large tensors.
    payloads : Payloads

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not an ONNX file, or the data of a tensor are not where it says.
    """

    def __init__(self, path: Path) -> None:
        from onnx import ModelProto

        self.path, self.payloads = path, Payloads()
        self._maps: dict[Path, mmap.mmap | bytes] = {}
        data = self._map(path)
        try:
            structure = self._without_payloads(ModelProto.DESCRIPTOR, data, 0, len(data), 0)
            self.model: ModelProto = ModelProto.FromString(structure)
        except Exception as error:  # protobuf raises what its implementation raises
            if isinstance(error, (OSError, MemoryError)):
                raise
            raise ValueError(f"{path}: not an ONNX file: {error}") from error
        if not self.model.graph.node:
            raise ValueError(f"{path}: not an ONNX file, or one without nodes")
        for tensor in tensors_of(self.model):
            if tensor.data_location == tensor.EXTERNAL:
                self._open_external(tensor)

    def array(self, tensor: TensorProto) -> Array:
        """Return the value of a tensor, which may be a view of the file."""
        from onnx import TensorProto, helper, numpy_helper

        payload = self.payloads.of(tensor.raw_data)
        try:
            if payload is None:
                return np.asarray(numpy_helper.to_array(tensor))
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if math.prod(tensor.dims) * dtype.itemsize == payload.nbytes and "int4" not in dtype.name:
                return np.frombuffer(payload.read(), dtype.newbyteorder("<")).reshape(tuple(tensor.dims))
            whole = TensorProto()
            whole.CopyFrom(tensor)
            whole.raw_data = bytes(payload.read())
            return np.asarray(numpy_helper.to_array(whole))
        except Exception as error:  # onnx raises what it meets
            if isinstance(error, (OSError, MemoryError)):
                raise
            raise ValueError(f"{self.path}: {tensor.name!r}: not a sound tensor: {error}") from error

    def release(self, tensor: TensorProto) -> None:
        """Give back the memory of a tensor that was read."""
        payload = self.payloads.of(tensor.raw_data)
        if payload is not None:
            payload.release()

    def _map(self, path: Path) -> mmap.mmap | bytes:
        if path not in self._maps:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        return self._maps[path]

    def _payload(self, path: Path, start: int, size: int) -> Payload:
        data = self._map(path)

        def release() -> None:
            if isinstance(data, mmap.mmap):
                first, last = (
                    -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
                    (start + size) // mmap.PAGESIZE * mmap.PAGESIZE,
                )
                if last > first:
                    data.madvise(mmap.MADV_DONTNEED, first, last - first)

        return Payload(size, lambda: memoryview(data)[start : start + size], release)

    def _open_external(self, tensor: TensorProto) -> None:
        """Map the bytes of a tensor that is stored in another file."""
        what = f"{self.path}: {tensor.name!r}"
        told = {entry.key: entry.value for entry in tensor.external_data}
        location = told.get("location", "")
        data = self.path.parent / location
        # In the cache of Hugging Face, the model and its data are links into one other folder.
        folders = (self.path.parent.resolve(), self.path.resolve().parent)
        if not location or not any(data.resolve().is_relative_to(folder) for folder in folders):
            raise ValueError(f"{what}: expected its data in the folder of the model, got the location {location!r}")
        if not data.is_file():
            raise ValueError(f"{what}: its data should be in {data}, which is missing or no regular file")
        try:
            start = int(told.get("offset", 0))
            end = len(self._map(data)) if "length" not in told else start + int(told["length"])
        except ValueError as error:
            raise ValueError(f"{what}: its place in {data} is not sound: {error}") from error
        if not 0 <= start <= end <= len(self._map(data)):
            raise ValueError(f"{what}: bytes {start} to {end} of {data}, which has {len(self._map(data))}")
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        self.payloads.set(tensor, self._payload(data, start, end - start))

    def _without_payloads(self, kind: Any, data: mmap.mmap | bytes, start: int, end: int, depth: int) -> bytes:
        """Return a message with tokens for the bytes of large tensors."""
        if depth > _DEPTH:
            raise ValueError(f"more than {_DEPTH} messages in each other")
        out = bytearray()
        for number, wire, begin, content, finish in _fields(data, start, end):
            field = kind.fields_by_number.get(number)
            large = wire == _BYTES and finish - content > _SMALL and field is not None
            if large and field.message_type is not None:
                inner = self._without_payloads(field.message_type, data, content, finish, depth + 1)
                out += _head(number, len(inner)) + inner
            elif large and kind.name == "TensorProto" and field.name == "raw_data":
                payload = self._payload(self.path, content, finish - content)
                payload.release()  # the system maps pages around those that were read
                token = self.payloads.add(payload)
                out += _head(number, len(token)) + token
            else:
                out += data[begin:finish]
        return bytes(out)


def save(model: ModelProto, payloads: Payloads, path: Path) -> int:
    """Write a model with the bytes that its tokens stand for; return how many bytes it takes.

    If a file cannot hold it all, all but small tensors go to another beside it, PATH.data, as ONNX has it.
    """
    pieces, length = _pieces_of(model, payloads)
    beside: list[Payload] = []
    if length > _LIMIT:
        data = path.with_name(f"{path.name}.data")
        _name_constants(model.graph, payloads)
        beside = _move_beside(model, payloads, data.name)
        pieces, length = _pieces_of(model, payloads)
    if length > _LIMIT:
        raise ValueError(f"an ONNX file has up to 2 GiB, {path.name} would have {length:,} bytes; pack more of it")
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            _write(file, piece)
        if beside:
            with replacing(data) as other, other.open("wb") as file_beside:
                for payload in beside:
                    _write(file_beside, payload)
                    file_beside.write(bytes(-payload.nbytes % ALIGNMENT))
                length += file_beside.tell()
    return length


def size_of(model: ModelProto, payloads: Payloads) -> int:
    """Return how many bytes `save` writes, if that is one file."""
    return _pieces_of(model, payloads)[1]


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Give all tensors of a model, wherever they stand."""
    graphs = [model.graph, *(graph for info in model.training_info for graph in (info.initialization, info.algorithm))]
    for graph in graphs:
        yield from _tensors_of_graph(graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Any) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for tensor in (*sparse, *attribute.sparse_tensors):
                yield from (tensor.values, tensor.indices)
        for graph in subgraphs(node):
            yield from _tensors_of_graph(graph)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Give the graphs that a node holds, as the branches of an If."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _name_constants(graph: GraphProto, payloads: Payloads) -> None:
    """Replace large Constant nodes by initializers, since not every runtime reads external data of attributes."""
    nodes = []
    for node in graph.node:
        for inner in subgraphs(node):
            _name_constants(inner, payloads)
        value = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if value is None or payloads.of(value.raw_data) is None:
            nodes.append(node)
        else:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
    if len(nodes) < len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)


def _move_beside(model: ModelProto, payloads: Payloads, name: str) -> list[Payload]:
    """Let large tensors refer to a file of this name; return its content, where each payload is aligned."""
    beside: list[Payload] = []
    offset = 0
    for tensor in tensors_of(model):
        payload = payloads.of(tensor.raw_data)
        if payload is None:
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", payload.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        beside.append(payload)
        offset += payload.nbytes + -payload.nbytes % ALIGNMENT
    return beside


def _write(file: Any, piece: bytes | Payload) -> None:
    if isinstance(piece, bytes):
        file.write(piece)
    else:
        file.write(piece.read())
        piece.release()


# ---- the wire format of protobuf: a field has a number, a wire type, and for bytes and messages a length ---------


def _pieces_of(message: Any, payloads: Payloads) -> tuple[list[bytes | Payload], int]:
    return _with_payloads(message.DESCRIPTOR, message.SerializeToString(deterministic=True), payloads)


def _with_payloads(kind: Any, data: bytes, payloads: Payloads) -> tuple[list[bytes | Payload], int]:
    """Return the pieces of a message, with payloads in place of tokens, and its length."""
    pieces: list[bytes | Payload] = []
    length = done = 0
    for number, wire, begin, content, finish in _fields(data, 0, len(data)):
        field = kind.fields_by_number.get(number)
        if wire != _BYTES or field is None or payloads.mark not in (inner := data[content:finish]):
            continue
        payload = payloads.of(inner) if kind.name == "TensorProto" and field.name == "raw_data" else None
        if payload is not None:
            put: list[bytes | Payload] = [payload]
            size = payload.nbytes
        elif field.message_type is not None:
            put, size = _with_payloads(field.message_type, inner, payloads)
        else:
            continue
        head = data[done:begin] + _head(number, size)
        pieces += [head, *put]
        length += len(head) + size
        done = finish
    pieces.append(data[done:])
    return pieces, length + len(data) - done


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Give number, wire type, begin, begin of the content and end of each field of a message."""
    at = start
    while at < end:
        begin = at
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        content = at
        if wire == 0:
            _, at = _varint(data, at, end)
        elif wire == _BYTES:
            size, content = _varint(data, at, end)
            at = content + size
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise ValueError("truncated")
        yield number, wire, begin, content, at


def _varint(data: Any, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError("truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _head(number: int, length: int) -> bytes:
    """Return the head of a field of bytes or of a message: its number and its length."""
    out = bytearray()
    for value in (number << 3 | _BYTES, length):
        rest = value
        while rest > 0x7F:
            out.append(rest & 0x7F | 0x80)
            rest >>= 7
        out.append(rest)
    return bytes(out)
