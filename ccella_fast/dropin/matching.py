"""`speed_up(model)` replaces modules of MONAI networks by fused kernels, in place and reversibly.

Each module that is recognized is assigned another class: a subclass of its own class with a faster `forward`, defined in
`dropin/replacements.py`. The module objects, their parameters, names, hooks and devices stay the same, so that state dicts,
optimizers, `.to()`, `copy.deepcopy`, pickling, DDP and `torch.compile` work as before; `undo()` restores the classes. MONAI is
never imported. A module is recognized by the class that defines its `forward`, so a subclass that inherits `forward` is
replaced, and a subclass that overrides it is not. Only what a module's own `forward` does is replaced, never what one of its
children computes for others.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ccella_fast.dropin import fusion, replacements
from ccella_fast.dropin.comparison import Example, Values, compute, describe_difference, in_float64
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
        computes: children whose computation the replacement includes.
    """

    kind: str
    module: nn.Module
    mixin: type[replacements.ReplacementMixin]
    computes: tuple[nn.Module, ...] = ()


# Replacements, or the reason why a module is not replaced
Replacements = Iterator[Replacement | str]
Rule = Callable[[Any], Replacements]


@dataclass
class SpeedUpReport:
    """What `speed_up` has replaced.

    Attributes:
        swapped: for each kind of replacement (`KINDS`), the names of the modules that were replaced.
        refused: for each recognized module that was not replaced, the reason.
        unknown: the number of modules by class that hold layers of their own and were not recognized.
        plain: with an example: the names of replaced modules that computed as the original, which is as fast or faster there.
        check: with an example: how far apart the outputs are, as a sentence.
    """

    swapped: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    check: str = ""
    _originals: list[tuple[nn.Module, type, type]] = field(default_factory=list, repr=False)
    _is_repeated: bool = field(default=False, repr=False)

    def undo(self) -> None:
        """Restore the original class of every module. The current weights are kept.

        A module whose class has been changed since, for example by FSDP2 or a parametrization, keeps that and computes as its
        original class does.
        """
        for module, original, replaced in reversed(self._originals):
            if type(module) is replaced:
                module.__class__ = original
            else:
                module._is_undone = True  # type: ignore[assignment]
        self._originals.clear()

    def __str__(self) -> str:
        lines = [f"{len(names):>5}  {kind:<16} {KINDS[kind]}" for kind, names in self.swapped.items()]
        if not lines and not self.check:
            known = "more modules than were replaced before" if self._is_repeated else "known modules"
            lines = [f"this model contains no {known}; nothing was replaced"]
        elif not self.swapped.keys() - {"group_norm", "metatensor"}:
            lines.insert(0, "no block of this model is known; only single norms were replaced")
        lines = [*filter(None, [self.check]), *lines]
        lines += [f"    -  {name} is not replaced: {why}" for name, why in self.refused.items()]
        if self.plain:
            lines.append(
                f"{len(self.plain):>5}  of these compute as before with the example, which is as fast or faster there"
            )
        if self.unknown:
            lines.append("not recognized, by class:")
            lines += [f"{count:>5}  {name}" for name, count in self.unknown.items()]
        return "\n".join(lines)


