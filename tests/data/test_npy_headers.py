"""Damaged headers of `.npy` files raise DataError, also where nothing compares a checksum."""

from __future__ import annotations

import io
import pickle
import random
import struct
import tokenize
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ccella_fast.data.manifest import open_array
from ccella_fast.errors import DataError

VALUES = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)


def npy(array: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


def expect_defect(path: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        open_array(path, field="a field")
    assert caught.value.path == str(path) and caught.value.field == "a field" and caught.value.fix


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(4, 6, 5), (120,), (1, 2, 3, 4, 5), ()])
def test_arrays_are_opened_as_numpy_saved_them(tmp_path: Path, shape: tuple[int, ...], order: str):
    array = np.asarray(VALUES.ravel()[: int(np.prod(shape))].reshape(shape), order=order)
    (tmp_path / "a.npy").write_bytes(npy(array))
    opened = open_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(opened, array)
    assert opened.shape == shape and not opened.flags.writeable and isinstance(opened, np.memmap)


def test_random_damage_of_the_header_raises_nothing_but_data_errors(tmp_path: Path):
    """Where the header is still valid, it states the same number of values."""
    path, rng, content = tmp_path / "a.npy", random.Random(0), npy(VALUES)
    failures_of_numpy, refused = set(), 0
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(128)] = rng.choice([rng.randrange(256), rng.choice(b"'{}(),0123456789 \n\\")])
        path.write_bytes(damaged[: rng.choice([len(damaged), len(damaged), rng.randrange(140)])])
        try:
            opened = open_array(path)
        except DataError as error:
            assert str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(np.sort(opened, None), np.sort(VALUES, None))
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError, SyntaxError):
            pass
        except Exception as error:
            failures_of_numpy.add(type(error))
    assert 400 < refused < 600 and tokenize.TokenError in failures_of_numpy, "control: numpy raises other types"


REFUSED = {
    "object": (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), "must contain a float32 array, got .O"),
    "pickle": (pickle.dumps(VALUES), "not a plain .npy array"),
    "float64": (npy(VALUES.astype("f8")), "got <f8"),
    "big-endian": (npy(VALUES.astype(">f4")), "got >f4"),
    "structured": (npy(np.zeros(3, [("a", "f4")])), "not a plain .npy array"),
    "empty": (npy(np.zeros((3, 0), np.float32)), "an empty array"),
    "bytes after it": (npy(VALUES) + b"\0", "has 609 bytes, but its header says 608"),
    "cut off": (npy(VALUES)[:-1], "has 607 bytes, but its header says 608"),
    "magic": (b"\x93NUMPX" + npy(VALUES)[6:], "not a plain .npy array"),
    "version": (b"\x93NUMPY\x04" + npy(VALUES)[7:], "not a plain .npy array"),
    "no file": (b"", "not a plain .npy array"),
    "large shape": (
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 999999999999), }\n"), "its header says"
    ),
    "open bracket": (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,\n"), "not a plain .npy array"),
    "deep": (with_header(b"(" * 60_000), "not a plain .npy array"),
    "expression": (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2**9,), }\n"), "not a plain .npy array"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_other_files_raise(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "a.npy").write_bytes(content)
    expect_defect(tmp_path / "a.npy", words)


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path):
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        file.write(b"\x93NUMPY\x02\0" + struct.pack("<I", 2**30))
        file.truncate(2**30 + 12)  # a hole in the file, which takes no space on disk
    tracemalloc.start()
    try:
        expect_defect(path, "not a plain .npy array")
        assert tracemalloc.get_traced_memory()[1] < 2**22
        with pytest.raises(ValueError, match="Header info length"):
            np.load(path)
        assert tracemalloc.get_traced_memory()[1] > 2**30, "control: numpy reads the header to see that it is too long"
    finally:
        tracemalloc.stop()
