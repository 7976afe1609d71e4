"""Random damage to the files of an input: a mutation takes a generator and {name: content}, and returns what it changed."""

from __future__ import annotations

import gzip
import io
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Files = dict[str, bytes]
EXTREMES = [
    b"0", b"-1", b"1e30", b"-1e30", b"nan", b"inf", b"65536", b"4294967296", b"99999999999999999999", b"0.0000001",
    b"none", b"", b"1 1", b"0x10", b"1,5", b"\xff\xfe", b"\0",
]  # fmt: skip


class Mutation(NamedTuple):
    """One kind of damage.

    Attributes:
        name: What is done.
        apply: The function that does it.
        guarded: Whether a checksum covers what is changed, so that the input may not be read with another content.
    """

    name: str
    apply: Callable[[np.random.Generator, Files], Files]
    guarded: bool = False


def pick(rng: np.random.Generator, files: Files, suffix: str = "") -> str:
    """The name of one of the files that end with `suffix`."""
    names = sorted(name for name in files if name.endswith(suffix))
    return names[int(rng.integers(len(names)))]


def on_one_file(change: Callable[[np.random.Generator, bytes], bytes], suffix: str = "") -> Callable[..., Files]:
    """Apply `change` to one of the files that end with `suffix`."""

    def apply(rng: np.random.Generator, files: Files) -> Files:
        name = pick(rng, files, suffix)
        return files | {name: change(rng, files[name])}

    return apply


def overwrite(rng: np.random.Generator, content: bytes, *, reach: int | None = None) -> bytes:
    """Flip a bit, or put zeros, ones, a NaN or random bytes, in one to three places of the first `reach` bytes."""
    damaged = bytearray(content)
    end = max(1, min(len(damaged), reach or len(damaged)))
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(end))
        flipped = bytes([(damaged[at] if damaged else 0) ^ (1 << int(rng.integers(8)))])
        patches = [flipped, flipped, bytes(4), b"\xff" * 4, b"\0\0\xc0\x7f", rng.bytes(4), rng.bytes(2)]
        patch = patches[int(rng.integers(len(patches)))]
        damaged[at : at + len(patch)] = patch
    return bytes(damaged[: len(content)])


def header(reach: int) -> Callable[[np.random.Generator, bytes], bytes]:
    """`overwrite` in the first bytes alone."""
    return lambda rng, content: overwrite(rng, content, reach=reach)


def cut(rng: np.random.Generator, content: bytes) -> bytes:
    """Drop the end, often only a few bytes of it."""
    kept = len(content) - int(rng.integers(1, 20)) if rng.random() < 0.3 else int(rng.integers(len(content) + 1))
    return content[: min(max(0, kept), len(content) - 1)]


def splice(rng: np.random.Generator, content: bytes) -> bytes:
    """Insert, delete or repeat a range of bytes."""
    at, length = int(rng.integers(len(content) + 1)), int(2 ** rng.uniform(0, 10))
    kind = int(rng.integers(3))
    if kind == 0:
        return content[:at] + rng.bytes(length) + content[at:]
    if kind == 1:
        return content[:at] + content[at + length :]
    return content[:at] + content[at : at + length] + content[at:]


def empty(rng: np.random.Generator, content: bytes) -> bytes:
    """Leave nothing, or zeros."""
    return b"" if rng.random() < 0.5 else bytes(len(content))


def inside_gzip(change: Callable[[np.random.Generator, bytes], bytes]) -> Callable[[np.random.Generator, bytes], bytes]:
    """Apply `change` to the inflated content; the result is a valid gzip stream."""
    return lambda rng, content: gzip.compress(change(rng, gzip.decompress(content)), 1, mtime=0)


def text(rng: np.random.Generator, content: bytes, *, end: bytes = b"") -> bytes:
    """Damage a text, or the part before `end` of a file with a text header: lines, numbers, words, separators, encoding."""
    head, mark, rest = content.partition(end) if end else (content, b"", b"")
    lines = head.split(b"\n")
    at, other = (int(each) for each in rng.integers(len(lines), size=2))
    number = list(re.finditer(rb"-?\d+(\.\d+)?", lines[at]))
    word = list(re.finditer(rb"[A-Za-z]+", lines[at]))
    kind = int(rng.integers(10))
    extreme = EXTREMES[int(rng.integers(len(EXTREMES)))]
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind in (3, 4) and number:
        match = number[int(rng.integers(len(number)))]
        lines[at] = lines[at][: match.start()] + extreme + lines[at][match.end() :]
    elif kind == 5 and word:
        match = word[int(rng.integers(len(word)))]
        changed = [match[0] * int(2 ** rng.uniform(1, 14)), match[0].swapcase(), b"", match[0][::-1]]
        lines[at] = lines[at][: match.start()] + changed[int(rng.integers(4))] + lines[at][match.end() :]
    elif kind == 6:
        lines[at] = lines[at] + bytes(rng.choice(list(b" \t\r\"',;:=\\{}[]/#\0\x1b\xff"), size=int(rng.integers(1, 5))))
    elif kind == 7:
        old, new = rng.choice([b",", b"=", b":", b'"', b" ", b"\n", b"\t", b";", b"[", b"{"], size=2)
        lines[at] = lines[at].replace(bytes(old), bytes(new), 1)
    elif kind == 8:
        lines = overwrite(rng, b"\n".join(lines)).split(b"\n")
    else:
        lines = splice(rng, b"\n".join(lines)).split(b"\n")
    return b"\n".join(lines) + mark + rest


def dicom_tags(rng: np.random.Generator, content: bytes) -> bytes:
    """Remove, repeat or change one to three elements of a DICOM file, and write it again with pydicom."""
    import pydicom
    from pydicom.tag import Tag

    warnings.simplefilter("ignore", UserWarning)  # pydicom names each invalid value
    dataset = pydicom.dcmread(io.BytesIO(content))
    for _ in range(int(rng.integers(1, 4))):
        elements = [element.tag for element in dataset if element.tag != Tag("PixelData")]
        tag = elements[int(rng.integers(len(elements)))]
        values = [
            "",
            "0",
            "0\\0",
            "1e30\\1e30",
            "nan\\nan",
            "-1",
            "1\\2\\3",
            "x" * 5000,
            "65535",
            "1\\0\\0\\0\\1\\0",
            "0.5",
        ]
        if rng.random() < 0.4:
            del dataset[tag]
        elif dataset[tag].VR in ("US", "SS", "UL"):
            dataset[tag].value = int(rng.choice([0, 1, 2, 7, 8, 15, 16, 255, 4096, 65535]))
        else:
            try:
                dataset[tag].value = values[int(rng.integers(len(values)))]
            except Exception:  # pydicom refuses some values; such an element is removed instead
                del dataset[tag]
    buffer = io.BytesIO()
    try:
        dataset.save_as(buffer, enforce_file_format=False)
    except Exception:
        return overwrite(rng, content, reach=1500)
    return buffer.getvalue()
