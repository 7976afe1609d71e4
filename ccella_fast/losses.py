"""Terms of the training losses (docs/explanation/method.md, section 3).

The diffusion model minimizes the L1 distance of its prediction plus w times a focal loss on the class; the autoencoder's loss
contains the KL divergence. All terms are computed in fp32 and averaged over the local batch, without synchronizing with the
host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def noise_loss(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean absolute error over all elements, a float32 scalar.

    Args:
        predicted: (B, ...).
        target: like predicted; the noise in the reference.
        weights: (B,), of the samples; None: all are 1.
    """
    if weights is None:
        return F.l1_loss(predicted.float(), target.float())
    per_sample = F.l1_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)
    return (weights * per_sample).mean()


def focal_terms(logits: Tensor, target: Tensor) -> Tensor:
    """Unreduced focal loss (Lin et al. 2017): -target * alpha * (1 - p)^2 * log(p) with p = softmax(logits).

    alpha is 0.25 for the negative and 0.75 for the positive class. The loss is linear in `target`.

    Args:
        logits: (B, 2).
        target: (B, 2).

    Returns:
        (B, 2), float32.
    """
    log_p = logits.float().log_softmax(dim=1)
    terms = -target.float() * (1 - log_p.exp()).square() * log_p
    negative, positive = terms.unbind(dim=1)
    return torch.stack([0.25 * negative, 0.75 * positive], dim=1)


def class_loss(logits: Tensor, pirads_x100: Tensor, mask: Tensor) -> Tensor:
    """Focal loss summed over both classes and averaged over the samples that `mask` selects.

    The target is the one-hot class times 100, as in the reference implementation, so that the configured weight w = 1e-4 is an
    effective weight of 1e-2.

    Args:
        logits: (B, 2).
        pirads_x100: one-hot class times 100, (B, 2).
        mask: (B,), true for samples that have both a report and a class.

    Returns:
        A float32 scalar; zero if `mask` selects no sample.
    """
    mask = mask.bool()
    per_sample = focal_terms(logits, pirads_x100).sum(dim=1)
    return torch.where(mask, per_sample, 0.0).sum() / mask.sum().clamp(min=1)


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)), summed over the elements of each latent and averaged over the batch.

    Source: Kingma and Welling 2014 (arXiv 1312.6114), appendix B.

    Args:
        mean: (B, ...).
        sigma: (B, ...), positive.

    Returns:
        A float32 scalar.
    """
    mean, sigma = mean.float(), sigma.float()
    return 0.5 * (mean.square() + sigma.square() - 2 * sigma.log() - 1).sum() / len(mean)
