"""Names of a package that are imported on first use, so that whoever needs one of its modules does not wait for all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of `package`, in which each name of `homes` is what its home, a module of the package, defines."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package} has no attribute {name}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return find
