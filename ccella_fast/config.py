"""All settings with their defaults and checks, and the readers of both file formats.

Our format is one JSON file with the sections of `Config`; a section or key that is omitted keeps its default. The reference's
format is three JSON files (env, config, def), which `load_config([env, config, def])` reads unchanged. Configuration files
are data: nothing in them is imported or executed, `_target_` must be one of the implemented targets, and `$` expressions are
errors.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ccella_fast import reference_config
from ccella_fast.config_augmentation import AugmentationConfig
from ccella_fast.config_autoencoder import AutoencoderConfig, VaeTrainingConfig
from ccella_fast.config_errors import explain
from ccella_fast.config_scheduler import SchedulerConfig, check_objective, with_sampling_of_flows
from ccella_fast.config_section import (
    Count,
    Fraction,
    OneOrMore,
    Part,
    Positive,
    PositiveFloat,
    Probability,
    RelativeWidth,
    Section,
    Seed,
    SubPart,
)
from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.storage import read_json
from ccella_fast.variants import VARIANTS, Variant

logger = logging.getLogger("ccella_fast")


class ModelConfig(Section):
    """Adapter and U-Net. Key names are those of the reference's `diffusion_unet_def` where it has one."""

    variant: str = "CCELLA"  #: one of the nine variants, docs/explanation/method.md, section 7
    #: one entry per sequence; their sum enters the U-Net
    latent_channels: Annotated[list[Positive], OneOrMore, Field(min_length=1)] = [4]
    #: width of each level of the U-Net; every level but the last halves the grid
    num_channels: Annotated[list[Positive], Field(min_length=1)] = [64, 128, 256, 512]
    attention_levels: list[bool] = [False, False, True, True]  #: which levels have attention
    #: width of an attention head on each level; 0 on levels without attention
    num_head_channels: list[Count] = [0, 0, 32, 32]
    num_res_blocks: Positive = 2  #: residual blocks per level on the way down; one more on the way up
    resblock_updown: bool = False  #: residual blocks change the grid, not convolutions, as in NV-Generate-CTMR
    include_fc: bool = False  #: self-attention ends in a linear layer, as in NV-Generate-CTMR
    norm_num_groups: Positive = 32  #: groups of every group normalization
    norm_eps: PositiveFloat = 1e-6  #: added to the variance in every group normalization
    cross_attention_dim: Positive = 768  #: width of the adapter and of the context that it returns
    input_dim: Positive = 4096  #: width of the text features
    num_latents: Positive = 256  #: context tokens
    adapter_blocks: Positive = 6  #: perceiver blocks of the adapter
    adapter_heads: Positive = 8  #: attention heads of a perceiver block
    adapter_time_dim: Positive = 320  #: width of the adapter's sinusoidal timestep embedding
    num_classes: Positive = 2  #: classes that the heads predict: PI-RADS 1-2 and 3-5
    class_head_dim: Positive = 256  #: hidden width of a class head

    @field_validator("variant")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in VARIANTS:
            raise ValueError(f"the variant '{name}' does not exist; {did_you_mean(name, VARIANTS)}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        levels = len(self.num_channels)
        for name in ("attention_levels", "num_head_channels"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} needs one entry per level ({levels}, as num_channels)")
        attends_at = [*self.attention_levels[:-1], True]  # the middle block, as wide as the last level, always attends
        for width, attends, head in zip(self.num_channels, attends_at, self.num_head_channels, strict=True):
            if width % self.norm_num_groups:
                raise ValueError(f"num_channels {width} is not divisible by norm_num_groups {self.norm_num_groups}")
            if attends and (head == 0 or width % head):
                raise ValueError(f"num_channels {width} is not divisible by its num_head_channels {head}")
        for name, width in (("num_channels", self.num_channels[0]), ("adapter_time_dim", self.adapter_time_dim)):
            if width % 2:
                raise ValueError(
                    f"{name} {width} is odd; it is the width of a timestep embedding, half sines, half cosines"
                )
        if self.cross_attention_dim % self.adapter_heads:
            raise ValueError(
                f"cross_attention_dim {self.cross_attention_dim} % adapter_heads {self.adapter_heads} is not 0"
            )
        return self

    @property
    def traits(self) -> Variant:
        """The row of `variants.VARIANTS` that `variant` names: how this variant differs from the others."""
        return VARIANTS[self.variant]

    @property
    def divisor(self) -> int:
        """Each latent axis must be a multiple of this: every level but the last halves the grid."""
        return 2 ** (len(self.num_channels) - 1)


class GridConfig(Section):
    """The grid that every study is brought to, and the sequences that are kept. A prepared folder's manifest holds it."""

    #: T2-weighted, high b-value diffusion, apparent diffusion coefficient
    sequences: list[Literal["t2w", "hbv", "adc"]] = ["t2w"]
    #: voxel size in mm along R, A, S
    spacing: Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)] = [0.5, 0.5, 0.5625]
    dim: Annotated[list[Positive], Field(min_length=3, max_length=3)] = [256, 256, 128]  #: voxels along R, A, S
    dataset: str | None = None  #: train only on studies with this tag (``dataset`` in studies.csv)

    @field_validator("sequences")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if not names or len(set(names)) != len(names):
            raise ValueError("give at least one sequence, each once")
        return names


