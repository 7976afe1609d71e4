"""Autoguidance: against loops written out here, with every solver and optimization, and what is recorded and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ccella_fast
from ccella_fast import FastSampler, cli, load_checkpoint
from ccella_fast.checkpoint import Checkpoint, write_manifest
from ccella_fast.diffusion.noise import generator, start_noise
from ccella_fast.diffusion.objective import noise_process
from ccella_fast.errors import ConfigError
from ccella_fast.evaluation.volumes import open_volumes
from ccella_fast.sampling import Optimizations, Reuse, pretrained
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.sampling.memory import cache_bytes
from ccella_fast.sampling.onednn_prepack import can_pack
from sampling_fixtures import FakeEncoder, write_checkpoint

STEPS, SCALE = 6, 2.5
SPACING = torch.tensor([[150.0, 150.0, 300.0]])
GUIDED = {"guidance_scale": SCALE, "num_inference_steps": STEPS}
FLOW = {"scheduler.schedule": "rectified_flow", "sampling.solver": "euler_flow", "sampling.num_inference_steps": 5}


def weaker(folder: Path, seed: int = 1, variant: str = "CCELLA", **overrides: Any) -> Path:
    """A checkpoint whose weights are those of `write_checkpoint` with noise."""
    write_checkpoint(folder, variant, **overrides)
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    noisy = {name: each + 0.1 * torch.randn(each.shape, generator=random) for name, each in tensors.items()}
    save_file(noisy, folder / "model.safetensors")
    (folder / "manifest.json").unlink()
    write_manifest(folder, step=12)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The model, and its weak version."""
    place = tmp_path_factory.mktemp("models")
    return write_checkpoint(place / "model"), weaker(place / "weak")


def make(model: Path, weak: Path | Checkpoint | None, **options: Any) -> FastSampler:
    given = {"device": "cpu", "dtype": "float32", "text_encoder": FakeEncoder()} | options
    return FastSampler.from_checkpoint(model, autoguidance=weak, **given)


def text(length: int) -> torch.Tensor:
    return torch.from_numpy(FakeEncoder().encode(["a" * length]).features)


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got - truth).norm() / truth.norm())


def predictor(folders: tuple[Path, Path], length: int = 3, scale: float = SCALE) -> Callable:
    """The prediction weak + scale (model - weak) in float64, each with the report."""
    model, weak = (load_checkpoint(folder).model for folder in folders)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        given = {"spacing": SPACING.expand(len(x), 3)}
        if model.variant.text:
            given["text"] = text(length).expand(len(x), -1, -1)
        main, worse = (each(x.float(), t, **given).noise.double() for each in (model, weak))
        return worse + scale * (main - worse)

    return predict


