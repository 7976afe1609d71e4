"""One training run from its arguments to its exit code: check, start or resume, train, record how it ended."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ccella_fast.checkpoint import read_state, step_folder
from ccella_fast.config import Config, load_config
from ccella_fast.data.augmentation.parameters import check_conditioning
from ccella_fast.data.checking.findings import check_allowed_names
from ccella_fast.data.checking.overview import check_before_training
from ccella_fast.data.loading.selection import select_studies
from ccella_fast.data.manifest import Manifest, load_manifest
from ccella_fast.errors import ConfigError, DataError, DiskError, NonFiniteError
from ccella_fast.folder_lock import lock_folder
from ccella_fast.processes import HostCollectives
from ccella_fast.quantities import counted
from ccella_fast.storage import disk_error, remove_partial_files, sha256, write_json
from ccella_fast.training.deepspeed_config import merge_deepspeed_config
from ccella_fast.training.resume import agree_on_start, check_agreement, check_unchanged, flatten, run_length
from ccella_fast.training.run_status import RunStatus, read_status
from ccella_fast.training.signals import SignalHandler

if TYPE_CHECKING:
    import torch

    from ccella_fast.data.loading.dataset import LatentSource, PreparedDataset
    from ccella_fast.training.batches import BatchStream
    from ccella_fast.training.condition_dropout import ConditionDropout
    from ccella_fast.training.observer import FixedNoiseLosses, MakePreviews
    from ccella_fast.training.quarantine import Quarantine
    from ccella_fast.training.start_weights import StartWeights

logger = logging.getLogger("ccella_fast")
# Launchers end all processes when one has ended with an error, so the others wait so long for what rank 0 writes last.
_WRITES_WITHIN = timedelta(seconds=10)
_ADD_LATENTS = (
    "train an autoencoder with `ccella-fast train-vae`, then run `ccella-fast prepare` again with --vae FOLDER"
)


@dataclass(frozen=True)
class RunPlan:
    """A run whose settings and data have been checked."""

    config: Config
    engine_values: dict[str, Any]  # for deepspeed.initialize
    deepspeed_file: Path | None
    data: Path  # the prepared folder
    run: Path  # the run's folder
    facts: dict[str, Any]  # written to training_state.json of every checkpoint; a resumed run must have the same
    start: Path | None = None  # the step folder to resume from
    state: dict[str, Any] = field(default_factory=dict)  # its training_state.json; empty for a new run
    start_weights: StartWeights | None = None  # of a new run

    @property
    def total_steps(self) -> int:
        """The length of the run in optimizer steps."""
        return self.facts["total_steps"]


def make_run_plan(
    config: Config,
    *,
    data: Path,
    run: Path,
    deepspeed_file: Path | None,
    start: Path | None = None,
    allow: Sequence[str] = (),
    extend_to: int | None = None,
) -> RunPlan:
    """Check and resolve a new run, or one that is resumed from the step folder `start`. Writes nothing.

    Args:
        config: the configuration.
        data: the prepared folder.
        run: the run's folder.
        deepspeed_file: the user's DeepSpeed configuration.
        start: the step folder.
        allow: names of findings about the data with which a new run starts nevertheless.
        extend_to: the new length of the run in optimizer steps.
    """
    from ccella_fast.models.parts import check_parts
    from ccella_fast.training.start_weights import check_same_start, read_start_weights

    check_allowed_names(allow)
    check_parts(config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config, engine_values = merge_deepspeed_config(
        config, deepspeed_file, world_size=world_size, output_dir=run, auto_precision=lambda: auto_precision(start)
    )
    prepared = check_data(config, data)
    state = {} if start is None else read_state(start)
    length, extensions = run_length(count_steps(config, prepared, world_size), extend_to, run, state)
    weights, origin = None, state.get("start_weights")
    if start is None:
        check_before_training(prepared, config, allow)
        weights = read_start_weights(config)
        origin = weights and weights.facts()
    else:
        check_same_start(config.paths.existing_ckpt_filepath, config.training.init_skip, origin, start)
    facts = {
        "total_steps": length,
        "world_size": world_size,
        "data_sha256": sha256(data / "manifest.json"),
        "variant": config.model.variant,
        "seed": config.training.seed,
        "scale_factor": prepared.scale_factor,
        "intensity_scale": prepared.intensity_scale,
        "start_weights": origin,
        "extensions": extensions,
    }
    return RunPlan(config, engine_values, deepspeed_file, data, run, facts, start, state, weights)


def train(
    config: Config,
    *,
    data: Path,
    run: Path,
    resume: str | None = None,
    deepspeed_file: Path | None = None,
    allow: Sequence[str] = (),
    extend_to: int | None = None,
    make_previews: MakePreviews | None = None,
) -> int:
    """Train on the prepared folder `data` and write to the folder `run`.

    Args:
        config: the configuration.
        data: the prepared folder.
        run: the run's folder.
        resume: "latest", a step folder, or None to start a new run.
        deepspeed_file: the user's DeepSpeed configuration.
        allow: names of findings about the data with which training starts nevertheless, see `ccella-fast check`.
        extend_to: with `resume`: the new length of the run in optimizer steps, see `run_length`.
        make_previews: makes what generates volumes every `monitoring.sample_steps`; None: none are generated.

    Returns:
        The exit code: 0, or 128 + signal after a signal.

    Raises:
        CcellaError: with `resume=None`, also if `run` already contains a run.
    """
    from ccella_fast.training import distributed

    # StallWatch can name a process, so it must come first: the collectives wait longer.
    timeout = 3 * timedelta(minutes=config.training.collective_timeout) + timedelta(minutes=1)
    with contextlib.ExitStack() as held:
        signals = held.enter_context(SignalHandler())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # First, so that they can agree on what follows; a single process reports mistakes faster without.
            distributed.initialize_processes(timeout, signals.check)
        collectives = HostCollectives(timeout)
        main = collectives.rank == 0
        held.callback(collectives.after_rank_zero, _WRITES_WITHIN)
        with distributed.translate_peer_failure():
            collectives.together(lambda: held.enter_context(lock_folder(run, "train.py")) if main else None)
        status = held.enter_context(RunStatus(run, writes=main))
        held.enter_context(_leave_no_trace(run, status) if main else contextlib.nullcontext())
        held.enter_context(distributed.translate_peer_failure())
        start = agree_on_start(run, resume, collectives)
        plan = collectives.together(
            lambda: make_run_plan(
                config, data=data, run=run, deepspeed_file=deepspeed_file, start=start, allow=allow, extend_to=extend_to
            )
        )
        state = plan.state
        facts = plan.facts | {f"{key} of the checkpoint": value for key, value in flatten(state).items()}
        check_agreement(plan.config, plan.engine_values, facts, collectives)
        if start is not None:
            collectives.together(lambda: check_unchanged(plan.config, plan.facts, start, state))
            if state["step"] >= plan.total_steps:
                if main and read_status(run).get("state") != "finished":  # it was killed after its last checkpoint
                    remove_partial_files(run)
                    status.step, status.total_steps = state["step"], plan.total_steps
                    status.begin()
                logger.info("%s is complete (%s), nothing to do", run, counted(plan.total_steps, "step"))
                return 0
        device = distributed.initialize_processes(timeout)
        status.step, status.total_steps = state.get("step", 0), plan.total_steps
        status.exit_code = _train(plan, device, status, signals, collectives, make_previews)
        return status.exit_code


@contextlib.contextmanager
def _leave_no_trace(run: Path, status: RunStatus) -> Iterator[None]:
    """Remove what a start that fails has written to the folder of a new run, for example logs that DeepSpeed opens."""
    before = set(run.iterdir())
    try:
        yield
    except BaseException:
        if not status.has_begun:
            for path in set(run.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def auto_precision(start: Path | None) -> Literal["bf16", "fp32"]:
    """The precision that "auto" selects: that of the resumed run, or the faster one on this machine for a new run.

    start: the step folder to resume from.
    """
    if start is not None:
        return "bf16" if load_config(start / "config.json").training.precision == "bf16" else "fp32"
    from ccella_fast import hardware
    from ccella_fast.training import distributed

    return "bf16" if distributed.uses_gpu() or hardware.cpu_multiplies_bf16() else "fp32"


def check_data(config: Config, data: Path) -> Manifest:
    """Read the manifest of the prepared folder and check that it fits the configuration. Raises DataError, ConfigError."""
    prepared = load_manifest(data)
    path, fix = data / "manifest.json", "prepare the data with this configuration"
    if prepared.scale_factor is None:
        raise DataError("this folder does not contain latents yet", path=path, field="scale_factor", fix=_ADD_LATENTS)
    if prepared.data.sequences != config.data.sequences:
        why = f"the data was prepared for {prepared.data.sequences}, but {config.data.sequences} is configured"
        raise DataError(why, path=path, field="data.sequences", fix=fix)
    wanted = [name for name in ("validation_steps", "sample_steps") if getattr(config.monitoring, name)]
    if wanted and not select_studies(prepared, config, "val"):
        why = f"monitoring.{wanted[0]} is set, but there is no study of the split val"
        fix = "set monitoring.validation_fraction to a share of the patients, such as 0.1, or prepare studies of this split"
        raise ConfigError(why, path=path, field=f"monitoring.{wanted[0]}", fix=fix)
    if config.monitoring.sample_steps and not (data / "vae").is_dir():
        why = "monitoring.sample_steps is set, but this folder does not contain an autoencoder"
        raise DataError(why, path=data / "vae", field="monitoring.sample_steps", fix=_ADD_LATENTS)
    if config.training.latents == "online":
        check_conditioning(config)
        if not (data / "vae").is_dir():
            why = "training.latents is 'online', but this folder does not contain an autoencoder"
            raise DataError(why, path=data / "vae", field="training.latents", fix=_ADD_LATENTS)
    return prepared


def count_steps(config: Config, prepared: Manifest, world_size: int) -> int:
    """The length of the run in optimizer steps: `max_train_steps`, or `n_epochs` over the training set."""
    training = config.training
    if training.max_train_steps is not None:
        return training.max_train_steps
    cases = len(select_studies(prepared, config, "train"))
    return math.ceil(training.n_epochs * cases / training.global_batch(world_size))


def _train(
    plan: RunPlan,
    device: torch.device,
    status: RunStatus,
    signals: SignalHandler,
    collectives: HostCollectives,
    make_previews: MakePreviews | None,
) -> int:
    """Build dataset, engine and stream, restore the checkpoint, and train. Returns the exit code.

    Args:
        plan: the run.
        device: of this process.
        status: records the newest checkpoint.
        signals: end the run after a step.
        collectives: of all processes.
        make_previews: see `train`.
    """
    from ccella_fast.data.augmentation.engine_choice import check_engine
    from ccella_fast.data.loading.dataset import PreparedDataset
    from ccella_fast.hardware import warn_of_emulated_bf16
    from ccella_fast.run_record import write_run_record
    from ccella_fast.training import checkpointing, distributed
    from ccella_fast.training.condition_dropout import ConditionDropout
    from ccella_fast.training.ema import Ema
    from ccella_fast.training.engine import build_engine
    from ccella_fast.training.loop import LoopState, train_loop
    from ccella_fast.training.model_flops import peak_flops, step_flops
    from ccella_fast.training.observer import Observer
    from ccella_fast.training.power_ema import PowerEma
    from ccella_fast.training.quarantine import Quarantine
    from ccella_fast.training.snapshots import remove_later_snapshots
    from ccella_fast.training.stalls import StallWatch
    from ccella_fast.training.start_weights import write_base_weights
    from ccella_fast.training.telemetry import Telemetry

    config, training, first_step, main = plan.config, plan.config.training, status.step, collectives.rank == 0
    state = plan.state
    facts = {"world_size": collectives.world_size, "total_steps": plan.total_steps, "precision": training.precision}
    record = write_run_record(plan.run, "train", **facts) if main else contextlib.nullcontext()
    if main:
        logger.info("training in %s on %s", training.precision, device)
    if device.type == "cpu" and training.precision == "bf16":
        warn_of_emulated_bf16("set training.precision to fp32")
    if plan.start and main:
        status.begin()
    if plan.start_weights is not None and main:
        for name, what in plan.start_weights.table:
            logger.info("%s: %s", name, what)
    needs: Literal["latents", "images"] = "images" if training.latents == "online" else "latents"
    if needs == "images":
        check_engine(config.data.engine)
    dataset = collectives.together(lambda: PreparedDataset(plan.data, config, "train", needs=needs))
    dropout = collectives.together(lambda: ConditionDropout.from_config(config, dataset))
    saved_facts = plan.facts | {key: state[key] for key in ("base_weights",) if key in state}
    if plan.start_weights is not None and training.low_rank.rank > 0:  # before the engine, which releases them
        folder, weights = step_folder(plan.run, 0).parent, plan.start_weights
        base = collectives.together(lambda: write_base_weights(folder, weights, config) if main else None)
        saved_facts["base_weights"] = base
    with distributed.translate_refusal(plan.deepspeed_file):
        engine = build_engine(
            config, plan.engine_values, total_steps=plan.total_steps, device=device, path=plan.deepspeed_file,
            start_weights=plan.start_weights,
        )  # fmt: skip
    if main:  # only now, so that a DeepSpeed file that is refused can be corrected and the command repeated
        _initialize_run_folder(plan)
        status.begin()
    ema = Ema(engine, training.ema_decay) if training.ema_decay else None
    power_ema = PowerEma.from_config(engine, training, plan.total_steps)
    if plan.start:
        checkpointing.restore_checkpoint(plan.start, engine, ema, state, power_ema)
    if main:
        remove_later_snapshots(plan.run, first_step)
    vae = plan.data / "vae" if (plan.data / "vae").is_dir() else None
    quarantine = Quarantine(dataset.ids, state.get("quarantine", {}))
    status.quarantined = quarantine.ids  # the list, which may grow
    stream, trained_on = _make_stream(plan, dataset, device, quarantine, dropout), dataset.trained_on()
    previews = make_previews if main and config.monitoring.sample_steps else None
    sample = collectives.together(lambda: previews(plan.data, config, device) if previews else None)
    losses = _fixed_noise_losses(plan, dataset, collectives) if config.monitoring.validation_steps else None

    checkpoints = checkpointing.CheckpointWriter(
        plan.run,
        engine,
        ema,
        config,
        saved_facts | {"trained_on": trained_on},
        vae,
        status,
        collectives,
        power_ema,
    )
    log: Any = contextlib.nullcontext()
    if main:
        tokens = dataset.prepared.text.max_length if dataset.prepared.text else 1
        log = Telemetry(
            plan.run, engine, first_step, plan.total_steps, stream.global_batch,
            flops=step_flops(config, tokens=tokens), peak=peak_flops(device, training.precision),
        )  # fmt: skip
    signals.record()
    stalls = StallWatch(timedelta(minutes=training.collective_timeout), status, collectives)
    try:
        with record, log as telemetry, stalls:
            observer = Observer(
                engine, ema, config.monitoring, total_steps=plan.total_steps, losses=losses, sample=sample,
                telemetry=telemetry, collectives=collectives,
            )  # fmt: skip
            done, number = train_loop(
                engine, stream, config, ema, state=LoopState(first_step, state.get("bad_in_a_row", 0)),
                total_steps=plan.total_steps, checkpoints=checkpoints, signals=signals, stalls=stalls,
                collectives=collectives, telemetry=telemetry, observe=observer.observe, power_ema=power_ema,
            )  # fmt: skip
    except Exception as error:
        # Of several processes all must publish what has been written, and only this error is raised on all.
        if collectives.world_size == 1 or isinstance(error, NonFiniteError):
            with contextlib.suppress(DiskError):  # it must not hide what ended the run
                checkpoints.finish()
            if main:
                remove_partial_files(plan.run)
        raise
    if number and status.step == done:
        logger.warning("stopped by signal %d after step %d; saved as %s", number, done, step_folder(plan.run, done))
    return 128 + number if number else 0


def _make_stream(
    plan: RunPlan, dataset: PreparedDataset, device: Any, quarantine: Quarantine, dropout: ConditionDropout | None
) -> BatchStream:
    """The micro-batches of this process.

    Call it when the engine exists: the device memory that the engine leaves free decides where latents are kept.
    """
    import torch
    import torch.distributed as dist

    from ccella_fast.data.loading.online_latents import OnlineLatents
    from ccella_fast.data.loading.resident_latents import choose_latent_source
    from ccella_fast.diffusion.objective import Objective
    from ccella_fast.training.batches import BatchStream

    config, training = plan.config, plan.config.training
    if training.latents == "online":
        source: LatentSource = OnlineLatents(dataset, plan.data / "vae", device, training.seed)
    else:
        source = choose_latent_source(
            dataset, device, torch.bfloat16 if training.precision == "bf16" else torch.float32
        )
    return BatchStream(
        dataset,
        seed=training.seed,
        batch_size=training.batch_size,
        accumulation=training.gradient_accumulation_steps,
        rank=dist.get_rank(),
        world_size=plan.facts["world_size"],
        scale=_scale(plan),
        objective=Objective.from_config(config),
        source=source,
        device=device,
        quarantine=quarantine,
        dropout=dropout,
    )


def _scale(plan: RunPlan) -> torch.Tensor:
    """The latents' scale factor per channel."""
    import torch

    channels = plan.config.model.latent_channels
    return torch.tensor(plan.facts["scale_factor"]).repeat_interleave(torch.tensor(channels))


