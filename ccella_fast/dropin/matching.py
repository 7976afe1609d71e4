"""`speed_up(model)`: our kernels inside other projects' MONAI networks, in place and reversible.

What is recognised is given another class, a subclass of its own with a faster `forward` (`dropin/replacements.py`). The module
objects, their parameters, names, hooks and device stay, so that a state dict, an optimizer, `.to()`, `copy.deepcopy`, pickling,
DDP and `torch.compile` meet the model that they know; `undo()` puts the classes back. MONAI is never imported: a class is known
by where its `forward` is defined, so a subclass that keeps it is recognised, and one that overrides it is left alone.
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
    "attention": "self- and cross-attention that never hold the matrix of weights",
    "upsample_conv3d": "nearest x2 and the 3x3x3 convolution after it in one",
    "unsplit": "MAISI's autoencoder without split convolutions, loops over groups and cache flushes; planned exact tiles",
    "metatensor": "MetaTensors are unwrapped at the entrance",
}


class Replacement(NamedTuple):
    """`module` shall be `faster`. alone: only if it is used in one place and no hook sees what goes in and out."""

    kind: str
    module: nn.Module
    faster: type[replacements.ReplacementMixin]
    alone: bool = False


Replacements = Iterator[list[Replacement] | str]  # that belong together, or why there are none
Rule = Callable[[Any], Replacements]


@dataclass
class SpeedUpReport:
    """What `speed_up` did. swapped: names of modules by kind (`KINDS`); refused: the name of a module, and why it stays."""

    swapped: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    _originals: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every module its own class back: the model computes what it did, with the weights that it has now."""
        for module, original in reversed(self._originals):
            module.__class__ = original
        self._originals.clear()

    def __str__(self) -> str:
        lines = [f"{len(names):>5}  {kind:<16} {KINDS[kind]}" for kind, names in self.swapped.items()]
        lines += [f"    -  {name} stays: {why}" for name, why in self.refused.items()]
        return "\n".join(lines) or "nothing in this model is known"


def speed_up(model: nn.Module, *, without: Collection[str] = ()) -> SpeedUpReport:
    """Replace what is known in `model` by our kernels, in place: MONAI's DiffusionModelUNet, DiffusionModelUNetMaisi,
    AutoencoderKL, AutoencoderKlMaisi, anything that holds their blocks, and in any `nn.Sequential` a GroupNorm before a SiLU
    or a nearest x2 upsampling before a convolution.

    Outputs and gradients stay equal within the rounding of their dtype. MetaTensors may come in, plain tensors come out.
    Call it before `torch.compile`.

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
        raise ConfigError("this model is compiled already", field="model", fix=fix)
    report = SpeedUpReport()
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    taken: set[int] = set()
    for name, module in model.named_modules():
        name = name or type(model).__name__
        rule = None if id(module) in taken else _RULES.get(_forward_owner(module))
        for claims in () if rule is None else rule(module):
            refusal = claims if isinstance(claims, str) else _reason_to_skip(claims, uses)
            if isinstance(claims, str) or refusal is not None:
                report.refused[name] = str(refusal)
            elif claims[0].kind not in without:
                report.swapped.setdefault(claims[0].kind, []).append(name)
                for claim in claims:
                    taken.add(id(claim.module))
                    _swap(claim.module, claim.faster, report)
    known = report.swapped and "metatensor" not in without and not isinstance(model, replacements.ReplacementMixin)
    if known and "monai.data.meta_tensor" in sys.modules:
        report.swapped["metatensor"] = [type(model).__name__]
        _swap(model, replacements.MetaTensorUnwrapper, report)
    return report


def _swap(module: nn.Module, better: type[replacements.ReplacementMixin], report: SpeedUpReport) -> None:
    report._originals.append((module, type(module)))
    module.__class__ = replacements.subclass(better, type(module))


def _forward_owner(module: nn.Module) -> str:
    """Where the `forward` that runs is defined."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return f"{owner.__module__}.{owner.__qualname__}"


def _reason_to_skip(claims: list[Replacement], uses: Counter[int]) -> str | None:
    for claim in claims:
        what = type(claim.module).__name__
        if "forward" in vars(claim.module):
            return f"the forward of its {what} has been replaced"
        if claim.alone and uses[id(claim.module)] > 1:
            return f"its {what} is used in {uses[id(claim.module)]} places"
        if claim.alone and (claim.module._forward_hooks or claim.module._forward_pre_hooks):
            return f"a hook watches its {what}"
    return None


# Rules


def _group_norm(module: nn.GroupNorm) -> Replacements:
    yield (
        [Replacement("group_norm", module, replacements.FusedGroupNorm)]
        if module.affine
        else "it has no weight and bias"
    )


