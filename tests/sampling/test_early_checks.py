"""A wrong request, device or backend is answered before any weight is read; only what fits the checkpoint is suggested."""

from __future__ import annotations

import shutil

import pytest
import torch

from ccella_fast import FastSampler
from ccella_fast.config import make_config
from ccella_fast.diffusion.solvers import SOLVERS
from ccella_fast.errors import CcellaError, CheckpointError, ConfigError
from ccella_fast.models import build_model
from ccella_fast.sampling import Reuse, pretrained
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.storage import read_json, write_json
from sampling_fixtures import TINY, FakeEncoder, write_checkpoint

FLOW = {"scheduler.schedule": "rectified_flow", "sampling.solver": "euler_flow"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000012")


@pytest.fixture
def no_weights(monkeypatch):
    """Loading anything is an error of another type."""

    def load(*_, **__):
        raise ZeroDivisionError("weights were loaded")

    monkeypatch.setattr(pretrained, "load_checkpoint", load)
    monkeypatch.setattr("ccella_fast.sampling.text_features._LazyTextEncoder", load)


def draw(checkpoint, out, **changes):
    wanted = {"reports": ["abc"], "num_samples": 1, "seed": 0, "dtype": "float32"} | changes
    sample_to_folder(checkpoint, out, **wanted)


INVALID = [
    ({"solver": "euler"}, "no solver 'euler'"),
    ({"solver": "euler_flow"}, "solves a rectified flow, but this model was trained for a noise schedule"),
    ({"num_inference_steps": 1001}, "from 1 to 1000, got 1001"),
    ({"num_inference_steps": 2.5}, "from 1 to 1000, got 2.5"),
    ({"timestep_spacing": "trailin"}, "did you mean 'trailing'"),
    ({"prediction": "noise"}, "no prediction type 'noise'"),
    ({"prediction": "v_prediction"}, "prediction is 'v', but the network was trained to predict 'epsilon'"),
    ({"prediction": "velocity"}, "networks of a noise schedule predict epsilon, v or x0, not velocity"),
    ({"spacing": [1.0, "x", 1.0]}, "three lengths between 0 and 100 mm"),
    ({"spacing": [1.0, float("nan"), 1.0]}, "three lengths between 0 and 100 mm"),
    ({"latent_shape": (4, 8, 7, 4)}, r"divisible by 2(.|\n)*use \[8, 8, 4\]"),
    ({"pirads": "pos"}, "predicts the class"),
    ({"class_override": 6}, "PI-RADS score from 1 to 5, neg or pos, got '6'"),
    ({"guidance_scale": "strong"}, "guidance_scale must be a number, such as 2, got 'strong'"),
    ({"guidance_scale": float("nan")}, "at least 0 and below 1000, got nan"),
    ({"guidance_interval": (0.1,)}, "two fractions of the schedule"),
    ({"reuse": Reuse(2, 4)}, "4 is not a possible depth"),
    ({"reuse": (2, 1)}, "must be a Reuse"),
    ({"batch_size": "2"}, "batch_size must be at least 1, got '2'"),
    ({"report_ids": ["a", "a"], "reports": ["abc", "d"]}, "used more than once"),
    ({"device": "gpu"}, "no device 'gpu'"),
]


@pytest.mark.parametrize(("change", "message"), INVALID)
def test_a_wrong_request_is_answered_before_weights_load(checkpoint, no_weights, tmp_path, change, message):
    for path in (checkpoint, checkpoint.parents[1]):  # a step folder, and its run
        with pytest.raises(ConfigError, match=message) as caught:
            draw(path, tmp_path / "out", **change)
        assert caught.value.fix and len(str(caught.value).splitlines()) <= 5
    assert not (tmp_path / "out").exists()


def test_a_correct_request_loads_weights(checkpoint, no_weights, tmp_path):
    with pytest.raises(ZeroDivisionError, match="weights were loaded"):
        draw(checkpoint, tmp_path / "out")


SAME = {"num_inference_steps": 2, "num_samples": 2}
EARLIER = [
    ({"seed": 1}, "other seeds or fewer volumes"),
    ({"num_samples": 1}, "other seeds or fewer volumes"),
    ({"num_inference_steps": 3}, "num_inference_steps was 2, now 3"),
    ({"solver": "ddpm"}, "solver was 'ddim', now 'ddpm'"),
    ({"spacing": [1.0, 1.5, 3.0]}, r"spacing was \[1.5, 1.5, 3.0\], now \[1.0, 1.5, 3.0\]"),
    ({"guidance_scale": 2.0}, "guidance_scale was 1.0, now 2.0"),
    ({"reuse": Reuse(2, 1)}, r"reuse was None, now \[2, 1\]"),
    ({"class_override": 5}, "class_override was None, now 'pos'"),
    ({"batch_invariant": True}, "batch_invariant was False, now True"),
    ({"reports": ["canary"]}, "it had another report"),
    ({"reports": [" "]}, "it had another report"),
    ({"format": "dicom"}, "format was 'nifti', now 'dicom'"),
]


@pytest.fixture(scope="module")
def earlier(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples")
    draw(checkpoint, out, text_encoder=FakeEncoder(), **SAME)
    return out


@pytest.mark.parametrize(("change", "message"), EARLIER)
def test_samples_of_another_request_are_found_before_weights_load(checkpoint, earlier, no_weights, change, message):
    for path in (checkpoint, checkpoint.parents[1]):
        with pytest.raises(ConfigError, match=message) as caught:
            draw(path, earlier, **SAME | change)
        assert "canary" not in str(caught.value) and "sample-00" in caught.value.path
        assert "--out" in caught.value.fix and "--overwrite" in caught.value.fix
    for accepted in ({}, {"overwrite": True} | change, {"report_ids": ["another"]}):  # control
        with pytest.raises(ZeroDivisionError):
            draw(checkpoint, earlier, **SAME | accepted)


def test_samples_of_another_checkpoint_are_found_before_weights_load(checkpoint, earlier, no_weights, tmp_path):
    changed = shutil.copytree(checkpoint, tmp_path / "step")
    manifest = read_json(changed / "manifest.json")
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    write_json(changed / "manifest.json", manifest)
    with pytest.raises(ConfigError, match="another request: weights_sha256 was"):
        draw(changed, earlier, **SAME)
    with pytest.raises(ConfigError, match="another request: config_sha256 was"):
        draw(write_checkpoint(tmp_path / "other", **{"training.lr": 0.5}), earlier, **SAME)


def test_a_configuration_that_cannot_be_read_is_left_to_the_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path / "step")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        draw(folder, tmp_path / "out", solver="euler")
    assert caught.value.path.endswith("config.json")


@pytest.mark.parametrize("flow", [False, True])
def test_only_solvers_that_fit_the_checkpoint_are_suggested_and_accepted(no_weights, tmp_path, flow):
    folder = write_checkpoint(tmp_path / "step", **(FLOW if flow else {}))
    fitting = {name for name, solver in SOLVERS.items() if solver.flow == flow}
    for wrong in ("euler", "heun", "x", *(SOLVERS.keys() - fitting)):
        with pytest.raises(ConfigError) as caught:
            draw(folder, tmp_path / "out", solver=wrong)
        suggested = set(caught.value.fix.replace("'", " ").replace(",", " ").replace("?", " ").split()) & SOLVERS.keys()
        assert suggested and suggested <= fitting and caught.value.field == "solver"
    for right in fitting:
        with pytest.raises(ZeroDivisionError):
            draw(folder, tmp_path / "out", solver=right)


def test_a_model_that_predicts_the_clean_sample_takes_the_solvers_of_its_own_kind(no_weights, tmp_path):
    folder = write_checkpoint(tmp_path / "step", **FLOW | {"scheduler.prediction": "x0"})
    with pytest.raises(ConfigError, match="ddim solves a noise schedule"):
        draw(folder, tmp_path / "out", solver="ddim")
    with pytest.raises(ZeroDivisionError):
        draw(folder, tmp_path / "out", solver="euler_flow")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda"}, "device 'cuda' cannot be used"),
        ({"device": "cuda:3"}, "device 'cuda:3' cannot be used"),
        ({"device": "cpu:x"}, "no device 'cpu:x'"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"device": 3.5}, "no device '3.5'"),
        ({"device": "cpu", "dtype": "float16"}, "float16 is not supported on CPUs"),
        ({"device": "cpu", "dtype": "int8"}, "no dtype 'int8'"),
    ],
)
def test_a_device_or_dtype_that_is_not_there(checkpoint, no_weights, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message) as caught:
        FastSampler.from_checkpoint(checkpoint, **arguments)
    assert caught.value.fix
    with pytest.raises(ConfigError, match=message):
        FastSampler(build_model(make_config(TINY)), **arguments)


