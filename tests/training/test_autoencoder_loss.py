"""The optional terms of the autoencoder's loss: values, gradients, training with them, resumption, refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast import optional
from ccella_fast.config import Config, load_config, make_config
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.evaluation.features.medicalnet import KNOWN_FILES
from ccella_fast.models import resnet
from ccella_fast.models.autoencoder import load_autoencoder
from ccella_fast.storage import sha256
from ccella_fast.training.autoencoder import loop
from ccella_fast.training.autoencoder.adversary import Adversary
from ccella_fast.training.autoencoder.checkpointing import identity
from ccella_fast.training.autoencoder.loss import AutoencoderLoss
from ccella_fast.training.autoencoder.patches import read_images
from ccella_fast.training.autoencoder.perceptual import PerceptualDistance
from ccella_fast.training.autoencoder.run import train_vae
from feature_fixtures import authors_names, dilated, keras_form, monai_resnet50
from training_fixtures import IMAGE_GRID, write_images

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "autoencoder.num_channels": [4, 4],
    "autoencoder.num_res_blocks": [1, 1],
    "autoencoder.norm_num_groups": 2,
    "data.dim": list(IMAGE_GRID),
    "vae_training.patch": [8, 8, 8],
    "vae_training.batch_size": 2,
    "vae_training.max_train_steps": 24,
    "vae_training.lr": 5e-3,
}
ADVERSARIAL: dict[str, Any] = SETTINGS | {
    "vae_training.adversarial_weight": 0.1,
    "vae_training.adversarial_start": 4,
    "vae_training.discriminator_layers": 1,
    "vae_training.discriminator_channels": 8,
    "vae_training.discriminator_lr": 2e-3,
}


def config(**changes: Any) -> Config:
    return make_config(SETTINGS | {f"vae_training.{name}": value for name, value in changes.items()})


def volumes(*shape: int) -> tuple[Tensor, Tensor]:
    """A reconstruction that needs a gradient, and what it should be."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    reconstruction = x + 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return reconstruction.requires_grad_(), x


def term(name: str, found: Config, reconstruction: Tensor, x: Tensor, step: int = 0) -> Tensor:
    posterior = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    return AutoencoderLoss(found.vae_training, CPU)(reconstruction, *posterior, x, step)[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("prepared"))


# ---- Values and gradients


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_reconstruction_loss_is_the_mean_of_its_norm(norm: str):
    reconstruction, x = volumes(2, 1, 4, 6, 8)
    difference = (reconstruction - x).detach().double().numpy()
    expected = {"l1": np.abs(difference).mean(), "l2": np.square(difference).mean()}
    loss = AutoencoderLoss(config(reconstruction_loss=norm).vae_training, CPU)
    terms = loss(reconstruction, torch.zeros(2, 3), torch.ones(2, 3), x, 0)
    assert list(terms) == list(loss.weights) == [norm, "kl"]
    assert terms[norm].item() == pytest.approx(expected[norm], rel=1e-5)
    assert expected["l1"] != pytest.approx(expected["l2"], rel=0.1)


def amplitudes(x: np.ndarray) -> np.ndarray:
    """Of the discrete Fourier transform, as three matrix products."""
    for axis, size in enumerate(x.shape):
        k = np.arange(size)
        matrix = np.exp(-2j * np.pi * np.outer(k, k) / size) / np.sqrt(size)
        x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return np.abs(x)


def test_the_spectral_term_compares_amplitudes():
    """Equal to matrix products. A shifted image has the same amplitudes, so the term does not see it; the L1 loss does."""
    reconstruction, x = volumes(2, 1, 4, 6, 8)
    on = config(spectral_weight=0.5)
    pairs = zip(reconstruction.detach().double().numpy()[:, 0], x.double().numpy()[:, 0], strict=True)
    expected = np.mean([np.square(amplitudes(a) - amplitudes(b)) for a, b in pairs])
    assert term("spectral", on, reconstruction, x).item() == pytest.approx(expected, rel=1e-4)
    shifted = x.roll((1, 2, 3), (2, 3, 4))
    assert term("spectral", on, shifted, x).item() < 1e-10 < 1e-2 < term("l1", on, shifted, x).item()