def test_it_is_weak_plus_scale_times_the_difference(folders):
    """DDIM in float64, with guidance inside its interval alone; in any batch, and with two different reports."""
    from diffusers import DDIMScheduler

    timesteps = torch.linspace(0, 999, STEPS).round().long().flip(0)
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    abar = scheduler.alphas_cumprod.double()
    guided, alone = predictor(folders), predictor(folders, scale=1.0)

    def loop(seed: int, predict: Callable) -> torch.Tensor:
        x = torch.randn(1, 4, 8, 6, 4, generator=generator(seed, "start")).double()
        with torch.no_grad():
            for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
                a, b = abar[t], abar[after] if after is not None else torch.tensor(1.0).double()
                eps = predict(x, t[None])
                x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        return x

    expected = loop(4, lambda x, t: guided(x, t) if 200 <= t <= 700 else alone(x, t))
    sampler, inside = make(*folders), {**GUIDED, "guidance_interval": (0.2, 0.7)}
    got = sampler(reports=["abc"], seeds=[4], **inside).latents
    assert error(got, expected) < 5e-5
    assert error(got, loop(4, guided)) > 1e-2 and error(got, loop(4, alone)) > 1e-2  # negative controls
    in_batch = sampler(reports=["abc", "a"], seeds=[4, 9], batch_size=2, **inside).latents
    assert error(in_batch[:1], expected) < 5e-5 < error(in_batch[1:], expected)
    several = sampler(reports=["abc"], seeds=[9, 4], batch_size=2, **inside).latents
    assert error(several[1:], expected) < 5e-5
    alone_in_batch = {**inside, "batch_invariant": True}
    both = sampler(reports=["abc", "a"], seeds=[4, 9], **alone_in_batch).latents
    assert torch.equal(both[:1], sampler(reports=["abc"], seeds=[4], **alone_in_batch).latents)
    assert error(both[:1], expected) < 5e-5


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler_flow", "heun_flow"])
def test_every_solver_is_guided(folders, tmp_path, solver):
    schedule = None
    if solver.endswith("flow"):
        folders = write_checkpoint(tmp_path / "model", **FLOW), weaker(tmp_path / "weak", **FLOW)
        schedule = noise_process(load_checkpoint(folders[0]).config.scheduler, [8, 6, 4])
    got = make(*folders)(reports=["abc"], seeds=[4], solver=solver, **GUIDED).latents
    expected, without = (
        ccella_fast.sample(
            predictor(folders, scale=scale), start_noise((4, 8, 6, 4), [4]), solver=solver, num_inference_steps=STEPS,
            seeds=[4], schedule=schedule, prediction="velocity" if schedule else "epsilon",
        )
        for scale in (SCALE, 1.0)
    )  # fmt: skip
    assert error(got, expected) < 1e-4
    assert error(got, without) > 1e-2


@pytest.mark.parametrize("name", ["precompute_conditioning", "channels_last", "phase_upsampler"])
def test_each_optimization_alone_changes_only_rounding(folders, name):
    request = {"reports": ["abc", "d", "abc"], "seeds": [5, 6, 7], "batch_size": 2, "solver": "ddim", **GUIDED}
    plain = make(*folders, optimizations=Optimizations.off())(**request)
    got = make(*folders, optimizations=replace(Optimizations.off(), **{name: True}))(**request)
    assert error(got.latents, plain.latents) < 5e-5
    torch.testing.assert_close(got.class_probabilities, plain.class_probabilities, atol=1e-5, rtol=0)
    alone = make(folders[0], None)(**{**request, "guidance_scale": 1.0})
    torch.testing.assert_close(got.class_probabilities, alone.class_probabilities, atol=1e-5, rtol=0)  # the model's own


def test_bf16_with_packed_weights_changes_only_rounding(folders):
    if not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this CPU has no packed bf16 convolutions")
    request = {"reports": ["abc"], "seeds": [5], "solver": "ddim", "guidance_scale": 1.5, "num_inference_steps": 3}
    exact, rounded, alone = (
        make(*models, dtype=dtype)(**request | changes).latents
        for models, dtype, changes in [
            (folders, "float32", {}), (folders, "bfloat16", {}), ((folders[0], None), "float32", {"guidance_scale": 1.0}),
        ]
    )  # fmt: skip
    assert error(rounded, exact) < 0.5 * error(alone, exact)


def test_features_are_reused_in_both_networks(folders):
    """With an interval of 1 nothing is reused, so that only rounding differs; with 2, both networks reuse theirs."""
    request = {
        "reports": ["abc", "d"],
        "seeds": [5, 6],
        "batch_size": 2,
        "solver": "ddim",
        "num_inference_steps": STEPS,
    }
    inside = {**request, "guidance_scale": SCALE, "guidance_interval": (0.0, 0.7)}
    exact, same, reused = (make(*folders)(**inside, reuse=reuse).latents for reuse in (None, Reuse(1, 1), Reuse(2, 1)))
    assert error(same, exact) < 2e-5 < error(reused, exact) < 1.0
    itself, alone = make(folders[0], folders[0]), make(folders[0], None)(**request, reuse=Reuse(2, 1)).latents
    # A model that is guided by itself predicts as it does alone, but a feature is computed anew where guidance begins.
    whole, late = (
        itself(**inside | {"guidance_interval": (0.0, end)}, reuse=Reuse(2, 1)).latents for end in (1.0, 0.9)
    )
    assert error(whole, alone) < 5e-5 < error(late, alone)


