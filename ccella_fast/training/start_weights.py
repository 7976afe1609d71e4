"""Weights that a new run starts from: read from any file or folder that has them, compared by name, copied part by part.

Names are those of a model with a report: the U-Net's begin with `unet.`, also those of a model that is a U-Net alone. The
projections of the embedding are split into the columns of their inputs, `[time]`, `[class]` and `[spacing]`, so that a U-Net
with a class input can start from one without.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ccella_fast.checkpoint import BASE_WEIGHTS, checkpoint_folder, load_checkpoint
from ccella_fast.config import Config, ModelConfig
from ccella_fast.config_scheduler import SchedulerConfig
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.models import build_model
from ccella_fast.models.low_rank import plain_name
from ccella_fast.models.parts import is_within, select_trained, subpart_of
from ccella_fast.quantities import counted
from ccella_fast.reference_checkpoint import read_weight_file
from ccella_fast.storage import atomic_path, read_json, sha256
from ccella_fast.training.maisi_weights import MODALITIES, fold_constant_inputs

logger = logging.getLogger("ccella_fast")
# All parts of weights; the last two are within the U-Net, and go with it.
PARTS = ("unet", "adapter", "class_heads", "unet.attention", "unet.class_input")
# Settings that change what a model computes but no shape, and the part that they belong to.
_HIDDEN = {"num_head_channels": "unet", "norm_num_groups": "unet", "norm_eps": "unet", "adapter_heads": "adapter"}
# The settings on which the shape or the presence of a tensor depends; the first pattern that matches counts.
_SETTINGS = [
    (r"unet\.(conv_in|out\.2)\.", "model.latent_channels and model.num_channels"),
    (r"unet\.pirads_layer\.", "model.variant and model.num_classes"),
    (r"unet\..*attn2\.to_[kv]\.", "model.cross_attention_dim and model.num_channels"),
    (r"unet\..*\.(down|up)sampler\.", "model.resblock_updown and model.num_channels"),
    (r"unet\..*\.attn1?\.out_proj\.", "model.include_fc"),
    (r"unet\..*\.(attentions|attention)\.", "model.variant and model.attention_levels"),
    (r"unet\.(down|up)_blocks\.\d+\.resnets\.", "model.num_channels and model.num_res_blocks"),
    (r"unet\.", "model.num_channels"),
    (r"ella\.connector\.latents", "model.num_latents and model.cross_attention_dim"),
    (r"ella\.connector\.proj_in\.", "model.input_dim and model.cross_attention_dim"),
    (r"ella\.connector\.perceiver_blocks\.", "model.adapter_blocks and model.cross_attention_dim"),
    (r"ella\.connector\.(cascade_blocks|classifier)\.", "model.class_head_dim, model.num_latents and model.adapter_blocks"),
    (r"ella\.time_embedding\.", "model.adapter_time_dim and model.cross_attention_dim"),
    (r"classifier\.", "model.variant, model.num_classes and model.adapter_blocks"),
]  # fmt: skip


@dataclass
class StartWeights:
    """Weights that fit a model, except for the parts in `skip`.

    Attributes:
        path: the file or step folder.
        sha256: of the file of weights.
        tensors: by name, see above; empty after `load_into`.
        skip: parts that are not taken from them.
        notes: what they are, and what was changed, in words.
        scale_factor: of the latents that the weights were trained on, one per sequence; None if it is not known.
        table: what is loaded, new and skipped, as rows (name, what).
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor] = field(repr=False)
    skip: list[str]
    notes: list[str]
    scale_factor: list[float] | None
    table: list[tuple[str, str]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """The entry of training_state.json."""
        return {"sha256": self.sha256, "skip": sorted(self.skip)}

    @torch.no_grad()
    def copy_to(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights to the tensors of the model that they were compared with."""
        for name, target in named_columns(state).items():
            if not _is_skipped(name, self.skip):
                target.copy_(self.tensors[name])

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights to the model that they were compared with, and release them."""
        self.copy_to(model.state_dict())
        self.tensors.clear()


def read_start_weights(config: Config) -> StartWeights | None:
    """Read and check the weights that a new run starts from; None if it starts from random ones.

    Args:
        config: of the run; `paths.existing_ckpt_filepath` names the weights, `training.init_skip` what is not taken from them.

    Raises:
        CheckpointError: they cannot be read, or do not fit.
        ConfigError: a setting of the start is given without weights.
    """
    path, training = config.paths.existing_ckpt_filepath, config.training
    if path is None:
        for key, value in (
            ("init_skip", training.init_skip),
            ("init_modality", training.init_modality is not None),
            ("low_rank.rank", training.low_rank.rank),
        ):
            if value:
                why = f"training.{key} says how a run starts from weights, but none are given"
                raise ConfigError(why, field=f"training.{key}", fix="add --init_from PATH, or remove this setting")
        return None
    weights, trained_as, scheduler = _read(Path(path))
    weights.skip = list(training.init_skip)
    prefix = "" if any(name.startswith("unet.") for name in weights.tensors) else "unet."
    tensors = {prefix + name: tensor for name, tensor in weights.tensors.items()}
    modality = MODALITIES[config.data.sequences[0]] if training.init_modality is None else training.init_modality
    folded = fold_constant_inputs(tensors, modality=modality, path=weights.path)
    weights.tensors, weights.notes = named_columns(folded.tensors), weights.notes + folded.notes
    with torch.device("meta"):
        expected = named_columns(build_model(config).state_dict())
    _check_fit(weights, expected)
    if trained_as is not None:
        _check_hidden_settings(weights, trained_as, config.model)
    weights.table = _table(weights, expected)
    if scheduler is not None and _objective(scheduler) != _objective(config.scheduler):
        about = f"{_objective(scheduler)} when they were trained; this run's is {_objective(config.scheduler)}"
        weights.table.append(("  objective", about))
    return weights


def write_base_weights(folder: Path, weights: StartWeights, config: Config) -> dict[str, Any]:
    """Write the weights that a run with low-rank adapters does not train to `folder`, in fp32, once for all checkpoints.

    Returns:
        The entry of training_state.json.
    """
    with torch.device("meta"):
        model = build_model(config)
    state = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
    weights.copy_to(state)
    select_trained(model, config)
    frozen = {plain_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    with atomic_path(folder / BASE_WEIGHTS) as temporary:
        save_file({name: state[name] for name in frozen}, temporary)
    return {"sha256": sha256(folder / BASE_WEIGHTS)}


def check_same_start(path: str | None, skip: Sequence[str], recorded: dict[str, Any] | None, start: Path) -> None:
    """Raise ConfigError if a run that is resumed is given other weights to start from than it has started from.

    Args:
        path: the weights that are given; None: the run is resumed without them.
        skip: parts that are not taken from them.
        recorded: what `StartWeights.facts` returned when the run was started; None if it started from random weights.
        start: the step folder to resume from.
    """
    if path is None:
        return
    fix = "remove --init_from: a run that is resumed does not need it; or start a new run in another --output_dir"
    if recorded is None:
        why = "this run did not start from weights, but --init_from is given"
        raise ConfigError(why, path=start, field="--init_from", fix=fix)
    if not Path(path).exists():
        logger.info("%s does not exist; the run continues from its checkpoint and does not need it", path)
        return
    digest = (
        sha256(path) if Path(path).is_file() else _listed_digest(checkpoint_folder(Path(path), field="--init_from"))
    )
    if digest != recorded["sha256"] or sorted(skip) != recorded["skip"]:
        before, now = (" ".join(parts) or "no part" for parts in (recorded["skip"], sorted(skip)))
        what = "other weights than these" if digest != recorded["sha256"] else f"{before} skipped, and now {now} is"
        why = f"this run was started with {what} ({path})"
        raise ConfigError(why, path=start, field="--init_from", fix=fix)


def named_columns(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model by the names of this module; those that are split are views."""
    prefix = "" if any(name.startswith("unet.") for name in state) else "unet."
    named = {prefix + name: tensor for name, tensor in state.items()}
    width = named["unet.time_embed.2.weight"].shape[0] if "unet.time_embed.2.weight" in named else 0
    columns = ["time", "class", "spacing"] if "unet.pirads_layer.0.weight" in named else ["time", "spacing"]
    result: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if name.endswith(".time_emb_proj.weight") and tensor.ndim == 2 and tensor.shape[1] == width * len(columns):
            parts = zip(columns, tensor.tensor_split(len(columns), dim=1), strict=True)
            result |= {f"{name}[{column}]": part for column, part in parts}
        else:
            result[name] = tensor
    return result


def _table(weights: StartWeights, expected: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    rows = [("start weights", ": ".join([str(weights.path), *([", ".join(weights.notes)] if weights.notes else [])]))]
    for part in PARTS:
        elements = sum(tensor.numel() for name, tensor in expected.items() if subpart_of(name) == part)
        given = sum(subpart_of(name) == part for name in weights.tensors)
        if elements and is_within(part, weights.skip):
            rows.append((f"  {part}", f"{elements:,} parameters are new, {counted(given, 'tensor')} skipped"))
        elif elements:
            rows.append((f"  {part}", f"{elements:,} parameters loaded"))
        elif given:
            rows.append((f"  {part}", f"{counted(given, 'tensor')} skipped"))
    if weights.scale_factor is not None:
        factors = ", ".join(f"{factor:.4g}" for factor in weights.scale_factor)
        rows.append(("  scale factor", f"{factors} when they were trained; the prepared folder's is used"))
    return rows


def _is_skipped(name: str, skip: list[str]) -> bool:
    return is_within(subpart_of(name), skip)


def _read(path: Path) -> tuple[StartWeights, ModelConfig | None, SchedulerConfig | None]:
    """The weights, and the model and the objective that they were trained as if that is known."""
    if not path.exists():
        raise CheckpointError(
            "this file or folder does not exist", path=path, field="--init_from", fix="check the path"
        )
    if path.is_dir():  # our own: a run, a step, an exported or saved model; averaged weights if there are some
        loaded = load_checkpoint(checkpoint_folder(path, field="--init_from"))
        what = {"ema": "averaged weights", "raw": "weights"}[loaded.weights]
        about = f"{what} of {loaded.variant} after {counted(loaded.step, 'step')}"
        tensors, digest = loaded.model.state_dict(), _listed_digest(loaded.path)
        weights = StartWeights(loaded.path, digest, tensors, [], [about], loaded.scale_factor)
        return weights, loaded.config.model, loaded.config.scheduler
    file = read_weight_file(path)
    return StartWeights(path, sha256(path), file.state_dict, [], [], file.scale_factor), file.config, None


def _objective(scheduler: SchedulerConfig) -> str:
    return f"{scheduler.prediction} of {scheduler.schedule}"


def _listed_digest(folder: Path) -> str:
    """The SHA-256, in the manifest, of the weights that `load_checkpoint` chooses."""
    files = read_json(folder / "manifest.json", error=CheckpointError)["files"]
    return files["ema.safetensors" if "ema.safetensors" in files else "model.safetensors"]["sha256"]


def _check_fit(weights: StartWeights, expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, naming the first difference and all parts with one, unless every tensor that is taken fits."""
    found = weights.tensors
    taken = [name for name in dict.fromkeys([*expected, *found]) if not _is_skipped(name, weights.skip)]
    wrong = [name for name in taken if _difference(name, expected, found)]
    if wrong:
        parts = sorted({subpart_of(name) for name in wrong}, key=PARTS.index)
        others = "" if len(wrong) == 1 else f"; with {len(wrong) - 1} others it is in {', '.join(parts)}"
        fix = f"change {_setting_of(wrong[0])}, or start these parts anew with --init_skip "
        fix += " ".join(sorted([*weights.skip, *parts], key=PARTS.index))
        why = f"{_difference(wrong[0], expected, found)}{others}"
        raise CheckpointError(why, path=weights.path, field=wrong[0], fix=fix)
    for name in taken:
        if not found[name].is_floating_point() or not bool(found[name].isfinite().all()):
            why = f"'{name}' of the weights has values that are not finite numbers"
            raise CheckpointError(why, path=weights.path, field=name, fix="give another file")


def _difference(name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    if name not in found:
        return f"the weights have no '{name}'"
    if name not in expected:
        return f"the model has no '{name}', and the weights have"
    shapes = [list(tensors[name].shape) for tensors in (found, expected)]
    return None if shapes[0] == shapes[1] else f"'{name}' has the shape {shapes[0]}, and the model needs {shapes[1]}"


def _check_hidden_settings(weights: StartWeights, trained_as: ModelConfig, model: ModelConfig) -> None:
    """Raise CheckpointError for a setting that changes what the weights compute, but none of their shapes."""
    for key, part in _HIDDEN.items():
        before, now = getattr(trained_as, key), getattr(model, key)
        if before != now and not is_within(part, weights.skip):
            why = f"the weights were trained with model.{key} {before}, and {now} is configured"
            raise CheckpointError(why, path=weights.path, field=f"model.{key}", fix=f"set model.{key} to {before}")


def _setting_of(name: str) -> str:
    return next((setting for pattern, setting in _SETTINGS if re.match(pattern, name)), "model.variant")
