"""The section `augmentation` and its presets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ccella_fast.config_section import Fraction, PositiveFloat, Section

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Axes = Annotated[list[Strength], Field(min_length=3, max_length=3)]  # along R, A, S
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # With a report: sides stay, sizes stay true, intensities stay those of a plausible scan.
    "text": {
        "rotation": [3.0, 3.0, 6.0], "translation": [4.0, 4.0, 3.0], "zoom": 0.1, "crop": [0.1, 0.1, 0.05],
        "gamma": 0.1, "contrast": 0.1, "brightness": 0.05, "bias": 0.1, "blur": 0.3, "noise": 0.01,
    },
    # Without: also mirrored, and stronger in everything.
    "image": {
        "rotation": [6.0, 6.0, 12.0], "translation": [8.0, 8.0, 6.0], "zoom": 0.2, "crop": [0.2, 0.2, 0.1],
        "gamma": 0.25, "contrast": 0.2, "brightness": 0.1, "bias": 0.25, "blur": 0.6, "noise": 0.03, "flip": 0.5,
    },
}  # fmt: skip


class AugmentationConfig(Section):
    """Strengths of the augmentations. A key is the largest deviation that is drawn; 0 turns the operator off.

    Keys that are given override those of `preset`. `flip` must be 0 if the model reads the report, because in a mirrored study
    left and right are exchanged.
    """

    preset: Literal["none", "text", "image"] = "text"  #: strengths of the keys that are not given
    rotation: Axes = [0.0, 0.0, 0.0]  #: degrees about R, A, S
    translation: Axes = [0.0, 0.0, 0.0]  #: mm along R, A, S
    zoom: Annotated[Strength, Field(le=1)] = 0.0  #: 0.1: voxels smaller or larger by up to 10 %
    #: fraction of each axis that is cut off
    crop: Annotated[list[Fraction], Field(min_length=3, max_length=3)] = [0.0, 0.0, 0.0]
    #: mm around the center that always stay in view
    gland: Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)] = [60.0, 50.0, 45.0]
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0  #: probability of exchanging left and right
    gamma: Annotated[Strength, Field(le=2)] = 0.0  #: 0.1: exponent between exp(-0.1) and exp(0.1)
    contrast: Annotated[Strength, Field(le=0.5)] = 0.0  #: change of the slope at mid-gray
    brightness: Annotated[Strength, Field(le=1)] = 0.0  #: 0.1: gain between 0.9 and 1.1
    bias: Annotated[Strength, Field(le=1)] = 0.0  #: 0.1: bias field between exp(-0.1) and exp(0.1)
    blur: Annotated[Strength, Field(le=5)] = 0.0  #: largest standard deviation of the Gaussian, mm
    noise: Annotated[Strength, Field(le=1)] = 0.0  #: largest standard deviation, for an image in [0, 1]

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        preset = values.get("preset", "text") if isinstance(values, dict) else None
        return {**PRESETS[preset], **values} if isinstance(preset, str) and preset in PRESETS else values

    @property
    def active(self) -> bool:
        """Whether any operator is enabled."""
        return self.moves or any((self.gamma, self.contrast, self.brightness, self.bias, self.blur, self.noise))

    @property
    def moves(self) -> bool:
        """Whether any operator changes the geometry."""
        return any((*self.rotation, *self.translation, self.zoom, *self.crop, self.flip))