def test_a_smaller_network_and_a_variant_without_report(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    weak = write_checkpoint(tmp_path / "weak", **{"model.num_channels": [8, 8], "model.adapter_blocks": 1})
    got = make(model, weak)(reports=["abc"], seeds=[4], solver="ddim", **GUIDED).latents
    expected = ccella_fast.sample(
        predictor((model, weak)), start_noise((4, 8, 6, 4), [4]), solver="ddim", num_inference_steps=STEPS
    )
    assert error(got, expected) < 1e-4
    pair = write_checkpoint(tmp_path / "maisi", "MAISI"), weaker(tmp_path / "maisi-weak", variant="MAISI")
    got = make(*pair)(seeds=[4], solver="ddim", **GUIDED).latents
    expected = ccella_fast.sample(
        predictor(pair), start_noise((4, 8, 6, 4), [4]), solver="ddim", num_inference_steps=STEPS
    )
    assert error(got, expected) < 1e-4
    with pytest.raises(ConfigError, match="guidance needs a report"):
        make(pair[0], None)(seeds=[4], **GUIDED)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "MAISI"}, "the weak model has model.variant 'MAISI', but the model that it guides has 'CCELLA'"),
        ({"scheduler.prediction": "v"}, "scheduler.prediction 'v', but the model that it guides has 'epsilon'"),
        ({"scheduler.beta_end": 0.02}, "scheduler.beta_end 0.02"),
        (FLOW, "scheduler.schedule 'rectified_flow'"),
        ({"model.latent_channels": [8], "autoencoder.latent_channels": 8}, "model.latent_channels [8]"),
        ({"text.encoder": "another"}, "text.encoder 'another'"),
        (
            {
                "model.num_channels": [8, 8, 8],
                "model.attention_levels": [False] * 3,
                "model.num_head_channels": [0, 0, 8],
            },
            "levels of the U-Net 3",
        ),
    ],
    ids=["variant", "prediction", "schedule", "flow", "channels", "encoder", "levels"],
)
def test_a_model_that_does_not_fit_is_refused(folders, tmp_path, changes, words):
    """By the command before any weights are read, and from Python."""
    weak = write_checkpoint(tmp_path / "weak", **changes)
    with pytest.raises(ConfigError) as caught:
        make(folders[0], weak)
    assert words in caught.value.why and caught.value.field == "--autoguidance"
    (weak / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError) as caught:
        draw(folders[0], tmp_path / "out", weak)
    assert words in caught.value.why and not (tmp_path / "out").exists()


def test_other_scales_are_refused(folders, tmp_path):
    weak = load_checkpoint(folders[1])
    with pytest.raises(ConfigError, match=r"latents scaled by \[1.5\], but the model that it guides by \[1.0\]"):
        make(folders[0], replace(weak, scale_factor=[1.5]))
    with pytest.raises(ConfigError, match="with guidance_scale 1 it has no effect"):
        make(*folders)(reports=["abc"], num_inference_steps=2)
    with pytest.raises(ConfigError, match="with guidance_scale 1 it has no effect"):
        draw(folders[0], tmp_path / "out", folders[1], guidance_scale=None)
    with pytest.raises(ConfigError, match="depth"):
        deep = write_checkpoint(tmp_path / "deep", **{"model.num_res_blocks": 3})
        make(deep, folders[1])(reports=["abc"], reuse=Reuse(2, 7), **GUIDED)


def draw(model: Path, out: Path, weak: Path | None, guidance_scale: float | None = 2.0) -> None:
    sample_to_folder(
        model, out, reports=["abc"], num_samples=1, seed=0, autoguidance=weak, text_encoder=FakeEncoder(), device="cpu",
        dtype="float32", guidance_scale=guidance_scale, num_inference_steps=2,
    )  # fmt: skip


