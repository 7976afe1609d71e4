"""The nine variants of the reference as one table of differences (docs/explanation/method.md, section 7).

They differ in four facts: is the report used, where a class head sits in the adapter, where the U-Net's class vector comes
from, and the configured weight of the class loss.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ccella_fast.errors import ConfigError, did_you_mean

# The reference multiplies the inputs and targets of every variant by these.
CLASS_SCALE = 100.0  # of one-hot classes and class probabilities
SPACING_SCALE = 100.0  # of spacings in mm


class Variant(NamedTuple):
    """One row. `head`: where class logits are read (`cascade`: one head after each adapter block; `shared`: one head used
    after every block; `first`, `last`: after the first block, on the final context). `class_input`: the class vector that
    reaches the U-Net (`predicted` from the report, `given` with the data, or `none`)."""

    name: str
    text: bool
    head: Literal["none", "first", "last", "shared", "cascade"]
    class_input: Literal["predicted", "given", "none"]
    class_loss_weight: float
    target: str  # last part of the `_target_` in the reference's definition file


_ROWS = [
    Variant("CCELLA", True, "cascade", "predicted", 1e-4, "CCELLA_LDM"),
    Variant("FIRST", True, "first", "predicted", 1e-4, "CCELLA_FIRST_LDM"),
    Variant("LAST", True, "last", "predicted", 1e-4, "CCELLA_LAST_LDM"),
    Variant("SHARED", True, "shared", "predicted", 1e-4, "CCELLA_SHARED_LDM"),
    Variant("L1ONLY", True, "cascade", "predicted", 0.0, "CCELLA_LDM"),
    Variant("DECOUPLED", True, "none", "given", 0.0, "ELLA_LDM"),
    Variant("ELLAMAISI", True, "none", "none", 0.0, "ELLA_LDM"),
    Variant("RADMAISI", False, "none", "given", 0.0, "DiffusionModelUNetMaisi"),
    Variant("MAISI", False, "none", "none", 0.0, "DiffusionModelUNetMaisi"),
]
VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}


def get_variant(name: str) -> Variant:
    """The row called `name`; ConfigError with the nearest name otherwise."""
    if name not in VARIANTS:
        raise ConfigError(f"there is no variant '{name}'", field="model.variant", fix=did_you_mean(name, VARIANTS))
    return VARIANTS[name]
