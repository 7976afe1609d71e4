"""Names of the previous release that still work, each with a DeprecationWarning; they will be removed in release 0.3."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from ccella_fast.lazy_names import lazy_names

T = TypeVar("T", bound=Callable[..., Any])


def deprecated_names(
    module: str, renamed: dict[str, str], *, otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """The `__getattr__` of `module`, in which each old name of `renamed` gives what its new name does.

    otherwise: the `__getattr__` for every other name, such as that of `lazy_names`
    """
    otherwise = otherwise or lazy_names(module, {})

    def find(name: str) -> Any:
        if name not in renamed:
            return otherwise(name)
        _warn(f"{module}.{name}", f"{module}.{renamed[name]}")
        return getattr(sys.modules[module], renamed[name])

    return find


def deprecated_arguments(**renamed: str) -> Callable[[T], T]:
    """Decorate a function, or a class for its constructor, so that each old keyword is passed on under its new name."""

    def decorate(target: T) -> T:
        if isinstance(target, type):
            target.__init__ = decorate(target.__init__)  # type: ignore[misc]
            return target

        @functools.wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in renamed.items():
                if old in kwargs:
                    _warn(f"the argument {old}", new)
                    kwargs[new] = kwargs.pop(old)
            return target(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


class DeprecatedAttribute:
    """The old name of an attribute of a class: reading it from an object gives the attribute `new`, a field or a method."""

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:  # of the class itself, which documentation tools list
            return self
        _warn(f"{owner.__name__}.{self.old}", f"{owner.__name__}.{self.new}")
        return getattr(instance, self.new)


def _warn(old: str, new: str) -> None:
    message = f"{old} is deprecated and will be removed in release 0.3; use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)  # of who uses the old name