def test_a_gpu_that_is_not_there_beside_others(monkeypatch):
    from ccella_fast.processes import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1) and resolve_device(None).type == "cuda"
    with pytest.raises(ConfigError, match="no device 'cuda:2'(.|\n)*cuda:0 to cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("requested", ["attention=xformers", "attention=nothing", "nothing", "nothing=reference"])
def test_a_backend_that_cannot_run_here(checkpoint, no_weights, monkeypatch, requested):
    monkeypatch.setenv("CCELLA_FAST_BACKEND", requested)
    with pytest.raises(CcellaError) as caught:
        FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32")
    assert isinstance(caught.value, ConfigError) and caught.value.field == "CCELLA_FAST_BACKEND"
    monkeypatch.setenv("CCELLA_FAST_BACKEND", "reference")
    with pytest.raises(ZeroDivisionError):
        FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32")


def test_bf16_runs_on_a_cpu_whose_onednn_has_no_packed_bf16(tmp_path, monkeypatch):
    from ccella_fast.sampling import onednn_prepack

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(onednn_prepack, "PackedConvolution", None)  # would fail
    sampler = FastSampler.from_checkpoint(
        write_checkpoint(tmp_path / "step"), device="cpu", dtype="bfloat16", text_encoder=FakeEncoder()
    )
    assert sampler(reports=["abc"], num_inference_steps=1).volumes.isfinite().all()


def test_scores_and_names_of_classes_are_the_same_request(tmp_path):
    sampler = FastSampler.from_checkpoint(
        write_checkpoint(tmp_path / "step", "RADMAISI"), device="cpu", dtype="float32"
    )

    def latents(pirads):
        return sampler(seeds=[3], pirads=pirads, num_inference_steps=2, decode=False).latents

    neg, pos = latents("neg"), latents("pos")
    assert not torch.equal(neg, pos)
    for score in (1, 2, "1", "2"):
        assert torch.equal(latents(score), neg)
    for score in (3, 4, 5, "3", "4", "5"):
        assert torch.equal(latents(score), pos)
    both = sampler(seeds=[3, 3], pirads=[2, "4"], num_inference_steps=2, batch_size=1)
    assert torch.equal(both.latents, torch.cat([neg, pos]))
    assert [output.sample_metadata["class_given"] for output in both.outputs] == ["neg", "pos"]
    for wrong in (0, 6, "3.5", "maybe", True, ["neg", 9]):
        with pytest.raises(ConfigError, match="PI-RADS score from 1 to 5"):
            latents(wrong)


def test_objects_print_short_and_without_reports_or_tensors(checkpoint):
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())
    assert repr(sampler) == "FastSampler(CCELLA, t2w, 16 x 12 x 8 voxels of 1.5 x 1.5 x 3 mm, float32 on cpu)"
    result = sampler(reports=["Zebedee"], seeds=[4, 7], num_inference_steps=1)
    assert repr(result) == "Result(2 volumes, t2w, 16 x 12 x 8 voxels, latents 4 x 8 x 6 x 4, seeds [4, 7])"
    (one,) = sampler.iter(reports=["Zebedee"], num_inference_steps=1, decode=False)
    assert repr(one) == "GeneratedVolume(0, seed 0, not decoded, latent 4 x 8 x 6 x 4)"
    from ccella_fast.sampling import Request

    assert "Zebedee" not in repr(Request(reports=["Zebedee"])) and "Zebedee" not in repr(result)
