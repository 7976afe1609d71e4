"""Snapshots of power-function averages, and models with the average of any width that is made of them.

A snapshot is RUN/snapshots/step-XXXXXXXX/, with a file for each width and a manifest. Checkpoints contain the same averages in
fp32, but only the newest are kept. Snapshots are all kept, so they are fp16, which takes half the space. A width is refused if
the sum would magnify the rounding of fp16 beyond that of bf16, in which models are sampled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ccella_fast.checkpoint import (
    newest_checkpoint,
    read_base_weights,
    read_state,
    verify_checkpoint,
    write_manifest,
)
from ccella_fast.config import load_config
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.folder_kinds import folder_kind, wrong_folder
from ccella_fast.folder_lock import lock_folder
from ccella_fast.models.low_rank import merge_factors
from ccella_fast.storage import atomic_folder, check_writable, publish_folder, write_hashed, write_json
from ccella_fast.training.power_ema import file_name
from ccella_fast.training.power_profiles import Fit, fit
from ccella_fast.training.tensor_files import header, raw_tensors

FORMAT = "ccella_fast.snapshot"
DTYPE = torch.float16
PART = "snapshot"  # the folder of a snapshot in that of a checkpoint that is being written
MAX_ERROR = 0.05  # of a profile, relative to its norm
MAX_GAIN = 8.0  # bf16 has three bits less than fp16
WIDTHS = np.arange(10, 281) / 1000  # those of which the range of possible ones is sought
_KEPT = ("scale_factor", "intensity_scale", "trained_on")  # entries of a checkpoint's training_state.json


def snapshot_folder(run: Path, step: int) -> Path:
    """The folder of the snapshot of a step."""
    return run / "snapshots" / f"step-{step:08d}"


def snapshot_steps(run: Path) -> list[int]:
    """The steps of a run's snapshots, ascending, without verification."""
    found = (run / "snapshots").glob(f"step-{'[0-9]' * 8}")
    return sorted(int(path.name.removeprefix("step-")) for path in found if path.is_dir())


def publish_snapshot(partial: Path, run: Path, step: int, hashes: dict[str, str]) -> None:
    """Move a complete folder to its final place. An earlier snapshot of the step is replaced: a resumed run repeats steps.

    hashes: SHA-256 by file name.
    """
    write_manifest(partial, hashes, format=FORMAT, step=step)
    final = snapshot_folder(run, step)
    final.parent.mkdir(exist_ok=True)
    if final.exists():
        _remove(final)
    publish_folder(partial, final)


def remove_later_snapshots(run: Path, step: int) -> None:
    """Remove snapshots after the step that a run is resumed from, which it takes again; with --extend_to they may differ."""
    for later in (each for each in snapshot_steps(run) if each > step):
        _remove(snapshot_folder(run, later))


def _remove(folder: Path) -> None:
    """Remove a snapshot. It is renamed first, so that no half of it is left under its name."""
    shutil.rmtree(folder.rename(folder.with_name(f".partial-old-{folder.name}")))


class Average(NamedTuple):
    """An average of the weights of a run.

    Attributes:
        width: its relative width.
        step: the end of what it averages.
        error: that of its profile, see `power_profiles.Fit`.
        snapshots: how many snapshots it was made of.
        possible: in words, the widths that these snapshots can make.
    """

    width: float
    step: int
    error: float
    snapshots: int
    possible: str


