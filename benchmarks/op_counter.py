"""Counts ops, bytes, FLOPs and peak memory of a call instead of timing it. Deterministic, and free of cost on meta tensors.

* ops: operators that the dispatcher sends to a device. Views and mere allocations do no work and are counted separately.
* bytes: every op reads each input once and writes each output once. What a library does inside an op (a second read in a norm,
  a layout conversion around a convolution) is not included, so a fused op is credited for its inputs and outputs only.
* launches: kernels that the ops launch on a GPU, by the rules in `launch_model.py`.
* flops: by torch's own formulas, in which a multiply-add is two; our kernels have theirs in `FLOPS` below.
* peak_bytes: the largest amount of memory, allocated by the call itself, that was in use at one time.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ccella_fast.kernels.backend import ENVIRONMENT
from ccella_fast.training.activation_memory import saved_bytes as saved_bytes
from launch_model import in_layout_of_cudnn, launches

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_VIEWS_WITHOUT_ALIAS = {"_unsafe_view", "_reshape_alias", "lift_fresh"}


@dataclass
class Counts:
    """What a call did. `by_op` has the number of calls by op, `bytes_by_op` the bytes, `launches_by_op` the kernels."""

    ops: int = 0
    launches: int = 0
    views: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    peak_bytes: int = 0
    by_op: Counter[str] = field(default_factory=Counter)
    bytes_by_op: Counter[str] = field(default_factory=Counter)
    launches_by_op: Counter[str] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    def summary(self) -> dict[str, int]:
        """The counts that are kept and compared."""
        return {
            "ops": self.ops,
            "launches": self.launches,
            "bytes": self.bytes,
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
        }


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.live, self.known = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        out = in_layout_of_cudnn(name, args, func(*args, **kwargs))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._allocate(inputs, outputs)
        written_inputs = [] if outputs else tree_leaves(_mutated(func, args))
        if name in _ALLOCATIONS or name in _VIEWS_WITHOUT_ALIAS or _is_view(func) or not (outputs or written_inputs):
            self.counts.views += 1
            return out
        read, written = sum(map(_bytes, inputs)), sum(map(_bytes, [*outputs, *written_inputs]))
        self.counts.ops += 1
        self.counts.bytes_read += read
        self.counts.bytes_written += written
        self.counts.by_op[name] += 1
        self.counts.bytes_by_op[name] += read + written
        kernels = launches(name, args, out)
        self.counts.launches += kernels
        self.counts.launches_by_op[name] += kernels
        self.counts.flops += _flops(func, name, args, kwargs, out)
        return out

    def _allocate(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self.known:
                size = storage.nbytes()
                self.known.add(storage._cdata)
                self.live += size
                weakref.finalize(storage, self._free, storage._cdata, size)
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.live)

    def _free(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.live -= size


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what is done inside a `with` block; the counts are complete at its end."""
    with _Counter() as counter:
        yield counter.counts


def count(run: Callable[[], Any]) -> Counts:
    """Count what a call does."""
    with counting() as counts:
        run()
    return counts


class HalfAutocast(TorchFunctionMode):
    """CUDA's fp16 autocast for meta tensors, which torch does not support: the same op lists, weights cast once.

    Attention uses the flash op, as on a GPU with fp16 inputs.
    """

    HALF = {"linear", "conv3d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "mm", "einsum"}
    FULL = {"group_norm", "layer_norm", "softmax", "log_softmax", "l1_loss", "exp", "pow", "sum", "norm"}

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with self:  # torch disables the mode inside this function
                return _multi_head_attention(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            q, k, v = (self._half(kwargs.get(key, arg)) for key, arg in _attention_arguments(args, kwargs))
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=kwargs.get("scale"))[0]
        cast = self._half if name in self.HALF else _full if name in self.FULL else None
        if cast is not None:
            args = torch.utils._pytree.tree_map(cast, args)
            kwargs = torch.utils._pytree.tree_map(cast, kwargs)
        return func(*args, **kwargs)

    def _half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            return value
        if not isinstance(value, torch.nn.Parameter):
            return value.to(torch.float16)
        if id(value) not in self.weights:
            self.weights[id(value)] = value.to(torch.float16)
        return self.weights[id(value)]


class FlashAttention(TorchFunctionMode):
    """Keeps attention a single op on meta tensors, as on a GPU; torch would decompose it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (kwargs.get(key, arg) for key, arg in _attention_arguments(args, kwargs))
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, weight: Tensor, bias: Tensor, *rest: Any,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """torch's function of this name without a mask: (N, B, E) in and out, with one tensor for keys and values."""
    out_weight, out_bias = rest[4], rest[5]
    (wq, wkv), (bq, bkv) = weight.split([width, 2 * width]), bias.split([width, 2 * width])
    q, kv = F.linear(query, wq, bq), F.linear(key, wkv, bkv)
    kv = kv.unflatten(-1, (2, width)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    q, k, v = (part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for part in (q, kv[0], kv[1]))
    mixed = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
    return F.linear(mixed, out_weight, out_bias), None


def _attention_arguments(args: tuple, kwargs: dict) -> list[tuple[str, Any]]:
    given = [*args, *[None] * 3]
    return [(key, given[index]) for index, key in enumerate(("query", "key", "value"))]


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.float16 else value


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(ret.alias_info is not None and not ret.alias_info.is_write for ret in returns)


def _mutated(func: Any, args: Any) -> list[Tensor]:
    """The positional arguments that an op writes in place."""
    declared = func._schema.arguments[: len(args)]
    return [arg for arg, given in zip(args, declared, strict=True) if given.alias_info and given.alias_info.is_write]


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    if func._overloadpacket in flop_registry:
        return flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
    formula = FLOPS.get(name)
    return formula(*args, **kwargs) if formula else 0  # norms and elementwise ops count zero, as in torch's own counter


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    return 4 * q.numel() * k.shape[-2]


def _cross_attention_flops(x: Tensor, k: Tensor, *rest: Any) -> int:
    return 4 * x.numel() * x.shape[-1] + 4 * x.numel() * k.shape[-2]


# FLOPs of our own ops by name. The backward pass of attention has five matrix products where the forward pass has two, that of
# a projection two where it has one. Recomputation is not counted, here as elsewhere.
FLOPS: dict[str, Callable[..., int]] = {
    "ccella_fast::attention": _attention_flops,
    "ccella_fast::attention_backward": lambda do, q, k, *rest: _attention_flops(q, k, k) * 5 // 2,
    "ccella_fast::cross_attention": _cross_attention_flops,
    "ccella_fast::cross_attention_backward": lambda dy, x, k, *rest: (
        8 * x.numel() * x.shape[-1] + 10 * x.numel() * k.shape[-2]
    ),
    "ccella_fast::upsample_conv3d": lambda x, weight, *rest: (
        8 * 2 * 8 * x[:, 0].numel() * weight[:, :, 0, 0, 0].numel()
    ),
    "ccella_fast::conv3d": lambda x, weight, *rest: 2 * x[:, 0].numel() * weight.numel(),
}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Select this backend for every kernel that has it; "triton" on meta tensors gives the ops that a GPU would run."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = name
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT) if before is None else os.environ.update({ENVIRONMENT: before})