def _fixed_noise_losses(plan: RunPlan, dataset: PreparedDataset, collectives: HostCollectives) -> FixedNoiseLosses:
    """The loss of the validation studies, and of as many studies of the training."""
    from ccella_fast.data.loading.dataset import PreparedDataset
    from ccella_fast.diffusion.objective import Objective
    from ccella_fast.training.observer import FixedNoiseLosses
    from ccella_fast.training.validation import FixedNoiseLoss

    config = plan.config
    held_out = collectives.together(lambda: PreparedDataset(plan.data, config, "val"))
    count = min(len(held_out), len(dataset))
    spread = [number * len(dataset) // count for number in range(count)]
    settings: dict[str, Any] = {
        "batch_size": config.training.batch_size,
        "scale": _scale(plan),
        "objective": Objective.from_config(config),
        "weight": config.class_loss_weight,
        "collectives": collectives,
    }
    logger.info(
        "validation: %s, every %d steps", counted(len(held_out), "study", "studies"), config.monitoring.validation_steps
    )
    return FixedNoiseLosses(
        validation=FixedNoiseLoss(held_out, range(len(held_out)), **settings),
        training=FixedNoiseLoss(dataset, spread, **settings),
    )


def _initialize_run_folder(plan: RunPlan) -> None:
    """Create the run's folder if needed, remove partial files, write config.json."""
    try:
        plan.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, plan.run) from error
    remove_partial_files(plan.run)
    write_json(plan.run / "config.json", plan.config.dump())
