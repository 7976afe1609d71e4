"""Single layers that are known by what their `forward` does: GroupNorm, also one that casts to fp32, and SiLU.

A plain layer is one whose call does nothing but compute the `forward` of its class: it has no hooks, and is not wrapped. Only
for those, reading the weights instead of calling the layer changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ccella_fast.dropin.program import fingerprint
from ccella_fast.dropin.replacement import original_class, plain_forward


class _GroupNormIn32Bits(nn.GroupNorm):
    """The ways in which projects write a GroupNorm that computes in fp32, as do the kernels of this project in any case."""

    def super_type(self, x):  # OpenAI's guided-diffusion, and networks derived from it
        return super().forward(x.float()).type(x.dtype)

    def super_to(self, x):
        return super().forward(x.float()).to(x.dtype)

    def super_type_as(self, x):
        return super().forward(x.float()).type_as(x)

    def super_to_tensor(self, x):
        return super().forward(x.float()).to(x)

    def super_cast(self, x):
        return super().forward(x.to(torch.float32)).to(x.dtype)

    def function_type(self, x):
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).type(x.dtype)

    def function_to(self, x):
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)

    def wide_weights_type(self, x):
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).type(x.dtype)

    def wide_weights_to(self, x):
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class _SiLU(nn.Module):
    """The ways in which projects write a SiLU."""

    def input_first(self, x):
        return x * torch.sigmoid(x)

    def sigmoid_first(self, x):
        return torch.sigmoid(x) * x

    def method(self, x):
        return x * x.sigmoid()

    def function(self, x):
        return F.silu(x)


_SILU_BY_HELPER = "2cec0758a73ec622"  # return silu(x), with silu(x) = x * torch.sigmoid(x)
_VOLUME_NORM = "90d4462ef82f895c"  # GroupNorm3D of NVIDIA PhysicsNeMo, see `rules.physicsnemo`


def spellings(owner: type[nn.Module]) -> frozenset[str | None]:
    """The fingerprints of the methods that a class itself defines."""
    return frozenset(fingerprint(owner, name) for name in vars(owner) if not name.startswith("__"))


@functools.cache
def _known() -> dict[str | None, str]:
    """Fingerprint -> what a layer with this `forward` computes."""
    norms, silus = spellings(_GroupNormIn32Bits), spellings(_SiLU) | {_SILU_BY_HELPER}
    return {**dict.fromkeys(norms, "norm"), **dict.fromkeys(silus, "silu"), _VOLUME_NORM: "volume norm", None: ""}


# The `forward` of a class -> what it computes
_COMPUTES: dict[Callable[..., Any], str] = {nn.GroupNorm.forward: "norm", nn.SiLU.forward: "silu"}


def computes(module: Any) -> str:
    """What the class of a module computes: "norm", "silu", "volume norm" (that of PhysicsNeMo), or "" for anything else."""
    if not isinstance(module, nn.Module):
        return ""
    forward = plain_forward(module)
    if forward not in _COMPUTES and not torch.compiler.is_compiling():
        owner = type(module) if forward is type(module).forward else original_class(module)
        _COMPUTES[forward] = _known().get(fingerprint(owner), "")
    return _COMPUTES.get(forward, "")


def is_norm(module: Any) -> bool:
    """Whether the module is a plain GroupNorm with weight and bias, in the dtype of its input or in fp32."""
    return isinstance(module, nn.GroupNorm) and module.affine and computes(module) == "norm" and not has_hooks(module)


def is_silu(module: Any) -> bool:
    """Whether the module is a plain SiLU."""
    return isinstance(module, nn.Module) and computes(module) == "silu" and not has_hooks(module)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` would do nothing but compute the `forward` of `kind`, or its replacement."""
    return plain_forward(module) is kind.forward and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
