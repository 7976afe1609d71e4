"""benchmarks/few_step_quality.py: its distances against plain calls of `sample`, its files, and its cache of the adapter."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ccella_fast import build_model, sample
from ccella_fast.checkpoint import write_manifest
from ccella_fast.config import Config, SchedulerConfig, make_config
from ccella_fast.diffusion.noise import start_noise
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.storage import write_json

TINY = {
    "model.num_channels": [8, 16], "model.attention_levels": [False, True], "model.num_head_channels": [0, 8],
    "model.num_res_blocks": 1, "model.norm_num_groups": 8, "model.cross_attention_dim": 16, "model.input_dim": 16,
    "model.num_latents": 4, "model.adapter_blocks": 2, "model.adapter_heads": 2, "model.adapter_time_dim": 16,
    "model.class_head_dim": 8, "autoencoder.num_channels": [8, 8], "autoencoder.num_res_blocks": [1, 1],
    "autoencoder.norm_num_groups": 4, "data.dim": [16, 8, 8], "scheduler.num_train_timesteps": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "few_step_quality.py"
    spec = importlib.util.spec_from_file_location("few_step_quality", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_model(config: Config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.normal_(1, 0.1)
    return model


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x * (0.2 + t.view(-1, 1, 1, 1, 1) / 80)


def test_distances_equal_those_of_plain_calls(quality):
    schedule, shape = Schedule.from_config(SchedulerConfig(num_train_timesteps=60)), (2, 4, 3, 2)
    names = ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]
    entries, latents = quality.measure(lambda seed: network, schedule, shape, (10, 30), names, [4, 5], "cpu")
    assert [(entry["solver"], entry["steps"]) for entry in entries] == [(n, c) for n in names for c in (10, 30)]
    for entry in entries:

        def plain(num_inference_steps, seed, solver=entry["solver"]):
            start = start_noise(shape, [seed])
            return sample(
                network, start, solver=solver, num_inference_steps=num_inference_steps, seeds=[seed], schedule=schedule
            )

        expected = [
            ((plain(entry["steps"], seed) - plain(60, seed)).norm() / plain(60, seed).norm()).item() for seed in (4, 5)
        ]
        np.testing.assert_allclose(entry["distances"], expected, rtol=1e-4)
        for count in (entry["steps"], 60):
            torch.testing.assert_close(latents[entry["solver"], count][1], plain(count, 5)[0], rtol=1e-4, atol=1e-5)
        assert entry["distance"] == pytest.approx(np.mean(expected), rel=1e-4)
        other = (plain(entry["steps"], 4) - plain(60, 5)).norm() / plain(60, 5).norm()
        assert abs(other.item() / entry["distances"][0] - 1) > 0.1  # negative control: another seed has another result


def test_the_cached_adapter_does_not_change_the_prediction(quality, monkeypatch):
    config = make_config(TINY)
    model, calls = random_model(config), []
    text, spacing = torch.randn(1, 5, 16), torch.tensor([[50.0, 60.0, 70.0]])
    x, t = torch.randn(3, 4, 8, 4, 4), torch.tensor([7, 40, 7])
    with torch.no_grad():
        expected = model(x, t, spacing=spacing.expand(3, -1), text=text.expand(3, -1, -1)).noise
        model.ella.register_forward_hook(lambda *_: calls.append(1))
        adapter = type(model.ella).forward
        counting = lambda *inputs: calls.append("adapter") or adapter(*inputs)  # noqa: E731
        monkeypatch.setattr(type(model.ella), "forward", counting)
        denoise = quality.conditioned(model, quality.Prompt(text, None, [0.50, 0.60, 0.70]), "cpu")
        for _ in range(2):
            torch.testing.assert_close(denoise(x, t), expected, rtol=1e-5, atol=1e-5)
        assert calls.count("adapter") == 2  # one per timestep
        assert (denoise(x, torch.tensor([7, 41, 7])) - expected)[1].abs().max() > 1e-3
        other = quality.conditioned(model, quality.Prompt(2 * text, None, [0.50, 0.60, 0.70]), "cpu")
        assert (
            other(x, t) - expected
        ).abs().max() > 1e-3  # another prompt does not meet the adapter's outputs of the first
        torch.testing.assert_close(denoise(x, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["MAISI", "RADMAISI"])
def test_the_command_writes_table_plot_and_json(quality, tmp_path, variant, capsys):
    config = make_config(TINY | {"model.variant": variant})
    folder = tmp_path / "step"
    folder.mkdir()
    write_json(folder / "config.json", config.dump())
    save_file(random_model(config).state_dict(), folder / "model.safetensors")
    write_json(folder / "training_state.json", {"step": 3, "scale_factor": [1.0], "intensity_scale": {}})
    write_manifest(folder, step=3)
    assert quality.main(["--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "few_step_quality.json").read_text())
    assert record["latent"] == [4, 8, 4, 4] and record["reference_steps"] == 60
    assert {(e["solver"], e["steps"]) for e in record["results"]} == {
        (n, c) for n in quality.NAMES for c in quality.STEPS
    }
    written = (tmp_path / "out" / "few_step_quality.md").read_text()
    assert written in capsys.readouterr().out
    for entry in record["results"]:
        row = next(line for line in written.splitlines() if line.startswith(f"| {entry['solver']} "))
        assert f"{entry['distance']:.4f}" in row and (entry["solver"] in ("ddpm", "dpmpp_2m_sde")) == ("*" in row)
    assert (tmp_path / "out" / "few_step_quality.png").read_bytes().startswith(b"\x89PNG")


def test_the_random_model_changes_the_sample_and_stays_bounded(quality):
    config = make_config(TINY)
    schedule = Schedule.from_config(config.scheduler)
    with torch.no_grad():
        denoise = quality.random_denoiser(config, schedule, (8, 4, 4), "cpu")
    result = sample(denoise, start_noise((4, 8, 4, 4), [1]), schedule=schedule)
    plain = sample(lambda x, t: (1 - torch.tensor(schedule.alphas_cumprod[t[0]])).sqrt() * x, start_noise((4, 8, 4, 4), [1]),
                   schedule=schedule)  # fmt: skip
    assert 0.05 < (result - plain).std() < 3 and result.std() < 5


def test_a_wrong_folder_is_reported_in_one_message(quality, tmp_path, capsys):
    assert quality.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 4
    assert "not a checkpoint or run folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