def test_it_is_recorded_and_part_of_the_identity(folders, tmp_path):
    draw(folders[0], tmp_path / "auto", folders[1])
    draw(folders[0], tmp_path / "null", None)
    auto, null = (json.loads((tmp_path / name / "sample-000_seed0.json").read_text()) for name in ("auto", "null"))
    listed = json.loads((folders[1] / "manifest.json").read_text())["files"]
    expected = {"step": 12, "weights": "raw", "weights_sha256": listed["model.safetensors"]["sha256"]}
    assert auto["autoguidance"] == expected and "autoguidance" not in null
    assert auto["identity"] != null["identity"] and auto["weights_sha256"] == null["weights_sha256"]
    assert open_volumes(tmp_path / "auto", field="--synthetic").generator["autoguidance"] == expected
    other = weaker(tmp_path / "other", seed=2)
    for weak in (other, None):
        with pytest.raises(ConfigError, match="another request"):
            draw(folders[0], tmp_path / "auto", weak)
    draw(folders[0], tmp_path / "auto", folders[1])  # the same again: nothing to do


def test_the_estimate_of_memory_has_two_caches_and_no_further_rows(folders, monkeypatch):
    needed: list[int] = []
    monkeypatch.setattr("ccella_fast.sampling.memory.check_memory", lambda size, *rest: needed.append(size))
    request = {"reports": ["abc"], "num_inference_steps": 2, "decode": False}
    make(folders[0], None)(**request)
    make(*folders)(**request, guidance_scale=2.0)
    make(folders[0], None)(**request, guidance_scale=2.0)
    alone, autoguided, guided = needed
    assert guided == 2 * alone and autoguided - alone == cache_bytes(
        load_checkpoint(folders[0]).config.model, 1, 2, torch.float32
    )
    assert alone < autoguided < guided


def test_the_option_of_the_command(folders, tmp_path, monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr("ccella_fast.sampling.command.sample_to_folder", lambda *paths, **given: seen.update(given))
    command = [
        "sample",
        "--checkpoint",
        str(folders[0]),
        "--out",
        str(tmp_path / "out"),
        "--autoguidance",
        str(folders[1]),
    ]
    assert cli.main([*command, "--guidance_scale", "1.5"]) == 0
    assert seen["autoguidance"] == folders[1] and seen["guidance_scale"] == 1.5


def test_the_weak_fixture_differs(folders):
    model, weak = (load_checkpoint(folder).model.state_dict() for folder in folders)
    assert all(not torch.equal(model[name], weak[name]) for name in model)


def test_earlier_samples_with_another_weak_model_are_found_before_weights_load(folders, tmp_path, monkeypatch):
    third = weaker(tmp_path / "third", seed=2)
    draw(folders[0], tmp_path / "weak", folders[1])
    draw(folders[0], tmp_path / "null", None)

    def load(*_, **__):
        raise ZeroDivisionError("weights were loaded")

    monkeypatch.setattr(pretrained, "load_checkpoint", load)
    for name, weak, words in (
        ("weak", third, "another request: weights_sha256 of the weak model was '"),
        ("weak", None, "another request: it was made with --autoguidance"),
        ("null", third, "another request: it was made without --autoguidance"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            draw(folders[0], tmp_path / name, weak)
        assert caught.value.path.endswith("sample-000_seed0.json")
    for name, weak in (("weak", folders[1]), ("null", None)):  # controls
        with pytest.raises(ZeroDivisionError):
            draw(folders[0], tmp_path / name, weak)


def test_a_model_cannot_guide_itself(folders, tmp_path):
    """The prediction would be its own, at twice the cost."""
    with pytest.raises(ConfigError, match="the same weights as the model that it guides") as caught:
        draw(folders[0], tmp_path / "out", folders[0])
    assert caught.value.field == "--autoguidance" and not list(tmp_path.iterdir())
