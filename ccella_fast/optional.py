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
    "int8": ("accelerate", "bitsandbytes"),
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


def require_installed(*packages: str) -> None:
    """Raise ConfigError if a package that a command uses is not installed. For the first line of a command: imports none."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        why = f"this command needs {' and '.join(missing)}, which {are} not installed"
        raise ConfigError(why, fix=install(*missing))


def install(*packages: str) -> str:
    """The command that installs packages: those of an extra together with that extra."""
    extras = sorted({PACKAGES[package] for package in packages if package in PACKAGES})
    others = [package for package in packages if package not in PACKAGES]
    return " ".join(["pip install", *([f'"ccella-fast[{",".join(extras)}]"'] if extras else []), *others])
