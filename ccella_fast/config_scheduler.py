"""The section `scheduler`: the noise process and what the network predicts, and which other settings fit them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ccella_fast.config_section import Positive, PositiveFloat, Section
from ccella_fast.variants import Variant

_PREDICTIONS = {
    "scaled_linear_beta": ("epsilon", "v", "x0"),
    "rectified_flow": ("velocity", "x0_minus_noise", "x0"),
}
KEYS_OF_ONE_SCHEDULE = {
    "scaled_linear_beta": ("beta_start", "beta_end"),
    "rectified_flow": (
        "sample_method", "loc", "scale", "use_timestep_transform", "transform_scale", "base_img_size_numel"
    ),
}  # fmt: skip
# The keys of `sampling` that a configuration with a rectified flow does not give have these values, those of MAISI.
_SAMPLING_OF_FLOWS = {"solver": "euler_flow", "num_inference_steps": 30}


class SchedulerConfig(Section):
    """The noise process of the training and what the network predicts. A checkpoint keeps both, and sampling follows them.

    The defaults are the reference's (docs/explanation/method.md, section 3). Names of keys are those of MONAI's schedulers.
    """

    #: scaled_linear_beta: a noise schedule, linear in the square root of beta; rectified_flow: straight paths to noise
    schedule: Literal["scaled_linear_beta", "rectified_flow"] = "scaled_linear_beta"
    #: what the network is trained to predict, see :doc:`/explanation/sampling`; velocity unless given for a rectified flow
    prediction: Literal["epsilon", "v", "x0", "velocity", "x0_minus_noise"] = "epsilon"
    #: number of noise levels; of a rectified flow, whose times are continuous, the time at pure noise
    num_train_timesteps: Positive = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0015  #: variance added at the first timestep
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.0195  #: variance added at the last timestep
    #: how the times of a rectified flow are drawn in training; logit-normal: the sigmoid of a normal number
    sample_method: Literal["uniform", "logit-normal"] = "uniform"
    loc: float = 0.0  #: mean of that normal number
    scale: PositiveFloat = 1.0  #: its standard deviation
    #: shift the times of a rectified flow towards noise, in training and in sampling, the more the larger the latent
    use_timestep_transform: bool = True
    transform_scale: PositiveFloat = 1.0  #: factor of the shift, next to the ratio of the sizes
    base_img_size_numel: Positive = 32768  #: voxels of a latent that is not shifted
    clip_sample: Literal[False] = False  #: the estimate of the clean latent is never clipped

    @model_validator(mode="before")
    @classmethod
    def _prediction_of_flows(cls, values: Any) -> Any:
        flow = isinstance(values, dict) and values.get("schedule") == "rectified_flow"
        return {"prediction": "velocity", **values} if flow else values

    @model_validator(mode="after")
    def _consistent(self) -> SchedulerConfig:
        allowed = _PREDICTIONS[self.schedule]
        if self.prediction not in allowed:
            raise ValueError(
                f"prediction '{self.prediction}' does not exist for schedule '{self.schedule}', "
                f"whose networks predict {', '.join(allowed[:-1])} or {allowed[-1]}; leave it out, or give one of them"
            )
        for schedule, names in KEYS_OF_ONE_SCHEDULE.items():
            given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if schedule != self.schedule and given:
                raise ValueError(
                    f"{given[0]} has an effect only with schedule '{schedule}', but schedule is '{self.schedule}'; "
                    f"leave {given[0]} out"
                )
        return self

    @property
    def is_flow(self) -> bool:
        """Whether the process is a rectified flow."""
        return self.schedule == "rectified_flow"


def with_sampling_of_flows(values: Any) -> Any:
    """The values of a configuration; with a rectified flow, keys of `sampling` that are not given have other defaults."""
    if not isinstance(values, dict):
        return values
    scheduler, sampling = values.get("scheduler"), values.get("sampling", {})
    schedule = scheduler.get("schedule") if isinstance(scheduler, dict) else getattr(scheduler, "schedule", None)
    if schedule != "rectified_flow" or not isinstance(sampling, dict):
        return values
    return {**values, "sampling": {**_SAMPLING_OF_FLOWS, **sampling}}


def check_objective(scheduler: SchedulerConfig, training: Any, sampling: Any, traits: Variant) -> None:
    """Raise ValueError unless the sections `training` and `sampling` fit the noise process and the variant."""
    if sampling.prediction not in (None, scheduler.prediction):
        raise ValueError(
            f"sampling.prediction is '{sampling.prediction}', but the network is trained to predict "
            f"'{scheduler.prediction}' (scheduler.prediction); leave sampling.prediction null"
        )
    if scheduler.is_flow and not sampling.solver.endswith("_flow"):
        raise ValueError(
            f"sampling.solver '{sampling.solver}' solves a noise schedule, but scheduler.schedule is 'rectified_flow'; "
            "set sampling.solver to euler_flow or heun_flow, or leave it out"
        )
    if scheduler.is_flow and training.min_snr_gamma is not None:
        raise ValueError(
            "training.min_snr_gamma weights the timesteps of a noise schedule, but scheduler.schedule is "
            "'rectified_flow'; set it to null, and weight times by scheduler.sample_method"
        )
    if training.report_dropout and not traits.text:
        raise ValueError(f"training.report_dropout has no effect: {traits.name} does not read the report; set it to 0")
    if training.class_dropout and traits.class_input != "given":
        raise ValueError(f"training.class_dropout has no effect: {traits.name} is not given a class; set it to 0")