def speed_up(
    model: nn.Module, *, without: Collection[str] = (), example: Example | None = None, gradients: bool = False
) -> SpeedUpReport:
    """Replace known modules of `model` by fused kernels, in place.

    Known are MONAI's DiffusionModelUNet, DiffusionModelUNetMaisi, AutoencoderKL and AutoencoderKlMaisi, any model that contains
    their blocks, and, in any `nn.Sequential`, a GroupNorm before a SiLU or a nearest-neighbor upsampling by 2 before a
    convolution.

    Outputs and gradients agree within the rounding of their dtype; only where MAISI's autoencoder loses planes, because its
    number of splits does not divide an axis, the output is that of the unsplit network. Inputs may be MetaTensors; outputs are
    plain tensors. At each call a replacement computes only where it may and where it pays: a child with a hook, or of
    another class than the known one, a tensor for which the original is faster on a CPU, derivatives in forward mode and
    `torch.jit.trace` take the original. Call `speed_up` before `torch.compile`.

    Args:
        model: changed in place.
        without: kinds of replacements (`KINDS`) to leave out.
        example: arguments of the model by position and by name, `(args, kwargs)`. The model computes them before and after; if
            the outputs differ by more than rounding, everything is undone, and the first line of the report says so.
        gradients: compare the gradients of the example too, and whether replacements compute as in training.

    Returns:
        What was replaced, what was not and why, and `undo()`.

    Raises:
        ConfigError: an unknown kind, a model that is compiled or scripted or not a module, or an example of another form.
    """
    if isinstance(without, str):
        raise ConfigError(
            f"without must be a list of kinds, got '{without}'", field="without", fix=f"give ['{without}']"
        )
    for kind in without:
        if kind not in KINDS:
            raise ConfigError(f"there is no kind '{kind}'", field="without", fix=did_you_mean(kind, KINDS))
    if not isinstance(model, nn.Module):
        why = f"a torch.nn.Module is needed, got {type(model).__name__}"
        raise ConfigError(why, field="model", fix="give the network itself")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        fix = "call speed_up(model) first, then torch.compile(model)"
        raise ConfigError("this model is already compiled", field="model", fix=fix)
    if example is not None and not (
        isinstance(example, tuple) and len(example) == 2 and isinstance(example[1], Mapping)
    ):
        why = "example must be a pair: the arguments by position and a dictionary of those by name"
        raise ConfigError(why, field="example", fix="write example=((x, timesteps), {})")
    if example is None:
        return _replace(model, without)
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    before = compute(model, example, gradients=gradients)
    report = _replace(model, without)
    with replacements.watched() as calls:
        after = compute(model, example, gradients=gradients)
    report.plain = [names[module] for module, computes in calls.items() if not computes]

    def truth() -> Values:
        with replacements.originals():
            return in_float64(model, example, gradients=gradients)

    is_right, phrase = describe_difference(before, after, truth)
    report.check = f"with the example, {phrase} from those of the original"
    if not is_right:
        report.undo()
        report.check = f"nothing was replaced: with the example, {phrase} from those of the original"
        report.swapped, report.plain = {}, []
    return report


def _replace(model: nn.Module, without: Collection[str]) -> SpeedUpReport:
    report = SpeedUpReport()
    computed: set[int] = set()  # by a replacement of their container
    modules = dict(model.named_modules())
    report._is_repeated = any(isinstance(module, replacements.ReplacementMixin) for module in modules.values())
    for name, module in modules.items():
        name, is_replaced = name or type(model).__name__, isinstance(module, replacements.ReplacementMixin)
        rule = None if id(module) in computed else _RULES.get(_forward_owner(module))
        found = [] if rule is None else list(rule(module))
        if any(isinstance(each, Replacement) and each.kind in without for each in found):
            continue
        for replacement in found:
            reason = replacement if isinstance(replacement, str) else _reason_to_skip(replacement)
            if isinstance(replacement, str) or reason is not None:
                report.refused[name] = str(reason)
                continue
            computed |= {id(child) for child in replacement.computes}
            if not is_replaced:
                report.swapped.setdefault(replacement.kind, []).append(name)
        if not is_replaced and name in itertools.chain(*report.swapped.values()):
            _swap_class(module, next(each.mixin for each in found if isinstance(each, Replacement)), report)
    known = report.swapped and "metatensor" not in without and not isinstance(model, replacements.ReplacementMixin)
    if known and "monai.data.meta_tensor" in sys.modules:
        report.swapped["metatensor"] = [type(model).__name__]
        _swap_class(model, replacements.MetaTensorUnwrapper, report)
    report.unknown = _unknown(modules, report)
    return report


def _swap_class(module: nn.Module, mixin: type[replacements.ReplacementMixin], report: SpeedUpReport) -> None:
    original, replaced = type(module), replacements.subclass(mixin, type(module))
    report._originals.append((module, original, replaced))
    module.__class__ = replaced


def _forward_owner(module: nn.Module) -> str:
    """The full name of the class that defines the `forward` of `module`, before it was replaced."""
    classes = type(module).__mro__
    if isinstance(module, replacements.ReplacementMixin):
        classes = classes[classes.index(replacements.ReplacementMixin) + 1 :]
    owner = next(cls for cls in classes if "forward" in vars(cls))
    return f"{owner.__module__}.{owner.__qualname__}"


def _reason_to_skip(replacement: Replacement) -> str | None:
    for module in (replacement.module, *replacement.computes):
        class_name = type(module).__name__
        if "forward" in vars(module):
            return f"the forward of its {class_name} has been replaced"
        if module is not replacement.module and fusion.has_hooks(module):
            return f"its {class_name} has a hook"
    return None


