"""The training loop, in the order in which it runs (docs/explanation/method.md, section 3)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.diffusion.objective import Objective
from ccella_fast.errors import NonFiniteError
from ccella_fast.losses import class_loss, noise_loss
from ccella_fast.processes import HostCollectives
from ccella_fast.training.batches import BatchStream, MicroBatch
from ccella_fast.training.checkpointing import CheckpointWriter
from ccella_fast.training.ema import Ema
from ccella_fast.training.power_ema import PowerEma
from ccella_fast.training.signals import SignalHandler
from ccella_fast.training.stalls import StallWatch
from ccella_fast.training.telemetry import Progress, Telemetry

logger = logging.getLogger("ccella_fast")
MAX_NONFINITE_STEPS = 10  # consecutive non-finite steps after which training stops


class Losses(NamedTuple):
    """The losses of a micro-batch, on the device; total, noise and classes are fp32 scalars."""

    total: Tensor  # noise + weight * classes
    noise: Tensor
    classes: Tensor
    finite: Tensor  # (B,) bool: whether the prediction for a sample is finite


class LoopState(NamedTuple):
    """How far training has come."""

    step: int  # finished optimizer steps, skipped ones included
    nonfinite_steps: int  # how many of the last steps were skipped without a finite one in between


def joint_loss(model: Any, micro_batch: MicroBatch, objective: Objective, weight: float) -> Losses:
    """L1 between the prediction and its target, which is the noise by default, + `weight` x focal loss of the predicted class.

    model: a `DiffusionModel` or its DeepSpeed engine. Nothing is read back to the host.
    """
    network = getattr(model, "module", model)
    variant, dtype = network.variant, next(network.parameters()).dtype
    batch, drawn = micro_batch.batch, (micro_batch.latents, micro_batch.noise, micro_batch.timesteps)
    noisy = objective.add_noise(*drawn)
    inputs: dict[str, Tensor] = {"spacing": batch.spacing}
    if batch.text is not None:
        inputs["text"] = batch.text.to(dtype)
    if variant.class_input == "given":
        inputs["pirads"] = batch.pirads
    predicted, logits = model(noisy.to(dtype), micro_batch.timesteps, **inputs)
    noise = noise_loss(predicted, objective.target(*drawn), objective.weights(micro_batch.timesteps))
    if logits is None or weight == 0:
        classes = torch.zeros_like(noise)
    else:
        classes = class_loss(logits, batch.pirads, batch.has_class) * micro_batch.class_share
    return Losses(noise + weight * classes, noise, classes, predicted.detach().isfinite().flatten(1).all(1))


def train_loop(
    engine: Any,
    stream: BatchStream,
    config: Config,
    ema: Ema | None,
    *,
    state: LoopState,
    total_steps: int,
    checkpoints: CheckpointWriter,
    signals: SignalHandler,
    stalls: StallWatch,
    collectives: HostCollectives,
    telemetry: Telemetry | None,
    observe: Callable[[int], dict[str, Any]] = lambda step: {},
    power_ema: PowerEma | None = None,
) -> tuple[int, int]:
    """Train to step `total_steps` or until a signal arrives. All processes call it.

    Args:
        engine: the DeepSpeed engine around the diffusion model.
        stream: the micro-batches of this process.
        config: sets the objective, the weight of the class loss, and the intervals of logging and saving.
        ema: the moving average of the weights, updated after each finite step.
        state: where to start.
        total_steps: T, the length of the run in optimizer steps.
        checkpoints: writes a checkpoint at the configured interval, after the last step and after a signal.
        signals: records SIGTERM, SIGINT and SIGUSR1.
        stalls: is notified after each step.
        collectives: used for decisions that all processes must take alike.
        telemetry: None on all processes but rank 0.
        observe: called with the number of finished steps; returns what was measured of the model, see `training.observer`.
        power_ema: the power-function averages, updated at their interval.

    Returns:
        The number of finished steps, and the number of the signal that ended the loop or 0.

    Raises:
        NonFiniteError: `MAX_NONFINITE_STEPS` consecutive steps were not finite, or too many studies are left out.
        DiskError: a checkpoint could not be written.
    """
    training, objective, weight = config.training, Objective.from_config(config), config.class_loss_weight
    first, nonfinite_steps = state
    head = config.model.traits.head
    # Else it averages no study.
    has_class_loss = head != "none" and weight > 0 and any(stream.dataset.has_class) and training.report_dropout < 1
    on_gpu = engine.device.type == "cuda"
    for done, micro_batches in enumerate(stream.steps(first, total_steps, background=on_gpu), start=first + 1):
        lr = engine.lr_scheduler.get_last_lr()[0]
        micro_steps: list[tuple[list[str], Losses]] = []
        for micro_batch in micro_batches:
            losses = joint_loss(engine, micro_batch, objective, weight)
            # Makes all gradients NaN if the loss is not finite. Averaging then spreads them to all processes, so that all skip.
            nan_if_nonfinite = torch.where(losses.total.detach().isfinite(), 1.0, torch.nan)
            engine.backward(losses.total * nan_if_nonfinite)
            engine.step()  # updates the weights at the last micro-step
            micro_steps.append((micro_batch.batch.ids, losses))

        if engine.optimizer.overflow:  # the gradient norm is not finite, and DeepSpeed has left the weights unchanged
            engine.lr_scheduler.step()
            nonfinite_steps += 1
            stream.quarantine.count(*_report_nonfinite_step(done, nonfinite_steps, micro_steps, collectives), done)
        else:
            nonfinite_steps = 0
            if ema is not None:
                ema.update()
            if done % training.logging_steps == 0 or done == total_steps:
                loss, noise, classes = _mean_losses([losses for _, losses in micro_steps])
                if telemetry is not None:
                    grad_norm = float(engine.get_global_grad_norm())
                    class_term = classes if has_class_loss else None
                    telemetry.log(Progress(done, stream.epoch(done - 1), loss, noise, class_term, lr, grad_norm))
        if power_ema is not None:
            power_ema.update(done)
        if telemetry is not None:
            with signals.output():
                telemetry.bar.update()

        signal = collectives.max(signals.signal)
        stalls.finished(done)
        progress: dict[str, Any] = {"bad_in_a_row": nonfinite_steps, "quarantine": stream.quarantine.state()}
        with stalls.paused():
            checkpoints.publish_if_written()
            if signal:
                checkpoints.save_after_signal(done, progress, signal)
                return done, signal
            if measured := observe(done):
                progress["measured"] = measured
            if done % training.checkpointing_steps == 0 or done == total_steps:
                checkpoints.save(done, progress)
    with stalls.paused():
        checkpoints.finish()
    return total_steps, 0


def _mean_losses(losses: list[Losses]) -> list[float]:
    """Total, noise and class loss averaged over micro-steps and processes: the one read of the device per step."""
    values = torch.stack([torch.stack(entry[:3]).detach() for entry in losses]).mean(0)
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def _report_nonfinite_step(
    step: int, consecutive: int, micro_steps: list[tuple[list[str], Losses]], collectives: HostCollectives
) -> tuple[set[str], set[str]]:
    """Log the studies of all processes whose predictions are not finite, or all studies if only the gradient is not finite.

    micro_steps: ids and losses of each micro-step of this process.

    Returns:
        The ids of the studies whose predictions are not finite, and of all studies of the step.
    """
    local_ids = [case for ids, _ in micro_steps for case in ids]
    finite = [value for _, losses in micro_steps for value in losses.finite.tolist()]
    local_nonfinite = [case for case, is_finite in zip(local_ids, finite, strict=True) if not is_finite]
    nonfinite_ids, all_ids = (
        [case for part in collectives.all_gather(ids) for case in part] for ids in (local_nonfinite, local_ids)
    )
    cases = ", ".join(sorted(set(nonfinite_ids or all_ids)))
    why = f"step {step}: loss or gradient is not finite; step skipped ({consecutive} in a row); cases: {cases:.400}"
    logger.warning("%s", why)
    if consecutive >= MAX_NONFINITE_STEPS:
        fix = "check the latents and the text of these cases, or lower training.lr"
        raise NonFiniteError(f"training stopped at {why}", field="training", fix=fix)
    return set(nonfinite_ids), set(all_ids)
