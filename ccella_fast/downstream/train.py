"""One classifier: trained on the batches of an arm, then applied to the validation and test studies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ccella_fast.diffusion.noise import generator
from ccella_fast.downstream.arms import DrawnCase
from ccella_fast.downstream.data import LabelledCase
from ccella_fast.downstream.inputs import Inputs
from ccella_fast.downstream.networks import Backbone, make_network
from ccella_fast.entrypoint import is_local_rank_zero
from ccella_fast.errors import NonFiniteError
from ccella_fast.progress import refresh_interval

_READ_EVERY = 10  # updates between two reads of the loss from the device
_AT_ONCE = 16  # studies that are classified together
_WARM_UP = 0.05  # share of the updates of `cosine`


class LearningRates(NamedTuple):
    """The number of updates, and the learning rate at each, relative to that of AdamW."""

    updates: int
    factor: Callable[[int], float]


def cosine(updates: int) -> LearningRates:
    """Linear warm-up in 5 % of the updates, then a cosine to 0."""
    warm_up = max(1, round(_WARM_UP * updates))

    def factor(update: int) -> float:
        if update < warm_up:
            return (update + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (update - warm_up) / max(1, updates - warm_up)))

    return LearningRates(updates, factor)


def polynomial(studies: int, batch_size: int, epochs: int) -> LearningRates:
    """The reference's schedule: (1 - update / total)^2 with total = epochs x studies / batch size, which need not be whole.

    An epoch has one update more if its last batch is smaller, so that the rate has ended before the last updates.
    """
    total = epochs * studies / batch_size
    return LearningRates(
        epochs * math.ceil(studies / batch_size), lambda update: (1 - min(update, int(total)) / total) ** 2
    )


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss with gamma 2 of softmax probabilities, as MONAI's `FocalLoss` averages it: over the classes too.

    Args:
        logits: (B, 2).
        labels: (B,), 0 or 1.
    """
    log_p = logits.float().log_softmax(1).gather(1, labels[:, None])
    return -((1 - log_p.exp()).square() * log_p).mean() / logits.shape[1]


class Classified(NamedTuple):
    """What a job results in.

    Attributes:
        p_positive: for each evaluated study, float32.
        loss: the mean over the last tenth of the updates.
    """

    p_positive: np.ndarray
    loss: float


def train_classifier(
    batches: Iterable[Sequence[DrawnCase]],
    schedule: LearningRates,
    evaluated: Sequence[LabelledCase],
    inputs: Inputs,
    *,
    backbone: Backbone,
    lr: float,
    seed: int,
    device: torch.device,
    name: str = "training",
) -> Classified:
    """Train a classifier from scratch with AdamW, and classify studies with its last weights.

    The initial weights, dropout and augmentations depend on the seed and the number of the update alone, not on the studies.

    Args:
        batches: one for each update.
        schedule: number of updates and learning rates.
        evaluated: the studies to classify afterwards.
        inputs: makes the images.
        backbone: the network.
        lr: of AdamW.
        seed: of the classifier.
        device: that trains.
        name: of the progress bar.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    with _seeded(seed, device):
        network = make_network(backbone).to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
        bar = tqdm(
            batches, desc=name, unit="update", total=schedule.updates, mininterval=refresh_interval(), leave=False,
            disable=not is_local_rank_zero(),
        )  # fmt: skip
        losses: list[Tensor] = []
        for update, draws in enumerate(bar):
            x = inputs.augmented_batch(draws, seed, device)
            labels = torch.tensor([draw.case.label for draw in draws], device=device)
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule.factor(update)
            loss = focal_loss(network(x), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if (update + 1) % _READ_EVERY == 0 or update + 1 == schedule.updates:
                recent = float(torch.stack(losses[-_READ_EVERY:]).mean())
                if not math.isfinite(recent):
                    why = f"the loss of {name} is not finite before update {update + 1}"
                    raise NonFiniteError(why, field="--lr", fix=f"use a learning rate below {lr:g}")
                bar.set_postfix(loss=f"{recent:.4f}")
        last = torch.stack(losses[-max(1, schedule.updates // 10) :]).mean()
        return Classified(classify(network, evaluated, inputs, device), float(last))


@torch.no_grad()
def classify(network: nn.Module, cases: Sequence[LabelledCase], inputs: Inputs, device: torch.device) -> np.ndarray:
    """The probability of the positive class of each study, float32."""
    network.eval()
    found = [np.zeros(0, np.float32)]
    for start in range(0, len(cases), _AT_ONCE):
        logits = network(inputs.batch(cases[start : start + _AT_ONCE], device))
        found.append(logits.float().softmax(1)[:, 1].cpu().numpy())
    return np.concatenate(found)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block, torch's random numbers are those of the seed, and cuDNN's algorithms repeat their results."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(generator(seed, "classifier").initial_seed())
        yield
