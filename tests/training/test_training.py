"""Loss, data stream, moving average and training loop, each against an independent computation."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ccella_fast.config import make_config
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.diffusion.objective import Objective
from ccella_fast.errors import CcellaError, NonFiniteError
from ccella_fast.models import build_model
from ccella_fast.training import distributed, loop
from ccella_fast.training.batches import BatchStream, epoch_order
from ccella_fast.training.loop import joint_loss
from training_fixtures import CONFIG, losses, stage_id, train_here, weights, write_prepared


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def tiny(**overrides):
    return make_config({**{key: value for key, value in CONFIG.items() if key != "name"}, **overrides})


def make_stream(data, *, batch_size, accumulation=1, rank=0, world_size=1, seed=3):
    return BatchStream(
        PreparedDataset(data, tiny()),
        seed=seed,
        batch_size=batch_size,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        scale=torch.full((4,), 0.97),
        objective=Objective(),
    )


class FixedOutput(torch.nn.Module):
    """A network with a fixed output that records its input."""

    def __init__(self, noise, logits):
        super().__init__()
        self.variant = SimpleNamespace(text=True, class_input="predicted")
        self.noise, self.logits = torch.nn.Parameter(noise), logits

    def forward(self, x, timesteps, **inputs):
        self.given = x
        return self.noise, self.logits


def float64_loss(samples, predicted, logits, weight):
    """The loss of docs/explanation/method.md, section 3, in float64 with loops."""
    betas = np.linspace(math.sqrt(0.0015), math.sqrt(0.0195), 1000) ** 2
    bar = np.cumprod(1 - betas)[samples.timesteps.numpy()].reshape(-1, 1, 1, 1, 1)
    x = np.sqrt(bar) * samples.latents.double().numpy() + np.sqrt(1 - bar) * samples.noise.double().numpy()
    l1 = np.abs(predicted.double().numpy() - samples.noise.double().numpy()).mean()
    focal, count = 0.0, 0
    for row, target, known in zip(
        logits.double().numpy(), samples.batch.pirads.double().numpy(), samples.batch.has_class.numpy(), strict=True
    ):
        p = np.exp(row) / np.exp(row).sum()
        count += known
        focal += known * sum(-target[c] * (0.25, 0.75)[c] * (1 - p[c]) ** 2 * math.log(p[c]) for c in (0, 1))
    return x, l1 + weight * focal / count


def test_joint_loss_equals_float64(data):
    samples = make_stream(data, batch_size=5).micro_batch(0, 0)
    random = torch.Generator().manual_seed(0)
    predicted = torch.randn(samples.noise.shape, generator=random)
    logits = torch.randn(5, 2, generator=random)
    model = FixedOutput(predicted, logits)
    found = joint_loss(model, samples, Objective(), 1e-4)
    x, expected = float64_loss(samples, predicted, logits, 1e-4)
    assert found.total.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(model.given.numpy(), x, atol=2e-6)
    assert found.total.item() != pytest.approx(float64_loss(samples, predicted, logits, 1e-6)[1], rel=1e-6)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch():
    orders = [epoch_order(1, epoch, 40) for epoch in range(3)] + [epoch_order(2, 0, 40)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_ranks_and_micro_steps_divide_one_stream(data):
    """2 processes x 2 micro-steps x 1 sample are bit-equal to 1 process x 4 samples."""
    for step in (0, 1, 7):
        whole = make_stream(data, batch_size=4).micro_batch(step, 0)
        parts = [
            make_stream(data, batch_size=1, accumulation=2, rank=rank, world_size=2).micro_batch(step, micro)
            for micro in (0, 1)
            for rank in (0, 1)
        ]
        assert [part.batch.ids[0] for part in parts] == whole.batch.ids
        for number, expected in enumerate(whole.tensors()):
            assert torch.equal(torch.cat([list(part.tensors())[number] for part in parts]), expected), number
    other = make_stream(data, batch_size=4, seed=4).micro_batch(0, 0)
    assert not torch.equal(other.noise, make_stream(data, batch_size=4).micro_batch(0, 0).noise)


def test_prefetching_waits_for_the_cuda_stream_of_the_training(data, monkeypatch):
    """CUDA streams are not ordered: without waiting, resident text could be read before it is written."""
    calls: list[str] = []
    side = SimpleNamespace(
        wait_stream=lambda other: calls.append("wait for training" if other is current else "wait"),
        record_event=lambda: "event",
    )
    current = SimpleNamespace(wait_event=lambda event: calls.append(f"wait for {event}"))
    fakes = {"Stream": lambda device: side, "device": lambda device: nullcontext(), "stream": lambda _: nullcontext(),
             "current_stream": lambda device: current}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    stream = make_stream(data, batch_size=1)
    stream.device = torch.device("cuda")

    def made():
        calls.append("made")
        yield micro_batch

    tensor = SimpleNamespace(record_stream=lambda stream: calls.append("recorded" if stream is current else "lost"))
    micro_batch = SimpleNamespace(tensors=lambda: [tensor])
    assert list(stream._prefetch(made())) == [micro_batch]
    assert calls == ["wait for training", "made", "wait for event", "recorded"]


def test_a_connection_that_another_process_closed_is_reported_as_such(monkeypatch):
    broken = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    with (
        pytest.raises(CcellaError, match="another process of this run has ended"),
        distributed.translate_peer_failure(),
    ):
        raise RuntimeError(broken)
    with pytest.raises(RuntimeError, match="shapes"), distributed.translate_peer_failure():
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)
    with pytest.raises(RuntimeError, match="by peer"), distributed.translate_peer_failure():
        raise RuntimeError(broken)


def test_the_posterior_is_drawn_again_in_each_epoch_and_scaled(data):
    stream = make_stream(data, batch_size=1)
    cases = {case.id: case for case in stream.dataset.cases}
    seen: dict[str, list[torch.Tensor]] = {}
    for step in range(10):  # two epochs
        samples = stream.micro_batch(step, 0)
        mean = np.load(data / cases[samples.batch.ids[0]].files["latent_mean/t2w"].path)
        draw = (samples.latents[0].numpy() / 0.97 - mean) / 0.1
        assert abs(draw.mean()) < 0.15 and 0.9 < draw.std() < 1.1
        seen.setdefault(samples.batch.ids[0], []).append(samples.latents)
    assert all(len(pair) == 2 and not torch.equal(*pair) for pair in seen.values())


def test_class_loss_of_micro_batches_averages_to_that_of_the_batch(data):
    """One sample of the batch does not have a class, so the mean of local means would be wrong. The truth is in float64."""
    logits = torch.linspace(-1, 2, 10).view(5, 2)

    def classes(samples, rows):
        return float(joint_loss(FixedOutput(samples.noise, logits[rows]), samples, Objective(), 1.0).classes)

    whole = make_stream(data, batch_size=5).micro_batch(0, 0)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    target = {"case0": 0, "case1": 1, "case2": 0, "case3": 1}  # case4 has neither class nor report
    by_hand = [
        100 * (0.25, 0.75)[target[case]] * (1 - row[target[case]]) ** 2 * -np.log(row[target[case]])
        for case, row in zip(whole.batch.ids, p, strict=True)
        if case in target
    ]
    assert classes(whole, slice(None)) == pytest.approx(np.mean(by_hand), rel=1e-5)
    micro = [make_stream(data, batch_size=1, accumulation=5).micro_batch(0, m) for m in range(5)]
    parts = [classes(samples, slice(m, m + 1)) for m, samples in enumerate(micro)]
    assert np.mean(parts) == pytest.approx(np.mean(by_hand), rel=1e-5) and parts.count(0.0) == 1
    unshared = [classes(samples._replace(class_share=1.0), slice(m, m + 1)) for m, samples in enumerate(micro)]
    assert np.mean(unshared) == pytest.approx(np.mean(by_hand) * 4 / 5, rel=1e-5)  # negative control: a fifth too small


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_steps_come_in_order(data, background):
    stream = make_stream(data, batch_size=1, accumulation=2)
    for step, batches in enumerate(stream.steps(3, 6, background=background), start=3):
        assert len(batches) == 2
        for micro, samples in enumerate(batches):
            assert torch.equal(samples.noise, stream.micro_batch(step, micro).noise)
    assert step == 5


def test_loss_falls_on_one_case(tmp_path):
    data = write_prepared(tmp_path / "one", cases=2)
    assert train_here(tmp_path / "run", data, lr=5e-3, max_train_steps=40, checkpointing_steps=40, ema_decay=0) == 0
    curve = [loss for _, loss in losses(tmp_path / "run")]
    assert np.mean(curve[-10:]) < 0.9 * np.mean(curve[:3])


def test_learning_rate_and_metrics(tmp_path, data):
    train_here(tmp_path / "run", data, max_train_steps=5, logging_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert line["lr"] == pytest.approx(2e-3 * (1 - (line["step"] - 1) / 5) ** 2, rel=1e-12)
        assert line["epoch"] == (line["step"] - 1) * 2 // 5
        assert line["loss"] == pytest.approx(line["loss_l1"] + 1e-4 * line["loss_class"], rel=1e-6)
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["state"] == "finished"
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("stage", "precision"), [slow(1, "fp32"), slow(2, "bf16"), slow(3, "fp32"), (3, "bf16")], ids=stage_id
)
def test_ema_equals_the_recursion_in_float64(tmp_path, data, stage, precision):
    """Other stages and precisions: test_training_exact.py."""
    every = {"checkpointing_steps": 1, "checkpoints_total_limit": 9, "max_train_steps": 4, "zero_stage": stage}
    train_here(tmp_path / "run", data, ema_decay=0.25, precision=precision, **every)
    torch.manual_seed(0)
    start = build_model(tiny()).state_dict()
    if precision == "bf16":
        start = {name: value.bfloat16().float() for name, value in start.items()}
    average = {name: value.double() for name, value in start.items()}
    for step in range(1, 5):
        decay = min(0.25, (1 + step) / (10 + step))
        for name, value in weights(tmp_path / "run", step).items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    found, raw = weights(tmp_path / "run", 4, "ema"), weights(tmp_path / "run", 4)
    assert found.keys() == start.keys()
    for name in start:
        torch.testing.assert_close(found[name].double(), average[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(found[name], raw[name], rtol=1e-5, atol=2e-6) for name in start)


@pytest.mark.parametrize("section", [None, {"partition_activations": False}], ids=["torch", "deepspeed"])
@pytest.mark.parametrize("stage", [0, slow(3)], ids=stage_id)
def test_activation_checkpointing_is_used_and_does_not_change_the_losses(tmp_path, data, monkeypatch, section, stage):
    import deepspeed

    calls = []
    for module in (torch.utils.checkpoint, deepspeed.checkpointing):
        plain = module.checkpoint
        monkeypatch.setattr(module, "checkpoint", lambda *a, plain=plain, **k: (calls.append(1), plain(*a, **k))[1])
    train_here(tmp_path / "plain", data, zero_stage=stage, max_train_steps=3)
    assert not calls
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"activation_checkpointing": section} if section else {}))
    train_here(
        tmp_path / "again",
        data,
        zero_stage=stage,
        max_train_steps=3,
        deepspeed_file=file,
        activation_checkpointing=True,
    )
    assert len(calls) >= 3 * 10
    np.testing.assert_allclose(losses(tmp_path / "again"), losses(tmp_path / "plain"), rtol=1e-6)


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (3, "bf16")], ids=stage_id)
def test_a_nan_latent_is_reported_and_its_step_skipped(tmp_path, caplog, stage, precision):
    data = write_prepared(tmp_path / "prepared", nan_in="case1")
    every = {"batch_size": 1, "max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    train_here(tmp_path / "run", data, zero_stage=stage, precision=precision, **every)
    bad = epoch_order(0, 0, 5).index(1) + 1
    assert [step for step, _ in losses(tmp_path / "run")] == [step for step in range(1, 6) if step != bad]
    (message,) = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert f"step {bad}:" in message and message.endswith("cases: case1")
    before = weights(tmp_path / "run", bad - 1) if bad > 1 else None
    after, ema = weights(tmp_path / "run", bad), weights(tmp_path / "run", 5, "ema")
    assert all(value.isfinite().all() for value in [*after.values(), *ema.values()])
    if before is not None:
        assert all(torch.equal(before[name], after[name]) for name in after)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates == [pytest.approx(2e-3 * (1 - k / 5) ** 2) for k in range(5) if k != bad - 1]


@pytest.mark.parametrize("inputs", [True, False], ids=["nan-latent", "nan-loss"])
def test_cases_of_a_nonfinite_step_are_reported(tmp_path, data, caplog, monkeypatch, inputs):
    """Only cases with non-finite predictions are reported; all cases if predictions are finite but the gradient is not."""
    if inputs:
        data = write_prepared(tmp_path / "prepared", nan_in="case2")
    else:
        joint = loop.joint_loss
        monkeypatch.setattr(loop, "joint_loss", lambda *a: (it := joint(*a))._replace(total=it.total * float("nan")))
    train_here(tmp_path / "run", data, batch_size=2, gradient_accumulation_steps=2, max_train_steps=1)
    (message,) = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    first = [f"case{number}" for number in epoch_order(0, 0, 5)[:4]]
    assert "case2" in first and message.endswith("cases: " + ("case2" if inputs else ", ".join(sorted(first))))


def test_an_infinite_loss_with_finite_gradients_is_skipped(tmp_path, data, caplog, monkeypatch):
    """Gradients do not tell that the loss of one micro-step has overflowed."""
    joint = loop.joint_loss
    calls = []

    def overflowing(*arguments):
        calls.append(joint(*arguments))
        return calls[-1]._replace(total=calls[-1].total + (float("inf") if len(calls) == 3 else 0))

    monkeypatch.setattr(loop, "joint_loss", overflowing)
    every = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    train_here(tmp_path / "run", data, batch_size=1, gradient_accumulation_steps=2, **every)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 3]
    assert any("step 2: loss or gradient is not finite" in record.getMessage() for record in caplog.records)
    first, second, third = (weights(tmp_path / "run", step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in second)


def test_a_case_of_another_process_is_reported(caplog):
    """This process found nothing; the other one did."""
    losses = loop.Losses(*torch.zeros(3), torch.ones(2, dtype=torch.bool))
    of_the_other = iter([["case7"], ["case6", "case7"]])
    collectives = SimpleNamespace(all_gather=lambda local: [local, next(of_the_other)])
    loop._report_nonfinite_step(3, 1, [(["case0", "case1"], losses)], collectives)
    assert caplog.records[-1].getMessage().endswith("cases: case7")


def test_ten_consecutive_nonfinite_steps_stop_the_run(tmp_path):
    data = write_prepared(tmp_path / "prepared", cases=1, nan_in="case0")
    with pytest.raises(NonFiniteError, match="step 10: .*case0"):
        train_here(tmp_path / "run", data, max_train_steps=30, checkpointing_steps=30)
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)


@pytest.mark.parametrize("variant", ["MAISI", "ELLAMAISI", "SHARED", "LAST"])
def test_other_variants_train(tmp_path, data, variant):
    assert train_here(tmp_path / "run", data, max_train_steps=2, model__variant=variant) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all((line["loss_class"] is not None) == (variant in ("SHARED", "LAST")) for line in lines)
    assert all(line["loss_class"] is None or line["loss_class"] > 0 for line in lines)
