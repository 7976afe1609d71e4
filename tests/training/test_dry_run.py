"""The memory, disk space and speed that a run reports, against sums by hand and the sizes of written files."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from ccella_fast.config import load_config, make_config
from ccella_fast.errors import DataError
from ccella_fast.losses import noise_loss
from ccella_fast.models import build_model
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.training import telemetry
from ccella_fast.training.activation_memory import activation_bytes
from ccella_fast.training.dry_run import checkpoint_bytes, describe_run, state_bytes
from ccella_fast.training.flat_adamw import FlatAdamW
from ccella_fast.training.tensor_files import header
from training_fixtures import CONFIG, TOKENS, WIDTH, train_here, weights, write_prepared

GRADIENTS = 4 * (575_506_474 - 6 * 256 * 196_608) / 575_506_474  # the class heads' first layers have factors


@pytest.mark.parametrize(
    ("precision", "stage", "ema", "expected"),
    [
        ("fp32", 0, 0, 4 + GRADIENTS + 8),  # weights, gradients, two moments of Adam
        ("fp32", 0, 0.999, 4 + GRADIENTS + 8 + 4),
        ("bf16", 0, 0, 2 + GRADIENTS + 8 + 4),  # and fp32 master weights
        ("bf16", 0, 0.999, 2 + GRADIENTS + 8 + 4 + 4),
        ("bf16", 1, 0, 2 + 2 + 4 + (8 + 4) / 4),  # DeepSpeed adds bf16 gradients to a second buffer, in fp32
        ("bf16", 2, 0, 2 + 4 / 4 + (8 + 4) / 4),
        ("bf16", 3, 0, (2 + 4 + 8 + 4) / 4),
        ("fp32", 3, 0.999, (4 + 4 + 8 + 4 + 4) / 4),  # ZeRO keeps fp32 master weights also in fp32
    ],
    ids=[
        "fp32-zero0", "fp32-zero0-ema", "bf16-zero0", "bf16-zero0-ema", "bf16-zero1", "bf16-zero2", "bf16-zero3",
        "fp32-zero3-ema",
    ],
)  # fmt: skip
def test_bytes_per_parameter_on_four_processes(precision, stage, ema, expected):
    values = {"training.precision": precision, "training.zero_stage": stage, "training.ema_decay": ema}
    with torch.device("meta"):
        model = build_model(make_config(values))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(state_bytes(make_config(values), 4, model).values()) == pytest.approx(parameters * expected, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_without_zero_are_those_of_the_optimizer(precision):
    """Six class heads keep their gradients as factors for up to 128 studies a step."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = []
    for batch in (2, 200):
        config = make_config({"training.precision": precision, "training.batch_size": batch, "training.ema_decay": 0})
        with torch.device("meta"):
            model = build_model(config)
        estimate = state_bytes(config, 1, model)
        optimizer = FlatAdamW(
            model, dtype=dtype, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01, max_norm=1, rows=batch, sum_dtype=dtype
        )
        buffers = [getattr(optimizer, name) for name in ("masters", "exp_avg", "exp_avg_sq", "gradients")]
        weights = sum(parameter.nbytes for parameter in model.parameters()) if precision == "bf16" else 0
        assert sum(estimate.values()) == pytest.approx(weights + sum(buffer.nbytes for buffer in buffers), rel=1e-3)
        sizes.append(estimate["gradients"])
    assert sizes[1] > 2 * sizes[0]


@pytest.mark.parametrize(
    ("precision", "stage", "ema"),
    [("fp32", 0, 0), ("fp32", 0, 0.9), ("bf16", 0, 0.9), ("bf16", 1, 0.9), ("fp32", 2, 0.9), ("bf16", 3, 0.9)],
    ids=["fp32-zero0", "fp32-zero0-ema", "bf16-zero0-ema", "bf16-zero1-ema", "fp32-zero2-ema", "bf16-zero3-ema"],
)
def test_disk_space_of_a_checkpoint_is_that_of_its_files(tmp_path, precision, stage, ema):
    """Two widths of one model: the difference in file sizes is due to the parameters alone."""
    data = write_prepared(tmp_path / "prepared")
    written = {"precision": precision, "zero_stage": stage, "ema_decay": ema}
    counts, sizes, expected = [], [], []
    for width in (8, 16):
        run = tmp_path / str(width)
        train_here(run, data, **written, max_train_steps=1, model__num_channels=[width, 2 * width, 2 * width])
        counts.append(sum(value.numel() for value in weights(run, 1).values()))
        sizes.append(sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file()))
        config = load_config(run / "config.json")
        with torch.device("meta"):
            expected.append(checkpoint_bytes(config, build_model(config)))
    found = (sizes[1] - sizes[0]) / (counts[1] - counts[0])
    assert counts[1] > 2 * counts[0]  # negative control: enough to detect one byte per parameter
    assert found == pytest.approx((expected[1] - expected[0]) / (counts[1] - counts[0]), abs=0.1)


