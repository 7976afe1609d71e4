"""`sample_to_folder` and the path from a checkpoint to volumes: compared with diffusers; files written, kept and rejected."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from ccella_fast.checkpoint import load_checkpoint
from ccella_fast.config import make_config
from ccella_fast.diffusion.noise import generator
from ccella_fast.errors import CheckpointError, ConfigError, DiskError, NonFiniteError
from ccella_fast.models.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from ccella_fast.models.unet3d import UNet3d
from ccella_fast.report import figures
from ccella_fast.sampling import FastSampler, command, pretrained
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.sampling.output import OutputWriter
from sampling_fixtures import THREE, FakeEncoder, scrambled, write_checkpoint

CANARY = "Patient Zebedee, 14 mm focus in the left peripheral zone"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step")


def draw(checkpoint, out, **changes) -> None:
    wanted = {"reports": [CANARY, "No focus"], "num_samples": 2, "seed": 3, "text_encoder": FakeEncoder()}
    wanted |= {"dtype": "float32"}
    sample_to_folder(checkpoint, out, **(wanted | changes))


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_the_whole_path_equals_diffusers_and_direct_calls(checkpoint):
    """DDIM of diffusers with the same network, then the decoding of the reference written out."""
    from diffusers import DDIMScheduler

    loaded = load_checkpoint(checkpoint)
    text = torch.from_numpy(FakeEncoder().encode(["abc"]).features)
    vae = load_autoencoder(checkpoint)
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32")
    got = sampler(text=text, seeds=[11], num_inference_steps=28)
    truth = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="linspace"
    )  # fmt: skip
    truth.set_timesteps(28)  # 999 = 27 x 37: a step of 37 each time
    truth.num_inference_steps = Fraction(1000, 37)
    x = torch.randn(1, 4, 8, 6, 4, generator=generator(11, "start"))
    with torch.no_grad():
        for t in truth.timesteps:
            predicted = loaded.model(x, t[None], spacing=torch.tensor([[150.0, 150.0, 300.0]]), text=text)
            x = truth.step(predicted.noise, t, x).prev_sample
        image = vae.decode(x / loaded.scale_factor[0])[0, 0].clamp(0, 1).numpy()
    assert image.std() > 0.05  # not a constant image
    np.testing.assert_allclose(got.volumes[0, 0], image, atol=2e-3)
    np.testing.assert_allclose(got.class_probabilities, predicted.class_logits.softmax(1), atol=1e-4)
    with pytest.raises(AssertionError):  # negative control: another spacing
        other = sampler(text=text, seeds=[11], num_inference_steps=28, spacing=[9, 9, 9])
        np.testing.assert_allclose(other.volumes[0, 0], image, atol=2e-3)


def test_cudnn_searches_for_algorithms_in_the_loop_and_in_the_decoder(checkpoint, monkeypatch):
    """Shapes stay the same from step to step and from volume to volume, so that the search pays. It ends with them."""
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())
    seen = []

    def observe(owner, name):
        plain = getattr(owner, name)
        note = lambda: seen.append((name, torch.backends.cudnn.benchmark))  # noqa: E731
        monkeypatch.setattr(owner, name, lambda *arguments: note() or plain(*arguments))

    observe(UNet3d, "denoise")
    observe(Autoencoder, "decode")
    sampler(reports=["abc"], seeds=[1], num_inference_steps=2)
    assert seen == [("denoise", True), ("denoise", True), ("decode", True)] and not torch.backends.cudnn.benchmark


def test_a_volume_does_not_depend_on_its_batch(checkpoint, tmp_path):
    for size, out in ((1, "one"), (3, "three")):
        draw(checkpoint, tmp_path / out, batch_size=size)
    files = names(tmp_path / "one", "*.nii.gz")
    assert files == [f"sample-{k:03d}_seed{seed}.nii.gz" for k, seed in enumerate([3, 4, 3, 4])]
    for name in files:
        np.testing.assert_allclose(voxels(tmp_path / "one" / name), voxels(tmp_path / "three" / name), atol=0.05)
    first = voxels(tmp_path / "one" / files[0])
    assert np.abs(first - voxels(tmp_path / "one" / files[1])).max() > 5  # another seed
    assert np.abs(first - voxels(tmp_path / "one" / files[2])).max() > 5  # another report


def test_written_files(checkpoint, tmp_path):
    draw(checkpoint, tmp_path)
    sidecar = json.loads((tmp_path / "sample-001_seed4.json").read_text())
    assert {key: sidecar[key] for key in ("synthetic", "variant", "step", "seed", "report", "solver")} == {
        "synthetic": True, "variant": "CCELLA", "step": 12, "seed": 4, "report": 0, "solver": "ddim",
    }  # fmt: skip
    assert sum(sidecar["class_probabilities"].values()) == pytest.approx(1, abs=1e-4)
    image = nibabel.load(tmp_path / "sample-001_seed4.nii.gz")
    assert image.shape == (16, 12, 8)
    assert image.header.get_zooms() == (1.5, 1.5, 3.0)
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())
    again = sampler(reports=[CANARY], seeds=[4]).volumes[0, 0]
    np.testing.assert_allclose(voxels(tmp_path / "sample-001_seed4.nii.gz"), again * 700, atol=0.05)
    assert (tmp_path / "montage.png").read_bytes().startswith(b"\x89PNG")
    for path in tmp_path.iterdir():
        assert b"Zebedee" not in path.read_bytes(), path


def test_the_montage_shows_volumes_of_every_report(checkpoint, tmp_path, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(command, "_MONTAGE_VOLUMES", 2)
    monkeypatch.setattr(figures, "montage", lambda panels, **_: shown.extend(panel.title for panel in panels) or b"")
    draw(checkpoint, tmp_path)
    assert [title.split(", P(")[0] for title in shown] == ["report 1, seed 3", "report 2, seed 3"]


def test_volumes_of_an_equal_request_are_kept_and_of_another_raise(checkpoint, tmp_path, monkeypatch):
    draw(checkpoint, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    draw(checkpoint, tmp_path)
    for change in ({"seed": 4}, {"reports": [CANARY, "no focus"]}, {"num_samples": 1}, {"num_inference_steps": 6}):
        with pytest.raises(ConfigError, match="another request"):
            draw(checkpoint, tmp_path, **change)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    draw(checkpoint, tmp_path, num_samples=1, seed=9, overwrite=True)
    assert names(tmp_path, "*.nii.gz") == ["sample-000_seed9.nii.gz", "sample-001_seed9.nii.gz"]


def test_the_identity_of_samples_is_that_of_the_first_version():
    """Its configurations had no settings of the autoencoder's optimizer, and some that nothing read."""
    first = (
        "5ed5234421f3556751a289f82ae8ccf0ab9a4715769c9639fecf430a3bf1d946"  # as computed by it for the same settings
    )
    precision = {"training.precision": "fp32"}
    assert pretrained.config_digest(make_config(precision)) == first
    for change in ({"vae_training.weight_decay": 0.02}, {"vae_training.lr": 2e-4}, {"scheduler.beta_end": 0.02}):
        assert pretrained.config_digest(make_config(precision | change)) != first


