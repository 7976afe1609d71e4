"""The nine variants of the reference implementation as one table (docs/explanation/method.md, section 7).

They differ in four properties: whether the report is used, where the adapter has a class head, where the class vector of the
U-Net comes from, and the configured weight of the class loss.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ccella_fast.errors import ConfigError, did_you_mean

# The reference multiplies the inputs and targets of every variant by these.
CLASS_SCALE = 100.0  # of one-hot classes and class probabilities
SPACING_SCALE = 100.0  # of spacings in mm


class Variant(NamedTuple):
    """One row of the table.

    Attributes:
        name: value of `model.variant`.
        text: whether the model reads the report.
        head: where class logits are computed. `cascade`: one head after each adapter block; `shared`: the same head after
            each block; `first`: after the first block; `last`: on the final context.
        class_input: the class vector that the U-Net receives: `predicted` from the report, `given` with the data, or `none`.
        class_loss_weight: default weight of the class loss.
        target: last part of `_target_` in the definition file of the reference implementation.
    """

    name: str
    text: bool
    head: Literal["none", "first", "last", "shared", "cascade"]
    class_input: Literal["predicted", "given", "none"]
    class_loss_weight: float
    target: str

    @property
    def parts(self) -> list[str]:
        """The parts of the model, see `models.parts`."""
        return ["unet", *(["adapter"] if self.text else []), *(["class_heads"] if self.head != "none" else [])]


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
    """Return the variant called `name`.

    Raises:
        ConfigError: there is no such variant; the nearest name is suggested.
    """
    if name not in VARIANTS:
        raise ConfigError(f"there is no variant '{name}'", field="model.variant", fix=did_you_mean(name, VARIANTS))
    return VARIANTS[name]
