"""Checkpoint folders: validation, search for the newest one, loading for sampling.

The last file written to a checkpoint is manifest.json, with the SHA-256 of every other file; then the folder is renamed to
its final name, RUN/checkpoints/step-00000400/. A checkpoint is valid if its files have these hashes. Checkpoints are written by
`training.checkpointing`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ccella_fast.config import Config, load_config, make_config
from ccella_fast.data.manifest import PositiveFinite
from ccella_fast.errors import CheckpointError, ConfigError, DataError
from ccella_fast.folder_kinds import check_folder, wrong_folder
from ccella_fast.folder_lock import lock_folder
from ccella_fast.storage import publish_folder, read_json, safe_join, sha256, write_json

logger = logging.getLogger("ccella_fast")
FORMAT, VERSION = "ccella_fast.checkpoint", 2
BASE_WEIGHTS = "base.safetensors"  # beside the step folders of a run with low-rank adapters: what it does not train
_READABLE = (1, 2)  # version 1 has the optimizer's state as DeepSpeed's shards instead of whole tensors
_KEYS = {"format", "version", "step", "world_size", "versions", "files"}  # of a manifest
_FIX = "use another checkpoint, or train again"
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Lengths = Annotated[list[PositiveFinite], Field(min_length=3, max_length=3)]
_Number = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class _Quarantine(BaseModel):
    """See `training.quarantine`: tables by the number of a study."""

    model_config = ConfigDict(strict=True)
    strikes: dict[_Number, _Count] = {}
    left_out: dict[_Number, _Count] = {}


class _TrainedOn(BaseModel):
    """See `sampling.trained_on`."""

    model_config = ConfigDict(strict=True)
    classes: Annotated[list[_Count], Field(min_length=2, max_length=2)]
    spacing: Annotated[list[_Lengths], Field(min_length=2, max_length=2)]


class _StartWeights(BaseModel):
    """See `training.start_weights`."""

    model_config = ConfigDict(strict=True)
    sha256: str
    skip: list[str]


class _BaseWeights(BaseModel):
    """See `training.start_weights.write_base_weights`."""

    model_config = ConfigDict(strict=True)
    sha256: str


class _Extension(BaseModel):
    """See `training.resume.run_length`."""

    model_config = ConfigDict(strict=True)
    step: _Count
    before: _Count = Field(alias="from")
    to: _Count


class _State(BaseModel):
    """What is read from training_state.json. Checkpoints of earlier versions and exported models have only some entries."""

    model_config = ConfigDict(strict=True)
    step: _Count
    scale_factor: list[PositiveFinite]
    intensity_scale: dict[str, PositiveFinite]
    adam_steps: _Count = 0
    ema_updates: _Count = 0
    power_ema_step: _Count = 0
    bad_in_a_row: _Count = 0
    quarantine: _Quarantine = _Quarantine()
    trained_on: _TrainedOn | None = None
    averaged: bool | None = None  # of exported models
    start_weights: _StartWeights | None = None
    base_weights: _BaseWeights | None = None
    extensions: list[_Extension] = []
    measured: dict[str, float | None] = {}


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode, with everything else that sampling needs.

    Attributes:
        scale_factor: one entry per sequence.
        weights: "ema" or "raw".
        autoencoder: folder for `load_autoencoder`; None if the checkpoint has none (a reference .pt).
        trained_on: what the training has seen, see `sampling.trained_on`; None if the checkpoint does not say.
        averaged: whether the weights are averages; None if an exported model does not say, as those of earlier releases.
        start_weights: SHA-256 of the weights that the training started from, and the parts that it did not take from them; None
            if it started anew, or the checkpoint does not say.
    """

    model: Any
    variant: str
    scale_factor: list[float]
    config: Config
    step: int
    intensity_scale: dict[str, float]
    weights: str
    autoencoder: Path | None
    path: Path
    trained_on: dict[str, Any] | None = None
    averaged: bool | None = None
    start_weights: dict[str, Any] | None = None


