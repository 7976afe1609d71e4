"""How many kernels an operator launches on a GPU, and the memory layout of its results, for operators on meta tensors.

The rules are those of PyTorch 2.11 with cuDNN 9.19 and of the launchers in `kernels/`. What a library adds internally, such as
clearing the memory of a split-K product, is not included.

* A convolution runs in channels_last_3d if its input or its weight is in that layout, else in NCDHW; whichever is in another
  layout is copied first. Its bias is added by a kernel of its own. A 1x1x1 convolution is a matrix product with one copy.
* `cat` of tensors with at most four axes is one kernel, of others one copy for each tensor.
* Our kernels copy a volume whose layout differs from that of the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ccella_fast.kernels.conv3d_forward import taps_are_divided
from ccella_fast.kernels.group_norm_silu_forward import whole_tile
from ccella_fast.kernels.layout import is_channels_last

CHANNELS_LAST = torch.channels_last_3d


def in_layout_of_cudnn(name: str, args: Any, out: Any) -> Any:
    """The result of an operator in the layout that it has on a GPU; meta convolutions always return NCDHW."""
    if name == "convolution" and _runs_channels_last(*args[:2]):
        return out.contiguous(memory_format=CHANNELS_LAST)
    if name == "convolution_backward" and _runs_channels_last(*args[1:3]):
        return [t.contiguous(memory_format=CHANNELS_LAST) if t is not None and t.ndim == 5 else t for t in out]
    return out


def launches(name: str, args: Any, out: Any) -> int:
    """The number of kernels that an operator launches."""
    rule = _RULES.get(name)
    return rule(args, out) if rule else 1


def _runs_channels_last(x: Tensor, weight: Tensor) -> bool:
    return x.ndim == 5 and (is_channels_last(x) or is_channels_last(weight))


def _copies(tensors: list[Tensor], channels_last: bool) -> int:
    """How many of the tensors are in the other layout."""
    layout = CHANNELS_LAST if channels_last else torch.contiguous_format
    return sum(not tensor.is_contiguous(memory_format=layout) for tensor in tensors)


def _convolution(args: Any, out: Any) -> int:
    x, weight, bias = args[:3]
    if x.ndim != 5:
        return 1 + (bias is not None)
    pointwise = weight.shape[2:].numel() == 1
    return 1 + (bias is not None) + pointwise + _copies([x, weight], _runs_channels_last(x, weight))


def _convolution_backward(args: Any, out: Any) -> int:
    """One kernel for each gradient, and copies of what each of them reads in another layout."""
    dy, x, weight = args[:3]
    wants_dx, wants_dweight, wants_dbias = args[-1]
    channels_last = _runs_channels_last(x, weight)
    read = [dy] + [weight] * wants_dx + [x] * wants_dweight
    return wants_dx + wants_dweight + wants_dbias + _copies(read, channels_last)


def _cat(args: Any, out: Any) -> int:
    return len(args[0]) if out.ndim > 4 else 1


def _group_norm_silu(args: Any, out: Any) -> int:
    x, groups = args[:2]
    return (1 if whole_tile(x, groups) else 2) + _other_layouts(x)


def _other_layouts(*volumes: Tensor) -> int:
    """Copies of the volumes into the layout of the first one, or of that one into NCDHW."""
    last = [is_channels_last(volume) for volume in volumes]
    return sum(
        not (volume.is_contiguous() if index == 0 or not last[0] else each) and not (index == 0 and each)
        for index, (volume, each) in enumerate(zip(volumes, last, strict=True))
    )


def _upsample_conv3d(args: Any, out: Any) -> int:
    """The kernel, and the copy of the phase weights unless they are in the kernel's layout."""
    x, _, _, phases = args
    laid_out = phases is not None and phases.permute(0, 3, 4, 5, 2, 1).is_contiguous()
    return 1 + (not laid_out) + _copies([x], True)


def _conv3d(args: Any, out: Any) -> int:
    """One kernel, or two where the taps are divided, and the copy of a weight that is not in the kernel's layout."""
    x, weight, _, _, residual = args
    laid_out = weight.permute(2, 3, 4, 1, 0).is_contiguous()
    volumes = [x] if residual is None else [x, residual]
    return 1 + taps_are_divided(x, weight.shape[0]) + (not laid_out) + _copies(volumes, True)


def _multi_tensor(args: Any, out: Any) -> int:
    """Kernels of `_foreach_copy_`: each has parts of 65,536 elements, at most 320 of at most 64 tensors."""
    kernels, tensors, parts = 0, 0, 0
    for tensor in args[0]:
        if tensors == 64:
            kernels, tensors, parts = kernels + 1, 0, 0
        tensors, parts = tensors + 1, parts + -(-tensor.numel() // 65_536)
        if parts > 320:
            full, parts = divmod(parts, 320)
            kernels, tensors = kernels + full, 1
    return kernels + 1


_RULES: dict[str, Callable[[Any, Any], int]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "cat": _cat,
    "_foreach_copy_": _multi_tensor,
    "ccella_fast::group_norm_silu": _group_norm_silu,
    "ccella_fast::group_norm_silu_backward": lambda args, out: 3 + _other_layouts(args[1], args[0]),
    "ccella_fast::residual_shift": lambda args, out: 1 + _other_layouts(*args[:2]),
    "ccella_fast::attention_backward": lambda args, out: 2,
    "ccella_fast::cross_attention": lambda args, out: 2,
    # norm, query, attention, eight products and reductions, two launches of attention, sums and casts; by hand from the code
    "ccella_fast::cross_attention_backward": lambda args, out: 16 + (args[11] is not None),  # and the sum with `added`
    "ccella_fast::upsample_conv3d": _upsample_conv3d,
    "ccella_fast::conv3d": _conv3d,
}
