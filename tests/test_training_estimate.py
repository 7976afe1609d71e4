"""What a run says of its memory and its speed, against sums by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ccella_fast.config import make_config
from ccella_fast.training import telemetry
from ccella_fast.training.estimate import bytes_per_parameter


@pytest.mark.parametrize(
    ("precision", "stage", "ema", "expected"),
    [
        ("fp32", 0, 0, 4 + 4 + 8),  # weights, gradients, two moments of Adam
        ("fp32", 0, 0.999, 4 + 4 + 8 + 4),
        ("bf16", 0, 0, 2 + 2 + 8 + 4),  # and fp32 copies of the weights
        ("bf16", 0, 0.999, 2 + 2 + 8 + 4 + 4),
        ("bf16", 1, 0, 2 + 2 + (8 + 4) / 4),
        ("bf16", 2, 0, 2 + 2 / 4 + (8 + 4) / 4),
        ("bf16", 3, 0, (2 + 2 + 8 + 4) / 4),
        ("fp32", 3, 0.999, (4 + 4 + 8 + 4 + 4) / 4),  # ZeRO keeps its own fp32 copy
    ],
)
def test_bytes_per_parameter_on_four_processes(precision, stage, ema, expected):
    values = {"training.precision": precision, "training.zero_stage": stage, "training.ema_decay": ema}
    assert bytes_per_parameter(make_config(values), 4) == pytest.approx(expected)


def test_logged_rates(tmp_path, monkeypatch):
    """Three steps in six seconds, eight samples each."""
    monitor = SimpleNamespace(enabled=True, events=[])
    monitor.write_events = monitor.events.extend
    clock = iter([100.0, 106.0])
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
    engine = SimpleNamespace(monitor=monitor, device=torch.device("cpu"))
    progress = telemetry.Progress(step=13, epoch=2, loss=0.5, loss_l1=0.4, loss_class=0.1, lr=1e-4, grad_norm=2.0)
    with telemetry.Telemetry(tmp_path, engine, first=10, total=20, global_batch=8) as log:
        monkeypatch.setattr(
            log, "bar", SimpleNamespace(update=lambda *_: None, set_postfix=lambda *_, **__: None, close=lambda: None)
        )
        log.log(progress)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert line == {**progress._asdict(), "seconds_per_step": 2.0, "samples_per_second": 4.0}
    assert monitor.enabled is False
    expected = {"train_loss": 0.5, "loss_l1": 0.4, "loss_class": 0.1, "lr": 1e-4, "grad_norm": 2.0}
    assert monitor.events == [(f"Train/Samples/{name}", value, 13 * 8) for name, value in expected.items()]
