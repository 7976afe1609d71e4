"""One step of AdamW (Loshchilov & Hutter 2019) over flat buffers, with the moving average and the 16-bit copy of the weights.

    g = scale * gradient
    m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
    w = (1 - lr * decay) w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    average = d average + (1 - d) w         copy = w, rounded to 16 bits

The gradient of N weights is a tensor (N,), or the pair (dy (R, M), x (R, K)) of the factors of dy^T x, a matrix of M x K = N
elements that is not written to memory.

Memory traffic for N weights with average and copy: 38 N bytes, or 34 N with factors; PyTorch's fused AdamW, `lerp_` and `copy_`
46 N, and with factors 50 N. Arithmetic is in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import BackendSupport, choose, jit, library_op, tl, triton_on_a_gpu
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, launch_config

Factors = tuple[Tensor, Tensor]
_PART = 2**20  # elements


class AdamWStep(NamedTuple):
    """The numbers of one step.

    Attributes:
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Decay of the weights, multiplied by the learning rate.
        number: t, the number of the step, from 1.
        scale: Factor of the gradient.
        average_decay: d, the decay of the moving average.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    number: int
    scale: float = 1.0
    average_decay: float = 0.0

    def arguments(self) -> tuple[float, ...]:
        """The numbers that the kernels use, computed in double precision."""
        corrected = self.lr / (1 - self.beta1**self.number)
        inverse_root = (1 - self.beta2**self.number) ** -0.5
        return (
            self.scale, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, 1 - self.lr * self.weight_decay,
            corrected, inverse_root, self.eps, 1 - self.average_decay,
        )  # fmt: skip


