"""Choice of the implementation (backend) of each kernel.

Every kernel module has a function `backend_support(device, dtype, **sizes)` that lists its backends in order of preference,
each with the reason why it is unsupported, or None if it is supported. `choose` takes the first supported one. The `backend=`
argument of a kernel overrides the choice for one call, the environment variable CCELLA_FAST_BACKEND for a process:

    CCELLA_FAST_BACKEND=reference                              every kernel that has this backend
    CCELLA_FAST_BACKEND=attention=xformers,geglu=reference     these kernels only

A requested backend that is unsupported raises an error; it is never replaced silently.

The backends are `triton`, the Triton kernels of this package; `xformers`, the memory-efficient attention of xformers; `sdpa`,
PyTorch's attention; `phase`, eight small convolutions of PyTorch; `cudnn`, the convolution of cuDNN; and `reference`, the plain
PyTorch implementation, which defines the correct result.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

try:  # Triton is optional: the kernel modules must be importable without it
    import triton
    import triton.language as tl

    constexpr: Callable[..., Any] = tl.constexpr
except ImportError:
    triton = tl = None
    constexpr = lambda unchanged: unchanged  # noqa: E731

ENVIRONMENT = "CCELLA_FAST_BACKEND"
BACKENDS = ("triton", "xformers", "sdpa", "phase", "cudnn", "native", "reference")
KERNELS = (
    "group_norm_silu",
    "cross_attention",
    "attention",
    "upsample_conv3d",
    "conv3d",
    "geglu",
    "residual_shift",
    "upsample_trilinear",
    "adamw",
)
XFORMERS = importlib.util.find_spec("xformers") is not None  # found, not imported
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LAUNCHERS: dict[str, Callable[..., Any]] = {}  # name of a library op -> the function that launches its kernels

# backend -> the reason why it is unsupported, None if it is supported; in order of preference
BackendSupport = Mapping[str, str | None]


def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """Decorator `triton.jit`, which leaves the function unchanged where Triton is absent.

    Args:
        function: The kernel.
        do_not_specialize: Integer arguments from whose values the code gains nothing. Triton otherwise compiles a binary for
            each combination of arguments that are 1, multiples of 16 or neither: dozens in the first step of a model.
    """
    if function is None:
        return functools.partial(jit, do_not_specialize=do_not_specialize)
    return function if triton is None else triton.jit(function, do_not_specialize=list(do_not_specialize))


class BackendError(ValueError):
    """A requested backend does not exist or is unsupported here."""


class BackendChoice(NamedTuple):
    """The backend that a kernel uses, with the reason."""

    kernel: str
    backend: str
    reason: str


def choose(kernel: str, support: BackendSupport, requested: str | None = None) -> str:
    """The backend to use: `requested`, else that of the environment variable, else the first supported one.

    Raises:
        BackendError: The requested backend does not exist or is unsupported, or no backend is supported.
    """
    return explain_choice(kernel, support, requested).backend


def explain_choice(kernel: str, support: BackendSupport, requested: str | None = None) -> BackendChoice:
    """The result of `choose` with the reason for it as text."""
    wanted, origin = requested, "by argument"
    if wanted is None:
        wanted, origin = _from_environment(kernel, support), f"by {ENVIRONMENT}"
    if wanted is not None:
        if wanted not in support:
            raise BackendError(f"{kernel} does not have the backend {wanted!r}; choose one of {', '.join(support)}")
        if support[wanted] is not None:
            usable = ", ".join(backend for backend, reason in support.items() if reason is None)
            why = f"{kernel}: backend {wanted!r} was requested {origin}, but {support[wanted]}"
            raise BackendError(f"{why}; supported here: {usable or 'none'}")
        return BackendChoice(kernel, wanted, f"requested {origin}")
    skipped: list[str] = []
    for backend, reason in support.items():
        if reason is None:
            return BackendChoice(kernel, backend, "; ".join(skipped) or "preferred here")
        skipped.append(f"{backend}: {reason}")
    raise BackendError(f"{kernel} has no supported backend here: " + "; ".join(skipped))


def explain(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> list[BackendChoice]:
    """The choice of every kernel at the sizes of the default model.

    Args:
        device: Default: the GPU if there is one, else the CPU.
        dtype: Default: bf16 on a GPU, fp32 on a CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    modules = {name: importlib.import_module(f"ccella_fast.kernels.{name}") for name in KERNELS}
    return [explain_choice(name, module.backend_support(device, dtype)) for name, module in modules.items()]