class DataConfig(GridConfig):
    """The grid of the studies, and how their volumes are loaded."""

    #: what loads and augments volumes; auto: DALI on a GPU, else torch
    engine: Literal["auto", "dali", "torch"] = "auto"


class TextConfig(Section):
    """The report encoder: a hub id, a local folder, or `package:NAME` for one that arrives as a Python package."""

    encoder: str = "google/flan-t5-xxl"  #: hub id, local folder, or ``package:NAME``
    revision: str | None = None  #: revision of the hub id; null: the newest
    #: tokens; longer reports lose their beginning, shorter ones are padded and keep all positions
    max_length: Positive = 512
    #: precision of the encoder; int8: linear layers in 8 bits (bitsandbytes), the rest in bfloat16. T5 overflows in float16.
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    batch_size: Positive = 8  #: reports encoded at a time; one with int8, where the features depend on the batch


class LowRankConfig(Section):
    """Low-rank adapters: most weights stay as they are, and a product of two small factors is added to them (LoRA)."""

    rank: Count = 0  #: rank of the product, such as 8; 0: none, and all weights are trained
    alpha: PositiveFloat = 8.0  #: the product is multiplied by ``alpha / rank``
    #: parts whose linear layers and convolutions have factors; null: the U-Net and the adapter
    layers: list[Literal["unet", "unet.attention", "adapter"]] | None = None
    whole: list[SubPart] = []  #: parts that are trained as a whole, such as new class heads; all others are frozen