_LAYERS = (
    nn.GroupNorm, nn.LayerNorm, nn.Upsample, nn.MultiheadAttention, nn.modules.batchnorm._NormBase,
    nn.modules.conv._ConvNd,
)  # fmt: skip


def _unknown(modules: dict[str, nn.Module], report: SpeedUpReport) -> dict[str, int]:
    """The number of modules by class that call layers, and are neither replaced nor refused with a reason."""
    counts: Counter[str] = Counter()
    for name, module in modules.items():
        unwraps = isinstance(module, replacements.MetaTensorUnwrapper)  # and computes what its class does
        is_known = (isinstance(module, replacements.ReplacementMixin) and not unwraps) or name in report.refused
        owner = _forward_owner(module)
        if not is_known and not owner.startswith("torch.nn.modules") and any(map(_is_plain_layer, module.children())):
            counts[owner] += 1
    return dict(counts.most_common())


def _is_plain_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) and not isinstance(module, replacements.ReplacementMixin)


# Rules: the replacements for a module


def _group_norm(module: nn.GroupNorm) -> Replacements:
    if module.affine:
        yield Replacement("group_norm", module, replacements.FusedGroupNorm)
    else:
        yield "it does not have a weight and bias"


def _sequential(module: Any) -> Replacements:
    children = list(module.children())
    for first, second in zip(children, children[1:], strict=False):
        kind = "upsample_conv3d" if type(first) is nn.Upsample else "group_norm_silu"
        if fusion.fusion_of(first, second):
            yield Replacement(kind, module, replacements.FusedSequential, computes=(first, second))
        elif type(first) is nn.Upsample and first.mode == "nearest":
            conv = fusion.unwrap_convolution(second)
            yield fusion.reason_not_to_fuse(first, conv) or "its upsampling has a hook"
        elif type(first) is nn.GroupNorm and type(second) is nn.SiLU and first.affine:
            yield "its GroupNorm or SiLU has a hook"


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
    yield from _block_with_two_norms("unsplit", module, replacements.MaisiResBlock)


def _block_with_two_norms(kind: str, module: Any, mixin: type[replacements.ReplacementMixin]) -> Replacements:
    norms = (module.norm1, module.norm2)
    if not all(isinstance(norm, nn.GroupNorm) and norm.affine for norm in norms):
        yield "its norms are not GroupNorms with weight and bias"
        return
    yield Replacement(kind, module, mixin, computes=norms)


def _attention(module: Any) -> Replacements:
    if module.save_attn:
        yield "it stores the attention matrix (save_attn)"
    elif module.causal:
        yield "it is causal"
    elif module.rel_positional_embedding is not None:
        yield "it has a relative position embedding"
    elif module.use_flash_attention:
        yield "it already uses PyTorch's fused attention (use_flash_attention)"
    elif _forward_owner(module).endswith("SABlock"):
        yield Replacement("attention", module, replacements.FusedSelfAttention)
    else:
        yield Replacement("attention", module, replacements.FusedCrossAttention)


def _spatial_transformer(module: Any) -> Replacements:
    if module.spatial_dims == 3:
        yield Replacement("attention", module, replacements.FusedSpatialTransformer)
    else:
        yield "it is two-dimensional"


def _maisi_layer(mixin: type[replacements.ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        yield Replacement("unsplit", module, mixin)

    return rule


def _maisi_network(module: Any) -> Replacements:
    owners = [_forward_owner(block).removeprefix(_MAISI) for block in module.blocks]
    known = {"MaisiConvolution", "MaisiResBlock", "MaisiUpsample", "MaisiDownsample", "MaisiGroupNorm3D"}
    transposed = any(getattr(block, "use_convtranspose", False) for block in module.blocks)
    can_tile = set(owners) <= known and not transposed
    yield Replacement("unsplit", module, replacements.TiledMaisi if can_tile else replacements.MaisiBlocks)


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
    _MAISI + "MaisiGroupNorm3D": _maisi_layer(replacements.MaisiGroupNorm),
    _MAISI + "MaisiUpsample": _maisi_layer(replacements.MaisiUpsample),
    _MAISI + "MaisiEncoder": _maisi_network,
    _MAISI + "MaisiDecoder": _maisi_network,
}
