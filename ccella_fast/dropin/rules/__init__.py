"""The rules of `speed_up`: which modules are known, why one of them is not replaced, and the mixins that replace the others.

One file for each project, or for layers that many projects have. `RULES` of a file maps what identifies a module to its rule:
the fingerprint of its `forward`, see `program`; the function itself for layers of PyTorch; or the full name of the class that
defines a `forward` that cannot be read. Comments say where they are published. `fingerprint(Block)` computes a fingerprint.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ccella_fast.dropin.layers import computes
from ccella_fast.dropin.program import fingerprint
from ccella_fast.dropin.replacement import Rule, original_class, plain_forward
from ccella_fast.dropin.rules import (
    adm,
    diffusers,
    generative,
    ldm,
    lucidrains,
    maisi,
    monai,
    physicsnemo,
    torch_layers,
    upsampling,
)

RULES: dict[Any, Rule] = {
    **torch_layers.RULES, **upsampling.RULES, **monai.RULES, **maisi.RULES, **generative.RULES, **adm.RULES, **ldm.RULES,
    **lucidrains.RULES, **diffusers.RULES, **physicsnemo.RULES,
}  # fmt: skip


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module. One that was replaced is what it was before."""
    forward, owner = plain_forward(module), original_class(module)
    if forward in RULES or forward.__module__.startswith("torch."):
        return RULES.get(forward)
    if computes(module) == "norm" and issubclass(owner, nn.GroupNorm):
        return torch_layers.group_norm
    defining = next(cls for cls in owner.__mro__ if "forward" in vars(cls))
    names = (f"{defining.__module__}.{defining.__qualname__}", fingerprint(owner), fingerprint(owner, "_forward"))
    return next((RULES[name] for name in names if name in RULES), None)