class TrainingConfig(Section):
    """The diffusion model's training (docs/explanation/method.md, section 3). Batch sizes are per process."""

    #: stored: from the prepared folder; online: encoded during training, from augmented images
    latents: Literal["stored", "online"] = "stored"
    batch_size: Positive = 8  #: studies per process and micro-batch
    gradient_accumulation_steps: Positive = 1  #: micro-batches per optimizer step
    #: initial learning rate; it falls to 0 with the square of the remaining fraction of the run
    lr: PositiveFloat = 1e-4
    n_epochs: Positive = 400  #: passes over the training set, unless ``max_train_steps`` is given
    max_train_steps: Positive | None = None  #: optimizer steps; null: ``n_epochs`` over the training set
    #: parts that start anew where the run starts from weights, see :doc:`/how-to/fine-tune`
    init_skip: list[SubPart] = []
    init_modality: Count | None = None  #: class of NV-Generate-CTMR whose embedding is taken; null: the sequence's
    freeze: list[Part] = []  #: parts that keep their weights
    low_rank: LowRankConfig = LowRankConfig()
    lr_scale: dict[Part, PositiveFloat] = {}  #: factors of the learning rate, such as ``{"adapter": 10.0}``
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  #: AdamW's, on all parameters
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)  #: AdamW's decay rates of both moments
    #: the gradient's global norm is clipped to this; 0: not clipped
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    #: weight of the class loss; null: the variant's
    text_class_pred_weight: Annotated[float, Field(ge=0)] | None = None
    #: gamma of min-SNR weighting of the noise levels (Hang et al. 2023), such as 5; null: all have the same weight
    min_snr_gamma: PositiveFloat | None = None
    #: probability that a sample is trained with the null report, which guidance needs; 0: only studies without a report are
    report_dropout: Probability = 0.0
    #: probability that a sample is trained with the null class, in variants that are given the class
    class_dropout: Probability = 0.0
    ema_decay: Fraction = 0.9999  #: decay of the moving average of the weights; 0: no average
    #: optimizer steps between two snapshots of power-function averages, see :doc:`/how-to/average-weights`; 0: there are none
    power_ema_snapshot_steps: Count = 0
    power_ema_widths: Annotated[list[RelativeWidth], Field(min_length=1)] = [0.05, 0.1]  #: their relative widths
    power_ema_every: Positive = 8  #: optimizer steps between two updates of these averages
    #: auto: bf16 on GPUs and on CPUs with bf16 instructions, else fp32; chosen when a run starts and kept when it is resumed
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0  #: DeepSpeed ZeRO stage
    activation_checkpointing: bool = False  #: recompute activations in the backward pass: less memory, more time
    checkpointing_steps: Positive = 500  #: optimizer steps between checkpoints
    checkpoints_total_limit: Annotated[int, Field(ge=2)] = 2  #: checkpoints that are kept; older ones are removed
    logging_steps: Positive = 1  #: optimizer steps between two reads of the loss from the device
    seed: Seed = 0  #: data order, noise and initial weights follow from it
    #: minutes without a step after which a process stops waiting for the others; before the first step three times as long
    collective_timeout: Annotated[float, Field(gt=0, le=10080)] = 10.0

    @model_validator(mode="after")
    def _snapshots_are_possible(self) -> TrainingConfig:
        snapshot = self.power_ema_snapshot_steps
        if len(set(self.power_ema_widths)) != len(self.power_ema_widths):
            raise ValueError(f"power_ema_widths must each be given once, got {self.power_ema_widths}")
        for name, does in (("power_ema_every", "are updated"), ("checkpointing_steps", "are saved")):
            if snapshot % getattr(self, name):
                raise ValueError(
                    f"power_ema_snapshot_steps {snapshot} is not a multiple of {name} {getattr(self, name)}, the steps at "
                    f"which the averages {does}; change one of them"
                )
        return self

    def global_batch(self, processes: int) -> int:
        """The studies of an optimizer step over all processes."""
        return self.batch_size * self.gradient_accumulation_steps * processes


class MonitoringConfig(Section):
    """What is measured of the diffusion model while it is trained. Only `validation_fraction` changes the training."""

    #: optimizer steps between two validations: the loss of studies that are not trained on; 0: none
    validation_steps: Count = 0
    #: share of the training patients that are set aside for validation, where the data has no studies of the split val
    validation_fraction: Fraction = 0.0
    #: optimizer steps between two previews: volumes that are generated from reports of validation studies; 0: none
    sample_steps: Count = 0
    samples: Positive = 4  #: volumes of a preview
    sample_inference_steps: Positive = 20  #: denoising steps of each of them
    #: what decides which checkpoint is the best, and is kept whatever its age; the smallest value is the best; null: none is
    best_metric: Literal["val_loss", "val_loss_l1", "val_loss_class", "sample_distance"] | None = None


