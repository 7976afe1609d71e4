"""`speed_up(model)` replaces modules of MONAI networks by fused kernels, in place and reversibly.

Each module that is recognized is assigned another class: a subclass of its own class with a faster `forward`, defined in
`dropin/replacements.py`. The module objects, their parameters, names, hooks and devices stay the same, so that state dicts,
optimizers, `.to()`, `copy.deepcopy`, pickling, DDP and `torch.compile` work as before; `undo()` restores the classes. MONAI is
never imported. A module is recognized by the class that defines its `forward`, so a subclass that inherits `forward` is
replaced, and a subclass that overrides it is not.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ccella_fast.dropin import replacements
from ccella_fast.errors import ConfigError, did_you_mean

KINDS = {
    "group_norm_silu": "GroupNorm, the SiLU after it and a shift before it (the time embedding) in one kernel",
    "group_norm": "GroupNorm alone",
    "attention": "self- and cross-attention without storing the attention matrix",
    "upsample_conv3d": "nearest-neighbor upsampling by 2 and the 3x3x3 convolution after it in one kernel",
    "unsplit": "MAISI's autoencoder without split convolutions, loops over groups and cache flushes; exact tiling",
    "metatensor": "MetaTensors are converted to plain tensors at the input of the model",
}


class Replacement(NamedTuple):
    """A module and the class that is to replace its own.

    Attributes:
        kind: a key of `KINDS`.
        module: the module.
        mixin: the replacement.
        exclusive: the replacement changes the input or output of the module, so the module must be used in only one place and
            must not have hooks.
    """

    kind: str
    module: nn.Module
    mixin: type[replacements.ReplacementMixin]
    exclusive: bool = False


# Groups of replacements that are made together, or the reason why a module is not replaced
Replacements = Iterator[list[Replacement] | str]
Rule = Callable[[Any], Replacements]


@dataclass
class SpeedUpReport:
    """What `speed_up` has replaced.

    Attributes:
        swapped: for each kind of replacement (`KINDS`), the names of the modules that were replaced.
        refused: for each recognized module that was not replaced, the reason.
    """

    swapped: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    _originals: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restore the original class of every module. The current weights are kept."""
        for module, original in reversed(self._originals):
            module.__class__ = original
        self._originals.clear()

    def __str__(self) -> str:
        lines = [f"{len(names):>5}  {kind:<16} {KINDS[kind]}" for kind, names in self.swapped.items()]
        lines += [f"    -  {name} is not replaced: {why}" for name, why in self.refused.items()]
        return "\n".join(lines) or "this model contains no known modules"


def speed_up(model: nn.Module, *, without: Collection[str] = ()) -> SpeedUpReport:
    """Replace known modules of `model` by fused kernels, in place.

    Known are MONAI's DiffusionModelUNet, DiffusionModelUNetMaisi, AutoencoderKL and AutoencoderKlMaisi, any model that contains
    their blocks, and, in any `nn.Sequential`, a GroupNorm before a SiLU or a nearest-neighbor upsampling by 2 before a
    convolution.

    Outputs and gradients agree within the rounding of their dtype. Inputs may be MetaTensors; outputs are plain tensors. Call
    `speed_up` before `torch.compile`.

    Args:
        model: changed in place.
        without: kinds of replacements (`KINDS`) to leave out.

    Returns:
        What was replaced, what was not and why, and `undo()`.

    Raises:
        ConfigError: an unknown kind, or a model that is compiled or scripted.
    """
    for kind in without:
        if kind not in KINDS:
            raise ConfigError(f"there is no kind '{kind}'", field="without", fix=did_you_mean(kind, KINDS))
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        fix = "call speed_up(model) first, then torch.compile(model)"
        raise ConfigError("this model is already compiled", field="model", fix=fix)
    report = SpeedUpReport()
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    replaced: set[int] = set()
    for name, module in model.named_modules():
        name = name or type(model).__name__
        rule = None if id(module) in replaced else _RULES.get(_forward_owner(module))
        for group in () if rule is None else rule(module):
            reason = group if isinstance(group, str) else _reason_to_skip(group, uses)
            if isinstance(group, str) or reason is not None:
                report.refused[name] = str(reason)
            elif group[0].kind not in without:
                report.swapped.setdefault(group[0].kind, []).append(name)
                for replacement in group:
                    replaced.add(id(replacement.module))
                    _swap_class(replacement.module, replacement.mixin, report)
    known = report.swapped and "metatensor" not in without and not isinstance(model, replacements.ReplacementMixin)
    if known and "monai.data.meta_tensor" in sys.modules:
        report.swapped["metatensor"] = [type(model).__name__]
        _swap_class(model, replacements.MetaTensorUnwrapper, report)
    return report