def test_a_checkpoint_of_the_default_model_has_at_most_9_3_gb():
    """Weights, averages and two moments in fp32, the headers of four files, and an autoencoder of the default size."""
    config = make_config({})
    with torch.device("meta"):
        model, vae = build_model(config), Autoencoder(config.autoencoder)
    parameters, in_vae = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, vae))
    headers = 4 * len(header({name: parameter.shape for name, parameter in model.named_parameters()}))
    assert checkpoint_bytes(config, model) == 16 * parameters
    total = 16 * parameters + headers + 4 * in_vae
    assert 9.2e9 < total <= 9.3e9


def test_a_dry_run_reports_memory_and_disk_space(tmp_path):
    """Checkpoints include a copy of the autoencoder, and there is one more than is kept while one is written."""
    data = write_prepared(tmp_path / "prepared")
    (data / "vae").mkdir()
    with open(data / "vae" / "model.safetensors", "wb") as file:
        file.truncate(3 * 2**30)  # a sparse file
    sizes = {"num_channels": [64, 128, 256], "num_head_channels": [0, 32, 32], "norm_num_groups": 32}
    training = {**CONFIG["training"], "precision": "bf16", "zero_stage": 0, "checkpoints_total_limit": 3}
    config = make_config(
        {"model": {**CONFIG["model"], **sizes}, "data": CONFIG["data"], "text": CONFIG["text"], "training": training}
    )
    text = describe_run(config, data=data, run=tmp_path / "run", deepspeed_file=None)
    parameters = int(re.search(r"([\d,]+) parameters", text)[1].replace(",", ""))
    assert "6 steps" in text
    assert parameters > 30e6
    wide = 2 * 16 * 4 * 32  # weights of the class heads with factors in place of gradients
    memory, disk = (2 + 4 + 8 + 4 + 4) * parameters - 4 * wide, (4 + 8 + 4) * parameters + 3 * 2**30
    assert re.search(rf"memory per process +{memory / 2**20:.0f} MiB", text)
    assert re.search(rf"host memory +{(4 + 8 + 4) * parameters / 2**20:.0f} MiB over all processes", text)
    assert re.search(rf"disk +{disk / 2**30:.2f} GiB per checkpoint, at most 4 checkpoints", text)
    assert not (tmp_path / "run").exists()