class SamplingConfig(Section):
    """`ccella-fast sample`. The defaults are the reference's: every timestep, ancestral; 30 Euler steps for a flow."""

    #: see :doc:`/explanation/sampling`; euler_flow unless given for a rectified flow
    solver: Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler_flow", "heun_flow"] = "ddpm"
    #: null, or the same as ``scheduler.prediction``, which decides
    prediction: Literal["epsilon", "v", "x0", "velocity", "x0_minus_noise"] | None = None
    #: which timesteps a shorter run visits; null: the solver's own choice
    timestep_spacing: Literal["leading", "trailing", "linspace", "karras"] | None = None
    num_inference_steps: Positive = 1000  #: denoising steps; 30 unless given for a rectified flow
    #: classifier-free guidance against the null report; 1: off
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  #: fractions of the schedule between which guidance acts
    batch_size: Positive = 1  #: volumes denoised at a time


class PathsConfig(Section):
    """The reference's env file. Unused by the single-file form, whose commands take paths as arguments."""

    embedding_base_dir: str | None = None  #: prepared folder, where ``--data`` is not given
    model_dir: str | None = None  #: parent of the run folder, where ``--output_dir`` is not given
    model_filename: str | None = None  #: name of the run folder, without its suffix
    #: the weights that a new run starts from, where ``--init_from`` is not given
    existing_ckpt_filepath: str | None = None