class LastMap(nn.Module):
    """MONAI's ResNet up to its last map, as the hub's networks for MONAI's `PerceptualLoss` return it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        x = network.maxpool(network.act(network.bn1(network.conv1(x))))
        return network.layer4(network.layer3(network.layer2(network.layer1(x))))


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """With one block in each stage instead of 3, 4, 6, 3."""
    blocks = [1, 1, 1, 1]
    return {
        "medicalnet": monai_resnet50(3, blocks),
        "official": monai_resnet50(2, blocks),
        "converted": keras_form(monai_resnet50(2, blocks)),
    }


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, network in networks.items():
        state = dict(network.state_dict())
        torch.save(authors_names(state) if name == "official" else state, folder / f"{name}.pth")
    yield {name: folder / f"{name}.pth" for name in networks}
    shutil.rmtree(folder)  # 120 MB


@pytest.fixture
def few_blocks(monkeypatch):
    monkeypatch.setattr(resnet, "_BLOCKS", (1, 1, 1, 1))


def perceptual(file: Path, **changes: Any) -> Config:
    given = {"perceptual_weight": 0.3, "perceptual_network": str(file), "perceptual_sha256": sha256(file)}
    return config(**given | changes)


@pytest.mark.parametrize("name", ["medicalnet", "converted"])
def test_the_perceptual_term_is_that_of_monai(name: str, networks, files, few_blocks, monkeypatch):
    """Value and gradient, with all slices. The negative controls are MONAI's own loss with one thing changed."""
    from monai.losses.perceptual import PerceptualLoss

    network = dilated(networks[name]) if name == "medicalnet" else networks[name]
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: LastMap(network).eval())
    kind = {"medicalnet": "medicalnet_resnet50_23datasets", "converted": "radimagenet_resnet50"}[name]
    options = {"is_fake_3d": False, "channel_wise": True} if name == "medicalnet" else {"fake_3d_ratio": 1.0}
    monai = PerceptualLoss(spatial_dims=3, network_type=kind, **options)
    reconstruction, x = volumes(2, 1, 16, 24, 16)
    expected = monai(reconstruction, x)
    (slope,) = torch.autograd.grad(expected.sum(), reconstruction)
    found = term("perceptual", perceptual(files[name], perceptual_slices=1.0), reconstruction, x)
    (gradient,) = torch.autograd.grad(found, reconstruction)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and found.item() > 1e-4
    assert (gradient - slope).norm() < 1e-3 * slope.norm()
    if name == "medicalnet":
        network.layer3[0].conv2.dilation = network.layer3[0].conv2.padding = (1, 1, 1)
    else:
        monkeypatch.setattr("monai.losses.perceptual.subtract_mean", lambda x: x)
    assert monai(reconstruction, x).item() != pytest.approx(found.item(), rel=1e-3)


def test_the_authors_network_sees_slices_from_minus_one_to_one(networks, files, few_blocks):
    reconstruction, x = volumes(1, 1, 6, 10, 8)
    network, expected = LastMap(networks["official"]).double(), 0.0
    for axis in range(3):
        distances = []
        for k in range(x.shape[2 + axis]):
            a, b = (
                network((2 * volume.detach().double()[0, 0].select(axis, k) - 1).expand(1, 3, -1, -1))[0]
                for volume in (reconstruction, x)
            )
            a, b = a / a.square().sum(0).sqrt(), b / b.square().sum(0).sqrt()
            distances.append((a - b).square().sum(0).mean().item())
        expected += np.mean(distances)
    networks["official"].float()
    on = perceptual(files["official"], perceptual_slices=1.0)
    assert term("perceptual", on, reconstruction, x).item() == pytest.approx(expected, rel=1e-3)


