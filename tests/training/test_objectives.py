"""Training of other objectives than the reference's: the loss in float64, resumed runs, and the journey to a volume."""

from __future__ import annotations

import hashlib
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.schedulers import RFlowScheduler

from ccella_fast import FastSampler, load_checkpoint
from ccella_fast.checkpoint import export_reference
from ccella_fast.config import make_config
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.diffusion.noise import generator
from ccella_fast.diffusion.objective import Objective
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import get_solver
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.models import build_model
from ccella_fast.sampling import pretrained
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.sampling.monai_bundle import export_monai_bundle
from ccella_fast.storage import read_json
from ccella_fast.training.batches import BatchStream
from ccella_fast.training.loop import joint_loss
from sampling_fixtures import TINY, FakeEncoder, write_checkpoint
from training_fixtures import CONFIG, losses, train_here, validations, weights, write_prepared

FLOW = {"scheduler__schedule": "rectified_flow"}
STEPS = {"max_train_steps": 4, "checkpointing_steps": 2}


def settings(**overrides):
    return make_config({key: value for key, value in CONFIG.items() if key != "name"} | overrides)


class FixedOutput(torch.nn.Module):
    """A network with a fixed output that records its inputs."""

    def __init__(self, output, variant):
        super().__init__()
        self.variant, self.output = variant, torch.nn.Parameter(output)

    def forward(self, x, timesteps, **inputs):
        self.x, self.timesteps = x, timesteps
        return self.output, None


@pytest.mark.parametrize(("overrides", "target"), [
    ({"scheduler.prediction": "v"}, lambda x0, noise, signal, sigma: signal * noise - sigma * x0),
    ({"scheduler.prediction": "x0"}, lambda x0, noise, signal, sigma: x0),
    ({"scheduler.prediction": "v", "training.min_snr_gamma": 5.0},
     lambda x0, noise, signal, sigma: signal * noise - sigma * x0),
    ({"scheduler.schedule": "rectified_flow"}, lambda x0, noise, signal, sigma: noise - x0),
    ({"scheduler.schedule": "rectified_flow", "scheduler.sample_method": "logit-normal"},
     lambda x0, noise, signal, sigma: noise - x0),
], ids=["v", "x0", "v, min-SNR", "flow", "flow, logit-normal"])  # fmt: skip
def test_the_loss_of_a_micro_batch_equals_float64(data, overrides, target):
    config = settings(**overrides)
    stream = BatchStream(
        PreparedDataset(data, config), seed=3, batch_size=5, accumulation=1, rank=0, world_size=1,
        scale=torch.full((4,), 0.97), objective=Objective.from_config(config),
    )  # fmt: skip
    samples = stream.micro_batch(0, 0)
    predicted = torch.randn(samples.noise.shape, generator=torch.Generator().manual_seed(0))
    model = FixedOutput(predicted, config.model.traits)
    found = joint_loss(model, samples, stream.objective, 0.0)
    x0, noise, t = (part.double().numpy() for part in (samples.latents, samples.noise, samples.timesteps))
    if config.scheduler.is_flow:
        sigma = t / 1000
        signal = 1 - sigma
    else:
        bar = np.cumprod(1 - np.linspace(np.sqrt(0.0015), np.sqrt(0.0195), 1000) ** 2)[samples.timesteps.numpy()]
        signal, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    snr, wide = (signal / sigma) ** 2, (-1, 1, 1, 1, 1)
    weight = np.minimum(snr, 5.0) / (snr + 1) if config.training.min_snr_gamma else np.ones(5)
    signal, sigma = signal.reshape(wide), sigma.reshape(wide)
    error = np.abs(predicted.double().numpy() - target(x0, noise, signal, sigma)).mean(axis=(1, 2, 3, 4))
    assert found.total.item() == pytest.approx((weight * error).mean(), rel=1e-5)
    np.testing.assert_allclose(model.x.numpy(), signal * x0 + sigma * noise, atol=3e-6)
    assert torch.equal(model.timesteps, samples.timesteps)
    wrong = np.abs(predicted.double().numpy() - noise).mean(axis=(1, 2, 3, 4))
    assert found.total.item() != pytest.approx((weight * wrong).mean(), rel=1e-3)


