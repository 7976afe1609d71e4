"""The terms of the training losses: of the diffusion model, L1 on the noise + w * focal loss on the class
(docs/explanation/method.md, section 3); of the autoencoder, the KL divergence.

All in fp32, means over the local batch, nothing read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def noise_loss(predicted: Tensor, noise: Tensor) -> Tensor:
    """Mean absolute difference over all elements; a float32 scalar."""
    return F.l1_loss(predicted.float(), noise.float())


def focal_terms(logits: Tensor, target: Tensor) -> Tensor:
    """-target * alpha * (1 - p)^2 * log(p), p = softmax(logits): shape (B, 2), float32 (Lin et al. 2017).

    alpha is 0.25 for the negative and 0.75 for the positive class. Linear in `target`."""
    log_p = logits.float().log_softmax(dim=1)
    terms = -target.float() * (1 - log_p.exp()).square() * log_p
    negative, positive = terms.unbind(dim=1)
    return torch.stack([0.25 * negative, 0.75 * positive], dim=1)


def class_loss(logits: Tensor, pirads_x100: Tensor, mask: Tensor) -> Tensor:
    """Focal loss of the class logits (B, 2), summed over both classes, averaged over the samples where `mask` (B,) is true
    (those with a report and a class); zero when there is none. A float32 scalar.

    The target is the one-hot class times 100, as the reference has it: the weight w = 1e-4 on this loss is in effect 1e-2."""
    mask = mask.bool()
    per_sample = focal_terms(logits, pirads_x100).sum(dim=1)
    return torch.where(mask, per_sample, 0.0).sum() / mask.sum().clamp(min=1)


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) of latents (B, ...), summed over each sample's latent, averaged over the batch. A float32
    scalar (Kingma and Welling 2014, arXiv 1312.6114, appendix B)."""
    mean, sigma = mean.float(), sigma.float()
    return 0.5 * (mean.square() + sigma.square() - 2 * sigma.log() - 1).sum() / len(mean)
