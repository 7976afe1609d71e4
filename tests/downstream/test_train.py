"""Single classifiers: loss and schedules against MONAI and torch, networks, and what they learn and do not learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccella_fast.downstream.arms import matched_batches
from ccella_fast.downstream.data import read_real
from ccella_fast.downstream.inputs import Inputs, on_prepared_grid
from ccella_fast.downstream.networks import SmallClassifier, check_grid, make_network
from ccella_fast.downstream.train import Classified, cosine, focal_loss, polynomial, train_classifier
from ccella_fast.errors import ConfigError, NonFiniteError
from ccella_fast.evaluation.classifier_test import area_under_curve
from downstream_fixtures import real_studies, write_classified

CPU = torch.device("cpu")


def trained(folder, *, updates: int, seed: int = 0, lr: float = 3e-3) -> tuple[Classified, np.ndarray]:
    real = read_real(folder, validation_fraction=0.0, num_real=None)
    batches = matched_batches(("real",), [real.train], batch_size=8, updates=updates, seed=seed)
    labels = np.array([case.label for case in real.test])
    found = train_classifier(
        batches, cosine(updates), real.test, Inputs(on_prepared_grid), backbone="small", lr=lr, seed=seed, device=CPU
    )
    return found, labels


def test_a_planted_signal_is_learned_and_noise_is_not(tmp_path):
    rows = real_studies(train=40, val=0, test=60)
    found, labels = trained(write_classified(tmp_path / "signal", rows, signal=2.0), updates=60)
    assert area_under_curve(found.p_positive[labels == 1], found.p_positive[labels == 0]) > 0.95 and found.loss < 0.05
    noise, labels = trained(write_classified(tmp_path / "noise", rows, signal=0.0), updates=60)
    assert 0.25 < area_under_curve(noise.p_positive[labels == 1], noise.p_positive[labels == 0]) < 0.75


def test_a_seed_repeats_its_predictions_and_leaves_the_random_state_alone(tmp_path):
    folder = write_classified(tmp_path / "real", real_studies())
    torch.manual_seed(5)
    first = trained(folder, updates=3)[0]
    state = torch.random.get_rng_state()
    torch.rand(3)
    again, other = trained(folder, updates=3)[0], trained(folder, updates=3, seed=1)[0]
    np.testing.assert_array_equal(first.p_positive, again.p_positive)
    assert first.loss == again.loss and not np.array_equal(first.p_positive, other.p_positive)
    torch.manual_seed(5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    with pytest.raises(NonFiniteError, match="not finite before update"):
        trained(write_classified(tmp_path / "real", real_studies()), updates=4, lr=float("inf"))


def test_the_loss_is_monais(require):
    focal = require("monai.losses").FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0, reduction="mean")
    logits = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(9) % 2
    torch.testing.assert_close(focal_loss(logits, labels), focal(logits, labels[:, None]))


@pytest.mark.parametrize(("studies", "epochs"), [(32, 3), (37, 4), (16, 2)])
def test_the_schedule_of_the_reference_is_torchs(studies: int, epochs: int):
    schedule = polynomial(studies, 16, epochs)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    total = epochs * studies / 16
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=total, power=2.0)  # type: ignore[arg-type]
    assert schedule.updates == epochs * -(-studies // 16)
    for update in range(schedule.updates):
        assert schedule.factor(update) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_cosine_begins_and_ends_low():
    schedule = cosine(200)
    factors = [schedule.factor(update) for update in range(200)]
    assert factors[0] == 0.1 and max(factors) == factors[10] == 1 and factors[-1] < 1e-3
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)


def test_sizes_of_the_networks(require):
    require("monai")
    with torch.device("meta"):
        network = make_network("efficientnet-b0")
        for shape in ((32, 32, 32), (256, 256, 32), (256, 256, 128)):
            assert network(torch.empty(2, 1, *shape)).shape == (2, 2)
        with pytest.raises(RuntimeError, match="Kernel size"):
            network(torch.empty(2, 1, 32, 32, 31))
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_690_942  # as stated for the reference
    assert [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)] == [0.2]
    check_grid("efficientnet-b0", (32, 32, 32))
    check_grid("small", (4, 4, 4))
    with pytest.raises(ConfigError, match=r"at least 32 voxels .* \[32, 32, 31\]"):
        check_grid("efficientnet-b0", (32, 32, 31))
    small = SmallClassifier()
    assert sum(parameter.numel() for parameter in small.parameters()) == 73_290
    assert small(torch.rand(2, 1, 5, 4, 3)).shape == (2, 2)
