"""The scripts in examples/ run unchanged, and what they report is correct."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wrong", [False, True])
def test_monai_user_s_script_before_and_after(wrong, capsys, monkeypatch):
    """Negative control: with another solver the two volumes are not equal."""
    example = load("monai_inference")
    if wrong:
        right = example.sample
        monkeypatch.setattr(example, "sample", lambda *args, **kwargs: right(*args, **kwargs | {"solver": "dpmpp_2m"}))
    difference = example.main(["--timesteps", "4", "--grid", "8", "8", "4"])
    assert (difference < 1e-4) != wrong
    shown = capsys.readouterr().out
    assert "before" in shown and "ratio" in shown and "group_norm_silu" in shown and "unsplit" in shown


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_foreign_network_with_its_own_conditioning(solver, capsys):
    plain, faster = load("foreign_unet").main(["--solver", solver, "--steps", "4"])
    torch.testing.assert_close(faster, plain, rtol=1e-4, atol=1e-4)
    assert plain.std() > 0.1 and not torch.allclose(plain[0], plain[1])
    assert "7  group_norm_silu" in capsys.readouterr().out