class Config(Section):
    """The whole configuration. `dump()` is stored with a run, and `load_config` of that file returns an equal object."""

    name: str = "ccella"  #: name of the run, for people
    model: ModelConfig = ModelConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    data: DataConfig = DataConfig()
    augmentation: AugmentationConfig = AugmentationConfig()  #: of `--latents online` and `prepare --augment`
    text: TextConfig = TextConfig()
    vae_training: VaeTrainingConfig = VaeTrainingConfig()
    training: TrainingConfig = TrainingConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    sampling: SamplingConfig = SamplingConfig()
    paths: PathsConfig = PathsConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_flows(cls, values: Any) -> Any:
        return with_sampling_of_flows(values)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        check_objective(self.scheduler, self.training, self.sampling, self.model.traits)
        if len(self.model.latent_channels) != len(self.data.sequences):
            raise ValueError(
                f"model.latent_channels {self.model.latent_channels} needs one entry per sequence (data.sequences "
                f"{self.data.sequences})"
            )
        if any(channels != self.autoencoder.latent_channels for channels in self.model.latent_channels):
            raise ValueError("model.latent_channels must each equal autoencoder.latent_channels")
        best, saved_at = self.monitoring.best_metric, self.training.checkpointing_steps
        name = "sample_steps" if best == "sample_distance" else "validation_steps"
        interval = getattr(self.monitoring, name)
        if best is not None and interval == 0:
            raise ValueError(
                f"monitoring.best_metric {best} is never measured: monitoring.{name} is 0; "
                f"set monitoring.{name} to a number of steps"
            )
        if best is not None and saved_at % interval:
            raise ValueError(
                f"monitoring.best_metric {best} is not measured at every checkpoint: training.checkpointing_steps {saved_at} "
                f"is not a multiple of monitoring.{name} {interval}; change one of them"
            )
        return self

    @property
    def class_loss_weight(self) -> float:
        """The configured weight w. The class target is scaled by 100, so the effective weight is 100 w.

        Source: docs/explanation/method.md, section 3.
        """
        given = self.training.text_class_pred_weight
        return self.model.traits.class_loss_weight if given is None else given

    def dump(self) -> dict[str, Any]:
        """The configuration as JSON values, with every default."""
        return self.model_dump(mode="json")

    def check_grid(self) -> list[int]:
        """The latent grid [X, Y, Z] of `data.dim`.

        Raises:
            ConfigError: `data.dim` is not divisible; the nearest valid sizes are named.
        """
        step = self.autoencoder.factor * self.model.divisor
        if any(size % step for size in self.data.dim):
            down = [max(step, size // step * step) for size in self.data.dim]
            up = [-(-size // step) * step for size in self.data.dim]
            raise ConfigError(
                f"the grid {self.data.dim} is not divisible by {step} (autoencoder {self.autoencoder.factor} x U-Net "
                f"{self.model.divisor})",
                field="data.dim",
                fix=f"use {down} or {up}",
            )
        return [size // self.autoencoder.factor for size in self.data.dim]


# Settings of earlier releases and of the reference's files that nothing reads -> the option that decides.
REMOVED_SETTINGS = {
    "paths.data_base_dir": "--data_base_dir",
    "paths.train_json": "--data",
    "paths.test_json": "--test_data",
    "paths.output_dir": "--out",
    "paths.trained_autoencoder_path": "--vae",
    "sampling.random_seed": "--seed",
}


def load_config(source: str | Path | Sequence[str | Path], overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: our single file, or the reference's `[env.json, config.json, def.json]` in any order.
        overrides: `{"training.lr": 1e-3}` or `["training.lr=1e-3"]` (values in JSON; a bare word is a string). They win over
            the file.

    Raises:
        ConfigError: naming file, field and fix.
    """
    paths = [source] if isinstance(source, (str, Path)) else list(source)
    if not paths:
        raise ConfigError("no configuration file is given", fix="give one file, or the reference's env, config and def")
    files = [(path, read_json(path, error=ConfigError)) for path in paths]
    values, origin = files[0][1], ", ".join(Path(path).name for path in paths) if len(paths) > 1 else paths[0]
    if len(files) > 1 or (isinstance(values, dict) and reference_config.KEYS & values.keys() and "model" not in values):
        values = reference_config.convert(files)
    if not isinstance(values, dict):
        raise ConfigError("a configuration must be one JSON object", path=origin, fix="start the file with {")
    return _validate(_override(values, overrides), origin, _written(overrides))


def make_config(
    overrides: Mapping[str, Any] | Sequence[str] = (), *, base: Config | None = None, origin: object = None
) -> Config:
    """The defaults, or `base`, with overrides, validated like a file.

    Args:
        overrides: as for `load_config`.
        base: the configuration that is changed.
        origin: the file that the overrides come from, for error messages.
    """
    written = {} if origin else _written(overrides)
    return _validate(_override(base.dump() if base else {}, overrides), origin, written)


def _written(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, str | None]:
    """By the dotted name of each override: how it is written on the command line; None if it is a Python value."""
    if isinstance(overrides, Mapping):
        return dict.fromkeys(overrides)
    return {text.partition("=")[0]: f"--set {text}" for text in overrides}


def _override(values: dict[str, Any], overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    pairs = overrides.items() if isinstance(overrides, Mapping) else (_split(text) for text in overrides)
    for dotted, value in pairs:
        *parents, last = dotted.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"'{parent}' is a value, not a section", field=dotted, fix="check the dotted name")
        section[last] = copy.deepcopy(value)  # a later override may change a key in it
    return values


def _split(text: str) -> tuple[str, Any]:
    import json

    dotted, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override '{text}' has no value", field=dotted, fix="write it as section.key=value")
    try:
        return dotted, json.loads(value)
    except (ValueError, RecursionError):  # not JSON; a number of thousands of digits; thousands of brackets
        return dotted, value


def _validate(values: dict[str, Any], origin: object, overrides: Mapping[str, str | None]) -> Config:
    try:
        return Config.model_validate(_without_removed(values, origin))
    except ValidationError as bad:
        raise explain(bad, Config, path=origin, overrides=overrides) from None


def _without_removed(values: dict[str, Any], origin: object) -> dict[str, Any]:
    """`values` without the settings that had no effect and are gone; a warning names those that were set."""
    values, ignored = dict(values), []
    for dotted, instead in REMOVED_SETTINGS.items():
        section, key = dotted.split(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            if values[section][key] not in (None, 0):  # files that we wrote spell out every default
                ignored.append(f"{key} (use {instead})")
            values[section] = {name: value for name, value in values[section].items() if name != key}
    if ignored:
        _warn_once(f"{origin or 'overrides'}: these settings have no effect and are ignored: {', '.join(ignored)}")
    return values


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
