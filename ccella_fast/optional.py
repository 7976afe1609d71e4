"""Packages that only some parts of ccella_fast need, and the extra that installs each.

They are imported where they are used. What the base requires is in `setup.py`.
"""

from __future__ import annotations

import importlib
import importlib.util

from ccella_fast.errors import ConfigError

_EXTRAS = {
    "commands": (
        "SimpleITK", "deepspeed", "hjson", "huggingface_hub", "jinja2", "matplotlib", "monai", "nibabel", "pynvml",
        "tensorboard", "transformers",
    ),
    "gpu": ("nvidia", "triton", "xformers"),
    "dicom": ("highdicom", "pydicom"),
    "t5": ("protobuf", "sentencepiece"),
    "viewer": ("ipyniivue",),
}  # fmt: skip
PACKAGES = {package: extra for extra, packages in _EXTRAS.items() for package in packages}


def require(package: str, what: str) -> None:
    """Import a package that `what`, the subject of a sentence, needs. Raises ConfigError if it is not installed."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package itself is broken
            raise
        raise ConfigError(f"{what} needs {package}, which is not installed", fix=install(package)) from None


def require_commands() -> None:
    """Raise ConfigError if a package of the extra `commands` is not installed, before a command begins its work."""
    for package in _EXTRAS["commands"]:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"this command needs {package}, which is not installed", fix=install(package))


def install(package: str) -> str:
    """The command that installs a package: that of the extra, where one has it."""
    extra = PACKAGES.get(package)
    return f'pip install "ccella-fast[{extra}]"' if extra else f"pip install {package}"