def test_logged_rates_are_those_since_the_last_logged_step(tmp_path, monkeypatch):
    """Three steps of eight samples in six seconds."""
    monitor = SimpleNamespace(enabled=True, events=[])
    monitor.write_events = monitor.events.extend
    clock = iter([100.0, 106.0])
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
    engine = SimpleNamespace(monitor=monitor, device=torch.device("cpu"))
    progress = telemetry.Progress(step=13, epoch=2, loss=0.5, loss_l1=0.4, loss_class=0.1, lr=1e-4, grad_norm=2.0)
    with telemetry.Telemetry(tmp_path, engine, first=10, total=20, global_batch=8, flops=3e12, peak=4e12) as log:
        monkeypatch.setattr(
            log, "bar", SimpleNamespace(update=lambda *_: None, set_postfix=lambda *_, **__: None, close=lambda: None)
        )
        log.log(progress)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    memory = line.pop("peak_memory_mib")
    assert 50 < memory < 1e5
    speed = {"seconds_per_step": 2.0, "samples_per_second": 4.0, "tflops": 1.5, "mfu": 0.375}
    assert line == {**progress._asdict(), **speed}
    assert monitor.enabled is False
    expected = {"loss": 0.5, "loss_l1": 0.4, "loss_class": 0.1, "lr": 1e-4, "grad_norm": 2.0}
    events = [(f"Train/{name}", value, 13) for name, value in expected.items()]
    events += [(f"Speed/{name}", value, 13) for name, value in {**speed, "peak_memory_mib": memory}.items()]
    assert monitor.events == events


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_fake_tensors_are_those_of_real_ones(precision):
    """Also a negative control: twice the batch keeps about twice as much."""
    config = make_config(
        {**{key: value for key, value in CONFIG.items() if key != "name"}, "training.precision": precision}
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size, grid = config.training.batch_size, config.check_grid()
    model = build_model(config).to(dtype)
    x, text = torch.randn(size, 4, *grid, dtype=dtype), torch.randn(size, TOKENS, WIDTH, dtype=dtype)
    spacing, times = torch.ones(size, 3), torch.zeros(size, dtype=torch.long)
    kept: dict[int, int] = {}
    alive = []

    weights_at = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        alive.append(tensor.untyped_storage())
        if alive[-1].data_ptr() not in weights_at:
            kept[alive[-1].data_ptr()] = alive[-1].nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        noise_loss(model(x, times, spacing=spacing, text=text)[0], x)
    found = activation_bytes(config, tokens=TOKENS, device_type="cpu")
    assert found == pytest.approx(sum(kept.values()), rel=0.01)
    double = make_config({"training.batch_size": 2 * size}, base=config)
    assert activation_bytes(double, tokens=TOKENS, device_type="cpu") == pytest.approx(2 * found, rel=0.1)


def test_the_table_says_what_the_data_and_the_run_are(tmp_path):
    """Five studies, of which two are negative, two positive and one has neither a class nor a report."""
    data = write_prepared(tmp_path / "prepared")
    config = make_config({key: value for key, value in CONFIG.items() if key != "name"})
    config = make_config({"training.lr_scale": {"adapter": 3.0}}, base=config)
    arguments = {"data": data, "run": tmp_path / "run", "deepspeed_file": None}
    text = " ".join(describe_run(config, **arguments).split())
    for words in (
        "training.lr 0.002", "training.lr_scale.adapter 3.0", "5 train; every file was checked", "5 used, 4 with a report",
        "2 neg, 2 pos, 1 unknown", "t2w: 32 x 32 x 16 voxels of 0.5 x 0.5 x 0.5625 mm",
        "6 steps of 2 studies, epochs: 2.4", "clipped to 1",
    ):  # fmt: skip
        assert words in text, (words, text)
    assert "training.weight_decay" not in text  # a default
    facts = json.loads(describe_run(config, as_json=True, **arguments))
    assert facts["deepspeed"]["gradient_clipping"] == facts["run"]["gradient_clipping"] == 1.0
    assert facts["config"]["training"]["lr"] == 0.002 and facts["data"]["classes_of_train"] == {
        "neg": 2,
        "pos": 2,
        "unknown": 1,
    }
    assert facts["memory"]["activations"] == activation_bytes(config, tokens=TOKENS, device_type="cpu")
    recompute = make_config({"training.activation_checkpointing": True}, base=config)
    assert "not estimated with activation checkpointing" in describe_run(recompute, **arguments)


def test_a_damaged_file_is_found_by_the_dry_run(tmp_path):
    data = write_prepared(tmp_path / "prepared")
    latent = next((data / "latents").rglob("*_mean.npy"))
    raw = bytearray(latent.read_bytes())
    raw[-1] ^= 1
    latent.write_bytes(raw)
    config = make_config({key: value for key, value in CONFIG.items() if key != "name"})
    with pytest.raises(DataError, match="damaged"):
        describe_run(config, data=data, run=tmp_path / "run", deepspeed_file=None)


def test_averages_and_snapshots_are_part_of_the_estimate(tmp_path):
    """Three averages in place of one; 6 steps have a snapshot of two fp16 averages after 4 and 6."""
    data, run = write_prepared(tmp_path / "prepared"), tmp_path / "run"
    steps = {"power_ema_snapshot_steps": 4, "power_ema_every": 2, "checkpointing_steps": 2, "precision": "fp32"}
    config = make_config({**CONFIG, "training": {**CONFIG["training"], **steps}})
    plain = make_config({**CONFIG, "training": {**CONFIG["training"], "precision": "fp32"}})
    found, before = (
        json.loads(describe_run(each, data=data, run=run, deepspeed_file=None, as_json=True))
        for each in (config, plain)
    )
    parameters = found["parameters"]
    assert found["memory"]["averages"] == 3 * before["memory"]["averages"] == 12 * parameters
    assert found["disk"]["checkpoint"] - before["disk"]["checkpoint"] == 8 * parameters
    assert (found["disk"]["snapshot"], found["disk"]["most_snapshots"]) == (4 * parameters, 2)
    assert before["disk"]["most_snapshots"] == 0
    assert "per snapshot of averages, 2 snapshots" in describe_run(config, data=data, run=run, deepspeed_file=None)