def test_slices_are_a_share_and_follow_from_seed_and_step(files, few_blocks, monkeypatch):
    reconstruction, x = volumes(2, 1, 10, 20, 5)
    seen: list[Tensor] = []
    whole = PerceptualDistance._distance

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        seen.append(b[:, 0] + 0.406)
        return whole(self, a, b)

    monkeypatch.setattr(PerceptualDistance, "_distance", distance)
    values = [
        term("perceptual", perceptual(files["converted"], perceptual_slices=share, seed=seed), reconstruction, x, step)
        for share, seed, step in ((0.3, 0, 0), (0.3, 0, 0), (0.3, 0, 1), (0.3, 1, 0), (0.01, 0, 0))
    ]
    assert [len(slices) for slices in seen] == [6, 12, 3] * 4 + [1, 1, 1]
    assert values[0] == values[1] and len({value.item() for value in values}) == 4
    distances, places = torch.cdist(seen[0].flatten(1), x[:, 0].flatten(0, 1).flatten(1)).min(1)
    assert distances.max() < 1e-4 and len({*places.tolist()}) == 6  # six different slices of both volumes


def test_a_constant_patch_has_a_finite_distance(files, few_blocks):
    reconstruction, x = volumes(1, 1, 16, 16, 16)
    found = term("perceptual", perceptual(files["medicalnet"]), reconstruction, torch.zeros_like(x))
    (gradient,) = torch.autograd.grad(found, reconstruction)
    assert found.isfinite() and gradient.isfinite().all()


def logits(state: dict[str, Tensor], x: Tensor, layers: int) -> Tensor:
    """The discriminator written out: convolutions of kernel 4, instance norm in between, leaky ReLU."""
    x = F.leaky_relu(F.conv3d(x, state["initial_conv.conv.weight"], state["initial_conv.conv.bias"], 2, 1), 0.2)
    for k in range(layers):
        x = F.conv3d(x, state[f"{k}.conv.weight"], None, 1 if k == layers - 1 else 2, 1)
        centred = x - x.mean((2, 3, 4), keepdim=True)
        x = F.leaky_relu(centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt(), 0.2)
    return F.conv3d(x, state["final_conv.conv.weight"], state["final_conv.conv.bias"], 1, 1)


def squares(values: Tensor, target: float) -> Tensor:
    """Least squares of the logits behind MONAI's leaky ReLU."""
    return (torch.where(values > 0, values, 0.05 * values) - target).square().mean()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_discriminator_is_written_out(layers: int):
    settings = make_config(ADVERSARIAL | {"vae_training.discriminator_layers": layers, "vae_training.patch": [16] * 3})
    adversary = Adversary(settings.vae_training, CPU)
    state = {name: weight.double() for name, weight in adversary.network.state_dict().items()}
    assert state["initial_conv.conv.weight"].shape == (8, 1, 4, 4, 4)
    reconstruction, x = volumes(2, 1, 16, 16, 16)
    a, b = logits(state, reconstruction.double(), layers), logits(state, x.double(), layers)
    verdict = adversary.verdict(reconstruction)
    assert verdict.item() == pytest.approx(squares(a, 1).item(), rel=1e-4)
    (found,) = torch.autograd.grad(verdict, reconstruction)
    (expected,) = torch.autograd.grad(squares(a, 1), reconstruction)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert all(parameter.grad is None for parameter in adversary.network.parameters())
    loss = adversary.train_step(reconstruction, x, 1e-3)
    expected_loss = (squares(logits(state, reconstruction.double(), layers), 0) + squares(b, 1)) / 2
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    assert reconstruction.grad is None
    better = adversary.train_step(reconstruction, x, 1e-3)
    assert better < loss


# ---- Training


