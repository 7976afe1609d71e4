"""`speed_up(model)` replaces modules of diffusion networks and autoencoders by fused kernels, in place and reversibly.

Each module that is recognized is assigned another class: a subclass of its own class with a faster `forward`, defined in
`dropin/rules/`. The module objects, their parameters, names, hooks and devices stay the same, so that state dicts,
optimizers, `.to()`, `copy.deepcopy`, pickling, DDP and `torch.compile` work as before; `undo()` restores the classes. MONAI is
never imported. A module is recognized by what its `forward` does, see `program`: a subclass that inherits it is replaced, also
a copy in another project, and one that changes it is not. Only what a module's own `forward` does is replaced, never what one
of its children computes for others.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ccella_fast.dropin.comparison import Example, Values, compare, compute, in_float64
from ccella_fast.dropin.layers import has_hooks
from ccella_fast.dropin.replacement import (
    MetaTensorUnwrapper,
    Replacement,
    ReplacementMixin,
    Rule,
    original_class,
    originals,
    plain_forward,
    subclass,
    watched,
)  # fmt: skip
from ccella_fast.dropin.rules import rule_of
from ccella_fast.errors import ConfigError, did_you_mean

KINDS = {
    "group_norm_silu": "GroupNorm, the SiLU after it and a shift before it (the time embedding) in one kernel",
    "group_norm": "GroupNorm alone",
    "attention": "self- and cross-attention without storing the attention matrix",
    "upsample_conv3d": "nearest-neighbor upsampling by 2 and the 3x3x3 convolution after it in one kernel",
    "unsplit": "MAISI's autoencoder without split convolutions, loops over groups and cache flushes; exact tiling",
    "metatensor": "MetaTensors are converted to plain tensors at the input of the model",
}


@dataclass
class SpeedUpReport:
    """What `speed_up` has replaced.

    Attributes:
        swapped: for each kind of replacement (`KINDS`), the names of the modules that were replaced.
        refused: for each recognized module that was not replaced, the reason.
        unknown: the number of modules by class that hold layers of their own and were not recognized.
        total: the number of all modules of these classes.
        plain: with an example: the names of replaced modules that computed as the original, which is as fast or faster there.
        check: with an example: how far apart the outputs are, as a sentence.
    """

    swapped: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
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
                f"{len(self.plain):>5}  of these compute as the original with the example, which is as fast or faster there"
            )
        if self.unknown:
            lines.append("classes of which not every module was recognized:")
            lines += [
                f"{self.total[name] - count:>5} of {self.total[name]}  {name}" for name, count in self.unknown.items()
            ]
        return "\n".join(lines)


def speed_up(
    model: nn.Module, *, without: Collection[str] = (), example: Example | None = None, gradients: bool = False
) -> SpeedUpReport:
    """Replace known modules of `model` by fused kernels, in place.

    Known are the blocks of MONAI's and GenerativeModels' diffusion U-Nets, ControlNets and autoencoders, of OpenAI's
    guided-diffusion and networks derived from it, of latent-diffusion, of lucidrains' and diffusers' video networks and of
    PhysicsNeMo, in any model and in any copy that computes the same; in any `nn.Sequential`, a GroupNorm before a SiLU or a
    nearest-neighbor upsampling by 2 before a convolution; and `F.interpolate` before a convolution.

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
    with watched() as calls:
        after = compute(model, example, gradients=gradients)
    report.plain = [names[module] for module, computes in calls.items() if not computes]

    def truth() -> Values:
        with originals():
            return in_float64(model, example, gradients=gradients)

    comparison = compare(before, after, truth)
    report.check = f"with the example, {comparison.phrase} from those of the original"
    if not comparison.is_right:
        report.undo()
        report.check = f"nothing was replaced: {report.check}"
        report.swapped, report.plain = {}, []
    return report


def _replace(model: nn.Module, without: Collection[str]) -> SpeedUpReport:
    report = SpeedUpReport()
    computed: set[int] = set()  # by a replacement of their container
    rules: dict[type, Rule | None] = {}
    modules = dict(model.named_modules())
    report._is_repeated = any(map(_is_active, modules.values()))
    for name, module in modules.items():
        name, is_replaced = name or type(model).__name__, _is_active(module)
        if type(module) not in rules:
            rules[type(module)] = rule_of(module)
        rule = None if id(module) in computed else rules[type(module)]
        found = [] if rule is None else _apply(rule, module)
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
    known = report.swapped and "metatensor" not in without and not _is_active(model)
    if known and "monai.data.meta_tensor" in sys.modules:
        report.swapped["metatensor"] = [type(model).__name__]
        _swap_class(model, MetaTensorUnwrapper, report)
    _count_unknown(modules, computed, report)
    return report


