"""What the kernels' tests share: the interpreter put right on bf16, guarded memory, and the rule that judges a fused path.

The rule: both the fused and the plain path are compared with float64; the fused one may err at most twice as much as the plain
one of the same dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def mend_interpreter() -> None:
    """Triton's interpreter (3.6 to 3.9) made right and quick for our kernels.

    Its tl.dot of bf16 multiplies the bit patterns. It checks each integer sum and product for overflow, which compiled kernels
    do not, in half of its time; and each call of a function within a kernel replaces triton.language anew, in half of the
    rest. Loads are watched for `guarded`."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    if hasattr(builder, "plain_create_dot"):
        return
    builder.plain_create_dot, plain_call, plain_load = builder.create_dot, function.__call__, builder.create_masked_load
    replaced: set[str] = set()

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return self.plain_create_dot(widened(a), widened(b), *rest)

    def call(self, *args, **kwargs):
        if self.fn.__module__ in replaced:
            return self.rewrite()(*args, **kwargs)
        replaced.add(self.fn.__module__)
        return plain_call(self, *args, **kwargs)

    def create_masked_load(self, ptrs, mask, *rest):
        _GUARDS.see(ptrs.data[mask.data.astype(bool)])
        return plain_load(self, ptrs, mask, *rest)

    builder.create_dot, function.__call__, builder.create_masked_load = create_dot, call, create_masked_load
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


GUARD = 4096  # elements before and behind a tensor; a multiple of every alignment that a kernel may assume
_SENTINEL = 1234.0


class Guards:
    """The guard elements of the tensors in a `guarded` block, and how many of them were loaded there."""

    def __init__(self) -> None:
        self.storages: list[Tensor] = []
        self.edges = np.empty(0, np.uint64)  # first and end address of each run of guard elements, ascending
        self.read = 0

    def add(self, storage: Tensor) -> None:
        self.storages.append(storage)  # kept, so that no other tensor gets these addresses
        start, end, rim = storage.data_ptr(), storage.nbytes, GUARD * storage.element_size()
        self.edges = np.sort(np.append(self.edges, np.uint64(start) + np.uint64([0, rim, end - rim, end])))

    def see(self, addresses: np.ndarray) -> None:
        if len(self.edges):
            self.read += int((np.searchsorted(self.edges, addresses.astype(np.uint64), side="right") % 2).sum())


_GUARDS = Guards()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within: what torch.empty and its kin return is filled with NaN, so that an element nobody writes cannot pass by luck, and
    has guard elements on both sides. AssertionError at the end if one of these was written, or loaded by a kernel in Triton's
    interpreter: on a GPU there may be no memory."""
    names = ("empty", "empty_like", "empty_strided")
    plain = {name: getattr(torch, name) for name in names}
    new_empty = Tensor.new_empty
    storages: list[Tensor] = []

    def guard(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.device.type == "meta" or tensor.numel() == 0:
            return tensor
        storage = plain["empty"](tensor.numel() + 2 * GUARD, dtype=tensor.dtype, device=tensor.device)
        storage.fill_(_SENTINEL)[GUARD:-GUARD] = float("nan")
        storages.append(storage)
        _GUARDS.add(storage)
        return storage.as_strided(tensor.shape, tensor.stride(), GUARD)  # such tensors are dense

    try:
        for name in names:
            setattr(torch, name, lambda *a, _make=plain[name], **k: guard(_make(*a, **k)))
        Tensor.new_empty = lambda self, *a, **k: guard(new_empty(self, *a, **k))
        yield
    finally:
        for name in names:
            setattr(torch, name, plain[name])
        Tensor.new_empty = new_empty
        read = _GUARDS.read
        _GUARDS.__init__()
    for storage in storages:
        rims = torch.cat([storage[:GUARD], storage[-GUARD:]])
        written = int((rims != torch.tensor(_SENTINEL, dtype=rims.dtype)).sum())
        assert not written, f"{written} elements outside of an output were written"
    assert not read, f"{read} elements outside of a tensor were loaded"


def surrounded(tensor: Tensor) -> Tensor:
    """An equal tensor of the same strides with NaN before and behind it: what is read from there and used shows, and within
    `guarded` whatever is read from there."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.new_full((extent + 2 * GUARD,), float("nan"))
    storage[GUARD:-GUARD] = tensor.detach().as_strided((extent,), (1,), tensor.storage_offset())
    _GUARDS.add(storage)
    return storage.as_strided(tensor.shape, tensor.stride(), GUARD)


def outputs_and_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], dy: Tensor
) -> list[Tensor]:
    """[function(*tensors), then the gradient of each floating tensor], for the output's gradient `dy`. Layouts are kept."""
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    y = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def check_fused(
    fused: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    *,
    names: Sequence[str],
    factor: float = 2.0,
    roundings: float = 1.0,
) -> None:
    """Assert the rule for the output and every gradient. names: of the output and of each tensor that is given. roundings: of
    the largest value, in the tensor's dtype, allowed on top; a few for fp32 sums, whose error is luck on either side."""
    wide = [None if t is None else t.double() for t in tensors]
    with torch.no_grad():
        shape = plain(*wide).shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    first = next(t for t in tensors if t is not None)
    dy = dy.to(first.device, first.dtype)
    truth = outputs_and_gradients(plain, wide, dy.double())
    eager = outputs_and_gradients(plain, tensors, dy)
    with guarded():
        ours = outputs_and_gradients(fused, [None if t is None else surrounded(t) for t in tensors], surrounded(dy))
    assert len(ours) == len(truth) == len(names), f"{len(ours)} results for {list(names)}"
    for name, expected, plain_result, result in zip(names, truth, eager, ours, strict=True):
        assert result.shape == expected.shape and result.dtype == plain_result.dtype, name
        scale = expected.abs().max()
        # What a rounding of the result costs anyone; below it a ratio of errors says nothing.
        floor = roundings * scale * torch.finfo(result.dtype).eps
        allowed = factor * (plain_result.double() - expected).abs().max() + floor
        error = (result.double() - expected).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (scale {scale:.3g})"