def adamw_reference(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor | Factors,
    step: AdamWStep,
    average: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """The plain PyTorch implementation: the product, the fused AdamW of torch.optim, the average and the copy.

    On a CPU this is done in parts, so that these four find the part in the cache, and a product is not written to memory.
    """
    number = torch.tensor(float(step.number), device=weights.device)
    width, inverse_scale = 1, None if step.scale == 1 else torch.tensor(1 / step.scale, device=weights.device)
    if isinstance(gradient, tuple):
        dy, x = gradient[0].float() * step.scale, gradient[1].float()
        width, inverse_scale = x.shape[1], None  # parts have whole rows of the product
    size = max(1, _PART // width) * width if weights.device.type == "cpu" else weights.numel()
    for start in range(0, weights.numel(), size):
        part = slice(start, start + size)
        if isinstance(gradient, tuple):
            columns = dy[:, start // width : (start + size) // width].T
            # Of rank one it is no sum, and a multiplication is twice as fast as a matrix product on a CPU.
            of_part = (columns * x if len(x) == 1 else torch.mm(columns, x)).view(-1)
        else:
            of_part = gradient[part]
        # What `torch.optim.AdamW(fused=True)` calls. Its checks would take longer than a tenth of the arithmetic.
        torch._fused_adamw_(
            [weights[part]], [of_part], [exp_avg[part]], [exp_avg_sq[part]], [], [number], amsgrad=False, maximize=False,
            grad_scale=inverse_scale, lr=step.lr, beta1=step.beta1, beta2=step.beta2, weight_decay=step.weight_decay,
            eps=step.eps,
        )  # fmt: skip
        if average is not None:
            average[part].lerp_(weights[part], 1 - step.average_decay)
        if copy is not None:
            copy[part].copy_(weights[part])


@jit
def _update(
    b_g, o, mask, weights_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, copy_ptr, scale, beta1, one_less_beta1, beta2,
    one_less_beta2, kept, step_size, inverse_root, eps, one_less_average,
):  # fmt: skip
    """Update the weights at the offsets `o` with the gradient `b_g`."""
    b_g *= scale
    b_m = tl.load(exp_avg_ptr + o, mask=mask, other=0.0) * beta1 + b_g * one_less_beta1
    b_v = tl.load(exp_avg_sq_ptr + o, mask=mask, other=0.0) * beta2 + b_g * b_g * one_less_beta2
    tl.store(exp_avg_ptr + o, b_m, mask=mask)
    tl.store(exp_avg_sq_ptr + o, b_v, mask=mask)
    b_w = tl.load(weights_ptr + o, mask=mask, other=0.0) * kept
    b_w -= step_size * b_m / (tl.sqrt(b_v) * inverse_root + eps)
    tl.store(weights_ptr + o, b_w, mask=mask)
    if average_ptr is not None:
        b_average = tl.load(average_ptr + o, mask=mask, other=0.0)
        tl.store(average_ptr + o, b_average + one_less_average * (b_w - b_average), mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + o, b_w.to(copy_ptr.dtype.element_ty), mask=mask)


@jit
def _adamw_kernel(
    gradient_ptr, weights_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, copy_ptr, N, scale, beta1, one_less_beta1, beta2,
    one_less_beta2, kept, step_size, inverse_root, eps, one_less_average, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < N
    b_g = tl.load(gradient_ptr + o, mask=mask, other=0.0).to(tl.float32)
    _update(
        b_g, o, mask, weights_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, copy_ptr, scale, beta1, one_less_beta1, beta2,
        one_less_beta2, kept, step_size, inverse_root, eps, one_less_average,
    )  # fmt: skip


@jit(do_not_specialize=["R"])
def _adamw_factors_kernel(
    dy_ptr, x_ptr, weights_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, copy_ptr, R, M, K, scale, beta1, one_less_beta1,
    beta2, one_less_beta2, kept, step_size, inverse_root, eps, one_less_average, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of the weight (M, K), whose gradient is the product of the columns of dy (R, M) and x (R, K)."""
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_m, m_k = o_m < M, o_k < K
    b_g = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in tl.range(0, R, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        b_dy = tl.load(dy_ptr + o_r[None, :] * M + o_m[:, None], mask=m_r[None, :] & m_m[:, None], other=0.0)
        b_x = tl.load(x_ptr + o_r[:, None] * K + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_g += tl.dot(b_dy, b_x, input_precision="ieee")
    o = o_m[:, None].to(tl.int64) * K + o_k[None, :]
    _update(
        b_g, o, m_m[:, None] & m_k[None, :], weights_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, copy_ptr, scale, beta1,
        one_less_beta1, beta2, one_less_beta2, kept, step_size, inverse_root, eps, one_less_average,
    )  # fmt: skip


@library_op("adamw_", mutates_args=("weights", "exp_avg", "exp_avg_sq", "average", "copy"))
def _adamw_op(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    numbers: list[float],
    average: Tensor | None,
    copy: Tensor | None,
) -> None:
    config = launch_config("adamw", "dense", weights.device)
    programs = -(-weights.numel() // config.constants["BLOCK"])
    _adamw_kernel[(programs,)](
        gradient, weights, exp_avg, exp_avg_sq, average, copy, weights.numel(), *numbers, **config.launch()
    )


@_adamw_op.register_fake
def _(weights, exp_avg, exp_avg_sq, gradient, numbers, average, copy):
    return None


@library_op("adamw_factors_", mutates_args=("weights", "exp_avg", "exp_avg_sq", "average", "copy"))
def _adamw_factors_op(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    dy: Tensor,
    x: Tensor,
    numbers: list[float],
    average: Tensor | None,
    copy: Tensor | None,
) -> None:
    (R, M), K = dy.shape, x.shape[1]
    config = launch_config("adamw", "factors fp32" if dy.dtype == torch.float32 else "factors 16bit", weights.device)
    grid = -(-K // config.constants["BLOCK_K"]), -(-M // config.constants["BLOCK_M"])
    _adamw_factors_kernel[grid](
        dy, x, weights, exp_avg, exp_avg_sq, average, copy, R, M, K, *numbers, **config.launch()
    )


@_adamw_factors_op.register_fake
def _(weights, exp_avg, exp_avg_sq, dy, x, numbers, average, copy):
    return None


def backend_support(device: torch.device, dtype: torch.dtype) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported.

    Args:
        device: Device of the weights.
        dtype: Dtype of the gradient, of its factors, or of the copy.
    """
    return triton_on_a_gpu(device, dtype)


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles."""
    states = dict.fromkeys(("weights_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "average_ptr"), "*fp32")
    scalars = dict.fromkeys(
        ("scale", "beta1", "one_less_beta1", "beta2", "one_less_beta2", "kept", "step_size", "inverse_root", "eps",
         "one_less_average"), "fp32",
    )  # fmt: skip
    common, configs = {**states, "copy_ptr": "*bf16", **scalars}, DEFAULT_LAUNCH_CONFIGS["adamw"]
    dense = {**common, "gradient_ptr": "*fp32", "N": "i32"}
    factors = {**common, "R": "i32", "M": "i32", "K": "i32"}
    return [
        CompileCase("adamw dense", _adamw_kernel, dense, configs["dense"], divisible=("N",), wide_loads=True),
        *(
            CompileCase(
                f"adamw factors {name}", _adamw_factors_kernel, {**factors, "dy_ptr": f"*{name}", "x_ptr": f"*{name}"},
                configs[key], divisible=("M", "K"), wide_loads=True, tensor_cores=name == "bf16",
            )
            for name, key in (("bf16", "factors 16bit"), ("fp32", "factors fp32"))
        ),
    ]  # fmt: skip


def adamw_(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor | Factors,
    step: AdamWStep,
    *,
    average: Tensor | None = None,
    copy: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Take one step of AdamW in place.

    Args:
        weights: (N,), fp32, contiguous, as all tensors.
        exp_avg: (N,), fp32, the first moment m.
        exp_avg_sq: (N,), fp32, the second moment v.
        gradient: (N,), fp32, or the factors (dy (R, M), x (R, K)) with M * K = N, of one floating dtype.
        step: The numbers of the step.
        average: (N,), fp32, the moving average of the weights.
        copy: (N,), to which the new weights are copied, in its dtype.
        backend: "triton" or "reference"; None for the first supported one.

    Raises:
        ValueError: The shapes do not match, or a tensor is not contiguous or of another dtype.
        BackendError: `backend` is unsupported here.
    """
    _check(weights, exp_avg, exp_avg_sq, gradient, average, copy)
    dtype = (gradient[0] if isinstance(gradient, tuple) else gradient).dtype
    if choose("adamw", backend_support(weights.device, dtype), backend) == "reference":
        adamw_reference(weights, exp_avg, exp_avg_sq, gradient, step, average, copy)
    elif isinstance(gradient, tuple):
        _adamw_factors_op(weights, exp_avg, exp_avg_sq, *gradient, list(step.arguments()), average, copy)
    else:
        _adamw_op(weights, exp_avg, exp_avg_sq, gradient, list(step.arguments()), average, copy)


def _check(
    weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Any, average: Tensor | None, copy: Tensor | None
) -> None:
    states = {"weights": weights, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "average": average}
    for name, tensor in states.items():
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be fp32, got {tensor.dtype}")
    factors = isinstance(gradient, tuple)
    given = {**states, "copy": copy} | ({} if factors else {"gradient": gradient})
    for name, tensor in given.items():
        if tensor is not None and (tensor.shape != weights.shape or tensor.ndim != 1 or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous with shape ({weights.numel()},), got {tuple(tensor.shape)}")
    if factors:
        dy, x = gradient
        sizes = f"dy {tuple(dy.shape)} and x {tuple(x.shape)}"
        if dy.ndim != 2 or x.ndim != 2 or len(dy) != len(x) or dy.shape[1] * x.shape[1] != weights.numel():
            raise ValueError(f"{sizes} are not the factors (R, M) and (R, K) of {weights.numel()} weights")
        if dy.dtype != x.dtype or not dy.is_contiguous() or not x.is_contiguous():
            raise ValueError(f"{sizes} must be contiguous and have one dtype, got {dy.dtype} and {x.dtype}")