def write_average(run: Path, out: Path, *, width: float, step: int | None = None) -> Average:
    """Write a folder like a checkpoint, with the average of a width as its weights.

    Args:
        run: the run's folder.
        out: the new folder.
        width: the relative width.
        step: the snapshot at which the average ends; default: the newest.

    Raises:
        ConfigError: `out` exists, there is no snapshot of this step, or the snapshots cannot make this width.
        CheckpointError: the run has no snapshots, or a file is damaged.
    """
    if folder_kind(run) != "run":
        raise wrong_folder(run, "run", error=CheckpointError, field="--run")
    if out.exists():
        raise ConfigError("this folder already exists", path=out, field="--out", fix="choose another name")
    check_writable(out, "--out")
    known = snapshot_steps(run)
    checkpoint = newest_checkpoint(run) if known else None
    if checkpoint is None:
        why = "this run has no snapshots of averaged weights"
        fix = "give the --output_dir of a run with training.power_ema_snapshot_steps"
        raise CheckpointError(why, path=run / "snapshots", field="--run", fix=fix)
    if not WIDTHS[0] <= width <= WIDTHS[-1]:
        fix = f"give a number from {WIDTHS[0]:g} to {WIDTHS[-1]:g}, such as 0.08"
        raise ConfigError(f"{width:g} is not the width of an average", field="--width", fix=fix)
    step = known[-1] if step is None else step
    if step not in known:
        steps = ", ".join(map(str, known if len(known) <= 8 else [*known[:3], "...", *known[-3:]]))
        raise ConfigError(f"there is no snapshot of step {step}", path=run, field="--step", fix=f"use one of {steps}")
    config = load_config(checkpoint / "config.json")
    widths = config.training.power_ema_widths
    folders = {at: _verified(snapshot_folder(run, at), widths) for at in known if at <= step}
    stored = [(each, at) for at in folders for each in widths]
    found = fit(stored, [width, *WIDTHS], step, config.training.power_ema_every)
    error, gain, possible = float(found.errors[0]), float(found.gains[0]), possible_widths(found)
    if error > MAX_ERROR or gain > MAX_GAIN:
        what = f"the error of its profile would be {error:.2g} (at most {MAX_ERROR:g})"
        if error <= MAX_ERROR:
            what = f"the rounding of the snapshots would be magnified {gain:.0f} times (at most {MAX_GAIN:g})"
        why = f"the snapshots up to step {step} cannot make the width {width:g}: {what}"
        raise ConfigError(why, path=run / "snapshots", field="--width", fix=f"choose a width of {possible}")
    files = [folders[at] / file_name(each) for each, at in stored]
    average = Average(width, step, error, len(folders), possible)
    state = read_state(checkpoint)
    facts: dict[str, Any] = {"step": step, **{key: state[key] for key in _KEPT if key in state}, "averaged": True}
    merge = None
    if state.get("base_weights") is not None:  # the snapshots have low-rank adapters alone
        low_rank = config.training.low_rank
        base = read_base_weights(checkpoint, state)
        merge = partial(merge_factors, base, scale=low_rank.alpha / low_rank.rank)
    facts["power_ema"] = {"width": width, "error": error, "snapshots": len(folders)}
    with lock_folder(out.parent, "ccella-fast average", name=f".{out.name}.lock"), atomic_folder(out) as folder:
        write_json(folder / "config.json", config.dump())
        write_json(folder / "training_state.json", facts)
        digest = _write_sum(files, found.coefficients[:, 0].tolist(), folder / "model.safetensors", merge)
        if (checkpoint / "vae").is_dir():
            shutil.copytree(checkpoint / "vae", folder / "vae")
        write_manifest(folder, {"model.safetensors": digest}, step=step)
    return average


def _verified(folder: Path, widths: list[float]) -> Path:
    """The folder of a snapshot, of which every file has been compared with its manifest."""
    fix = f"restore the file, or remove {folder.name}: then the others are used"
    try:
        listed = verify_checkpoint(folder, format=FORMAT)["files"]
    except CheckpointError as bad:
        raise CheckpointError(bad.why, path=bad.path, fix=fix) from None
    for name in map(file_name, widths):
        if name not in listed:
            raise CheckpointError("this manifest does not list the file", path=folder / name, fix=fix)
    return folder


def possible_widths(found: Fit) -> str:
    """The widths of `WIDTHS` that can be made, in words. found: their fit, after that of the wanted width."""
    can_be_made = (found.errors[1:] <= MAX_ERROR) & (found.gains[1:] <= MAX_GAIN)
    ranges = []
    for possible, group in groupby(zip(WIDTHS, can_be_made, strict=True), key=lambda entry: bool(entry[1])):
        members = [width for width, _ in group]
        if possible:
            ranges.append(f"{members[0]:g} to {members[-1]:g}")
    return " or ".join(ranges)


def _write_sum(
    files: list[Path],
    coefficients: list[float],
    out: Path,
    merge: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
) -> str:
    """Write the weighted sum of the files' tensors in fp32, added in fp64, tensor by tensor. Returns the SHA-256.

    merge: makes the weights of the sums, which are then all in memory; None: they are the weights.
    """
    with ExitStack() as opened:
        sources = [opened.enter_context(safe_open(file, "pt")) for file in files]
        shapes = {name: sources[0].get_slice(name).get_shape() for name in sorted(sources[0].keys())}

        def total(name: str) -> Tensor:
            result = torch.zeros(shapes[name], dtype=torch.float64)
            for source, coefficient in zip(sources, coefficients, strict=True):
                result.add_(source.get_tensor(name).double(), alpha=coefficient)
            if not result.isfinite().all():
                why = f"the average of {name} is not finite: a weight was too large for the fp16 of the snapshots"
                raise CheckpointError(why, path=files[0].parent, fix="use the other averages of the checkpoint")
            return result.float()

        tensors: Iterable[Tensor] = map(total, shapes)
        if merge is not None:
            merged = merge(dict(zip(shapes, tensors, strict=True)))
            shapes = {name: merged[name].shape for name in sorted(merged)}
            tensors = map(merged.__getitem__, shapes)
        return write_hashed(out, chain([header(shapes)], raw_tensors(tensors)))