def test_an_interrupted_request_is_continued(checkpoint, tmp_path, monkeypatch):
    draw(checkpoint, tmp_path / "whole")
    write = OutputWriter.write

    def interrupted(writer, out, output, generated):
        if output.name == "sample-002_seed3":
            raise KeyboardInterrupt
        write(writer, out, output, generated)

    monkeypatch.setattr(OutputWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(checkpoint, tmp_path / "parts")
    assert len(names(tmp_path / "parts", "*.nii.gz")) == 2
    monkeypatch.setattr(OutputWriter, "write", write)
    draw(checkpoint, tmp_path / "parts")
    for name in names(tmp_path / "whole", "sample-*"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_null_report_is_used_and_logged(checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ccella_fast"):
        draw(checkpoint, tmp_path / "none", reports=None, num_samples=1)
    assert "null report" in caplog.text
    draw(checkpoint, tmp_path / "empty", reports=[""], num_samples=1)
    name = "sample-000_seed3.nii.gz"
    assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "empty" / name).read_bytes()


def test_a_given_class_is_required_and_changes_the_volume(tmp_path):
    folder = write_checkpoint(tmp_path / "step", "RADMAISI")
    with pytest.raises(ConfigError, match="RADMAISI needs a class"):
        draw(folder, tmp_path / "out", reports=None)
    with pytest.raises(ConfigError, match="does not take a report"):
        draw(folder, tmp_path / "out", pirads="pos")
    assert not (tmp_path / "out").exists()
    for pirads in ("neg", "pos"):
        draw(folder, tmp_path / pirads, reports=None, num_samples=1, pirads=pirads)
    neg, pos = (voxels(tmp_path / pirads / "sample-000_seed3.nii.gz") for pirads in ("neg", "pos"))
    assert np.abs(neg - pos).max() > 1
    assert json.loads((tmp_path / "pos" / "sample-000_seed3.json").read_text())["class_probabilities"] is None


def test_every_volume_has_its_own_seed_spacing_and_class(tmp_path):
    """A batch of three volumes that differ in one value each, compared with each volume alone."""
    sampler = FastSampler.from_checkpoint(
        write_checkpoint(tmp_path / "step", "RADMAISI"), device="cpu", dtype="float32"
    )
    own = [(3, [1.5, 1.5, 3.0], "neg"), (3, [1.5, 1.5, 3.0], "pos"), (3, [3.0, 1.5, 1.5], "pos")]
    seeds, spacing, pirads = (list(column) for column in zip(*own, strict=True))
    three = sampler(seeds=seeds, spacing=spacing, pirads=pirads, batch_size=3)
    for k, (seed, steps, name) in enumerate(own):
        alone = sampler(seeds=[seed], spacing=steps, pirads=name).latents[0]
        distances = [float((alone - latent).norm() / alone.norm()) for latent in three.latents]
        assert distances.pop(k) < 1e-4 < 1e-3 < min(distances)
    three.save(tmp_path / "out")
    for k, (seed, steps, name) in enumerate(own):
        sidecar = json.loads((tmp_path / "out" / f"sample-{k:03d}_seed{seed}.json").read_text())
        assert (sidecar["spacing"], sidecar["class_given"], sidecar["class_override"]) == (steps, name, None)
        image = nibabel.load(tmp_path / "out" / f"sample-{k:03d}_seed{seed}.nii.gz")
        assert image.header.get_zooms() == tuple(steps)


def test_three_sequences_are_split_scaled_and_named(tmp_path):
    folder = write_checkpoint(tmp_path / "step", **THREE)
    draw(folder, tmp_path / "out", reports=["abc"], num_samples=1)
    assert names(tmp_path / "out", "*.nii.gz") == [
        f"sample-000_seed3_seq-{name}.nii.gz" for name in ("adc", "hbv", "t2w")
    ]
    sampler = FastSampler.from_checkpoint(folder, device="cpu", dtype="float32", text_encoder=FakeEncoder())
    latents = sampler(reports=["abc"], seeds=[3], decode=False).latents
    # the second sequence: channels 4 to 7, its own factor, the reference's constant (the checkpoint stores none)
    with torch.no_grad():
        image = load_autoencoder(folder).decode(latents[:, 4:8] / 1.5)[0, 0].clamp(0, 1).numpy() * 117
    np.testing.assert_allclose(voxels(tmp_path / "out" / "sample-000_seed3_seq-hbv.nii.gz"), image, atol=0.02)
    draw(folder, tmp_path / "out", reports=["abc"], num_samples=1)  # kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "euler"}, "no solver 'euler'"),
        ({"num_inference_steps": 1001}, "must be an integer from 1 to 1000, got 1001"),
        ({"num_samples": 0}, "--num_samples must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"spacing": [1.0, 0.0, 1.0]}, "spacing"),
        ({"pirads": "pos"}, "predicts the class"),
    ],
    ids=["solver", "num_inference_steps", "num_samples", "seed", "spacing", "pirads"],
)
def test_invalid_requests_write_nothing(checkpoint, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        draw(checkpoint, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["model", "autoencoder"])
def test_a_diverged_model_raises_and_writes_nothing(checkpoint, tmp_path, monkeypatch, part):
    loaded, vae = load_checkpoint(checkpoint), load_autoencoder(checkpoint)
    broken = loaded.model if part == "model" else vae
    with torch.no_grad():
        list(broken.parameters())[-1].fill_(float("nan"))
    monkeypatch.setattr(pretrained, "load_checkpoint", lambda *_, **__: loaded)
    monkeypatch.setattr(pretrained, "load_autoencoder", lambda *_: vae)
    with pytest.raises(NonFiniteError, match="diverged") as caught:
        draw(checkpoint, tmp_path / "out")
    assert caught.value.path == str(loaded.path) and len(str(caught.value).splitlines()) <= 5
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_raises_before_any_work(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pretrained, "load_checkpoint", None)
    with pytest.raises(DiskError, match="is a file"):
        draw(checkpoint, tmp_path / "file" / "out")


def test_a_missing_autoencoder_raises_with_a_fix(tmp_path):
    folder = write_checkpoint(tmp_path / "step", with_vae=False)
    with pytest.raises(CheckpointError, match="--vae"):
        draw(folder, tmp_path / "out")
    save_autoencoder(scrambled(Autoencoder(load_checkpoint(folder).config.autoencoder)), tmp_path / "vae")
    draw(folder, tmp_path / "out", vae=tmp_path / "vae", num_samples=1)
    assert len(names(tmp_path / "out", "*.nii.gz")) == 2


def test_two_processes_generate_the_volumes_of_one(tmp_path):
    """Bit for bit with --batch_invariant, also if two processes continue a request that one process began."""
    folder = write_checkpoint(tmp_path / "step", "RADMAISI")
    flags = ["--checkpoint", folder, "--pirads", "pos", "--num_samples", "5", "--seed", "3", "--solver", "dpmpp_2m_sde"]
    flags += ["--batch_size", "2", "--batch_invariant", "--dtype", "float32"]
    common = {"num_samples": 5, "seed": 3, "pirads": "pos", "solver": "dpmpp_2m_sde", "batch_size": 2}
    draw(folder, tmp_path / "one", reports=None, batch_invariant=True, device="cpu", **common)
    (tmp_path / "two").mkdir()
    for name in names(tmp_path / "one", "sample-001*"):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    launcher = Path(sys.executable).with_name("torchrun")
    command = [launcher, "--standalone", "--nproc-per-node", "2", "-m", "ccella_fast.cli", "sample", *flags]
    completed = subprocess.run([*map(str, command), "--out", tmp_path / "two"], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "sampling 1-1 of 2" in completed.stderr  # four are missing, two per process
    for path in (tmp_path / "one").iterdir():
        if path.name != "run_record.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert json.loads((tmp_path / "two" / "run_record.json").read_text())["processes"] == 2
