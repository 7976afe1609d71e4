"""Safetensors files of fp32 or fp16 tensors, from copies in host memory or from tensors that are read one after another.

A safetensors file is the length of a JSON header (8 bytes), the header, and the raw tensors. The files written here equal those
of the safetensors library byte for byte; writing them ourselves lets them be hashed meanwhile, and needs no second copy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2**26  # elements of 4 bytes that are allocated together; a power of two, to which PyTorch rounds pinned memory
_PIECE = 2**20  # elements that are written at a time
_NAMES = {torch.float32: "F32", torch.float16: "F16"}  # in the header of a file


class HostCopy:
    """Host memory for a sequence of fp32 tensors, which is allocated once and filled again for each checkpoint.

    Args:
        elements: of all tensors together.
        pinned: whether to allocate page-locked memory, to which a GPU copies several times as fast.
    """

    def __init__(self, elements: int, *, pinned: bool):
        sizes = [min(_CHUNK, elements - start) for start in range(0, elements, _CHUNK)]
        # Written once, because the system provides memory only then, which would take as long as filling it several times.
        self._chunks = [torch.empty(size, dtype=torch.float32, pin_memory=pinned).zero_() for size in sizes]

    @torch.no_grad()
    def fill(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors, which have to have `elements` elements. On a GPU this does not wait for the last copies."""
        position = 0
        for tensor in tensors:
            flat = tensor.detach().flatten()
            while len(flat):
                chunk, start = divmod(position, _CHUNK)
                part = flat[: _CHUNK - start]
                self._chunks[chunk][start : start + len(part)].copy_(part, non_blocking=True)
                position, flat = position + len(part), flat[len(part) :]

    def chunks(self, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
        """Yield the content as bytes-like objects, each small enough to stay in the cache while it is written and hashed."""
        return (_raw(part.to(dtype)) for chunk in self._chunks for part in chunk.split(_PIECE))


def header(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> bytes:
    """The beginning of a safetensors file, before the tensors.

    Args:
        shapes: of the tensors by name, in the order in which they follow, which has to be that of the names.
        dtype: of all of them.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def raw_tensors(tensors: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    """Yield each tensor as a bytes-like object in host memory. The tensor must stay unchanged until the next one is taken."""
    for tensor in tensors:
        yield _raw(tensor.detach().to("cpu", dtype).flatten())


def _raw(flat: Tensor) -> Any:
    return flat.contiguous().view(torch.uint8).numpy()
