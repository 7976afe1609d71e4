"""Which implementation a kernel takes, and why: the one dispatcher of `kernels/`.

Every kernel module has a function `backend_support(device, dtype, **sizes)` that lists its implementations in order of
preference, each with the reason why it cannot run here, or None if it can. `choose` takes the first that can. A caller
overrides that with the kernel's `backend=` argument, a user with the environment variable CCELLA_FAST_BACKEND:

    CCELLA_FAST_BACKEND=reference                              every kernel that has it
    CCELLA_FAST_BACKEND=attention=xformers,geglu=reference     these kernels only

What was asked for by name and cannot run raises: nothing is swallowed and nothing is silently replaced.

Names: `triton` our kernel, `xformers` its memory-efficient attention, `sdpa` PyTorch's attention, `phase` eight small
convolutions of PyTorch's, `reference` the plain PyTorch function that defines what is correct.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

try:  # Triton is optional: the kernels' files must be readable by Python without it
    import triton
    import triton.language as tl

    jit: Callable[..., Any] = triton.jit
except ImportError:
    triton = tl = None
    jit = lambda function: function  # noqa: E731

ENVIRONMENT = "CCELLA_FAST_BACKEND"
BACKENDS = ("triton", "xformers", "sdpa", "phase", "reference")
KERNELS = ("group_norm_silu", "cross_attention", "attention", "upsample_conv3d", "geglu", "residual_shift")
XFORMERS = importlib.util.find_spec("xformers") is not None  # found, not imported
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BackendSupport = Mapping[str, str | None]  # backend -> why it cannot run here, None if it can; preferred ones first


class BackendError(ValueError):
    """A backend that was asked for by name does not exist or cannot run here."""


class Choice(NamedTuple):
    kernel: str
    backend: str
    reason: str


def choose(kernel: str, support: BackendSupport, requested: str | None = None) -> str:
    """The backend to take: `requested`, else what the environment variable says, else the first that can run."""
    return explain_choice(kernel, support, requested).backend


def explain_choice(kernel: str, support: BackendSupport, requested: str | None = None) -> Choice:
    """As `choose`, with the reason as text. Raises BackendError when what was asked for by name cannot be had."""
    wanted, asker = requested, "by argument"
    if wanted is None:
        wanted, asker = _from_environment(kernel, support), f"by {ENVIRONMENT}"
    if wanted is not None:
        if wanted not in support:
            raise BackendError(f"{kernel} has no backend {wanted!r}; it has: {', '.join(support)}")
        if support[wanted] is not None:
            raise BackendError(f"{kernel}: backend {wanted!r} was asked for {asker}, but {support[wanted]}")
        return Choice(kernel, wanted, f"asked for {asker}")
    passed: list[str] = []
    for backend, why_not in support.items():
        if why_not is None:
            return Choice(kernel, backend, "; ".join(passed) or "preferred here")
        passed.append(f"{backend}: {why_not}")
    raise BackendError(f"{kernel} cannot run here: " + "; ".join(passed))


def explain(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> list[Choice]:
    """What each kernel takes on `device` (default: the GPU if there is one) for `dtype` (default: bf16 there, fp32 on a CPU),
    at the sizes of the default model."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    modules = {name: importlib.import_module(f"ccella_fast.kernels.{name}") for name in KERNELS}
    return [explain_choice(name, module.backend_support(device, dtype)) for name, module in modules.items()]


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a Triton kernel cannot take such tensors; None if it can. Meta tensors pass: they only count."""
    if triton is None:
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16"
    if device.type == "cuda":
        return _too_old(device)
    if device.type == "meta" or interpreted():
        return None
    return f"the tensors are on {device.type}, not on a GPU"


def _too_old(device: torch.device) -> str | None:
    """Why Triton does not compile for this GPU; None if it does."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU is sm_{major}{minor}, Triton compiles for sm_80 and newer"


# What torch.compiler.assume_constant_result does. That imports torch._dynamo, which takes a second of every command.
_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def xformers_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why xformers' attention cannot take such tensors; None if it can."""
    if not XFORMERS:
        return "xformers is not installed"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    if dtype not in TRITON_DTYPES:
        return f"it does not take {str(dtype).removeprefix('torch.')}"
    return None


def library_op(name: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Register a launcher as the library op `ccella_fast::name`: one node to torch.compile, CUDA graphs and export. It runs on
    the GPU that holds its first argument; Triton alone would launch on the current one."""

    def register(launcher: Callable[..., Any]) -> torch.library.CustomOpDef:
        @functools.wraps(launcher)
        def on_its_device(first: torch.Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(first):
                return launcher(first, *rest)

        schema = torch.library.infer_schema(launcher, mutates_args=())
        return torch.library.custom_op(f"ccella_fast::{name}", on_its_device, mutates_args=(), schema=schema)

    return register


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product of `x` is computed in: autocast's dtype where it is on, else x's own. Autocast does not reach into
    a library op, so the functions that launch kernels cast by this themselves. Nor does it touch float64."""
    kind = x.device.type
    autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _from_environment(kernel: str, support: BackendSupport) -> str | None:
    """What CCELLA_FAST_BACKEND says of this kernel. A bare name leaves alone the kernels that do not have it."""
    chosen = None
    for entry in os.environ.get(ENVIRONMENT, "").split(","):
        left, equals, right = entry.strip().partition("=")
        name = right if equals else left
        if name and name not in BACKENDS:
            raise BackendError(f"{ENVIRONMENT}: there is no backend {name!r}; there are: {', '.join(BACKENDS)}")
        if equals and left not in KERNELS:
            raise BackendError(f"{ENVIRONMENT}: there is no kernel {left!r}; there are: {', '.join(KERNELS)}")
        if name and (left == kernel if equals else name in support):
            chosen = name
    return chosen
