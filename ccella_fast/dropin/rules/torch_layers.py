"""Layers of PyTorch: GroupNorm, and containers that call their children in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import computes
from ccella_fast.dropin.replacement import Replacement, ReplacementMixin, Replacements, Rule


class FusedGroupNorm(ReplacementMixin):
    """Replaces `nn.GroupNorm`, also one that casts to fp32, on a GPU. On a CPU that of PyTorch is as fast."""

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    def suits(self, input: Tensor) -> bool:
        """Not on a CPU, in float64, which some cast to fp32, and for (B, C)."""
        return not input.is_cpu and input.ndim > 2 and input.dtype != torch.float64

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        return fusion.norm(self, input, silu=False)


class FusedSequential(ReplacementMixin):
    """Replaces a container that calls its children in order: it fuses two of them where `fusion.fusion_of` knows how."""

    _modules: dict[str, Any]

    def suits(self, *args: Any, **kwargs: Any) -> bool:
        """Whether two children are fused; the original may do more than to call its children."""
        children = list(self._modules.values())
        x = args[0] if args else next(iter(kwargs.values()))
        return any(fusion.fusion_of(first, second, x) for first, second in zip(children, children[1:], strict=False))

    def forward(self, input: Tensor, *others: Any, **ignored: Any) -> Tensor:
        """Apply all children to the input. Others are ignored, as by the containers that this replaces."""
        children = list(self._modules.values())
        while children:
            fused = fusion.fusion_of(children[0], children[1], input) if len(children) > 1 else None
            input = children[0](input) if fused is None else fused(input)
            children = children[1 if fused is None else 2 :]
        return input


def group_norm(module: nn.GroupNorm) -> Replacements:
    """Single norms."""
    if module.affine:
        yield Replacement("group_norm", module, FusedGroupNorm)
    else:
        yield "it does not have a weight and bias"


def sequential(module: Any) -> Replacements:
    """Containers whose `forward` calls the children in order."""
    children = list(module.children())
    for first, second in zip(children, children[1:], strict=False):
        kind = "upsample_conv3d" if type(first) is nn.Upsample else "group_norm_silu"
        if fusion.fusion_of(first, second):
            yield Replacement(kind, module, FusedSequential, computes=(first, second))
        elif type(first) is nn.Upsample and first.mode in fusion.NEAREST:
            conv = fusion.unwrap_convolution(second)
            yield fusion.reason_not_to_fuse(first, conv) or "its upsampling has a hook"
        elif computes(first) == "norm" and computes(second) == "silu" and first.affine:
            yield "its GroupNorm or SiLU has a hook"


def block_with_two_norms(kind: str, module: Any, mixin: type[ReplacementMixin]) -> Replacements:
    """The replacement of a block by `mixin`, which computes its norms `norm1` and `norm2`."""
    norms = (module.norm1, module.norm2)
    if not all(isinstance(norm, nn.GroupNorm) and norm.affine for norm in norms):
        yield "its norms are not GroupNorms with weight and bias"
        return
    yield Replacement(kind, module, mixin, computes=norms)


RULES: dict[Any, Rule] = {nn.GroupNorm.forward: group_norm, nn.Sequential.forward: sequential}