class Recorded:
    """The batches and noises of a run's steps."""

    def __init__(self, monkeypatch, *, stop_at: int | None = None):
        self.begun: dict[str, Tensor] = {}
        self.discriminator: dict[str, Tensor] = {}
        self.steps: list[tuple[Tensor, Tensor, int, float]] = []
        whole = loop.train_step

        def step(vae, optimizer, loss, x, noise, number, rate, settings):
            if number == stop_at:
                raise KeyboardInterrupt
            if not self.steps:
                self.begun = {name: p.detach().double().clone() for name, p in vae.named_parameters()}
                if loss.adversary is not None:
                    state = loss.adversary.network.state_dict()
                    self.discriminator = {name: p.double().clone() for name, p in state.items()}
            self.steps.append((x.double(), noise.double(), number, rate))
            return whole(vae, optimizer, loss, x, noise, number, rate, settings)

        monkeypatch.setattr(loop, "train_step", step)


def adamw(weights: dict[str, Tensor], gradients: list[Tensor], moments: dict[str, Any], rate: float) -> None:
    """Clip at 1 and update, in place; betas 0.9 and 0.95, weight decay 0.01."""
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    count = moments["count"] = moments.get("count", 0) + 1
    for (name, p), gradient in zip(weights.items(), gradients, strict=True):
        gradient = gradient * min(1.0, 1 / norm)
        first, second = moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        moments[name] = first, second
        step = first / (1 - 0.9**count) / ((second / (1 - 0.95**count)).sqrt() + 1e-8)
        p.data = p.data - rate * 0.01 * p.data - rate * step


def plain_adversarial_training(run: Recorded, network: nn.Module, *, weight: float, start: int, relative_rate: float):
    """The same training in float64, with every formula written out: final weights and the terms of the last step."""
    vae = network.double()
    vae.load_state_dict(run.begun)
    vae.requires_grad_(True)
    weights = dict(vae.named_parameters())
    judge = {name: p.clone().requires_grad_() for name, p in run.discriminator.items()}
    moments, moments_of_judge, terms = {}, {}, {}
    for x, noise, number, rate in run.steps:
        mean, sigma = vae.encode(x)
        reconstruction = vae.decode(mean + sigma * noise)
        terms = {"l1": (reconstruction - x).abs().mean()}
        terms["kl"] = 0.5 * (mean**2 + sigma**2 - 1 - 2 * sigma.log()).sum() / len(x)
        loss = terms["l1"] + 1e-6 * terms["kl"]
        if number >= start:
            terms["adversarial"] = squares(logits(judge, reconstruction, 1), 1)
            loss = loss + weight * terms["adversarial"]
        adamw(weights, list(torch.autograd.grad(loss, list(weights.values()))), moments, rate)
        if number >= start:
            fake, real = squares(logits(judge, reconstruction.detach(), 1), 0), squares(logits(judge, x, 1), 1)
            terms["discriminator"] = 0.5 * (fake + real)
            gradients = torch.autograd.grad(terms["discriminator"], list(judge.values()))
            adamw(judge, list(gradients), moments_of_judge, rate * relative_rate)
    return {name: p.detach() for name, p in weights.items()}, {name: value.item() for name, value in terms.items()}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor], begun: dict[str, Tensor]) -> float:
    """A distance relative to that from the beginning."""
    distance = math.hypot(*(float((found[name].double() - p).norm()) for name, p in expected.items()))
    return distance / math.hypot(*(float((begun[name] - p).norm()) for name, p in expected.items()))


def lines(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in found]


@pytest.fixture(scope="module")
def adversarial(data, tmp_path_factory) -> tuple[Path, Recorded]:
    out = tmp_path_factory.mktemp("adversarial") / "vae"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Recorded(monkeypatch)
        train_vae(data, out, make_config(ADVERSARIAL | {"vae_training.max_train_steps": 21}))
    return out, run


