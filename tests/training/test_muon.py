"""Muon: its steps are those of torch.optim.Muon and torch.optim.AdamW, without the rounding to bf16."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ccella_fast.config import make_config
from ccella_fast.models.autoencoder import load_autoencoder
from ccella_fast.training.autoencoder import loop
from ccella_fast.training.autoencoder.muon import Muon, orthogonalized
from ccella_fast.training.autoencoder.run import train_vae
from training_fixtures import IMAGE_GRID, write_images

OPTIONS = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4, 6, 3, 3, 3), (24, 2, 1, 1, 1), (5, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_matrices_take_the_steps_of_torch(shape: tuple[int, ...], channels_last: bool):
    """torch's Muon takes two axes only, and orthogonalizes in bf16: it agrees to 2 %."""
    weight = torch.nn.Parameter(random(*shape))
    if channels_last and weight.ndim == 5:
        weight = torch.nn.Parameter(weight.detach().to(memory_format=torch.channels_last_3d))
    twin = torch.nn.Parameter(random(*shape).flatten(1))
    ours = Muon([weight], **OPTIONS)
    torchs = torch.optim.Muon([twin], lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = twin.detach().clone()
    for step in range(5):
        gradient = random(*shape, seed=step + 1)
        weight.grad, twin.grad = gradient, gradient.flatten(1)
        ours.step()
        torchs.step()
    moved = (twin - before).norm()
    assert (weight.detach().flatten(1) - twin).norm() < 0.02 * moved
    adamw = torch.nn.Parameter(random(*shape))  # negative control
    other = torch.optim.AdamW([adamw], **OPTIONS)
    for step in range(5):
        adamw.grad = random(*shape, seed=step + 1)
        other.step()
    assert (adamw.detach().flatten(1) - twin).norm() > 0.1 * moved


def test_vectors_and_single_rows_take_the_steps_of_adamw():
    shapes = [(7,), (1, 8, 3, 3, 3), (6, 1)]
    pairs = [(torch.nn.Parameter(random(*shape)), torch.nn.Parameter(random(*shape))) for shape in shapes]
    ours = Muon([a for a, _ in pairs], **OPTIONS)
    torchs = torch.optim.AdamW([b for _, b in pairs], **OPTIONS)
    for step in range(6):
        for a, b in pairs:
            a.grad = b.grad = random(*a.shape, seed=step)
        ours.step()
        torchs.step()
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_orthogonalized_keeps_singular_vectors_and_levels_values(shape: tuple[int, int]):
    u, _, v = torch.linalg.svd(random(*shape).double(), full_matrices=False)
    before = torch.linspace(8, 1, min(shape), dtype=torch.float64)
    matrix = u @ torch.diag(before) @ v
    found = u.mT @ orthogonalized(matrix) @ v.mT
    values = found.diagonal()
    assert (found - torch.diag(values)).abs().max() < 1e-6
    assert values.min() > 0.5 and values.max() < 1.3
    assert before.max() / before.min() > 2 * values.max() / values.min()


def test_an_interrupted_run_with_muon_reaches_the_same_weights(tmp_path: Path, monkeypatch):
    data = write_images(tmp_path / "prepared")
    settings = make_config({
        "autoencoder.num_channels": [4, 4], "autoencoder.num_res_blocks": [1, 1], "autoencoder.norm_num_groups": 2,
        "data.dim": list(IMAGE_GRID), "vae_training.patch": [8, 8, 8], "vae_training.max_train_steps": 25,
        "vae_training.lr": 5e-3, "vae_training.optimizer": "muon", "vae_training.checkpointing_seconds": 0,
    })  # fmt: skip
    train_vae(data, tmp_path / "whole", settings)
    calls, step = [], loop.train_step

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_vae(data, tmp_path / "parts", settings)
    train_vae(data, tmp_path / "parts", settings)
    assert len(calls) == 18 + 15
    whole, parts = (load_autoencoder(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    train_vae(data, tmp_path / "adamw", make_config({"vae_training.optimizer": "adamw"}, base=settings))
    adamw = load_autoencoder(tmp_path / "adamw").state_dict()
    assert not torch.equal(adamw["quant_conv_mu.conv.weight"], whole["quant_conv_mu.conv.weight"])
    first, last = (
        json.loads(line)["loss_l1"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[::2]
    )
    assert last < first and math.isfinite(last)
