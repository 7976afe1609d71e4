"""The training loop of the autoencoder: L1 + KL, AdamW, gradient clipping, linear warm-up and cosine decay.

The patches and the posterior noise of step k depend only on (seed, k), so that a resumed run reaches the weights of an
uninterrupted one.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ccella_fast.config import Config, VaeTrainingConfig
from ccella_fast.diffusion.noise import generator, randn_per_sample
from ccella_fast.errors import NonFiniteError, Stopped
from ccella_fast.losses import kl_divergence
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.progress import refresh_interval
from ccella_fast.training.autoencoder.checkpointing import load_state, save_state
from ccella_fast.training.autoencoder.patches import Image, patch_batches
from ccella_fast.training.metrics_log import append_metrics, discard_metrics_after
from ccella_fast.training.signals import SignalHandler

_READ_EVERY = 10  # steps between two reads of the loss from the device


def train_loop(images: list[Image], out: Path, config: Config, device: torch.device) -> tuple[Autoencoder, float]:
    """Train to the last step, starting from the state saved in `out` if there is one.

    Returns:
        The autoencoder, and the number of steps per second.

    Raises:
        NonFiniteError: the loss is not finite.
        CheckpointError: the saved state is damaged.
        Stopped: SIGINT or SIGTERM; the state is saved first.
    """
    settings = config.vae_training
    vae = _initial_autoencoder(config, device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=settings.lr, betas=settings.adam_betas, weight_decay=settings.weight_decay
    )
    start = load_state(out, vae, optimizer)
    discard_metrics_after(out / "metrics.jsonl", start)
    latent = [config.autoencoder.latent_channels, *(width // config.autoencoder.factor for width in settings.patch)]
    begun = saved = time.monotonic()
    unread: list[Tensor] = []  # losses on the device
    bar = tqdm(
        range(start, settings.max_train_steps), desc="training the autoencoder", unit="step",
        initial=start, total=settings.max_train_steps, mininterval=refresh_interval(),
    )  # fmt: skip
    with SignalHandler() as signals:
        signals.record()
        for step, patches in zip(bar, patch_batches(images, config, device, start), strict=True):
            rate = learning_rate(settings, step)
            x = patches.to(device, memory_format=torch.channels_last_3d)
            generators = [generator(settings.seed, "posterior", step, row) for row in range(len(x))]
            unread.append(
                train_step(vae, optimizer, x, randn_per_sample(latent, generators, device=device), rate, settings)
            )
            done = step + 1
            stop = signals.signal
            if done % _READ_EVERY and done < settings.max_train_steps and not stop:
                continue
            l1, kl = torch.stack(unread).mean(0).tolist()
            unread.clear()
            if not math.isfinite(l1 + kl):
                fix = f"lower vae_training.lr ({settings.lr:g})"
                raise NonFiniteError(f"the loss is not finite before step {done}", path=out, fix=fix)
            bar.set_postfix(l1=f"{l1:.4f}", kl=f"{kl:.0f}")
            seconds = (time.monotonic() - begun) / (done - start)
            values = {"step": done, "loss": l1 + settings.kl_weight * kl, "loss_l1": l1, "loss_kl": kl, "lr": rate}
            append_metrics(out / "metrics.jsonl", {**values, "seconds_per_step": round(seconds, 5)})
            due = time.monotonic() - saved > settings.checkpointing_seconds
            if due or stop or done == settings.max_train_steps:
                save_state(out, vae, optimizer, done)
                saved = time.monotonic()
            if stop:
                bar.close()
                how = f"stopped after step {done}, which is saved in {out}; run the same command again to continue"
                raise Stopped(stop, how)
    seconds = time.monotonic() - begun
    return vae, round(max(0, settings.max_train_steps - start) / max(seconds, 1e-9), 3)


def train_step(
    vae: Autoencoder,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    noise: Tensor,
    rate: float,
    settings: VaeTrainingConfig,
) -> Tensor:
    """Update the weights once.

    Args:
        vae: the autoencoder.
        optimizer: of its parameters.
        x: patches (B, 1, *patch), float32.
        noise: standard normal, of the shape of the latents of `x`.
        rate: the learning rate.
        settings: the weight of the KL divergence and the largest norm of the gradient.

    Returns:
        L1 and KL, shape (2,), on the device.
    """
    # bf16 only on GPUs: on a CPU, the result would depend on the instructions that the CPU has.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        reconstruction, mean, sigma = vae(x, noise)
    l1, kl = F.l1_loss(reconstruction.float(), x), kl_divergence(mean, sigma)
    optimizer.zero_grad(set_to_none=True)
    (l1 + settings.kl_weight * kl).backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), settings.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return torch.stack([l1.detach(), kl.detach()])


def learning_rate(settings: VaeTrainingConfig, step: int) -> float:
    """The learning rate of `step`, from 0: linear warm-up to `lr`, then cosine decay to the fraction `final_lr_fraction`."""
    total, final = settings.max_train_steps, settings.final_lr_fraction
    warmup = min(settings.max_warmup_steps, max(1, int(settings.warmup_fraction * total)))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return settings.lr * (final + (1 - final) * cosine)


def _initial_autoencoder(config: Config, device: torch.device) -> Autoencoder:
    """An autoencoder with random weights that depend only on the seed, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.vae_training.seed, "weights").initial_seed())
        vae = Autoencoder(config.autoencoder).to(device).train()
    vae.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # faster on CPU and GPU
    # Start with a nearly noiseless posterior (sigma = e^-2). At sigma = 1 the decoder would see only noise until the scale of
    # the means has grown, which takes hundreds of steps. The KL term adjusts sigma later.
    torch.nn.init.constant_(vae.get_parameter("quant_conv_log_sigma.conv.bias"), -4.0)
    return vae