def test_adversarial_training_equals_a_plain_loop(adversarial):
    out, run = adversarial
    found, options = load_autoencoder(out), {"weight": 0.1, "start": 4, "relative_rate": 2e-3 / 5e-3}
    weights = {name: p.clone() for name, p in found.state_dict().items()}
    expected, last = plain_adversarial_training(run, found, **options)
    assert apart(weights, expected, run.begun) < 1e-3
    assert [line["step"] for line in lines(out)] == [4, 10, 20, 21]
    assert "loss_adversarial" not in lines(out)[0]
    logged = lines(out)[-1]
    assert {name: logged[f"loss_{name}"] for name in last} == pytest.approx(last, rel=1e-2)
    total = logged["loss_l1"] + 1e-6 * logged["loss_kl"] + 0.1 * logged["loss_adversarial"]
    assert logged["loss"] == pytest.approx(total, rel=1e-6)
    for wrong in ({"weight": 0.2}, {"start": 5}, {"relative_rate": 1.0}):
        other, _ = plain_adversarial_training(run, found, **options | wrong)
        assert apart(weights, other, run.begun) > 5e-3, wrong


def test_an_interrupted_adversarial_run_reaches_the_same_weights(data, adversarial, tmp_path, monkeypatch):
    """A discriminator that starts again is noticed."""
    settings = ADVERSARIAL | {"vae_training.max_train_steps": 21, "vae_training.checkpointing_seconds": 0}
    for name in ("kept", "forgotten"):
        with monkeypatch.context() as patch:
            Recorded(patch, stop_at=15)
            with pytest.raises(KeyboardInterrupt):
                train_vae(data, tmp_path / name, make_config(settings))
        with monkeypatch.context() as patch:
            if name == "forgotten":
                patch.setattr(Adversary, "load_state_dict", lambda *_: None)
            again = Recorded(patch)
            train_vae(data, tmp_path / name, make_config(settings))
        assert len(again.steps) == 11  # from step 10, the last saved one
    same, kept, forgotten = (
        load_autoencoder(out).state_dict() for out in (adversarial[0], tmp_path / "kept", tmp_path / "forgotten")
    )
    assert all(torch.equal(same[name], kept[name]) for name in same)
    assert lines(tmp_path / "kept") == lines(adversarial[0])
    assert not all(torch.equal(same[name], forgotten[name]) for name in same)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir() if path.suffix == ".pt") == []


def test_every_term_trains_together(data, files, few_blocks, tmp_path):
    given = {key.removeprefix("vae_training."): value for key, value in ADVERSARIAL.items() if "vae_training" in key}
    every = given | {"reconstruction_loss": "l2", "spectral_weight": 0.1, "max_train_steps": 6}
    train_vae(data, tmp_path / "vae", perceptual(files["converted"], **every))
    logged = lines(tmp_path / "vae")[-1]
    weights = {"l2": 1, "kl": 1e-6, "spectral": 0.1, "perceptual": 0.3, "adversarial": 0.1}
    assert logged["loss"] == pytest.approx(sum(weight * logged[f"loss_{name}"] for name, weight in weights.items()))
    assert logged["loss_discriminator"] > 0 and "loss_l1" not in logged


