"""What the kernels' tests share: the interpreter put right on bf16, poisoned memory, and the rule that judges a fused path.

The rule: both the fused and the plain path are compared with float64; the fused one may err at most twice as much as the plain
one of the same dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def mend_interpreter() -> None:
    """Make tl.dot of bf16 right in Triton's interpreter, which multiplies the bit patterns (seen in 3.6 to 3.9)."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "plain_create_dot"):
        return
    builder.plain_create_dot = builder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return self.plain_create_dot(widened(a), widened(b), *rest)

    builder.create_dot = create_dot


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that an element nobody writes cannot pass by luck."""
    names = ("empty", "empty_like", "empty_strided")
    plain = {name: getattr(torch, name) for name in names}
    new_empty = Tensor.new_empty

    def filled(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    try:
        for name in names:
            setattr(torch, name, lambda *a, _make=plain[name], **k: filled(_make(*a, **k)))
        Tensor.new_empty = lambda self, *a, **k: filled(new_empty(self, *a, **k))
        yield
    finally:
        for name in names:
            setattr(torch, name, plain[name])
        Tensor.new_empty = new_empty


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
    with poisoned():
        ours = outputs_and_gradients(fused, tensors, dy)
    assert len(ours) == len(truth) == len(names), f"{len(ours)} results for {list(names)}"
    for name, expected, plain_result, result in zip(names, truth, eager, ours, strict=True):
        assert result.shape == expected.shape and result.dtype == plain_result.dtype, name
        scale = expected.abs().max()
        # What a rounding of the result costs anyone; below it a ratio of errors says nothing.
        floor = roundings * scale * torch.finfo(result.dtype).eps
        allowed = factor * (plain_result.double() - expected).abs().max() + floor
        error = (result.double() - expected).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (scale {scale:.3g})"