def check_environment(device: torch.device | str | None = None) -> None:
    """Check the backends that CCELLA_FAST_BACKEND requests, at the sizes of the default model. For use before long work.

    Raises:
        BackendError: A backend does not exist or is unsupported on the device, which is chosen as by `explain`.
    """
    if os.environ.get(ENVIRONMENT):
        explain(device)


def triton_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels do not support such tensors, None if they do.

    Meta tensors are supported, so that the operations of a GPU can be counted without one.
    """
    if triton is None:
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16"
    if device.type == "cuda":
        return _unsupported_gpu_reason(device)
    if device.type == "meta" or interpreted():
        return None
    return f"the tensors are on {device.type}, not on a GPU"


def triton_on_a_gpu(device: torch.device, dtype: torch.dtype) -> BackendSupport:
    """The support of a kernel that prefers `triton` on a GPU and `reference`, PyTorch's own operations, elsewhere."""
    triton_reason = triton_unsupported_reason(device, dtype)
    if device.type == "cuda":
        return {"triton": triton_reason, "reference": None}
    return {"reference": None, "triton": triton_reason}


def _unsupported_gpu_reason(device: torch.device) -> str | None:
    """Why Triton does not compile for this GPU, None if it does."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU is sm_{major}{minor}, and Triton compiles for sm_80 and newer"


def chained_products_unsupported_reason(device: torch.device) -> str | None:
    """Why a kernel that adds several products of a loop to one accumulator is not used on this GPU, None if it may be.

    For tcgen05, the tensor cores of sm_100 and sm_103, Triton to 3.8 gives each product an accumulator of its own and may read
    it too early (triton-lang/triton#10821). The code of 3.9 has one accumulator.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] != 10:
        return None
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        return None
    return f"Triton {triton.__version__} may miscompile it for this GPU; Triton 3.9 does not"


# The effect of torch.compiler.assume_constant_result without its import of torch._dynamo, which takes a second per command.
_unsupported_gpu_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
chained_products_unsupported_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def xformers_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the attention of xformers does not support such tensors, None if it does."""
    if not XFORMERS:
        return "xformers is not installed"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    if dtype not in TRITON_DTYPES:
        return f"it does not support {str(dtype).removeprefix('torch.')}"
    return _unloadable_xformers_reason()


@functools.cache
def _unloadable_xformers_reason() -> str | None:
    """Why the compiled part of xformers does not load, None if it does; xformers itself only logs a warning.

    Without it, xformers refuses every tensor on a GPU, though its attention would call operators of PyTorch: so the wheel for
    CUDA 12 does with PyTorch for CUDA 13.
    """
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        loads = importlib.import_module("xformers._cpp_lib")._cpp_library_load_exception is None
    finally:
        logger.setLevel(level)
    return None if loads else f"its compiled part does not load with PyTorch {torch.__version__}"


_unloadable_xformers_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def library_op(
    name: str, *, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Decorator that registers a launcher as the library op `ccella_fast::name`, which writes to `mutates_args` in place.

    torch.compile, CUDA graphs and torch.export see it as one node. It runs on the GPU of its first argument, whereas Triton
    alone would launch on the current GPU.
    """

    def register(launcher: Callable[..., Any]) -> torch.library.CustomOpDef:
        @functools.wraps(launcher)
        def on_device_of_first(first: torch.Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(first):
                return launcher(first, *rest)

        LAUNCHERS[f"ccella_fast::{name}"] = launcher
        schema = torch.library.infer_schema(launcher, mutates_args=mutates_args)
        options: Any = {"mutates_args": mutates_args, "schema": schema}
        return torch.library.custom_op(f"ccella_fast::{name}", on_device_of_first, **options)

    return register


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product of `x`: autocast's where autocast is on, else that of `x`.

    Autocast does not act inside library ops, so the functions that launch kernels cast to this dtype themselves. Like autocast,
    this leaves float64 alone.
    """
    device_type = x.device.type
    autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if autocast else x.dtype


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter on CPU tensors, as in the tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _from_environment(kernel: str, support: BackendSupport) -> str | None:
    """The backend that CCELLA_FAST_BACKEND requests for this kernel; a bare name applies to the kernels that have it."""
    chosen = None
    for entry in os.environ.get(ENVIRONMENT, "").split(","):
        left, equals, right = entry.strip().partition("=")
        backend = right if equals else left
        if backend and backend not in BACKENDS:
            raise BackendError(f"{ENVIRONMENT}: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        if equals and left not in KERNELS:
            raise BackendError(f"{ENVIRONMENT}: unknown kernel {left!r}; choose one of {', '.join(KERNELS)}")
        if backend and (left == kernel if equals else backend in support):
            chosen = backend
    return chosen
