"""Write checkpoints from all processes while training goes on, and restore them.

A checkpoint contains whole fp32 tensors (`full_tensors`), so a run resumes with any number of processes, ZeRO stage and
precision. At a save, training waits until the tensors are copied to host memory; then a thread of each process writes its share
of the files. The first step boundary at which all have finished publishes the checkpoint: rank 0 writes the manifest and
renames the folder. A failure on any process (usually a full disk) is raised there, on all of them, so that no process is left
waiting; the partial folder is removed, and earlier checkpoints stay. A state that is not finite is never published.

With low-rank adapters a checkpoint has only what is trained; the rest is written once, see `start_weights.write_base_weights`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import ccella_fast
from ccella_fast.checkpoint import publish_checkpoint, read_base_weights, step_folder, write_manifest
from ccella_fast.config import Config
from ccella_fast.errors import CcellaError, CheckpointError, DiskError, NonFiniteError
from ccella_fast.foreign_errors import is_out_of_memory
from ccella_fast.hardware import free_memory
from ccella_fast.models.low_rank import plain_name
from ccella_fast.models.weights import first_difference
from ccella_fast.processes import HostCollectives
from ccella_fast.quantities import format_bytes
from ccella_fast.storage import existing_parent, json_text, read_chunks, read_json, write_hashed
from ccella_fast.training import old_checkpoints
from ccella_fast.training.best import LINK, best_checkpoint, mark_if_best
from ccella_fast.training.ema import Ema
from ccella_fast.training.full_tensors import (
    Kind,
    adam_steps,
    full_shape,
    full_tensors,
    set_adam_steps,
    set_full_tensors,
    set_model_weights,
    sorted_parameters,
)
from ccella_fast.training.power_ema import PowerEma
from ccella_fast.training.run_status import RunStatus
from ccella_fast.training.snapshots import DTYPE, PART, publish_snapshot
from ccella_fast.training.tensor_files import HostCopy, header, raw_tensors

logger = logging.getLogger("ccella_fast")
# Launchers end a process 30 seconds after SIGTERM; a checkpoint that takes longer than this is not begun then.
SECONDS_AFTER_A_SIGNAL = 20
_FILES: dict[Kind, str] = {
    "weights": "model.safetensors",
    "exp_avg": "exp_avg.safetensors",
    "exp_avg_sq": "exp_avg_sq.safetensors",
}
_EMA = "ema.safetensors"
_MOMENTS = (_FILES["exp_avg"], _FILES["exp_avg_sq"])  # which parameters that are not trained do not have
_FIX = "use another checkpoint"
_MEMORY_SHARE = 0.5  # of the memory that is free before the first step; on a CPU, activations need the rest


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    step: int
    folder: Path
    begun: float  # time.monotonic()
    hashes: Future[dict[str, str]]  # of this process's files


class CheckpointWriter:
    """Writes the checkpoints of a run. All processes call every method, in the same order.

    Args:
        run: the run's folder.
        engine: the DeepSpeed engine.
        ema: the moving average, if there is one.
        config: the configuration.
        facts: entries of training_state.json that stay the same.
        vae: folder of the autoencoder to copy into each checkpoint.
        status: records the step of each checkpoint that is published.
        collectives: used to share failures and decisions.
        power_ema: the power-function averages, if there are any. A snapshot of them is part of the checkpoint of its step while
            it is written, and published just before it.
    """

    def __init__(
        self,
        run: Path,
        engine: Any,
        ema: Ema | None,
        config: Config,
        facts: dict[str, Any],
        vae: Path | None,
        status: RunStatus,
        collectives: HostCollectives,
        power_ema: PowerEma | None = None,
    ):
        self._run, self._engine, self._ema, self._config = run, engine, ema, config
        self._power_ema, self._averages = power_ema, dict(power_ema.files() if power_ema else ())
        self._facts, self._vae, self._status, self._collectives = facts, vae, status, collectives
        self._trained_only = config.training.low_rank.rank > 0
        self._shapes = {
            name: _shapes(engine, trained_only=self._trained_only or name in _MOMENTS)
            for name in [*_FILES.values(), _EMA]
        }
        self._shapes |= dict.fromkeys(self._averages, self._shapes[_EMA])
        self._copies = self._allocate_copies()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._removal: Future[None] | None = None  # of checkpoints that are no longer kept
        self._magnitudes: list[Tensor] = []  # of the tensors that are being saved
        self._seconds = 0.0  # that the last checkpoint took on the slowest process

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Copy the state after `step` finished steps, and begin to write it. Waits for a checkpoint that is being written.

        Args:
            step: finished optimizer steps, skipped ones included.
            progress: further entries of training_state.json.

        Raises:
            DiskError: on all processes, if one of them could not write this or the previous checkpoint.
            NonFiniteError: on all processes, if a weight, average or moment is not finite.
        """
        self._publish()
        begun, folder = time.monotonic(), self._create_partial_folder(step)
        counts = {
            "step": step,
            "adam_steps": adam_steps(self._engine),
            "ema_updates": self._ema.updates if self._ema else 0,
        }
        if self._power_ema:
            counts["power_ema_step"] = self._power_ema.updated_at
        documents = {  # as text, because the objects may change while the thread writes
            "config.json": json_text(self._config.dump()).encode(),
            "training_state.json": json_text(self._facts | counts | progress).encode(),
        }
        if self._copies is not None:
            self._fill_copies(self._copies)
            self._check_finite(step, folder)
            hashes = self._pool.submit(self._write_copies, self._copies, folder, documents)
            self._pending = _Pending(step, folder, begun, hashes)
        else:
            hashes = self._write_directly(folder, documents)
            self._check_finite(step, folder)
            self._pending = _Pending(step, folder, begun, hashes)
            self._publish()

    def publish_if_written(self) -> None:
        """Publish the checkpoint that is being written, if all processes have finished. For every step boundary.

        Raises:
            DiskError: on all processes, if one of them could not write.
        """
        if self._pending and self._all_have_written(self._pending, wait_for=0.0):
            self._publish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, publish it, and wait until older ones are removed.

        Raises:
            DiskError: as `publish_if_written`.
        """
        self._publish()
        if self._removal:
            self._removal.result()

    def _publish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it. Raises DiskError as `publish_if_written`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        while not self._all_have_written(pending, wait_for=1.0):
            pass  # in turns, because a collective that waits for a slow disk could exceed its timeout
        failure, hashes = None, {}
        try:
            hashes = pending.hashes.result()
        except Exception as error:
            failure = error
        self._raise_if_any_rank_failed(failure, pending.folder)
        seconds = time.monotonic() - pending.begun
        parts = self._collectives.all_gather([seconds, hashes])
        self._seconds = max(seconds for seconds, _ in parts)
        try:
            if dist.get_rank() == 0:
                final = step_folder(self._run, pending.step)
                versions = {name: metadata.version(name) for name in ("torch", "deepspeed")} | {
                    "ccella-fast": ccella_fast.__version__
                }
                known = {name: digest for _, part in parts for name, digest in part.items()}
                if (pending.folder / PART).is_dir():
                    own = {name: known[f"{PART}/{name}"] for name in self._averages}
                    publish_snapshot(pending.folder / PART, self._run, pending.step, own)
                facts: dict[str, Any] = {
                    "step": pending.step,
                    "world_size": dist.get_world_size(),
                    "versions": versions,
                }
                write_manifest(pending.folder, known, **facts)
                kept, metric = self._config.training.checkpoints_total_limit, self._config.monitoring.best_metric
                old = publish_checkpoint(pending.folder, final, keep=kept, best=best_checkpoint(self._run))
                if metric is not None and mark_if_best(self._run, final, metric):
                    logger.info(
                        "step %d: the best %s so far; %s is this checkpoint", pending.step, metric, self._run / LINK
                    )
                self._removal = self._pool.submit(_remove, old)  # by the thread that writes the next one, before that
        except (OSError, DiskError) as error:
            failure = error
        self._raise_if_any_rank_failed(failure, pending.folder)
        self._status.saved(pending.step)
        if dist.get_rank() == 0:
            logger.info("step %d: checkpoint saved in %.1f s", pending.step, self._seconds)

    def _all_have_written(self, pending: _Pending, *, wait_for: float) -> bool:
        """Whether all processes have written, or failed to, after at most `wait_for` seconds."""
        done, _ = wait([pending.hashes], timeout=wait_for)
        return all(self._collectives.all_gather(bool(done)))

    def save_after_signal(self, step: int, progress: dict[str, Any], number: int) -> None:
        """Save and publish after signal `number`, unless that would take longer than the process has.

        The time is that of the last checkpoint. SIGUSR1 is sent by SLURM long enough before the end, so it always saves.
        """
        seconds = self._seconds
        if self._pending:
            seconds += max(0.0, self._seconds - (time.monotonic() - self._pending.begun))
        seconds = self._collectives.max(round(seconds))
        self.finish()
        goes_back = f"step {self._status.step}" if self._status.step else "the beginning"
        if number != signal.SIGUSR1 and seconds > SECONDS_AFTER_A_SIGNAL:
            if dist.get_rank() == 0:
                why = "signal %d: a checkpoint takes %d s, more than the %d s before the launcher ends this process"
                why += "; step %d is not saved, and --resume goes back to %s"
                logger.warning(why, number, seconds, SECONDS_AFTER_A_SIGNAL, step, goes_back)
            return
        if dist.get_rank() == 0:
            logger.info(
                "signal %d: saving step %d; until this is done, --resume goes back to %s", number, step, goes_back
            )
        self.save(step, progress)
        self.finish()

    def _create_partial_folder(self, step: int) -> Path:
        final = step_folder(self._run, step)
        folder = final.with_name(f".partial-{final.name}")
        failure = None
        try:
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                if self._power_ema and self._power_ema.is_snapshot(step):
                    (folder / PART).mkdir()
        except OSError as error:
            failure = error
        self._raise_if_any_rank_failed(failure, folder)
        return folder

    def _files(self) -> Iterator[tuple[str, bool, Callable[[], Iterator[tuple[str, Tensor]]]]]:
        """Yield for each file its name, whether this process writes it, and how to read its tensors, on all processes."""
        sources: dict[str, Callable[[], Iterator[tuple[str, Tensor]]]] = {
            name: partial(full_tensors, self._engine, kind, trained_only=self._trained_only)
            for kind, name in _FILES.items()
        }
        if self._ema is not None:
            sources[_EMA] = partial(self._ema.full_weights, trained_only=self._trained_only)
        for name, average in self._averages.items():
            sources[name] = partial(average.full_weights, trained_only=self._trained_only)
        for number, (name, read) in enumerate(sources.items()):
            yield name, number % dist.get_world_size() == dist.get_rank(), read

    def _allocate_copies(self) -> dict[str, HostCopy] | None:
        """Allocate host memory for this process's files; None on all processes if that of a machine does not suffice."""
        own = [name for name, mine, _ in self._files() if mine]
        elements = {name: sum(shape.numel() for shape in self._shapes[name].values()) for name in own}
        machines = self._collectives.all_gather([socket.gethostname(), 4 * sum(elements.values()), free_memory()])
        needed = Counter[str]()
        for machine, size, _ in machines:
            needed[machine] += size
        short = [(needed[machine], free) for machine, _, free in machines if needed[machine] > _MEMORY_SHARE * free]
        if not short:
            pinned = self._engine.device.type == "cuda"
            return {name: HostCopy(elements[name], pinned=pinned) for name in own}
        if dist.get_rank() == 0:
            why = "training waits while a checkpoint is written: a copy of it needs %s of memory, but only %s are free"
            logger.info(why, *map(format_bytes, short[0]))
        return None

    def _fill_copies(self, copies: dict[str, HostCopy]) -> None:
        for name, mine, read in self._files():
            tensors = self._measured(read())
            if mine:
                copies[name].fill(tensors)
            else:
                _read_to_the_end(tensors)
        if self._engine.device.type == "cuda":
            torch.cuda.current_stream(self._engine.device).synchronize()

    def _measured(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
        """The tensors, of which the largest magnitude is kept for `_check_finite`."""
        for _, tensor in tensors:
            if tensor.numel():
                self._magnitudes.append(torch.linalg.vector_norm(tensor.detach(), torch.inf))
            yield tensor

    def _check_finite(self, step: int, folder: Path) -> None:
        """Raise NonFiniteError on all processes unless all tensors that have been read are finite."""
        is_finite = bool(torch.stack(self._magnitudes).isfinite().all())
        self._magnitudes.clear()
        if self._collectives.max(int(not is_finite)):
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            why = f"after step {step} a weight or a moment of Adam is not finite; earlier checkpoints are intact"
            fix = "run the same command with --resume; if it happens again, lower training.lr"
            raise NonFiniteError(why, path=folder.parent, field="training", fix=fix)

    def _write_copies(self, copies: dict[str, HostCopy], folder: Path, documents: dict[str, bytes]) -> dict[str, str]:
        """Write this process's share, in a thread. Returns the SHA-256 of each file."""
        hashes = {}
        for name, copy in copies.items():
            for file, dtype in self._targets(name, folder):
                start = header(self._shapes[name], dtype)
                hashes[file] = write_hashed(folder / file, chain([start], copy.chunks(dtype)))
        return hashes | self._write_documents(folder, documents)

    def _targets(self, name: str, folder: Path) -> list[tuple[str, torch.dtype]]:
        """Where the tensors of a file go, and as what: to the checkpoint, and averages also to the snapshot if this is one."""
        snapshot = name in self._averages and (folder / PART).is_dir()
        return [(name, torch.float32), *([(f"{PART}/{name}", DTYPE)] if snapshot else [])]

    def _write_directly(self, folder: Path, documents: dict[str, bytes]) -> Future[dict[str, str]]:
        """Write this process's share tensor by tensor, without copies. Returns the finished result of `_write_copies`."""
        done: Future[dict[str, str]] = Future()
        hashes: dict[str, str] = {}
        failure: Exception | None = None
        targets = [(*target, entry) for entry in self._files() for target in self._targets(entry[0], folder)]
        for file, dtype, (name, mine, read) in targets:
            tensors = self._measured(read())
            try:
                if mine and failure is None:
                    start = header(self._shapes[name], dtype)
                    hashes[file] = write_hashed(folder / file, chain([start], raw_tensors(tensors, dtype)))
            except Exception as error:
                failure = error
            _read_to_the_end(tensors)  # in any case, because the other processes take part
        try:
            hashes |= self._write_documents(folder, documents)
        except Exception as error:
            failure = failure or error
        done.set_exception(failure) if failure else done.set_result(hashes)
        return done

    def _write_documents(self, folder: Path, documents: dict[str, bytes]) -> dict[str, str]:
        """Let rank 0 write the JSON files and copy the autoencoder. Returns the SHA-256 of each file."""
        if dist.get_rank() != 0:
            return {}
        hashes = {name: write_hashed(folder / name, [text]) for name, text in documents.items()}
        if self._vae is not None:
            for source in filter(Path.is_file, sorted(self._vae.rglob("*"))):
                name = f"vae/{source.relative_to(self._vae).as_posix()}"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                hashes[name] = write_hashed(folder / name, read_chunks(source))
        return hashes

    def _raise_if_any_rank_failed(self, failure: Exception | None, folder: Path) -> None:
        """Raise on all processes if one has failed, and remove the partial folder. A failed write is a DiskError."""
        kind = "disk" if isinstance(failure, (OSError, DiskError)) else "bug"
        if failure is not None and is_out_of_memory(failure):
            kind = "memory"
        reason = str(failure) or type(failure).__name__
        if isinstance(failure, OSError) and failure.errno:
            reason = os.strerror(failure.errno)  # without the path, which is that of the partial folder
        mine = failure and (kind, reason)
        failures = [each for each in self._collectives.all_gather(mine) if each]
        if not failures:
            return
        kind, reason = failures[0]
        written = 0
        if dist.get_rank() == 0:
            written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            shutil.rmtree(folder, ignore_errors=True)
        if kind == "memory":
            raise MemoryError(reason)
        if kind == "bug":
            raise failure or CcellaError("another process could not write a checkpoint", fix="see its message")
        free = shutil.disk_usage(existing_parent(folder)).free
        raise DiskError(
            f"this checkpoint could not be written: {reason.splitlines()[0]:.120} ({written} bytes "
            f"written, {free} bytes free); earlier checkpoints are intact",
            path=folder.parent,
            fix="free space, or make the folder writable, then run the same command with --resume",
        )


def _shapes(engine: Any, *, trained_only: bool) -> dict[str, torch.Size]:
    """The shapes of whole parameters by name, sorted."""
    return {
        name: full_shape(parameter)
        for name, parameter in sorted_parameters(engine)
        if parameter.requires_grad or not trained_only
    }


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def restore_checkpoint(
    folder: Path, engine: Any, ema: Ema | None, state: dict[str, Any], power_ema: PowerEma | None = None
) -> None:
    """Restore weights, optimizer, learning rate and averages from a verified step folder. All processes call it.

    Args:
        folder: the step folder.
        engine: the DeepSpeed engine.
        ema: the moving average, if there is one.
        state: the folder's training_state.json.
        power_ema: the power-function averages, if there are any.

    Raises:
        CheckpointError: a file does not fit the model.
    """
    has_base = state.get("base_weights") is not None
    version = read_json(folder / "manifest.json", error=CheckpointError)["version"]
    if version == 1 and old_checkpoints.has_shards(folder):
        old_checkpoints.load_shards(folder, engine)
    else:
        weights = _load(folder / _FILES["weights"], engine, trained_only=has_base)
        if version == 1:
            shapes = {name: full_shape(parameter) for name, parameter in engine.module.named_parameters()}
            exp_avg, exp_avg_sq, steps = old_checkpoints.read_moments(folder, shapes)
        else:
            exp_avg, exp_avg_sq = (
                _load(folder / _FILES[kind], engine, trained_only=True) for kind in ("exp_avg", "exp_avg_sq")
            )
            steps = state["adam_steps"]
        set_full_tensors(engine, "weights", weights)
        set_model_weights(engine, weights.items())
        if has_base:
            base = read_base_weights(folder, state)
            frozen = [name for name, parameter in sorted_parameters(engine) if not parameter.requires_grad]
            set_model_weights(engine, ((name, base[plain_name(name)]) for name in frozen))
        set_full_tensors(engine, "exp_avg", exp_avg)
        set_full_tensors(engine, "exp_avg_sq", exp_avg_sq)
        set_adam_steps(engine, steps)
        _set_progress(engine, state["step"], skipped=state["step"] - steps)
    if ema is not None:
        ema.restore(_load(folder / _EMA, engine, trained_only=has_base))
        ema.updates = state["ema_updates"]
    if power_ema is not None:
        for name, average in power_ema.files():
            average.restore(_load(folder / name, engine, trained_only=has_base))
        power_ema.updated_at = state["power_ema_step"]


def _load(path: Path, engine: Any, *, trained_only: bool) -> dict[str, Tensor]:
    """Read a file of whole tensors. Raises CheckpointError if names or shapes are not those of the engine's parameters."""
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as error:
        why = f"this file cannot be read: {str(error).splitlines()[0]:.160}"
        raise CheckpointError(why, path=path, fix=_FIX) from None
    shapes = _shapes(engine, trained_only=trained_only)
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    difference = first_difference(expected, values)
    if difference is not None:
        raise CheckpointError(f"these tensors do not fit the model: {difference}", path=path, fix=_FIX)
    return values


def _set_progress(engine: Any, step: int, *, skipped: int) -> None:
    """Set the learning rate and DeepSpeed's counters to those after `step` steps, of which `skipped` were skipped."""
    engine.global_steps, engine.skipped_steps = step, skipped
    engine.global_samples = step * engine.train_batch_size()
    scheduler = engine.lr_scheduler
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step - 1, "_step_count": step + 1})
    scheduler.step()  # computes the rate of the next step


def _read_to_the_end(tensors: Iterator[Tensor]) -> None:
    for _ in tensors:
        pass
