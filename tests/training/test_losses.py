"""The losses, against numbers computed by hand in float64. Numbers of the reference: test_golden.py."""

from __future__ import annotations

import math

import pytest
import torch

from ccella_fast.losses import class_loss, focal_terms, kl_divergence, noise_loss

LOGITS = [[0.3, -0.2], [1.0, 2.0], [-1.5, 0.5], [4.0, -3.0]]
TARGET = [[100.0, 0.0], [0.0, 100.0], [100.0, 0.0], [0.0, 100.0]]


def focal_by_hand(logits, target):
    total = 0.0
    for c, alpha in enumerate((0.25, 0.75)):
        p = math.exp(logits[c]) / sum(map(math.exp, logits))
        total += target[c] * alpha * (1 - p) ** 2 * -math.log(p)
    return total


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0]], ids=["all", "some", "one"])
def test_class_loss_is_the_mean_over_masked_samples(mask):
    terms = [focal_by_hand(*pair) for pair, keep in zip(zip(LOGITS, TARGET, strict=True), mask, strict=True) if keep]
    actual = class_loss(torch.tensor(LOGITS), torch.tensor(TARGET), torch.tensor(mask))
    assert actual.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    # Negative controls: a target that is not scaled, and another target.
    assert actual.item() != pytest.approx(sum(terms) / len(terms) / 100, rel=1e-5)
    swapped = torch.tensor(TARGET).flip(1)
    assert class_loss(torch.tensor(LOGITS), swapped, torch.tensor(mask)).item() != pytest.approx(
        actual.item(), rel=1e-2
    )


def test_empty_mask_gives_zero_loss_and_zero_gradient():
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = class_loss(logits, torch.tensor(TARGET), torch.zeros(4))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros(4, 2))


def test_masked_samples_do_not_affect_the_others():
    """A sample without a class has no influence, even if its logits are not finite."""
    logits = torch.tensor([[0.3, -0.2], [float("nan"), 1.0]], requires_grad=True)
    loss = class_loss(logits, torch.tensor([[100.0, 0.0], [0.0, 0.0]]), torch.tensor([True, False]))
    assert loss.item() == pytest.approx(focal_by_hand(LOGITS[0], TARGET[0]), rel=1e-5)


def test_gradients_equal_finite_differences():
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    loss = lambda values: class_loss(values, torch.tensor(TARGET), torch.tensor([1, 1, 0, 1]))  # noqa: E731
    analytic = torch.autograd.functional.jacobian(loss, logits)
    for i in range(4):
        for c in range(2):
            step = torch.zeros_like(logits)
            step[i, c] = 1e-2
            numeric = float(loss(logits + step) - loss(logits - step)) / 2e-2
            assert float(analytic[i, c]) == pytest.approx(numeric, rel=1e-2, abs=1e-3)
    assert not analytic[2].any() and analytic[0].all()


def test_bfloat16_predictions_are_compared_in_fp32():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(2, 4, 8, 8, 8, generator=generator).bfloat16()
    noise = torch.randn(2, 4, 8, 8, 8, generator=generator)
    expected = (predicted.double() - noise.double()).abs().mean().item()
    actual = noise_loss(predicted, noise)
    assert actual.dtype == torch.float32 and actual.item() == pytest.approx(expected, rel=1e-6)
    assert (predicted - noise.bfloat16()).abs().mean().item() != pytest.approx(expected, rel=1e-6)
    terms = focal_terms(torch.tensor(LOGITS).bfloat16(), torch.tensor(TARGET).bfloat16())
    assert terms.dtype == torch.float32


def test_losses_do_not_read_the_device():
    """Tensors on the meta device do not have values, so any `.item()` or `if tensor` raises."""
    meta = torch.zeros(4, 2, device="meta")
    assert class_loss(meta, meta, meta[:, 0]).shape == noise_loss(meta, meta).shape == ()
    with pytest.raises(RuntimeError):
        bool(class_loss(meta, meta, meta[:, 0]) > 0)


def test_kl_equals_torch_distributions():
    mean, sigma = torch.randn(3, 4, 2, 2, 2), torch.rand(3, 4, 2, 2, 2) + 0.1
    normal = torch.distributions.Normal
    truth = torch.distributions.kl_divergence(normal(mean.double(), sigma.double()), normal(0.0, 1.0)).sum() / 3
    assert kl_divergence(mean, sigma).item() == pytest.approx(truth.item(), rel=1e-5)
    assert kl_divergence(mean, 2 * sigma).item() != pytest.approx(truth.item(), rel=1e-5)