def _sequential(module: Any) -> Replacements:
    children = list(module.children())
    for first, second in zip(children, children[1:], strict=False):
        if type(first) is nn.GroupNorm and type(second) is nn.SiLU and first.affine:
            yield [
                Replacement("group_norm_silu", first, replacements.FusedGroupNormSiLU, alone=True),
                Replacement("group_norm_silu", second, replacements.PassThrough, alone=True),
            ]
        if type(first) is nn.Upsample and first.mode == "nearest":
            conv = _convolution(second)
            why = _unlike_ours(first, conv)
            yield why or [
                Replacement("upsample_conv3d", first, replacements.PassThrough, alone=True),
                Replacement("upsample_conv3d", conv, replacements.FusedUpsampleConv3d, alone=True),
            ]


def _convolution(module: Any) -> Any:
    """What a MONAI `Convolution` of nothing but a convolution holds."""
    children = list(module.children())
    return children[0] if isinstance(module, nn.Sequential) and len(children) == 1 else module


def _unlike_ours(upsample: nn.Upsample, conv: nn.Module) -> str | None:
    scale = upsample.scale_factor
    if type(conv) is nn.Conv2d:
        return "it is two-dimensional"
    if type(conv) is not nn.Conv3d:
        return "no plain convolution follows the upsampling"
    if upsample.size is not None or scale not in (2, (2, 2, 2)):
        return f"it enlarges by {scale}, not by 2"
    if (conv.kernel_size, conv.stride, conv.dilation, conv.groups) != ((3, 3, 3), (1, 1, 1), (1, 1, 1), 1):
        return "its convolution is not a dense 3x3x3 one"
    if conv.padding not in ((1, 1, 1), "same") or conv.padding_mode != "zeros":
        return "its convolution does not pad with one zero"
    return None


def _diffusion_block(module: Any) -> Replacements:
    if module.spatial_dims not in (2, 3):
        yield f"it is {module.spatial_dims}-dimensional"
    elif type(module.nonlinearity) is not nn.SiLU:
        yield f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
    else:
        yield from _two_norms("group_norm_silu", module, replacements.DiffusionResBlock)


def _autoencoder_block(module: Any) -> Replacements:
    yield from _two_norms("group_norm_silu", module, replacements.AutoencoderResBlock)


def _maisi_block(module: Any) -> Replacements:
    yield from _two_norms("unsplit", module, replacements.AutoencoderResBlock)


def _two_norms(kind: str, module: Any, better: type[replacements.ReplacementMixin]) -> Replacements:
    norms = (module.norm1, module.norm2)
    if not all(isinstance(norm, nn.GroupNorm) and norm.affine for norm in norms):
        yield "its norms are no GroupNorm with weight and bias"
        return
    yield [
        Replacement(kind, module, better),
        *(Replacement(kind, norm, replacements.FusedGroupNormSiLU, alone=True) for norm in norms),
    ]


def _attention(module: Any) -> Replacements:
    better = (
        replacements.FusedSelfAttention
        if _forward_owner(module).endswith("SABlock")
        else replacements.FusedCrossAttention
    )
    if module.save_attn:
        yield "it keeps the attention matrix (save_attn)"
    elif module.causal:
        yield "it is causal"
    elif module.rel_positional_embedding is not None:
        yield "it has a relative position embedding"
    elif module.dropout_rate and module.use_flash_attention:
        yield "its dropout is active in evaluation too (MONAI's flash attention)"
    else:
        yield [Replacement("attention", module, better)]


def _spatial_transformer(module: Any) -> Replacements:
    if module.spatial_dims == 3:
        yield [Replacement("attention", module, replacements.FusedSpatialTransformer)]
    else:
        yield "it is two-dimensional"


def _maisi(better: type[replacements.ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        yield [Replacement("unsplit", module, better)]

    return rule


def _maisi_network(module: Any) -> Replacements:
    homes = [_forward_owner(block).removeprefix(_MAISI) for block in module.blocks]
    known = {"MaisiConvolution", "MaisiResBlock", "MaisiUpsample", "MaisiDownsample", "MaisiGroupNorm3D"}
    plain = set(homes) <= known and not any(getattr(block, "use_convtranspose", False) for block in module.blocks)
    yield [Replacement("unsplit", module, replacements.TiledMaisi if plain else replacements.MaisiBlocks)]


_NETS = "monai.networks.nets."
_BLOCKS = "monai.networks.blocks."
_MAISI = "monai.apps.generation.maisi.networks.autoencoderkl_maisi."
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
    _MAISI + "MaisiConvolution": _maisi(replacements.MaisiConvolution),
    _MAISI + "MaisiGroupNorm3D": _maisi(replacements.FusedGroupNorm),
    _MAISI + "MaisiUpsample": _maisi(replacements.MaisiUpsample),
    _MAISI + "MaisiEncoder": _maisi_network,
    _MAISI + "MaisiDecoder": _maisi_network,
}
