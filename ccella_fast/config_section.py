"""The base class of the sections of a configuration, and the types of their keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch's generators take
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
RelativeWidth = Annotated[float, Field(ge=0.01, le=0.28)]  # of an average, see `training.power_profiles`
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, int) else value)
Part = Literal["unet", "adapter", "class_heads"]  # of a model, see `models.parts`
SubPart = Literal[Part, "unet.attention", "unet.class_input"]


class Section(BaseModel):
    """A section of the configuration: unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
