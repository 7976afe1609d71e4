"""One training run from its arguments to its exit code: check, resume or start, train, say how it ended."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

from ccella_fast.checkpoint import newest, read_state, step_folder, verify
from ccella_fast.config import Config, load_config
from ccella_fast.data.manifest import Prepared, load_manifest
from ccella_fast.errors import CcellaError, CheckpointError, ConfigError, DataError
from ccella_fast.storage import disk_error, sha256, sweep, write_json
from ccella_fast.training.deepspeed_config import merge

LOG = logging.getLogger("ccella_fast")
LATEST = "latest"
# May differ between a run and its continuation; everything else shapes the result.
_FREE = {
    "name", "vae_training", "sampling", "paths", "training.activation_checkpointing", "training.checkpointing_steps",
    "training.checkpoints_total_limit", "training.logging_steps",
}  # fmt: skip


def train(config: Config, *, data: Path, run: Path, resume: str | None = None, deepspeed_file: Path | None = None) -> int:
    """Train on the prepared folder `data`, write to `run`; returns the exit code (0, or 128 + signal when asked to stop).

    resume: None (a run that is already there is refused), "latest", or a step folder. Raises CcellaError."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config, engine_values = merge(config, deepspeed_file, world_size=world_size, output_dir=run)
    prepared = check_data(config, data)
    facts = {
        "total_steps": count_steps(config, prepared, world_size),
        "world_size": world_size,
        "data_sha256": sha256(data / "manifest.json"),
        "variant": config.model.variant,
        "seed": config.training.seed,
        "scale_factor": prepared.scale_factor,
        "intensity_scale": prepared.intensity_scale,
    }
    start = find_start(run, resume)
    if start is not None:
        state = read_state(start)
        check_same(config, facts, start, state)
        if state["step"] >= facts["total_steps"]:
            LOG.info("this run has done its %d steps", facts["total_steps"])
            return 0
        facts |= {"scale_factor": state["scale_factor"], "intensity_scale": state["intensity_scale"]}
    return _train(config, engine_values, data, run, start, facts, deepspeed_file)


def check_data(config: Config, data: Path) -> Prepared:
    """The prepared folder's manifest, if this configuration can train on it."""
    prepared = load_manifest(data)
    path, fix = data / "manifest.json", "prepare the data with this configuration"
    if prepared.scale_factor is None:
        raise DataError("this folder holds no latents yet", path=path, field="scale_factor", fix="run prepare with --vae")
    if prepared.data.sequences != config.data.sequences:
        why = f"prepared for {prepared.data.sequences}, configured are {config.data.sequences}"
        raise DataError(why, path=path, field="data.sequences", fix=fix)
    return prepared


def count_steps(config: Config, prepared: Prepared, world_size: int) -> int:
    """T: `max_train_steps`, or `n_epochs` over the training set."""
    training = config.training
    if training.max_train_steps is not None:
        return training.max_train_steps
    tag = config.data.dataset
    cases = sum(case.split == "train" and tag in (None, case.dataset) for case in prepared.cases)
    return math.ceil(training.n_epochs * cases / (training.batch_size * training.gradient_accumulation_steps * world_size))


def find_start(run: Path, resume: str | None) -> Path | None:
    """The step folder to go on from; None: start fresh."""
    if resume is None:
        if (run / "checkpoints").exists() or (run / "config.json").exists():
            raise ConfigError("this folder already holds a run", path=run, fix="add --resume, or choose another --output_dir")
        return None
    if resume == LATEST:
        found = newest(run)
        LOG.info("resuming from %s", found) if found else LOG.info("nothing to resume in %s: a fresh start", run)
        return found
    folder = Path(resume)
    if not (folder / "manifest.json").is_file():
        raise CheckpointError("there is no checkpoint here", path=folder, fix="name a step folder, or give --resume alone")
    verify(folder)
    if folder.resolve().parent.parent != run.resolve():
        why = "a run goes on in its own folder"
        raise ConfigError(why, path=folder, field="--resume", fix=f"use --output_dir {folder.parent.parent}")
    return folder


def check_same(config: Config, facts: dict[str, Any], start: Path, state: dict[str, Any]) -> None:
    """Refuse to go on with anything that shapes the run changed; the message names the first key."""
    before, now = (_flat(values.dump()) for values in (load_config(start / "config.json"), config))
    before |= {key: state[key] for key in ("world_size", "total_steps", "data_sha256")}
    now |= {key: facts[key] for key in ("world_size", "total_steps", "data_sha256")}
    for key, value in now.items():
        if before.get(key) != value and not any(key == free or key.startswith(free + ".") for free in _FREE):
            raise ConfigError(
                f"{key} is {value!r:.80}; this run was started with {before.get(key)!r:.80}",
                path=start,
                field=key,
                fix="restore it, or start another run with another --output_dir",
            )


