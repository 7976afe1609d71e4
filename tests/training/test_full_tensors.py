"""Whole tensors of an engine at every ZeRO stage and precision, also with DeepSpeed's offloading."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ccella_fast.config import make_config
from ccella_fast.training import distributed
from ccella_fast.training.deepspeed_config import merge_deepspeed_config
from ccella_fast.training.engine import build_engine
from ccella_fast.training.full_tensors import (
    adam_steps,
    full_tensors,
    set_adam_steps,
    set_full_tensors,
    set_model_weights,
)
from training_fixtures import CONFIG

OFFLOADED = {
    "offload-2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "offload-3": {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0, "sub_group_size": 50_000,
    },
}  # fmt: skip
KINDS = ("weights", "exp_avg", "exp_avg_sq")
STEPS = 7


def build(folder: Path, precision: str, zero: dict[str, Any], monkeypatch) -> Any:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    device = distributed.initialize_processes(timedelta(minutes=5))
    values = {key: value for key, value in CONFIG.items() if key != "name"}
    config = make_config({**values, "training.precision": precision, "training.weight_decay": 0.1})
    file = folder / "ds.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    config, engine_values = merge_deepspeed_config(
        config, file, world_size=1, output_dir=folder, auto_precision=lambda: "fp32"
    )
    return build_engine(config, engine_values, total_steps=10, device=device, path=None)


def random_values(engine: Any) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {name: getattr(value, "ds_shape", value.shape) for name, value in engine.module.named_parameters()}
    values = {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in KINDS}
    values["exp_avg_sq"] = {name: value.square() for name, value in values["exp_avg_sq"].items()}
    return values


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3, "offload-2", "offload-3"], ids=str)
def test_what_is_set_is_read(tmp_path, monkeypatch, stage, precision):
    """Bit for bit; and the model computes with the rounded weights. That the steps use it: test_resume.py."""
    engine = build(tmp_path, precision, OFFLOADED.get(stage, {"stage": stage}), monkeypatch)
    values = random_values(engine)
    for kind in KINDS:
        set_full_tensors(engine, kind, values[kind])
    set_model_weights(engine, values["weights"].items())
    set_adam_steps(engine, STEPS)
    for kind in KINDS:
        found = dict(full_tensors(engine, kind))
        assert list(found) == sorted(values[kind])
        assert all(torch.equal(found[name], value) for name, value in values[kind].items())
    assert adam_steps(engine) == STEPS
    check_model(engine, values["weights"])


@pytest.mark.parametrize("kind", KINDS)
def test_setting_one_kind_leaves_the_others(tmp_path, monkeypatch, kind):
    engine = build(tmp_path, "bf16", {"stage": 2}, monkeypatch)
    before = {other: {name: value.clone() for name, value in full_tensors(engine, other)} for other in KINDS}
    set_full_tensors(engine, kind, random_values(engine)[kind])
    for other in KINDS:
        found = dict(full_tensors(engine, other))
        assert all(torch.equal(found[name], value) for name, value in before[other].items()) == (other != kind)
    check_model(engine, before["weights"])  # not changed by any of them


def check_model(engine: Any, expected: dict[str, Tensor]) -> None:
    from deepspeed import zero

    for name, parameter in engine.module.named_parameters():
        with zero.GatheredParameters(parameter):
            assert torch.equal(parameter.detach().float(), expected[name].to(parameter.dtype).float()), name
