"""The training loop, in the order in which it runs (docs/explanation/method.md, section 3)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.errors import NonFiniteError
from ccella_fast.losses import class_loss, noise_loss
from ccella_fast.training.batches import BatchStream, MicroBatch
from ccella_fast.training.distributed import HostCollectives, SignalHandler
from ccella_fast.training.ema import Ema
from ccella_fast.training.telemetry import Progress, Telemetry

logger = logging.getLogger("ccella_fast")
PATIENCE = 10  # non-finite steps in a row


class Losses(NamedTuple):
    total: Tensor  # noise + weight * classes
    noise: Tensor
    classes: Tensor
    finite: Tensor  # (B,) bool: is the sample's prediction finite?


def joint_loss(model: Any, micro_batch: MicroBatch, schedule: Schedule, weight: float) -> Losses:
    """L1 between predicted and true noise + weight x focal loss of the predicted class. `model`: a Denoiser or its engine.

    Scalars are fp32; nothing is read back to the host."""
    network = getattr(model, "module", model)
    variant, dtype = network.variant, next(network.parameters()).dtype
    batch = micro_batch.batch
    noisy = schedule.add_noise(micro_batch.latents, micro_batch.noise, micro_batch.timesteps)
    inputs: dict[str, Tensor] = {"spacing": batch.spacing}
    if batch.text is not None:
        inputs["text"] = batch.text.to(dtype)
    if variant.class_input == "given":
        inputs["pirads"] = batch.pirads
    predicted, logits = model(noisy.to(dtype), micro_batch.timesteps, **inputs)
    noise = noise_loss(predicted, micro_batch.noise)
    if logits is None or weight == 0:
        classes = torch.zeros_like(noise)
    else:
        classes = class_loss(logits, batch.pirads, batch.has_class) * micro_batch.class_share
    return Losses(noise + weight * classes, noise, classes, predicted.detach().isfinite().flatten(1).all(1))


def train_loop(
    engine: Any,
    feed: BatchStream,
    schedule: Schedule,
    ema: Ema | None,
    *,
    first: int,  # optimizer steps already done
    total: int,
    weight: float,  # of the class loss
    logging_steps: int,
    save_steps: int,
    bad_in_a_row: int,
    save: Callable[[int, int], None],  # (steps done, non-finite steps in a row)
    stop: SignalHandler,
    control: HostCollectives,
    telemetry: Telemetry | None,  # rank 0 only
) -> tuple[int, int]:
    """Train to step `total` or until asked to stop; returns (steps done, signal or 0). The last step is always saved.

    Raises NonFiniteError after `PATIENCE` non-finite steps in a row."""
    on_gpu = engine.device.type == "cuda"
    for step, micro_batches in enumerate(feed.steps(first, total, background=on_gpu), start=first):
        done, seen = step + 1, []
        lr = engine.lr_scheduler.get_last_lr()[0]
        for micro_batch in micro_batches:
            losses = joint_loss(engine, micro_batch, schedule, weight)
            # A non-finite loss makes every gradient NaN, on every process once they are averaged: so all agree to skip.
            poison = torch.where(losses.total.detach().isfinite(), 1.0, torch.nan)
            engine.backward(losses.total * poison)
            engine.step()  # updates the weights at the last micro-step
            seen.append((micro_batch.batch.ids, losses))

        if engine.optimizer.overflow:  # gradient norm not finite: DeepSpeed has left the weights as they were
            engine.lr_scheduler.step()
            bad_in_a_row += 1
            _report_non_finite(done, bad_in_a_row, seen, control)
        else:
            bad_in_a_row = 0
            if ema is not None:
                ema.update()
            if done % logging_steps == 0 or done == total:
                loss, noise, classes = _mean([losses for _, losses in seen])
                if telemetry is not None:
                    norm = float(engine.get_global_grad_norm())
                    telemetry.log(Progress(done, feed.epoch(step), loss, noise, classes, lr, norm))
        if telemetry is not None:
            telemetry.bar.update()

        signal = control.max(stop.signal)
        if done % save_steps == 0 or done == total or signal:
            save(done, bad_in_a_row)
        if signal:
            return done, signal
    return total, 0


def _mean(losses: list[Losses]) -> list[float]:
    """Total, noise and class loss over micro-steps and processes: the one read of the device in a step."""
    values = torch.stack([torch.stack(entry[:3]).detach() for entry in losses]).mean(0)
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def _report_non_finite(
    done: int, in_a_row: int, seen: list[tuple[list[str], Losses]], control: HostCollectives
) -> None:
    mine = [
        case for ids, losses in seen for case, finite in zip(ids, losses.finite.tolist(), strict=True) if not finite
    ]
    everybodys = [case for ids, _ in seen for case in ids]
    named, all_of_it = ([case for part in control.all_gather(own) for case in part] for own in (mine, everybodys))
    cases = ", ".join(sorted(set(named or all_of_it)))
    why = f"step {done}: loss or gradient is not finite; step skipped ({in_a_row} in a row); cases: {cases:.400}"
    logger.warning("%s", why)
    if in_a_row >= PATIENCE:
        fix = "look at these cases' latents and text, or lower training.lr"
        raise NonFiniteError(f"stopped at {why}", field="training", fix=fix)