def test_the_times_of_a_flow_are_drawn_after_the_noise_and_shifted_for_the_grid(data):
    """By hand, with the generator of the sample; the latent of 8 x 8 x 4 voxels is smaller than MAISI's base."""
    config = settings(**{"scheduler.schedule": "rectified_flow"})
    stream = BatchStream(
        PreparedDataset(data, config), seed=3, batch_size=4, accumulation=1, rank=0, world_size=1, scale=torch.ones(4),
        objective=Objective.from_config(config),
    )  # fmt: skip
    found, ratio = stream.micro_batch(1, 0), (8 * 8 * 4 / 32**3) ** (1 / 3)
    for row, position in enumerate(range(4, 8)):
        source = generator(3, "sample", position)
        _, noise = (torch.randn(4, 8, 8, 4, generator=source) for _ in range(2))
        u = torch.rand((), generator=source).double()
        assert torch.equal(noise, found.noise[row])
        assert found.timesteps[row].item() == pytest.approx(1000 * float(ratio * u / (1 + (ratio - 1) * u)), rel=1e-5)
    assert found.timesteps.dtype == torch.float32


def fingerprint(run, step):
    files = sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return losses(run), [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize("objective", [
    FLOW | {"scheduler__sample_method": "logit-normal"}, {"scheduler__prediction": "v", "min_snr_gamma": 5.0},
], ids=["flow", "v"])  # fmt: skip
def test_a_resumed_run_of_another_objective_is_bit_equal(tmp_path, data, objective):
    train_here(tmp_path / "run", data, **STEPS, **objective)
    expected = fingerprint(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    train_here(tmp_path / "run", data, resume="latest", **STEPS, **objective)
    assert fingerprint(tmp_path / "run", 4) == expected
    train_here(tmp_path / "plain", data, **STEPS)
    assert [loss for _, loss in losses(tmp_path / "plain")] != [loss for _, loss in expected[0]]
    with pytest.raises(ConfigError, match=r"scheduler\.\w+ is .*; this run was started with"):
        train_here(tmp_path / "run", data, resume="latest", **STEPS)


def test_the_validation_loss_of_a_flow_is_that_of_its_objective(tmp_path):
    """The first band, written out: times in the middle of equal parts, the mixture, and the velocity as target."""
    splits = ("train", "train", "val", "val")
    data = write_prepared(tmp_path / "prepared", cases=4, splits=splits)
    run = tmp_path / "run"
    train_here(run, data, max_train_steps=1, checkpointing_steps=1, monitoring__validation_steps=1, **FLOW)
    model = build_model(settings())
    model.load_state_dict(weights(run, 1, "ema"))
    order = torch.randperm(2, generator=generator(0, "validation timesteps", 0, 250)).tolist()
    total = 0.0
    for number, case in enumerate(
        case for case in read_json(data / "manifest.json")["cases"] if case["split"] == "val"
    ):
        mean, sigma, text = (
            torch.from_numpy(np.load(data / case["files"][key]["path"]))
            for key in ("latent_mean/t2w", "latent_sigma/t2w", "text")
        )
        source = generator(0, "validation", case["id"], 0)
        posterior, noise = (torch.randn(mean.shape, generator=source) for _ in range(2))
        latent, t = (mean + sigma * posterior) * 0.97, (order[number] + 0.5) * 125
        with torch.no_grad():
            x = ((1 - t / 1000) * latent + t / 1000 * noise)[None]
            spacing = 100 * torch.tensor([case["spacing"]])
            predicted = model(x, torch.tensor([t]), spacing=spacing, text=text[None]).noise[0]
        total += float((predicted - (noise - latent)).abs().mean()) / 2
    assert validations(run)[-1]["val_loss_l1_0_249"] == pytest.approx(total, rel=2e-5)


# ---- sampling follows the checkpoint ----


@pytest.fixture(scope="module")
def flow_checkpoint(tmp_path_factory):
    """TINY states ddim, so the solver must be given with the flow."""
    folder = tmp_path_factory.mktemp("flow") / "step"
    return write_checkpoint(folder, **{"scheduler.schedule": "rectified_flow", "sampling.solver": "euler_flow"})


def sampler_of(folder):
    return FastSampler.from_checkpoint(folder, device="cpu", dtype="float32", text_encoder=FakeEncoder())


def test_a_sampled_flow_equals_monais_loop(flow_checkpoint):
    """The loop of MONAI's docstring, with its transform; RFlowScheduler steps by the network's x0 - noise, the opposite sign.

    Its timesteps are rounded to float16 and integers, so the times are ours, which test_objective.py compares exactly.
    """
    sampler = sampler_of(flow_checkpoint)
    found = sampler(reports=["abc"], seeds=[3], num_inference_steps=6, decode=False).latents
    model, text = load_checkpoint(flow_checkpoint).model, torch.from_numpy(FakeEncoder().encode(["abc"]).features)
    spacing, x = torch.tensor([[150.0, 150.0, 300.0]]), torch.randn(1, 4, 8, 6, 4, generator=generator(3, "start"))
    ratio = (8 * 6 * 4 / 32**3) ** (1 / 3)
    even = [1 - k / 6 for k in range(6)]
    times = [1000 * ratio * u / (1 + (ratio - 1) * u) for u in even]
    scheduler = RFlowScheduler(use_discrete_timesteps=False)
    scheduler.set_timesteps(6)
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        with torch.no_grad():
            velocity = model(x, torch.tensor([t]), spacing=spacing, text=text).noise
        x = x - velocity * (t - following) / 1000
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
    unshifted = sampler_of(flow_checkpoint)
    unshifted.config = make_config(unshifted.config.dump() | {"scheduler.use_timestep_transform": False})
    assert not torch.allclose(
        unshifted(reports=["abc"], seeds=[3], num_inference_steps=6, decode=False).latents, x, atol=1e-2
    )


@pytest.mark.parametrize(("request_", "message"), [
    ({"solver": "ddim"}, "ddim solves a noise schedule, but this model was trained for a rectified flow"),
    ({"prediction": "epsilon"}, "the networks of a rectified flow predict"),
    ({"prediction": "x0"}, "prediction is 'x0', but the network was trained to predict 'velocity'"),
], ids=str)  # fmt: skip
def test_sampling_cannot_mismatch_the_training(flow_checkpoint, tmp_path, request_, message):
    with pytest.raises(ConfigError, match=message):
        sampler_of(flow_checkpoint)(reports=["abc"], num_inference_steps=2, decode=False, **request_)
    with pytest.raises(ConfigError, match=message):
        sample_to_folder(flow_checkpoint, tmp_path / "out", reports=["abc"], num_samples=1, seed=0, **request_)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_the_prediction_of_a_noise_schedule_comes_from_the_checkpoint(tmp_path, prediction):
    """DDIM's first step by hand: the estimate of x0 differs from that of an epsilon model with the same weights."""
    latents = {}
    for name in ("epsilon", prediction):
        folder = write_checkpoint(tmp_path / name, **{"scheduler.prediction": name})
        latents[name] = sampler_of(folder)(reports=["abc"], seeds=[3], num_inference_steps=1, decode=False).latents
    x = torch.randn(1, 4, 8, 6, 4, generator=generator(3, "start"))
    model, text = load_checkpoint(folder).model, torch.from_numpy(FakeEncoder().encode(["abc"]).features)
    t = int(get_solver("ddim").plan(Schedule.scaled_linear(), 1).timesteps[0])
    bar = float(np.cumprod(1 - np.linspace(np.sqrt(0.0015), np.sqrt(0.0195), 1000) ** 2)[t])
    with torch.no_grad():
        output = model(x, torch.tensor([t]), spacing=torch.tensor([[150.0, 150.0, 300.0]]), text=text).noise
    expected = {"v": bar**0.5 * x - (1 - bar) ** 0.5 * output, "x0": output}[prediction]
    torch.testing.assert_close(latents[prediction], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents["epsilon"], expected, atol=1e-3)


def test_the_identity_of_samples_depends_on_the_objective():
    """Settings that the first version did not have count only if they differ from their defaults; see test_sampling.py too."""
    same = [make_config(), make_config({"sampling.prediction": "epsilon"})]
    other = [
        make_config({"scheduler.prediction": "v"}), make_config({"scheduler.schedule": "rectified_flow"}),
        make_config({"training.report_dropout": 0.1}), make_config({"training.min_snr_gamma": 5.0}),
        make_config({"scheduler.schedule": "rectified_flow", "scheduler.sample_method": "logit-normal"}),
    ]  # fmt: skip
    digests = [pretrained.config_digest(config) for config in (*same, *other)]
    assert digests[0] == digests[1] and len(set(digests)) == 1 + len(other)


# ---- what leaves the project ----


def test_exports_keep_the_objective_or_say_that_they_cannot(flow_checkpoint, tmp_path):
    for folder in (flow_checkpoint, write_checkpoint(tmp_path / "v", **{"scheduler.prediction": "v"})):
        with pytest.raises(CheckpointError, match="the reference's format cannot say so") as caught:
            export_reference(folder, tmp_path / "x.pt")
        assert "monai-bundle" in caught.value.fix and not (tmp_path / "x.pt").exists()
    export_reference(write_checkpoint(tmp_path / "epsilon"), tmp_path / "x.pt")
    sampler_of(flow_checkpoint).save_pretrained(tmp_path / "shared")
    assert FastSampler.from_pretrained(tmp_path / "shared", device="cpu").config.scheduler.is_flow


def test_the_model_card_states_the_objective(flow_checkpoint, tmp_path):
    dropping = write_checkpoint(tmp_path / "step", **{"training.report_dropout": 0.1})
    cards = []
    for folder, out in ((flow_checkpoint, "flow"), (dropping, "epsilon")):
        sampler_of(folder).push_to_hub("owner/name", out=tmp_path / out, text_encoder="google/flan-t5-xxl")
        cards.append((tmp_path / out / "README.md").read_text())
    assert (
        "| Noise | rectified flow" in cards[0] and "| Prediction | the velocity, which is noise - latent |" in cards[0]
    )
    assert "| Default sampling | 5 steps of euler_flow |" in cards[0] and "| Guidance |" not in cards[0]
    assert "| Noise | 1000 steps, scaled_linear_beta" in cards[1] and "| Prediction | the noise |" in cards[1]
    assert "| Guidance | trained for it, with samples without the report: 10% |" in cards[1]


@pytest.mark.filterwarnings("ignore:parsing config_file", "ignore:No hash value")
def test_a_monai_bundle_of_a_flow_samples_as_a_flow(flow_checkpoint, tmp_path):
    import monai.bundle

    maisi = write_checkpoint(
        tmp_path / "step", "MAISI", **{"scheduler.schedule": "rectified_flow", "sampling.solver": "euler_flow"}
    )
    export_monai_bundle(maisi, tmp_path / "bundle")
    metadata = read_json(tmp_path / "bundle" / "configs" / "metadata.json")
    assert (
        "the velocity, which is noise - latent" in metadata["description"]
        and "rectified flow" in metadata["description"]
    )
    times = metadata["network_data_format"]["inputs"]["timesteps"]
    assert (times["dtype"], times["value_range"]) == ("float32", [0, 1000])
    settings = {"num_inference_steps": 2, "bundle_root": str(tmp_path / "bundle"), "output_dir": str(tmp_path / "out")}
    file = str(tmp_path / "bundle" / "configs" / "inference.json")
    monai.bundle.run(config_file=file, device="cpu", **settings)
    sidecar = json.loads((tmp_path / "out" / "sample-000_seed0.json").read_text())
    assert (sidecar["solver"], sidecar["prediction"]) == ("euler_flow", "velocity")
    volume = nibabel.load(tmp_path / "out" / "sample-000_seed0.nii.gz").get_fdata()
    sample_to_folder(maisi, tmp_path / "ours", reports=None, num_samples=1, seed=0, num_inference_steps=2, device="cpu")
    expected = nibabel.load(tmp_path / "ours" / "sample-000_seed0.nii.gz").get_fdata()
    np.testing.assert_allclose(volume, expected, rtol=1e-4, atol=1e-2)


def test_tiny_states_a_solver():
    """What the fixtures above rely on: a configuration that states a solver of the other process is refused."""
    with pytest.raises(ConfigError, match="'ddim' solves a noise schedule"):
        make_config(TINY | {"scheduler.schedule": "rectified_flow"})