def load_checkpoint(path: str | Path, *, weights: str | None = None, device: Any = "cpu") -> Checkpoint:
    """Load a trained model, after all hashes have been checked.

    Args:
        path: a run folder (its newest valid step), a step folder, or a reference .pt file.
        weights: "ema", "raw", or None for the averaged weights if there are any.
        device: device of the model.

    Raises:
        CheckpointError: naming the file.
    """
    path = Path(path)
    if weights not in ("ema", "raw", None):
        raise ValueError(f"weights must be 'ema', 'raw' or None, got {weights!r}")
    if path.is_file():
        return _load_reference(path, weights, device)
    folder = checkpoint_folder(path)
    listed = verify_checkpoint(folder)["files"]  # a file that the manifest does not list has not been checked
    from safetensors.torch import load_file

    from ccella_fast.models.low_rank import merge_factors

    config, state = load_config(folder / "config.json"), read_state(folder)
    if weights is None or (weights == "ema" and state.get("averaged")):  # then the only weights are averages
        weights = "ema" if "ema.safetensors" in listed else "raw"
    file = folder / ("ema.safetensors" if weights == "ema" else "model.safetensors")
    if file.name not in listed:
        which, present, option = ("averaged", "raw", "raw") if weights == "ema" else ("raw", "averaged", "ema")
        fix = f'use the {present} weights, with --weights {option}, or weights="{option}" in Python'
        raise CheckpointError(f"this checkpoint has no {which} weights", path=file, fix=fix)
    tensors = load_file(file)
    if state.get("base_weights") is not None:
        low_rank = config.training.low_rank
        tensors = merge_factors(read_base_weights(folder, state), tensors, low_rank.alpha / low_rank.rank)
    model = _build(config, tensors, file, device)
    vae, trained_on = folder / "vae", state.get("trained_on")
    if trained_on is not None:  # other entries are not passed on
        trained_on = {name: trained_on[name] for name in _TrainedOn.model_fields}
    averaged = True if weights == "ema" else state.get("averaged")
    if averaged is None and ("ema.safetensors" in listed or config.training.ema_decay == 0):
        averaged = False
    return Checkpoint(
        model, config.model.variant, state["scale_factor"], config, state["step"], state["intensity_scale"], weights,
        vae if vae.is_dir() else None, folder, trained_on, averaged, state.get("start_weights"),
    )  # fmt: skip


