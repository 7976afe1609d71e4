"""The tensors of an ONNX file, read from the bytes of its protobuf message. Nothing is executed and no other package is needed.

Wire format: https://protobuf.dev/programming-guides/encoding. Fields of onnx.proto: ModelProto.graph 7, GraphProto.initializer
5, TensorProto.dims 1, data_type 2, name 8, raw_data 9, data_location 14.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_FLOAT = 1  # TensorProto.DataType


def read_onnx_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The float32 initializers of a model by name, as read-only views of `data`.

    Raises:
        ValueError: the message is malformed or has no graph, or a tensor is of another type, elsewhere, twice there, or has the
            wrong number of bytes.
    """
    graphs = [value for number, value in _fields(memoryview(data)) if number == 7]
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise ValueError("this is not an ONNX model with one graph")
    tensors: dict[str, np.ndarray] = {}
    for number, message in _fields(graphs[0]):
        if number == 5:
            name, tensor = _tensor(_bytes(message))
            if name in tensors:
                raise ValueError(f"the tensor {name!r:.80} is there twice")
            tensors[name] = tensor
    return tensors


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    dims: list[int] = []
    name, kind, location, raw = "", 0, 0, None
    for number, value in _fields(message):
        if number == 1:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = bytes(_bytes(value)).decode()
        elif number == 9:
            raw = _bytes(value)
        elif number == 14 and isinstance(value, int):
            location = value
    if kind != _FLOAT or location or raw is None or len(raw) != 4 * math.prod(dims):
        raise ValueError(f"the tensor {name!r:.80} does not hold {dims} float32 values")
    return name, np.frombuffer(raw, "<f4").reshape(dims)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a message; a value is an integer or a view of its bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = divmod(tag, 8)
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _LENGTH:
            size, at = _varint(data, at)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"there is no wire type {wire}")
        if at + size > len(data):
            raise ValueError("the file is truncated")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the file is truncated")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("an integer has more than ten bytes")


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number is where bytes have to be")
    return value