def _is_active(module: nn.Module) -> bool:
    return isinstance(module, ReplacementMixin) and not module._is_undone


def _apply(rule: Rule, module: nn.Module) -> list[Replacement | str]:
    try:
        return list(rule(module))
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        return [f"it computes as a known block, but does not have its layers ({error})"]


def _swap_class(module: nn.Module, mixin: type[ReplacementMixin], report: SpeedUpReport) -> None:
    if isinstance(module, mixin):  # of a class that others have made of the replacement, and undone
        module._is_undone = False
        report._originals.append((module, original_class(module), mixin))
        return
    original, replaced = type(module), subclass(mixin, type(module))
    report._originals.append((module, original, replaced))
    module.__class__ = replaced


def _reason_to_skip(replacement: Replacement) -> str | None:
    for module in (replacement.module, *replacement.computes):
        class_name = type(module).__name__
        if "forward" in vars(module):
            return f"the forward of its {class_name} has been replaced"
        if module is not replacement.module and has_hooks(module):
            return f"its {class_name} has a hook"
    return None


_LAYERS = (nn.GroupNorm, nn.LayerNorm, nn.Upsample, nn.MultiheadAttention, nn.modules.batchnorm._NormBase)
_FUNCTIONS = {"group_norm", "interpolate", "layer_norm", "scaled_dot_product_attention"}


def _count_unknown(modules: dict[str, nn.Module], computed: set[int], report: SpeedUpReport) -> None:
    """Count by class the modules that are neither replaced nor refused with a reason, and call layers themselves.

    A module that calls only convolutions counts if no block of the model is known: no replacement is for convolutions alone.
    One whose norm alone is replaced, or that calls functions in place of layers, counts if it contains no known block.
    """
    unknown: Counter[str] = Counter()
    total: Counter[str] = Counter()
    blocks = {
        name for kind, names in report.swapped.items() if kind not in ("group_norm", "metatensor") for name in names
    }
    known = blocks | report.refused.keys()
    for name, module in modules.items():
        owner = next(cls for cls in original_class(module).__mro__ if "forward" in vars(cls))
        if owner.__module__.startswith("torch.nn.modules"):
            continue
        owner_name = f"{owner.__module__}.{owner.__qualname__}"
        total[owner_name] += 1
        unwraps = isinstance(module, MetaTensorUnwrapper)  # and computes what its class does
        is_replaced = (isinstance(module, ReplacementMixin) and not unwraps) or id(module) in computed
        if is_replaced or (name or type(module).__name__) in report.refused:
            continue
        within = f"{name}." if name else ""
        has_blocks = any(within + child in known for child, _ in module.named_children())
        contains_known = any(each.startswith(within) for each in known)
        if (not has_blocks and _calls_layers(module, owner, convolutions=not blocks)) or (
            not contains_known and _computes_as_a_block(module)
        ):
            unknown[owner_name] += 1
    report.unknown = dict(unknown.most_common())
    report.total = {name: total[name] for name in report.unknown}


def _calls_layers(module: nn.Module, owner: type, *, convolutions: bool) -> bool:
    name = owner.__name__.lower()
    kinds = (*_LAYERS, nn.modules.conv._ConvNd) if convolutions or "upsample" in name else _LAYERS
    children = list(_called(module))
    is_attention = "attention" in name or "attn" in name
    is_norm = "norm" in name and any(True for _ in module.parameters(recurse=False))
    return (
        is_norm
        or (is_attention and any(isinstance(each, nn.Linear) for each in children))
        or any(isinstance(each, kinds) and not isinstance(each, ReplacementMixin) for each in children)
    )


def _computes_as_a_block(module: nn.Module) -> bool:
    """Whether a module calls a norm that is replaced alone, or a function that a block of a known kind calls."""
    code = getattr(inspect.unwrap(plain_forward(module)), "__code__", None)
    calls = _FUNCTIONS.intersection(() if code is None else code.co_names)
    has_weights = any(True for _ in module.parameters())
    return (bool(calls) and has_weights) or any(isinstance(each, nn.GroupNorm) for each in _called(module))


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, and those of its containers."""
    for child in module.children():
        is_container = isinstance(child, nn.Sequential) and not isinstance(child, ReplacementMixin)
        yield from _called(child) if is_container else (child,)