def _swap_class(module: nn.Module, mixin: type[replacements.ReplacementMixin], report: SpeedUpReport) -> None:
    report._originals.append((module, type(module)))
    module.__class__ = replacements.subclass(mixin, type(module))


def _forward_owner(module: nn.Module) -> str:
    """The full name of the class that defines the `forward` of `module`."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return f"{owner.__module__}.{owner.__qualname__}"


def _reason_to_skip(group: list[Replacement], uses: Counter[int]) -> str | None:
    for replacement in group:
        module, class_name = replacement.module, type(replacement.module).__name__
        if "forward" in vars(module):
            return f"the forward of its {class_name} has been replaced"
        if replacement.exclusive and uses[id(module)] > 1:
            return f"its {class_name} is used in {uses[id(module)]} places"
        if replacement.exclusive and (module._forward_hooks or module._forward_pre_hooks):
            return f"its {class_name} has a hook"
    return None


# Rules: the replacements for a module


def _group_norm(module: nn.GroupNorm) -> Replacements:
    if module.affine:
        yield [Replacement("group_norm", module, replacements.FusedGroupNorm)]
    else:
        yield "it does not have a weight and bias"


def _sequential(module: Any) -> Replacements:
    children = list(module.children())
    for first, second in zip(children, children[1:], strict=False):
        if type(first) is nn.GroupNorm and type(second) is nn.SiLU and first.affine:
            yield [
                Replacement("group_norm_silu", first, replacements.FusedGroupNormSiLU, exclusive=True),
                Replacement("group_norm_silu", second, replacements.PassThrough, exclusive=True),
            ]
        if type(first) is nn.Upsample and first.mode == "nearest":
            conv = _unwrap_convolution(second)
            reason = _reason_not_to_fuse(first, conv)
            yield reason or [
                Replacement("upsample_conv3d", first, replacements.PassThrough, exclusive=True),
                Replacement("upsample_conv3d", conv, replacements.FusedUpsampleConv3d, exclusive=True),
            ]


def _unwrap_convolution(module: Any) -> Any:
    """The only child of a MONAI `Convolution` without norm and activation; otherwise `module`."""
    children = list(module.children())
    return children[0] if isinstance(module, nn.Sequential) and len(children) == 1 else module


def _reason_not_to_fuse(upsample: nn.Upsample, conv: nn.Module) -> str | None:
    scale = upsample.scale_factor
    if type(conv) is nn.Conv2d:
        return "it is two-dimensional"
    if type(conv) is not nn.Conv3d:
        return "the upsampling is not followed by a plain convolution"
    if upsample.size is not None or scale not in (2, (2, 2, 2)):
        return f"it upsamples by {scale}, not by 2"
    if (conv.kernel_size, conv.stride, conv.dilation, conv.groups) != ((3, 3, 3), (1, 1, 1), (1, 1, 1), 1):
        return "its convolution is not a dense 3x3x3 convolution"
    if conv.padding not in ((1, 1, 1), "same") or conv.padding_mode != "zeros":
        return "its convolution is not padded with one zero"
    return None


def _diffusion_block(module: Any) -> Replacements:
    if module.spatial_dims not in (2, 3):
        yield f"it is {module.spatial_dims}-dimensional"
    elif type(module.nonlinearity) is not nn.SiLU:
        yield f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
    else:
        yield from _block_with_two_norms("group_norm_silu", module, replacements.DiffusionResBlock)


def _autoencoder_block(module: Any) -> Replacements:
    yield from _block_with_two_norms("group_norm_silu", module, replacements.AutoencoderResBlock)


def _maisi_block(module: Any) -> Replacements:
    yield from _block_with_two_norms("unsplit", module, replacements.AutoencoderResBlock)


def _block_with_two_norms(kind: str, module: Any, mixin: type[replacements.ReplacementMixin]) -> Replacements:
    norms = (module.norm1, module.norm2)
    if not all(isinstance(norm, nn.GroupNorm) and norm.affine for norm in norms):
        yield "its norms are not GroupNorms with weight and bias"
        return
    yield [
        Replacement(kind, module, mixin),
        *(Replacement(kind, norm, replacements.FusedGroupNormSiLU, exclusive=True) for norm in norms),
    ]


def _attention(module: Any) -> Replacements:
    if module.save_attn:
        yield "it stores the attention matrix (save_attn)"
    elif module.causal:
        yield "it is causal"
    elif module.rel_positional_embedding is not None:
        yield "it has a relative position embedding"
    elif module.dropout_rate and module.use_flash_attention:
        yield "its dropout is also active in evaluation mode (MONAI's flash attention)"
    elif _forward_owner(module).endswith("SABlock"):
        yield [Replacement("attention", module, replacements.FusedSelfAttention)]
    else:
        yield [Replacement("attention", module, replacements.FusedCrossAttention)]


def _spatial_transformer(module: Any) -> Replacements:
    if module.spatial_dims == 3:
        yield [Replacement("attention", module, replacements.FusedSpatialTransformer)]
    else:
        yield "it is two-dimensional"


def _maisi_layer(mixin: type[replacements.ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        yield [Replacement("unsplit", module, mixin)]

    return rule


def _maisi_network(module: Any) -> Replacements:
    owners = [_forward_owner(block).removeprefix(_MAISI) for block in module.blocks]
    known = {"MaisiConvolution", "MaisiResBlock", "MaisiUpsample", "MaisiDownsample", "MaisiGroupNorm3D"}
    transposed = any(getattr(block, "use_convtranspose", False) for block in module.blocks)
    can_tile = set(owners) <= known and not transposed
    yield [Replacement("unsplit", module, replacements.TiledMaisi if can_tile else replacements.MaisiBlocks)]


_NETS = "monai.networks.nets."
_BLOCKS = "monai.networks.blocks."
_MAISI = "monai.apps.generation.maisi.networks.autoencoderkl_maisi."
# by the full name of the class that defines `forward`
_RULES: dict[str, Rule] = {
    "torch.nn.modules.normalization.GroupNorm": _group_norm,
    "torch.nn.modules.container.Sequential": _sequential,
    _NETS + "diffusion_model_unet.WrappedUpsample": _sequential,
    _NETS + "diffusion_model_unet.DiffusionUNetResnetBlock": _diffusion_block,
    _NETS + "diffusion_model_unet.SpatialTransformer": _spatial_transformer,
    _NETS + "autoencoderkl.AEKLResBlock": _autoencoder_block,
    _BLOCKS + "selfattention.SABlock": _attention,
    _BLOCKS + "crossattention.CrossAttentionBlock": _attention,
    _MAISI + "MaisiResBlock": _maisi_block,
    _MAISI + "MaisiConvolution": _maisi_layer(replacements.MaisiConvolution),
    _MAISI + "MaisiGroupNorm3D": _maisi_layer(replacements.FusedGroupNorm),
    _MAISI + "MaisiUpsample": _maisi_layer(replacements.MaisiUpsample),
    _MAISI + "MaisiEncoder": _maisi_network,
    _MAISI + "MaisiDecoder": _maisi_network,
}