def test_the_recipe_of_the_page_trains(data, files, few_blocks, tmp_path):
    """At the smoke size. The SHA-256 on the page is that of a file that `evaluate` knows."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "autoencoder.md").read_text()
    (recipe,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "recipe.json").write_text(recipe)
    assert load_config(tmp_path / "recipe.json").vae_training.perceptual_sha256 in KNOWN_FILES
    smoke = {key: value for key, value in SETTINGS.items() if "lr" not in key} | {
        "vae_training.max_train_steps": 2,
        "vae_training.perceptual_network": str(files["medicalnet"]),
        "vae_training.perceptual_sha256": sha256(files["medicalnet"]),
        "vae_training.discriminator_layers": 1,
    }
    train_vae(data, tmp_path / "vae", load_config(tmp_path / "recipe.json", smoke))
    logged = lines(tmp_path / "vae")[-1]
    total = logged["loss_l1"] + 1e-7 * logged["loss_kl"] + 0.3 * logged["loss_perceptual"]
    assert logged["loss"] == pytest.approx(total + 0.1 * logged["loss_adversarial"], rel=1e-5)


# ---- Identity and refusals


def test_the_identity_knows_the_network_by_its_hash(data, tmp_path):
    train, _ = read_images(data)
    base = {"perceptual_weight": 0.3, "perceptual_network": "a.pth", "perceptual_sha256": "0" * 64}
    first = identity(config(**base), train)
    assert identity(config(**base | {"perceptual_network": "moved/a.pth"}), train) == first
    changes = {
        "perceptual_sha256": "1" * 64, "perceptual_weight": 0.2, "perceptual_slices": 0.5, "reconstruction_loss": "l2",
        "spectral_weight": 0.1, "adversarial_weight": 0.1, "adversarial_start": 3, "discriminator_channels": 16,
        "discriminator_layers": 1, "discriminator_lr": 1e-3, "optimizer": "muon",
    }  # fmt: skip
    layers = {"discriminator_layers": 1}  # which fit the patch
    found = {
        identity(config(**base | (layers if name == "adversarial_weight" else {}) | {name: value}), train)
        for name, value in changes.items()
    }
    assert len(found | {first}) == len(changes) + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perceptual_weight": 0.3}, "perceptual_weight 0.3 needs perceptual_network"),
        ({"perceptual_weight": 0.3, "perceptual_network": "a.pth"}, "needs perceptual_sha256; sha256sum prints"),
        ({"adversarial_weight": 0.1}, r"patch \[8, 8, 8\] is too small for discriminator_layers 3: .* 24 voxels"),
        ({"perceptual_sha256": "abc"}, "perceptual_sha256"),
        ({"reconstruction_loss": "l3"}, "reconstruction_loss"),
        ({"spectral_weight": -1}, "spectral_weight must be a number of at least 0"),
        ({"adversarial_weight": math.inf}, "adversarial_weight"),
        ({"perceptual_slices": 0}, "perceptual_slices"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        config(**changes)
    assert len(str(caught.value).splitlines()) <= 5


def test_the_smallest_patch_of_the_discriminator_is_the_one_that_is_allowed():
    """One voxel less leaves no verdict."""
    for layers, smallest in ((1, 6), (2, 12), (3, 24)):
        settings = config(adversarial_weight=0.1, discriminator_layers=layers, patch=[smallest] * 3).vae_training
        adversary = Adversary(settings, CPU)
        assert adversary.verdict(torch.rand(1, 1, *settings.patch)).isfinite()
        with pytest.raises(RuntimeError):
            adversary.verdict(torch.rand(1, 1, smallest - 1, *settings.patch[1:]))


def test_another_file_is_refused(data, networks, files, few_blocks, tmp_path):
    wrong = perceptual(files["converted"], perceptual_sha256="0" * 64)
    small = tmp_path / "small.pth"
    torch.save({"conv1.weight": torch.ones(64, 1, 7, 7, 7)}, small)
    for number, (settings, words) in enumerate((
        (wrong, f"{sha256(files['converted'])}, which is not that of vae_training.perceptual_sha256"),
        (perceptual(files["converted"], perceptual_network=str(tmp_path / "absent.pth")), "does not exist"),
        (perceptual(small), "smaller ResNet"),
    )):  # fmt: skip
        with pytest.raises(CheckpointError, match=words) as caught:
            train_vae(data, tmp_path / f"vae{number}", settings)
        assert caught.value.field == "vae_training.perceptual_network"
        assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("name", ["spectral_weight", "adversarial_weight"])
def test_a_missing_package_is_named(name: str, monkeypatch):
    def absent(package: str):
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    settings = config(**{name: 0.1}, discriminator_layers=1).vae_training
    with pytest.raises(ConfigError, match=f"vae_training.{name} needs monai"):
        AutoencoderLoss(settings, CPU)
