"""The reader of ONNX tensors, on messages that the tests write byte by byte, and on damaged ones."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.evaluation.features.onnx_tensors import read_onnx_tensors


def varint(value: int) -> bytes:
    result = b""
    while value > 127:
        result += bytes([value & 127 | 128])
        value >>= 7
    return result + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(8 * field) + varint(value)


def content(field: int, value: bytes) -> bytes:
    return varint(8 * field + 2) + varint(len(value)) + value


def tensor(name: str, array: np.ndarray, *, packed: bool = False, kind: int = 1, more: bytes = b"") -> bytes:
    dims = content(1, b"".join(map(varint, array.shape))) if packed else b"".join(number(1, n) for n in array.shape)
    return content(
        5, dims + number(2, kind) + content(8, name.encode()) + content(9, array.astype("<f4").tobytes()) + more
    )


def model(*tensors: bytes) -> bytes:
    node = content(1, b"not read")
    graph = node + b"".join(tensors) + content(2, b"graph")
    four, eight = varint(8 * 9 + 5) + b"abcd", varint(8 * 10 + 1) + bytes(8)
    return number(1, 8) + content(2, b"exporter") + content(7, graph) + four + eight


WEIGHT = np.random.default_rng(0).standard_normal((300, 2, 1)).astype(np.float32)
BIAS = np.array(0.5, np.float32)


@pytest.mark.parametrize("packed", [False, True])
def test_tensors_are_read(packed: bool):
    found = read_onnx_tensors(model(tensor("weight", WEIGHT, packed=packed), tensor("bias", BIAS)))
    assert list(found) == ["weight", "bias"]
    np.testing.assert_array_equal(found["weight"], WEIGHT)
    assert found["bias"].shape == () and found["bias"] == 0.5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "one graph"),
        (model() + model(), "one graph"),
        (number(7, 3), "one graph"),
        (model(tensor("w", WEIGHT), tensor("w", WEIGHT)), "twice"),
        (model(tensor("w", WEIGHT, kind=10)), "float32"),
        (model(tensor("w", WEIGHT, more=number(14, 1))), "float32"),  # its data is in another file
        (model(content(5, number(1, 3) + number(2, 1) + content(8, b"w"))), "float32"),  # no data
        (model(content(5, number(1, 3) + number(2, 1) + content(9, bytes(8)))), "float32"),  # too few bytes
        (model(number(5, 1)), "a number is where bytes"),
        (varint(8 * 7 + 3), "wire type 3"),
        (varint(8 * 7 + 2) + b"\xff" * 11, "more than ten bytes"),
        (model(content(5, content(8, b"\xff\xfe"))), "utf-8"),
    ],
)
def test_other_content_is_refused(data: bytes, words: str):
    with pytest.raises(ValueError, match=words):
        read_onnx_tensors(data)


def test_every_truncation_is_refused():
    data = model(tensor("w", np.ones((2, 2), np.float32)))
    end = data.index(varint(8 * 9 + 5) + b"abcd")  # fields after the graph may be absent
    for length in range(end):
        with pytest.raises(ValueError):
            read_onnx_tensors(data[:length])


def test_damaged_bytes_raise_nothing_but_value_errors():
    data = model(tensor("w", np.ones((2, 2), np.float32)), tensor("b", BIAS))
    refused = 0
    for place in range(len(data)):
        for value in (0, 255, data[place] ^ 1, data[place] ^ 128):
            try:
                read_onnx_tensors(data[:place] + bytes([value]) + data[place + 1 :])
            except ValueError:
                refused += 1
    assert refused > len(data)
