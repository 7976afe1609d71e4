"""How a module is replaced: by a mixin whose `forward` computes the same result with the kernels of this project.

`subclass(mixin, original)` combines a mixin with the original class: everything but `forward` is that of the original.
Instances can be copied, and are pickled as the pair of the two classes. `forward` decides at each call which of both computes:

- A mixin reads the weights of its children instead of calling them. So it computes only while these are plain layers without
  hooks; the children themselves are never changed, and may be called by others, wrapped or replaced at any time.
- The original computes where the kernels have no derivative: in forward mode, in transforms of `torch.func`, and in
  `torch.jit.trace`. A second derivative recomputes the plain operation, see `fusion`. It also computes while there is a hook
  on all modules (`register_module_forward_hook`), which is to see each layer.
- On a CPU the original computes where it is the faster of the two.

`torch.jit.script` compiles the originals: it cannot compile a choice that depends on the call.

The mixins are defined with the rules that choose them, in `dropin/rules/`.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class ReplacementMixin(nn.Module):
    """Base class of all replacements. It precedes the original class, so that `super().forward` is that of the original."""

    methods: tuple[str, ...] = ("forward",)  # the first of these that the original has is replaced
    _is_undone = False  # set by `undo` where the class has been changed by others since

    def suits(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the mixin computes this call."""
        return True

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        if cls not in _SUBCLASSES.values():  # made of a replacement by others, as FSDP2 and parametrizations do
            return super().__reduce_ex__(protocol)
        return _new_instance, cls.__bases__, self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        """The original with the same tensors, which `torch.jit.script` compiles and puts in the place of this module."""
        warnings.warn(
            "torch.jit.script compiles the original modules, and puts them into the network instead of the replacements; "
            "call speed_up again to replace them again",
            stacklevel=2,
        )
        plain = object.__new__(original_class(self))
        plain.__dict__ = {**self.__dict__, "_modules": dict(self._modules)}
        return plain


def subclass(mixin: type[ReplacementMixin], original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of both; always the same class for the same arguments."""
    if (mixin, original) not in _SUBCLASSES:
        _SUBCLASSES[mixin, original] = _make_subclass(mixin, original)
    return _SUBCLASSES[mixin, original]


_SUBCLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def _make_subclass(mixin: type[ReplacementMixin], original: type[nn.Module]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__}
    if mixin is MetaTensorUnwrapper:
        names = (name for name in ("forward", "encode", "decode") if hasattr(original, name))
        members |= {name: _with_plain_arguments(getattr(original, name)) for name in names}
    else:
        method = next(name for name in mixin.methods if hasattr(original, name))
        members["forward"] = _call_of(original)
        members[method] = _forward_of(mixin, original, method)
    return type(f"Faster{original.__name__}", (mixin, original), members)


def _call_of(original: Any) -> Any:
    """The `forward` of the original class, not that of a mixin which replaces another method."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original.forward(self, *args, **kwargs)

    forward.replaced = original.forward  # type: ignore[attr-defined]
    return forward


def _forward_of(mixin: type[ReplacementMixin], original: type[nn.Module], method: str) -> Any:
    fused, plain = mixin.forward, getattr(original, method)
    # An argument that is given by name may have another name in a copy of the original.
    names = dict(zip(inspect.signature(plain).parameters, inspect.signature(fused).parameters, strict=False))

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = getattr(original, method)
        if current is not plain:  # somebody has changed the class since
            return current(self, *args, **kwargs)
        named = {names.get(name, name): value for name, value in kwargs.items()} if kwargs else kwargs
        computes = _replaces and not self._is_undone and _may_compute() and self.suits(*args, **named)
        if _watched is not None:
            _watched[self] = computes or _watched.get(self, False)
        return fused(self, *args, **named) if computes else plain(self, *args, **kwargs)

    forward.replaced = plain  # type: ignore[attr-defined]
    return forward


_replaces = True
_watched: dict[nn.Module, bool] | None = None


@contextmanager
def originals() -> Iterator[None]:
    """Let all originals compute in the block."""
    global _replaces
    _replaces = False
    try:
        yield
    finally:
        _replaces = True


@contextmanager
def watched() -> Iterator[dict[nn.Module, bool]]:
    """Record in the block which replaced modules are called, and whether the replacement has computed at least once."""
    global _watched
    found: dict[nn.Module, bool] = {}
    _watched = found
    try:
        yield found
    finally:
        _watched = None


def _may_compute() -> bool:
    """Whether the surrounding code needs neither derivatives that the kernels lack nor hooks on all layers.

    torch.compile replaces its own transforms before.
    """
    if torch.compiler.is_compiling():
        return True
    in_forward_mode = forward_ad._current_level >= 0
    is_transformed = torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    return not (in_forward_mode or is_transformed or nn.modules.module._has_any_global_hook())


def _new_instance(mixin: type[ReplacementMixin], original: type[nn.Module]) -> nn.Module:
    """An instance without state, for unpickling."""
    cls = subclass(mixin, original)
    return object.__new__(cls)  # that of a project may need the arguments of its constructor


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` before it was replaced."""
    classes = type(module).__mro__
    return classes[classes.index(ReplacementMixin) + 1] if isinstance(module, ReplacementMixin) else classes[0]


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The `forward` of the class of `module`, or the one that a replacement replaces."""
    forward = type(module).forward
    return getattr(forward, "replaced", forward)


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
    mixin: type[ReplacementMixin]
    computes: tuple[nn.Module, ...] = ()


# The replacements for a module, or the reason why a module is not replaced
Replacements = Iterator[Replacement | str]
Rule = Callable[[Any], Replacements]


# Tensors with metadata


class MetaTensorUnwrapper(ReplacementMixin):
    """Replaces a whole model: it converts MetaTensors, which slow down every operation, to plain tensors at the input."""


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to the tensors in it, also those in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:
        return {key: map_tensors(function, each) for key, each in value.items()}
    return type(value)(map_tensors(function, each) for each in value) if type(value) in (list, tuple) else value


def _with_plain_arguments(method: Any) -> Any:
    """`method` with MetaTensors in its arguments converted to plain tensors."""
    meta_tensor = sys.modules["monai.data.meta_tensor"].MetaTensor

    def plain(value: Any) -> Any:
        return map_tensors(lambda each: each.as_subclass(Tensor) if isinstance(each, meta_tensor) else each, value)

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_undone:
            return method(self, *args, **kwargs)
        return method(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return wrapper