def _train(
    config: Config, engine_values: dict[str, Any], data: Path, run: Path, start: Path | None, facts: dict[str, Any], file: Any
) -> int:
    from ccella_fast.training import processes

    device = processes.initialise()  # before anything imports DeepSpeed

    import torch.distributed as dist

    from ccella_fast.environment import recorded
    from ccella_fast.training.telemetry import write_status

    main, total = dist.get_rank() == 0, facts["total_steps"]
    state = {"step": read_state(start)["step"] if start else 0}
    code, ending, why = 1, "failed", None
    try:
        if main:
            with recorded(run, "train", world_size=facts["world_size"], total_steps=total):
                code = _steps(config, engine_values, data, run, start, facts, file, device, state)
        else:
            code = _steps(config, engine_values, data, run, start, facts, file, device, state)
        ending = "terminated" if code else "finished"
        return code
    except BaseException as error:
        code, why = getattr(error, "exit_code", 1), str(error) if isinstance(error, CcellaError) else type(error).__name__
        raise
    finally:
        if main and run.is_dir():
            write_status(run, ending, step=state["step"], total_steps=total, exit_code=code, why=why)


def _steps(
    config: Config,
    engine_values: dict[str, Any],
    data: Path,
    run: Path,
    start: Path | None,
    facts: dict[str, Any],
    file: Any,
    device: Any,
    progress: dict[str, int],
) -> int:
    import contextlib

    import torch
    import torch.distributed as dist

    from ccella_fast.data.dataset import PreparedDataset
    from ccella_fast.diffusion.schedule import Schedule
    from ccella_fast.training import processes, saving
    from ccella_fast.training.ema import Ema
    from ccella_fast.training.engine import build_engine
    from ccella_fast.training.feed import Feed
    from ccella_fast.training.loop import train_loop
    from ccella_fast.training.telemetry import Telemetry, write_status

    control, training, total, main = processes.Control(), config.training, facts["total_steps"], dist.get_rank() == 0
    channels = torch.tensor(config.model.latent_channels)
    feed = Feed(
        PreparedDataset(data, config, "train"),
        seed=training.seed,
        batch_size=training.batch_size,
        accumulation=training.gradient_accumulation_steps,
        rank=dist.get_rank(),
        world_size=facts["world_size"],
        scale=torch.tensor(facts["scale_factor"]).repeat_interleave(channels),
        num_timesteps=config.scheduler.num_train_timesteps,
    )
    if main:
        _open_run(run, config, total)
    engine = build_engine(config, engine_values, total_steps=total, device=device, path=file)
    ema = Ema(engine, training.ema_decay) if training.ema_decay else None
    bad_in_a_row = 0
    if start:
        state = read_state(start)
        saving.restore(start, engine, ema, state)
        bad_in_a_row = state["bad_in_a_row"]
    vae = data / "vae" if (data / "vae").is_dir() else None

    def save(done: int, bad: int) -> None:
        progress["step"] = done
        updates = {"step": done, "ema_updates": ema.updates if ema else 0, "bad_in_a_row": bad}
        saving.save(run, done, engine, ema, config, facts | updates, vae, control)

    stop = processes.StopRequest()
    with contextlib.ExitStack() as stack:
        telemetry = None
        if main:
            first = progress["step"]
            telemetry = stack.enter_context(Telemetry(run, engine, first=first, total=total, global_batch=feed.global_batch))
        done, number = train_loop(
            engine,
            feed,
            Schedule.from_config(config.scheduler),
            ema,
            first=progress["step"],
            total=total,
            weight=config.class_loss_weight,
            logging_steps=training.logging_steps,
            save_steps=training.checkpointing_steps,
            bad_in_a_row=bad_in_a_row,
            save=save,
            stop=stop,
            control=control,
            telemetry=telemetry,
        )
    if number:
        LOG.warning("stopped by signal %d after step %d; its checkpoint is %s", number, done, step_folder(run, done))
    return 128 + number if number else 0


def _open_run(run: Path, config: Config, total: int) -> None:
    from ccella_fast.training.telemetry import write_status

    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, run) from error
    sweep(run)
    write_json(run / "config.json", config.dump())
    write_status(run, "running", step=0, total_steps=total)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
