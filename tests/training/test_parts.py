"""Parts that are frozen, or have a learning rate of their own: against a plain loop, with every ZeRO stage, and resumed."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from ccella_fast.config import make_config
from ccella_fast.errors import ConfigError
from ccella_fast.models import build_model
from ccella_fast.models.parts import check_parts, parameter_groups, part_of, select_trained
from ccella_fast.training.dry_run import describe_run, state_bytes
from ccella_fast.training.flat_adamw import FlatAdamW, factored_weights
from ccella_fast.variants import VARIANTS
from plain_training import EVERY_STEP, UNUSUAL, difference, part_name, plain_training
from training_fixtures import assert_resumed, settings, stage_id, train_here, weights, write_prepared

CHANGED = {
    "frozen U-Net": {"freeze": ["unet"]},
    "frozen adapter and heads": {"freeze": ["adapter", "class_heads"]},
    "three rates": {"lr_scale": {"adapter": 10.0, "class_heads": 0.1}},
    "frozen heads, two rates": {"freeze": ["class_heads"], "lr_scale": {"adapter": 3.0}},
}


@pytest.mark.parametrize(
    ("changed", "stage", "precision"),
    [
        ("frozen U-Net", 0, "fp32"),
        ("frozen adapter and heads", 0, "fp32"),
        ("three rates", 0, "fp32"),
        ("frozen heads, two rates", 2, "fp32"),
        ("frozen heads, two rates", 3, "fp32"),
        ("frozen heads, two rates", 0, "bf16"),
        pytest.param("three rates", 1, "bf16", marks=pytest.mark.slow),
        pytest.param("frozen U-Net", 3, "bf16", marks=pytest.mark.slow),
    ],
    ids=stage_id,
)
def test_a_run_equals_a_plain_loop(tmp_path, data, changed, stage, precision):
    """torch.optim.AdamW with a group per parameter; frozen parameters are not in it, nor in the norm of the gradients."""
    changed = CHANGED[changed]
    run = tmp_path / "run"
    train_here(run, data, **UNUSUAL, **EVERY_STEP, **changed, zero_stage=stage, precision=precision)
    plain = plain_training(data, **UNUSUAL, **changed, precision=precision, fp32_sums=stage == 0)
    found = difference(run, plain, at=[1, 2] if precision == "bf16" else [1, 2, 3, 4])
    numbers = 1e-5 if precision == "fp32" else 2e-2
    allowed = dict.fromkeys(found, numbers) | {"model": 2e-3, "ema": 2e-3}
    del found["lr"], allowed["lr"]  # that of the first group, see below
    assert not {key: value for key, value in found.items() if value > allowed[key]}, found
    without = difference(run, plain_training(data, **UNUSUAL, precision=precision), at=[2])
    assert without["model"] > 1e-2  # negative control
    begun = plain[0].weights
    for name, tensor in weights(run, 4).items():
        frozen = part_name(name) in changed.get("freeze", ())
        assert torch.equal(tensor, begun[name]) == frozen, name
    moments = {part_name(name) for name in weights(run, 4, "exp_avg")}
    assert moments == {"unet", "adapter", "class_heads"} - set(changed.get("freeze", ()))
    assert weights(run, 4, "ema").keys() == weights(run, 4).keys()


@pytest.mark.parametrize("stage", [0, 3], ids=stage_id)
def test_a_frozen_run_is_resumed_exactly_and_in_another_layout(tmp_path, data, stage):
    run, changed = tmp_path / "run", CHANGED["frozen heads, two rates"]
    every = {"max_train_steps": 4, "checkpointing_steps": 2, **changed}
    train_here(run, data, zero_stage=stage, **every)
    whole = {name: weights(run, 4, name) for name in ("model", "ema", "exp_avg", "exp_avg_sq")}
    for layout in (stage, 2 - stage // 3):
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        train_here(run, data, resume="latest", zero_stage=layout, **every)
        assert_resumed(run, 4, whole, exact=layout == stage, close=True)
    with pytest.raises(ConfigError, match="training.freeze"):
        train_here(run, data, resume="latest", zero_stage=stage, **{**every, "freeze": []})


@pytest.mark.parametrize("stage", [0, 3], ids=stage_id)
def test_a_validation_leaves_frozen_parts_as_they_are(tmp_path, data, stage):
    """It computes with the averages, which takes all weights out of the model and brings them back."""
    short = {"freeze": ["unet"], "max_train_steps": 2, "zero_stage": stage}
    observed = {"monitoring__validation_steps": 1, "monitoring__validation_fraction": 0.3}
    train_here(tmp_path / "run", data, **short, **observed)
    train_here(tmp_path / "scratch", data, max_train_steps=2, zero_stage=stage, lr=1e-12, weight_decay=0)
    found, begun = weights(tmp_path / "run", 2), weights(tmp_path / "scratch", 2)
    for name, tensor in found.items():
        assert torch.allclose(tensor, begun[name], atol=1e-7, rtol=0) == (part_name(name) == "unet"), name


def test_activation_checkpointing_changes_nothing_in_a_frozen_run(tmp_path, data):
    """Torch's, and DeepSpeed's, whose blocks compute gradients only if one of their inputs needs them."""
    short = {"freeze": ["unet"], "max_train_steps": 2}
    train_here(tmp_path / "plain", data, **short)
    train_here(tmp_path / "torch", data, **short, activation_checkpointing=True)
    (tmp_path / "ds.json").write_text(json.dumps({"activation_checkpointing": {"partition_activations": False}}))
    train_here(tmp_path / "deepspeed", data, **short, deepspeed_file=tmp_path / "ds.json")
    expected = weights(tmp_path / "plain", 2)
    for name in ("torch", "deepspeed"):
        for key, tensor in weights(tmp_path / name, 2).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_parts_of_every_variant(name):
    with torch.device("meta"):
        model = build_model(settings(model__variant=name))
    parts = {part_of(key) for key, _ in model.named_parameters()}
    assert parts == set(VARIANTS[name].parts)
    for key, _ in model.named_parameters():
        head = re.search(r"(cascade_blocks\.\d|classifier)(\.fc[12])?\.(weight|bias)$", key)
        assert (part_of(key) == "class_heads") == bool(head), key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.freeze": ["adapter"], "model.variant": "MAISI"}, "no part 'adapter'; its parts are unet"),
        ({"training.lr_scale": {"class_heads": 2}, "model.variant": "DECOUPLED"}, "no part 'class_heads'"),
        ({"training.freeze": ["unet", "adapter", "class_heads"]}, "nothing is left to be trained"),
        ({"training.freeze": ["unet"], "training.lr_scale": {"unet": 2}}, "'unet' has a learning rate of its own"),
        (
            {"training.low_rank": {"rank": 2, "layers": ["unet.attention"]}, "training.lr_scale": {"adapter": 2}},
            "'adapter' has a learning rate of its own, but nothing of it is trained",
        ),
        (
            {"training.low_rank": {"rank": 2}, "training.lr_scale": {"unet": 3, "class_heads": 2}},
            "'class_heads' has a learning rate of its own, but nothing of it is trained",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, words, data, tmp_path):
    with pytest.raises(ConfigError, match=words):
        check_parts(make_config(changes))
    names = {key.removeprefix("training.").replace(".", "__"): value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        train_here(tmp_path / "run", data, **names)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.freeze": ["unett"]}, "training.freeze"),
        ({"training.lr_scale": {"unet": 0}}, "training.lr_scale"),
        ({"training.lr_scale": {"unett": 1}}, "training.lr_scale"),
    ],
)
def test_unknown_parts_and_rates_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        make_config(changes)


def test_by_default_the_optimizer_has_one_group_and_one_update(monkeypatch):
    """What is not asked for costs nothing: all weights but the wide ones are updated by one call."""
    calls = []
    monkeypatch.setattr(
        "ccella_fast.training.flat_adamw.adamw_", lambda weights, *_, **__: calls.append(weights.numel())
    )
    for scales, groups in (({}, 1), ({"unet": 1.0}, 1), ({"adapter": 2.0}, 2), ({"unet": 2.0, "adapter": 3.0}, 3)):
        config = settings(training__lr_scale=scales)
        model = build_model(config)
        made = parameter_groups(model, config)
        assert len(made) == groups
        optimizer = FlatAdamW(
            model, groups=made, dtype=torch.float32, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, max_norm=1, rows=2,
            sum_dtype=torch.float32,
        )  # fmt: skip
        calls.clear()
        optimizer.step()
        assert len(calls) == groups + 2 and sum(calls) == len(optimizer.masters)  # and two wide layers


def test_frozen_parameters_take_the_memory_of_their_weights_alone(data, tmp_path):
    config = settings(training__freeze=["class_heads"], training__ema_decay=0.9, training__precision="bf16")
    model = build_model(config)
    everything = state_bytes(config, 1, model)
    wide = factored_weights(model, 2)
    select_trained(model, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = state_bytes(config, 1, model)
    assert found == {
        "weights": 2 * parameters,
        "gradients": 4 * trained,
        "optimizer": 12 * trained,
        "averages": 4 * trained,
    }
    assert everything["gradients"] == 4 * (parameters - wide) and everything["optimizer"] == 12 * parameters
    data = write_prepared(tmp_path / "prepared")
    facts = json.loads(describe_run(config, data=data, run=tmp_path / "run", deepspeed_file=None, as_json=True))
    assert (facts["parameters"], facts["trained_parameters"]) == (parameters, trained)
    assert facts["disk"]["checkpoint"] == 8 * parameters + 8 * trained
    train_here(tmp_path / "run", data, freeze=["class_heads"], max_train_steps=1)
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert facts["disk"]["checkpoint"] < size < 1.5 * facts["disk"]["checkpoint"]


@pytest.mark.parametrize("whole", [["unet.class_input"], ["class_heads"]])
def test_rates_of_parts_that_low_rank_adapters_train_are_accepted(whole):
    low_rank = {"rank": 2, "layers": ["adapter"], "whole": whole}
    rates = {"adapter": 2.0, whole[0].partition(".")[0]: 3.0}
    check_parts(make_config({"training.low_rank": low_rank, "training.lr_scale": rates}))