def read_base_weights(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that a run with low-rank adapters does not train, by their names in the model without adapters.

    Args:
        folder: a step folder, which has only what is trained.
        state: its training_state.json.

    Raises:
        CheckpointError: they are missing, or others than those that the run was started with.
    """
    from safetensors.torch import load_file

    path = folder.resolve().parent / BASE_WEIGHTS
    if not path.is_file():
        why = "this file is missing; the checkpoint has low-rank adapters alone, and the weights that they adapt are in it"
        fix = "put the file back, in the folder that contains the step folder, or use what `ccella-fast export` wrote"
        raise CheckpointError(why, path=path, fix=fix)
    if sha256(path) != state["base_weights"]["sha256"]:
        why = f"this file is not the one that the adapters of {folder.name} were trained with (its SHA-256 differs)"
        raise CheckpointError(why, path=path, fix="restore the file of this run")
    return load_file(path)


def export_reference(path: str | Path, out: str | Path, *, weights: str | None = None) -> None:
    """Write a checkpoint in the reference's format: one .pt file that `torch.load(weights_only=True)` reads.

    Raises:
        ConfigError: `out` exists, or another export is writing it. It may be the reference's own file of the same name.
        CheckpointError: the network was trained for another objective than the reference's.
    """
    from ccella_fast.reference_checkpoint import write_reference

    out = Path(out)
    check_exportable(path)
    if out.is_dir():
        raise ConfigError("this is a folder", path=out, field="--out", fix=f"give a file, such as {out / 'CCELLA.pt'}")
    if out.exists():
        raise ConfigError("this file already exists", path=out, field="--out", fix="remove it, or choose another name")
    with lock_folder(out.parent, "ccella-fast export", name=f".{out.name}.lock"):
        loaded = load_checkpoint(path, weights=weights)
        _check_objective(loaded)
        write_reference(
            out,
            state_dict=loaded.model.state_dict(),
            scale_factor=loaded.scale_factor,
            num_train_timesteps=loaded.config.scheduler.num_train_timesteps,
            config=loaded.config.model,
        )


def _check_objective(loaded: Checkpoint) -> None:
    """Raise CheckpointError unless the network predicts the noise of a noise schedule: the reference samples no other."""
    scheduler = loaded.config.scheduler
    if scheduler.is_flow or scheduler.prediction != "epsilon":
        process = "a rectified flow" if scheduler.is_flow else "a noise schedule"
        why = (
            f"this network predicts {scheduler.prediction} of {process}; the reference's format cannot say so, and the "
            "reference would sample it as noise"
        )
        fix = "use --format monai-bundle, or share it with `ccella-fast push`"
        raise CheckpointError(why, path=loaded.path, field="scheduler.prediction", fix=fix)


def check_exportable(path: str | Path) -> None:
    """Raise CheckpointError if `path` is a file, such as one that has been exported. For use before long work."""
    if Path(path).is_file():
        why = "this is a file; a run folder or a step folder is exported"
        raise CheckpointError(why, path=path, field="--checkpoint", fix="use a reference's .pt file as it is")


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """The published checkpoints of a run, newest first, without verification.

    Raises:
        CheckpointError: the folder that contains them cannot be read.
    """
    folder = run / "checkpoints"
    if not os.path.lexists(folder):
        return []
    try:  # not `glob`, for which a folder that cannot be read is empty: a resumed run would begin again
        found = [path for path in folder.iterdir() if path.name.startswith("step-") and path.is_dir()]
    except OSError as error:
        raise _unreadable(error, folder) from None
    return sorted(found, reverse=True)


def checkpoint_folder(path: Path, *, field: str | None = None) -> Path:
    """The newest checkpoint of a run folder; a step folder is returned as it is.

    Args:
        path: one of both.
        field: the option that named it, for errors.

    Raises:
        CheckpointError: it is something else, does not exist, or has no valid checkpoint.
    """
    check_folder(path, "checkpoint", error=CheckpointError, field=field)
    folder = path if (path / "manifest.json").is_file() else newest_checkpoint(path)
    if folder is None:
        raise wrong_folder(path, "checkpoint", error=CheckpointError, field=field)
    return folder


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose hashes match, or None if the run has no checkpoint. A warning names each corrupt one.

    Raises:
        CheckpointError: the run has checkpoints, and all are corrupt.
    """
    folders = step_folders(run)
    for folder in folders:
        try:
            verify_checkpoint(folder)
            return folder
        except CheckpointError as error:
            if not folder.exists():  # a training that goes on has written newer ones and removed it meanwhile
                return newest_checkpoint(run)
            logger.warning("%s is skipped: %s", error.path or folder, error.why)
    if folders:
        raise CheckpointError("every checkpoint of this run is damaged", path=run / "checkpoints", fix=_FIX)
    return None


def write_manifest(
    folder: Path, hashes: Mapping[str, str] = MappingProxyType({}), *, format: str = FORMAT, **facts: Any
) -> None:
    """Write manifest.json with `facts` and the SHA-256 and size of every file in `folder`.

    Args:
        folder: the folder.
        hashes: those that are known already, by relative path; these files are not read.
        format: what the folder is.
        facts: further entries.
    """
    paths = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files = {
        name: {"sha256": hashes.get(name) or sha256(file), "bytes": file.stat().st_size} for name, file in paths.items()
    }
    write_json(folder / "manifest.json", {"format": format, "version": VERSION, **facts, "files": files}, sealed=True)


def verify_checkpoint(folder: Path, *, format: str = FORMAT) -> dict[str, Any]:
    """Compare every listed file with the manifest, which is of this format, and return the manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    path = folder / "manifest.json"
    manifest = read_json(path, error=CheckpointError)
    try:
        if manifest["format"] != format or manifest["version"] not in _READABLE:
            raise CheckpointError(f"this is not a {format} of version 1 or {VERSION}", path=path, fix=_FIX)
        if unknown := manifest.keys() - _KEYS:
            raise CheckpointError(f"this manifest is malformed (the key {min(unknown)!r:.40})", path=path, fix=_FIX)
        for name, entry in manifest["files"].items():
            file = safe_join(folder, name)
            if not file.is_file():
                raise CheckpointError("this file is missing", path=file, fix=_FIX)
            if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
                raise CheckpointError("this file is damaged (its SHA-256 differs)", path=file, fix=_FIX)
    except OSError as error:
        raise _unreadable(error, file) from None
    except DataError as bad:
        raise CheckpointError(
            f"this manifest lists a file outside the checkpoint: {bad.why}", path=path, fix=_FIX
        ) from None
    except (KeyError, TypeError, AttributeError) as bad:
        raise CheckpointError(f"this manifest is malformed ({bad})", path=path, fix=_FIX) from None
    return manifest


def _unreadable(error: OSError, path: Path) -> CheckpointError:
    why = f"this path cannot be read: {os.strerror(error.errno or 0)}"
    return CheckpointError(why, path=path, fix="check its permissions and the disk")


def read_state(folder: Path) -> dict[str, Any]:
    """Read training_state.json: the facts of the run, which a resumed run must share, and its progress.

    Raises:
        CheckpointError: it cannot be read, or the value of a known entry is not one that training writes.
    """
    path = folder / "training_state.json"
    state = read_json(path, error=CheckpointError)
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or None
        raise CheckpointError(f"this state is not valid: {first['msg']}", path=path, field=field, fix=_FIX) from None
    return state


def publish_checkpoint(partial: Path, final: Path, *, keep: int, best: Path | None = None) -> list[Path]:
    """Rename a complete folder to its final name, then set aside all checkpoints but this one and the newest `keep` - 1 others.

    It need not be the newest, because a run can be resumed from an older checkpoint. `best` is kept in any case.

    Returns:
        The folders that were set aside, to be removed by the caller. Their names are those of partial folders, so that a kill
        during the removal does not leave a partial checkpoint under a valid name.
    """
    replaced = [final] if final.exists() else []  # a corrupt checkpoint that was skipped
    removed = [_set_aside(folder) for folder in replaced]
    publish_folder(partial, final)
    others = [folder for folder in step_folders(final.parent.parent) if folder != final]
    return removed + [_set_aside(folder) for folder in others[keep - 1 :] if folder != best]


def _set_aside(folder: Path) -> Path:
    return folder.rename(folder.with_name(f".partial-old-{folder.name}"))


def _build(config: Config, state: dict[str, Any], file: Path, device: Any) -> Any:
    import torch

    from ccella_fast.models import build_model
    from ccella_fast.models.weights import first_difference

    with torch.device("meta"):
        model = build_model(config)
    difference = first_difference(model.state_dict(), state)
    if difference is not None:
        why = f"these weights do not fit the configured {config.model.variant}: {difference}"
        raise CheckpointError(why, path=file, field="model", fix="load them with the configuration of their training")
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def _load_reference(path: Path, weights: str | None, device: Any) -> Checkpoint:
    from ccella_fast.reference_checkpoint import read_reference

    if weights == "ema":
        raise CheckpointError("a reference checkpoint has no averaged weights", path=path, fix="load the raw weights")
    found = read_reference(path)
    latents = found.config.latent_channels
    overrides = {
        "model": found.config.model_dump(mode="json"),
        "scheduler.num_train_timesteps": found.num_train_timesteps,
        "autoencoder.latent_channels": latents[0],
        "data.sequences": ["t2w"] if len(latents) == 1 else ["t2w", "hbv", "adc"],
    }
    config = make_config(overrides)
    model = _build(config, found.state_dict, path, device)
    return Checkpoint(model, found.variant, found.scale_factor, config, found.epoch, {}, "raw", None, path)
