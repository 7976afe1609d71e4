"""Runs with low-rank adapters: against a plain loop, with every ZeRO stage, resumed, sampled from, exported, refused."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

from ccella_fast import FastSampler
from ccella_fast.checkpoint import export_reference, load_checkpoint, read_base_weights
from ccella_fast.config import make_config
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.models import build_model
from ccella_fast.models.low_rank import merge_factors
from ccella_fast.models.parts import check_parts, select_trained
from ccella_fast.storage import read_json, sha256
from ccella_fast.training.dry_run import count_parameters, describe_run, state_bytes
from ccella_fast.training.flat_adamw import FlatAdamW
from ccella_fast.training.snapshots import write_average
from ccella_fast.training.start_weights import named_columns, read_start_weights
from plain_training import EVERY_STEP, UNUSUAL, difference, distance, part_name, plain_training, power_average
from training_fixtures import assert_resumed, launch_jobs, settings, stage_id, train_here, weights

LOW_RANK = {"rank": 2, "alpha": 3.0}
LAST = "step-00000004"
AVERAGES = {"power_ema_every": 2, "power_ema_snapshot_steps": 2}


@pytest.fixture(scope="module")
def start(tmp_path_factory, data):
    """A model to start from."""
    folder = tmp_path_factory.mktemp("start") / "model"
    train_here(folder, data, max_train_steps=3)
    return folder


def adapt(run, data, start, *, low_rank=LOW_RANK, **training):
    every = {"max_train_steps": 4, "checkpointing_steps": 2, **training}
    origin = {"paths__existing_ckpt_filepath": str(start)}
    return train_here(run, data, training__low_rank=low_rank, **origin, **every)


def as_in_plain_loop(name: str) -> str:
    return name.replace(".parametrizations", "").replace(".0.lora_", ".")


def first_factors(start, low_rank, **training):
    """The factors that a run begins with, by the names of their weights; drawn by the package, as initial weights are."""
    torch.manual_seed(training["seed"])
    config = settings(training__low_rank=low_rank)
    model = build_model(config)
    select_trained(model, config)
    drawn = {as_in_plain_loop(name): p.detach() for name, p in model.named_parameters() if ".0.lora_" in name}
    return {name.removesuffix(".A"): (a, drawn[name[:-1] + "B"]) for name, a in drawn.items() if name.endswith(".A")}


@pytest.mark.parametrize(
    ("stage", "whole"),
    [(0, []), (2, ["class_heads"]), pytest.param(3, ["class_heads"], marks=pytest.mark.slow)],
    ids=stage_id,
)
def test_a_run_equals_a_plain_loop(tmp_path, data, start, stage, whole, monkeypatch):
    """The loop forms W + alpha / r B A and the gradients of the factors by hand, and has an optimizer for them alone."""
    low_rank = {**LOW_RANK, "whole": whole}
    adapt(tmp_path / "run", data, start, low_rank=low_rank, **{**UNUSUAL, **EVERY_STEP}, zero_stage=stage)
    begun = {"start": weights(start, 3, "ema"), "factors": first_factors(start, low_rank, **UNUSUAL)}
    plain = plain_training(data, **UNUSUAL, **begun, whole=whole, alpha_over_rank=1.5)
    monkeypatch.setattr("plain_training.weights", lambda *of: {as_in_plain_loop(n): t for n, t in weights(*of).items()})
    found = difference(tmp_path / "run", plain, at=[1, 2, 3, 4])
    allowed = dict.fromkeys(found, 1e-5) | {"model": 2e-3, "ema": 2e-3}
    assert not {key: value for key, value in found.items() if value > allowed[key]}, found
    other = plain_training(data, **UNUSUAL, **begun, whole=whole, alpha_over_rank=1.0)
    assert difference(tmp_path / "run", other, at=[2])["model"] > 1e-2  # negative control


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "bf16"),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
    ],
    ids=stage_id,
)
def test_a_run_is_resumed_exactly_and_in_another_layout(tmp_path, data, start, stage, precision):
    run, low_rank = tmp_path / "run", {**LOW_RANK, "whole": ["class_heads"]}
    short = {"low_rank": low_rank, "precision": precision, "max_train_steps": 2, "checkpointing_steps": 1}
    adapt(run, data, start, zero_stage=stage, **short)
    names = ("model", "ema", "exp_avg", "exp_avg_sq")
    whole = {name: weights(run, 2, name) for name in names}
    base = run / "checkpoints" / "base.safetensors"
    written = base.stat().st_mtime_ns
    for layout in (stage, 2 if stage == 0 else 0):
        shutil.rmtree(run / "checkpoints" / "step-00000002")
        adapt(run, data, start, zero_stage=layout, resume="latest", **short)
        assert_resumed(run, 2, whole, exact=layout == stage, close=precision == "fp32")
    assert base.stat().st_mtime_ns == written


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, data, start):
    origin = {"paths__existing_ckpt_filepath": str(start), "training__low_rank": {**LOW_RANK, "whole": ["class_heads"]}}
    every = {**UNUSUAL, "checkpointing_steps": 2, **origin}
    jobs = {f"zero{stage}": {"set": {**every, "batch_size": 1, "zero_stage": stage}} for stage in (0, 2, 3)}
    launch_jobs(tmp_path, data, jobs)
    train_here(tmp_path / "one" / "run", data, **every)
    expected = weights(tmp_path / "one" / "run", 4)
    moved = math.hypot(*(float(tensor.norm()) for name, tensor in expected.items() if name.endswith("lora_B")))
    for name in jobs:
        found = weights(tmp_path / name, 4)
        assert found.keys() == expected.keys()
        apart = math.hypot(*(float((found[key] - tensor).norm()) for key, tensor in expected.items()))
        assert apart < 2e-3 * moved, name
        assert load_checkpoint(tmp_path / name).weights == "ema"


@pytest.mark.parametrize("averaged", ["raw", "ema"])
def test_a_checkpoint_has_the_factors_and_the_run_the_rest_once(tmp_path, data, start, averaged):
    """The model that is loaded is W + alpha / r B A in fp32, of the weights as they were before they were rounded."""
    run, begun = tmp_path / "run", weights(start, 3, "ema")
    if averaged == "raw":  # a file in 16 bits
        begun = {name: tensor.bfloat16() for name, tensor in begun.items()}
        start = tmp_path / "bf16.safetensors"
        save_file(begun, start)
    adapt(run, data, start, low_rank={**LOW_RANK, "whole": ["class_heads"]}, precision="bf16")
    trained = weights(run, 4, "ema" if averaged == "ema" else "model")
    assert {part_name(name) for name in trained if ".lora_" not in name} == {"class_heads"}
    loaded = load_checkpoint(run, weights=averaged).model.state_dict()
    assert loaded.keys() == begun.keys()
    changed = set()
    for name, tensor in begun.items():
        layer, _, weight = name.rpartition(".")
        pair = [trained.get(f"{layer}.parametrizations.{weight}.0.lora_{letter}") for letter in "AB"]
        expected = trained.get(name, tensor).double()
        if pair[0] is not None:
            changed.add(name)
            expected = expected + 1.5 * (pair[1].double() @ pair[0].double()).reshape(tensor.shape)
            assert not torch.equal(loaded[name], tensor.float()), name
        torch.testing.assert_close(loaded[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert len(changed) > 40
    state = read_json(run / "checkpoints" / LAST / "training_state.json")
    assert state["base_weights"] == {"sha256": sha256(run / "checkpoints" / "base.safetensors")}
    file = start if start.is_file() else start / "checkpoints" / "step-00000003" / "ema.safetensors"
    assert state["start_weights"]["sha256"] == sha256(file)
    if averaged == "ema":  # a further run can start from this one
        begun = read_start_weights(settings(paths__existing_ckpt_filepath=str(run))).tensors
        assert all(torch.equal(begun[name], tensor) for name, tensor in named_columns(loaded).items())
    export_reference(run, tmp_path / "merged.pt", weights=averaged)
    FastSampler.from_checkpoint(run, weights=averaged, dtype="float32").save_pretrained(tmp_path / "saved")
    for written in ("merged.pt", "saved"):
        found = load_checkpoint(tmp_path / written).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in loaded.items())


def test_a_step_needs_the_base_weights_of_its_run(tmp_path, data, start):
    run = tmp_path / "run"
    adapt(run, data, start)
    base = run / "checkpoints" / "base.safetensors"
    moved = shutil.copytree(run / "checkpoints" / LAST, tmp_path / "moved")
    with pytest.raises(CheckpointError, match="low-rank adapters alone"):
        load_checkpoint(moved)
    shutil.copy(base, tmp_path / "base.safetensors")
    load_checkpoint(moved)
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    base.write_bytes(content)
    shutil.rmtree(run / "checkpoints" / LAST)
    for call in (lambda: load_checkpoint(run), lambda: adapt(run, data, start, resume="latest")):
        with pytest.raises(CheckpointError, match="not the one that the adapters"):
            call()
    base.unlink()
    with pytest.raises(CheckpointError, match="this file is missing"):
        adapt(run, data, start, resume="latest")
    assert not list((run / "checkpoints").glob("step-00000004"))


def test_a_resume_with_another_start_or_rank_is_refused(tmp_path, data, start):
    run = tmp_path / "run"
    adapt(run, data, start)
    train_here(tmp_path / "other", data, max_train_steps=1)
    with pytest.raises(ConfigError, match="started with other weights"):
        adapt(run, data, tmp_path / "other", resume="latest")
    for low_rank in (
        {"rank": 3, "alpha": 3.0},
        {"rank": 2},
        {"rank": 0, "alpha": 3.0},
        {**LOW_RANK, "layers": ["unet"]},
    ):
        with pytest.raises(ConfigError, match="training.low_rank"):
            adapt(run, data, start, low_rank=low_rank, resume="latest")


@pytest.mark.parametrize("variant", ["MAISI", "CCELLA"])
def test_activation_checkpointing_changes_nothing(tmp_path, data, variant):
    """Torch's, and DeepSpeed's, where nothing before the first block with factors is trained.

    AdamW turns rounding of a gradient near zero into a whole step; its first moments, sums of gradients, are compared.
    """
    short = {"max_train_steps": 2, "model__variant": variant, "lr": 1e-2}
    train_here(tmp_path / "start", data, **short)
    (tmp_path / "ds.json").write_text(json.dumps({"activation_checkpointing": {"partition_activations": False}}))
    checkpointed = {"torch": {"activation_checkpointing": True}, "ds": {"deepspeed_file": tmp_path / "ds.json"}}
    kinds = {"plain": {}, **checkpointed, "other": {"seed": 6}}
    for name, kind in kinds.items():
        low_rank = {**LOW_RANK, "layers": ["unet.attention"]}
        adapt(tmp_path / name, data, tmp_path / "start", low_rank=low_rank, **short, **kind)
    expected = weights(tmp_path / "plain", 2, "exp_avg")
    assert sum(name.endswith("lora_B") for name in expected) == len(expected) / 2 > 5
    apart = {
        name: max(float((tensor - expected[key]).norm() / expected[key].norm()) for key, tensor in moments.items())
        for name, moments in ((name, weights(tmp_path / name, 2, "exp_avg")) for name in kinds)
    }
    assert apart["torch"] < 1e-3
    assert apart["ds"] < 1e-3
    assert apart["other"] > 0.1, apart


def test_a_validation_leaves_the_run_as_it_is(tmp_path, data, start):
    """It computes with the averages of the factors."""
    observed = {"monitoring__validation_steps": 1, "monitoring__validation_fraction": 0.3}
    adapt(tmp_path / "run", data, start, **observed)
    adapt(tmp_path / "quiet", data, start, monitoring__validation_fraction=0.3)
    for name in ("model", "ema"):
        found, expected = (weights(tmp_path / folder, 4, name) for folder in ("run", "quiet"))
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_optimizer_and_checkpoint_grow_with_the_factors(tmp_path, data, start):
    """Their bytes are those of r (outputs + inputs) numbers per layer."""
    found = {}
    for rank in (2, 4):
        config = settings(training__low_rank={"rank": rank}, training__ema_decay=0.9, training__precision="fp32")
        model = build_model(config)
        sizes = [
            len(weight) + weight[0].numel()
            for name, weight in model.named_parameters()
            if weight.ndim > 1 and "cascade_blocks" not in name and "classifier" not in name and "latents" not in name
        ]
        select_trained(model, config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) == rank * sum(sizes) == count_parameters(model)[1]
        assert state_bytes(config, 1, model)["optimizer"] == 8 * rank * sum(sizes)
        optimizer = FlatAdamW(
            model, groups=[{"params": trained}], dtype=torch.float32, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, max_norm=1,
            rows=2, sum_dtype=torch.float32,
        )  # fmt: skip
        padding = 128 * len(trained) + 1024
        for state in (optimizer.masters, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.gradients):
            assert rank * sum(sizes) <= state.numel() <= rank * sum(sizes) + padding
        run = tmp_path / str(rank)
        adapt(run, data, start, low_rank={"rank": rank}, max_train_steps=1)
        files = (run / "checkpoints" / "step-00000001").glob("*.safetensors")
        found[rank] = {file.name: sum(t.numel() for t in weights(run, 1, file.stem).values()) for file in files}
        assert found[rank] == dict.fromkeys(
            ("model.safetensors", "ema.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"), rank * sum(sizes)
        )
        origin = {"paths.existing_ckpt_filepath": str(start), "training.low_rank": {"rank": rank}}
        planned = make_config(origin, base=config)
        facts = json.loads(describe_run(planned, data=data, run=tmp_path / "new", deepspeed_file=None, as_json=True))
        assert facts["disk"]["checkpoint"] == 16 * rank * sum(sizes)
        assert facts["trained_parameters"] == rank * sum(sizes)
        base = (run / "checkpoints" / "base.safetensors").stat().st_size
        assert facts["disk"]["base_weights"] <= base < 1.1 * facts["disk"]["base_weights"]


def test_new_parts_are_trained_as_a_whole(tmp_path, data):
    """From a model without a class: its columns are in projections, which are then trained as a whole."""
    train_here(tmp_path / "start", data, max_train_steps=1, model__variant="ELLAMAISI")
    new = ["class_heads", "unet.class_input"]
    adapt(tmp_path / "run", data, tmp_path / "start", low_rank={**LOW_RANK, "whole": new}, init_skip=new)
    names = weights(tmp_path / "run", 4)
    whole = {name for name in names if ".lora_" not in name and part_name(name) != "class_heads"}
    assert all("time_emb_proj" in name or "pirads_layer" in name for name in whole)
    assert {"unet.down_blocks.0.resnets.0.time_emb_proj.weight", "unet.pirads_layer.0.bias"} <= whole
    assert load_checkpoint(tmp_path / "run").variant == "CCELLA"
    with pytest.raises(ConfigError, match="'unet.class_input' starts anew"):
        low_rank = {**LOW_RANK, "whole": ["class_heads"]}
        adapt(tmp_path / "other", data, tmp_path / "start", low_rank=low_rank, init_skip=new)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"low_rank.whole": ["unet"]}, "training.low_rank.rank is 0"),
        ({"low_rank.layers": ["unet"]}, "training.low_rank.rank is 0"),
        ({"low_rank.rank": 2, "freeze": ["unet"]}, "frozen already"),
        ({"low_rank.rank": 2, "low_rank.whole": ["unet", "adapter"]}, "no layer is left"),
        ({"low_rank.rank": 2, "low_rank.layers": []}, "no layer is left"),
        ({"low_rank.rank": 2, "init_skip": ["class_heads"]}, "'class_heads' starts anew"),
        ({"low_rank.rank": 2, "low_rank.layers": ["adapter"], "variant": "MAISI"}, "no part 'adapter'"),
        ({"low_rank.rank": 2, "low_rank.whole": ["unet.class_input"], "variant": "MAISI"}, "no part 'unet.class_input'"),
        ({"low_rank.rank": 2}, "none are given"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, words, data, tmp_path):
    names = {
        ("model__" if key == "variant" else "training__") + key.replace(".", "__"): v for key, v in changes.items()
    }
    if words != "none are given":
        with pytest.raises(ConfigError, match=words):
            check_parts(settings(**names))
    with pytest.raises(ConfigError, match=words):
        train_here(tmp_path / "run", data, **names)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"rank": -1}, {"alpha": 0}, {"layers": ["class_heads"]}, {"whole": ["all"]}])
def test_wrong_values_are_refused(change):
    key = next(iter(change))
    with pytest.raises(ConfigError, match=f"training.low_rank.{key}") as error:
        make_config({"training.low_rank": change})
    assert "default" in str(error.value)


@pytest.mark.parametrize("stage", [0, 2], ids=stage_id)
def test_power_function_averages_are_of_what_is_trained(tmp_path, data, start, stage):
    """The average of the factors, resumed exactly, is made a model that needs no base weights."""
    run = tmp_path / "run"
    adapt(run, data, start, **AVERAGES, zero_stage=stage)
    saved, average = {step: weights(run, step) for step in (2, 4)}, weights(run, 4, "power_ema-0.1")
    error = distance(average, power_average(saved, 0.1))
    assert error < 1e-2 * distance(saved[2], saved[4])
    shutil.rmtree(run / "checkpoints" / LAST)
    adapt(run, data, start, **AVERAGES, zero_stage=stage, resume="latest")
    assert all(torch.equal(tensor, average[name]) for name, tensor in weights(run, 4, "power_ema-0.1").items())
    if stage == 0:
        write_average(run, tmp_path / "out", width=0.1)
        state = read_json(run / "checkpoints" / LAST / "training_state.json")
        base = read_base_weights(run / "checkpoints" / LAST, state)
        expected = merge_factors(base, {name: tensor.half().float() for name, tensor in average.items()}, 1.5)
        shutil.rmtree(run)
        found = load_checkpoint(tmp_path / "out").model.state_dict()
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert any(not torch.equal(found[name], base[name]) for name in base)
