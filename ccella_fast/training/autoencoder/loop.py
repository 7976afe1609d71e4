"""The training loop of the autoencoder: AdamW or Muon, gradient clipping, linear warm-up and cosine decay.

The patches, the posterior noise and the slices of step k depend only on (seed, k), so that a resumed run reaches the weights of
an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast.config import Config, VaeTrainingConfig
from ccella_fast.diffusion.noise import generator, randn_per_sample
from ccella_fast.errors import NonFiniteError, Stopped
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.progress import refresh_interval
from ccella_fast.training.autoencoder.checkpointing import load_state, save_state
from ccella_fast.training.autoencoder.loss import AutoencoderLoss
from ccella_fast.training.autoencoder.muon import Muon
from ccella_fast.training.autoencoder.patches import Image, patch_batches
from ccella_fast.training.autoencoder.precision import network_precision
from ccella_fast.training.metrics_log import append_metrics, discard_metrics_after
from ccella_fast.training.signals import SignalHandler

_READ_EVERY = 10  # steps between two reads of the loss from the device


def train_loop(images: list[Image], out: Path, config: Config, device: torch.device) -> tuple[Autoencoder, float]:
    """Train to the last step, starting from the state saved in `out` if there is one.

    Returns:
        The autoencoder, and the number of steps per second.

    Raises:
        ConfigError: a term of the loss needs a package that is not installed.
        NonFiniteError: the loss is not finite.
        CheckpointError: the saved state is damaged, or the network of the perceptual distance cannot be loaded.
        Stopped: SIGINT or SIGTERM; the state is saved first.
    """
    settings = config.vae_training
    loss = AutoencoderLoss(settings, device)
    vae = _initial_autoencoder(config, device)
    kind = Muon if settings.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(vae.parameters(), lr=settings.lr, betas=settings.adam_betas, weight_decay=settings.weight_decay)
    start = load_state(out, vae, optimizer, loss.adversary)
    discard_metrics_after(out / "metrics.jsonl", start)
    latent = [config.autoencoder.latent_channels, *(width // config.autoencoder.factor for width in settings.patch)]
    begun = saved = time.monotonic()
    unread: list[dict[str, Tensor]] = []  # terms of the loss on the device
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
            noise = randn_per_sample(latent, generators, device=device)
            unread.append(train_step(vae, optimizer, loss, x, noise, step, rate, settings))
            done = step + 1
            stop = signals.signal
            same_terms = loss.judges(step) == loss.judges(done)
            if done % _READ_EVERY and done < settings.max_train_steps and not stop and same_terms:
                continue
            means = torch.stack([torch.stack(list(terms.values())) for terms in unread]).mean(0).tolist()
            terms = dict(zip(unread[0], means, strict=True))
            unread.clear()
            if not math.isfinite(sum(means)):
                fix = f"lower vae_training.lr ({settings.lr:g})"
                raise NonFiniteError(f"the loss is not finite before step {done}", path=out, fix=fix)
            bar.set_postfix({name: f"{value:.4g}" for name, value in terms.items()})
            seconds = (time.monotonic() - begun) / (done - start)
            total = sum(weight * terms[name] for name, weight in loss.weights.items() if name in terms)
            values = {"step": done, "loss": total, **{f"loss_{name}": value for name, value in terms.items()}}
            append_metrics(out / "metrics.jsonl", {**values, "lr": rate, "seconds_per_step": round(seconds, 5)})
            due = time.monotonic() - saved > settings.checkpointing_seconds
            if due or stop or done == settings.max_train_steps:
                save_state(out, vae, optimizer, done, loss.adversary)
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
    loss: AutoencoderLoss,
    x: Tensor,
    noise: Tensor,
    step: int,
    rate: float,
    settings: VaeTrainingConfig,
) -> dict[str, Tensor]:
    """Update the weights once, those of the discriminator too.

    Args:
        vae: the autoencoder.
        optimizer: of its parameters.
        loss: the terms of the loss and their weights.
        x: patches (B, 1, *patch), float32.
        noise: standard normal, of the shape of the latents of `x`.
        step: counted from 0.
        rate: the learning rate.
        settings: the largest norm of the gradient.

    Returns:
        The terms without their weights, and the discriminator's own loss; scalars on the device.
    """
    with network_precision(x):
        reconstruction, mean, sigma = vae(x, noise)
    terms = loss(reconstruction, mean, sigma, x, step)
    optimizer.zero_grad(set_to_none=True)
    loss.weighted(terms).backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), settings.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    terms = {name: term.detach() for name, term in terms.items()}
    if loss.adversary is not None and loss.judges(step):
        terms["discriminator"] = loss.adversary.train_step(reconstruction.detach(), x, rate)
    return terms


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
