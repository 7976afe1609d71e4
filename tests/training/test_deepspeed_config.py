"""DeepSpeed files: their values take effect, and values that would not take effect raise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ccella_fast.config import make_config
from ccella_fast.errors import ConfigError
from ccella_fast.training.deepspeed_config import (
    merge_deepspeed_config,
    read_deepspeed_file,
    validate_with_deepspeed,
)
from training_fixtures import ROOT

CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def merged(tmp_path: Path, text: str | dict, *, world_size: int = 2, auto_precision="bf16", **training):
    file = tmp_path / "ds.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    config = make_config({f"training.{key}": value for key, value in training.items()})
    return merge_deepspeed_config(
        config, file, world_size=world_size, output_dir=tmp_path, auto_precision=lambda: auto_precision
    )


def error_message(tmp_path: Path, text: str | dict, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        merged(tmp_path, text, **kwargs)
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_are_short_and_valid_for_deepspeed(file, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    assert len(file.read_text().splitlines()) <= 30
    config, values = merge_deepspeed_config(
        make_config(), file, world_size=1, output_dir=tmp_path, auto_precision=lambda: "bf16"
    )
    validate_with_deepspeed(values, DeepSpeedConfig, file)
    assert values["zero_optimization"]["stage"] == config.training.zero_stage


def test_an_error_of_deepspeed_becomes_one_message(tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    _, values = merged(tmp_path, {"zero_optimization": {"stage": 2}}, world_size=1)
    values["zero_optimization"]["overlap_com"] = True
    with pytest.raises(ConfigError, match="overlap_com") as caught:
        validate_with_deepspeed(values, DeepSpeedConfig, tmp_path / "ds.json")
    assert len(str(caught.value).splitlines()) <= 5


def test_values_of_the_file_win_and_are_logged(tmp_path, caplog):
    file = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 7e-4, "betas": [0.8, 0.9], "weight_decay": 0.1}},
        "activation_checkpointing": {"partition_activations": False},
    }
    caplog.set_level("INFO", logger="ccella_fast")
    config, values = merged(tmp_path, file)
    training = config.training
    assert (training.batch_size, training.gradient_accumulation_steps, values["train_batch_size"]) == (3, 5, 30)
    assert (training.lr, training.adam_betas, training.weight_decay) == (7e-4, (0.8, 0.9), 0.1)
    assert (training.precision, training.zero_stage, training.max_grad_norm) == ("fp32", 2, 0.5)
    assert training.activation_checkpointing and "activation_checkpointing" in values
    assert "optimizer" not in values  # build_engine passes an optimizer object with these values
    assert "training.lr is 0.0007" in caplog.text and "not 0.0001" in caplog.text


def test_auto_and_missing_values_come_from_the_configuration(tmp_path):
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    auto["zero_optimization"] = {"stage": "auto", "reduce_bucket_size": "auto"}
    auto["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
    config, values = merged(tmp_path, auto, batch_size=4, zero_stage=1, max_grad_norm=2.0, lr=3e-4)
    assert config.training.lr == 3e-4
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert values["zero_optimization"] == {"stage": 1}
    assert (values["bf16"]["enabled"], values["gradient_clipping"]) == (True, 2.0)


@pytest.mark.parametrize("faster", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("section", "setting", "expected"),
    [
        ({"enabled": "auto"}, "auto", None),  # None: the faster one of the machine
        ({"enabled": "auto"}, "fp32", "fp32"),
        ({"enabled": "auto"}, "bf16", "bf16"),
        ({"enabled": True}, "auto", "bf16"),
        ({"enabled": False}, "auto", "fp32"),
    ],
    ids=["auto-auto", "auto-fp32", "auto-bf16", "enabled-auto", "disabled-auto"],
)
def test_precision_auto_is_resolved_in_configuration_and_file(tmp_path, faster, section, setting, expected):
    config, values = merged(tmp_path, {"bf16": section}, precision=setting, auto_precision=faster, zero_stage=1)
    expected = expected or faster
    assert config.training.precision == expected
    assert values["bf16"]["enabled"] == (expected == "bf16")


@pytest.mark.parametrize(
    ("file", "micro", "steps"),
    [
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3}, 3, 4),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 2}, 6, 2),
        ({"train_batch_size": 24}, 12, 1),
        ({"train_micro_batch_size_per_gpu": 3}, 3, 1),
    ],
    ids=["total-micro", "total-steps", "total", "micro"],
)
def test_missing_batch_sizes_are_computed(file, micro, steps, tmp_path):
    config, _ = merged(tmp_path, file)
    assert (config.training.batch_size, config.training.gradient_accumulation_steps) == (micro, steps)


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ({"train_batch_size": 25}, "25 is not"),
        (
            {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5},
            "x 2 processes (= 30)",
        ),
        (
            {"train_micro_batch_size_per_gpu": 0},
            "train_micro_batch_size_per_gpu must be a whole number of at least 1, got 0",
        ),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"optimizer": {"type": "Lamb"}}, "must be Adam or AdamW, got 'Lamb'"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode must be true"),
        ({"scheduler": {"type": "WarmupLR"}}, "always lr (1 - k/T)^2"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "JSON object"),
        ({"optimizer": {"type": "AdamW", "params": [1e-4]}}, "JSON object"),
        ({"zero_optimization": {"stage": 4}}, "from 0 to 3"),
        ({"gradient_clipping": -1}, "at least 0"),
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}', "appears twice"),
        ('{"zero_optimization": {', "line 1"),
        ("[]", "one JSON object"),
        (" ", "is empty"),
    ],
    ids=[
        "total-not-divisible", "three-sizes-disagree", "micro-0", "fp16", "optimizer-Lamb", "Adam-L2", "scheduler",
        "offload-nvme", "offload-not-object", "params-not-object", "stage-4", "clipping-negative", "key-twice",
        "truncated", "list", "empty",
    ],
)  # fmt: skip
def test_contradictory_and_unsupported_values_raise(file, word, tmp_path):
    assert word in error_message(tmp_path, file)


def test_comments_and_trailing_commas_are_read(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        '{\n  // why\n  "zero_optimization": {"stage": 1,},  # here\n  /* and there */ "dump_state": true,\n}'
    )
    assert read_deepspeed_file(file) == {"zero_optimization.stage": 1, "dump_state": True}


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_deepspeed_file(tmp_path / "absent.json")


def test_monitors_write_to_the_run_unless_the_file_says_otherwise(tmp_path):
    _, values = merged(tmp_path, {"csv_monitor": {"enabled": True}})
    found = {name: (values[name]["output_path"], values[name]["job_name"]) for name in ("tensorboard", "csv_monitor")}
    folder = found["tensorboard"][0]
    assert Path(folder).is_absolute() and found == {
        "tensorboard": (folder, "tensorboard"),
        "csv_monitor": (folder, "csv"),
    }
    _, values = merged(tmp_path, {"csv_monitor": {"enabled": True, "output_path": "other"}})
    assert (values["csv_monitor"]["output_path"], values["csv_monitor"]["job_name"]) == ("other", "csv")
