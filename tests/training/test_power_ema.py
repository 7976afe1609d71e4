"""Power-function averages of the weights: what they are, that they are resumed exactly, and what is made of their snapshots."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ccella_fast import cli
from ccella_fast.checkpoint import load_checkpoint
from ccella_fast.config import TrainingConfig
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.training import checkpointing, snapshots
from ccella_fast.training.full_tensors import full_tensors
from ccella_fast.training.power_ema import PowerEma
from ccella_fast.training.power_profiles import exponent, fit, kept_share
from ccella_fast.training.snapshots import write_average
from plain_training import distance, power_average
from training_fixtures import ROOT, losses, settings, train_here, weights, write_prepared

ON = {"power_ema_every": 2, "power_ema_snapshot_steps": 2, "checkpointing_steps": 1}
# The last step is neither a multiple of `every` nor of `snapshot_steps`. The rate is so high that the weights move far.
LONG = {
    "power_ema_every": 2, "power_ema_snapshot_steps": 20, "checkpointing_steps": 20, "checkpoints_total_limit": 9,
    "max_train_steps": 119, "batch_size": 1, "lr": 2e-2,
}  # fmt: skip
STEPS = [20, 40, 60, 80, 100, 119]


@dataclass(repr=False)
class Run:
    """A run, and its weights at every update of the averages."""

    folder: Path
    saved: dict[int, dict[str, torch.Tensor]]

    def average(self, width: float, step: int = 119) -> dict[str, torch.Tensor]:
        return power_average({at: tensors for at, tensors in self.saved.items() if at <= step}, width)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> Run:
    made, plain = Run(tmp_path_factory.mktemp("power") / "run", {}), PowerEma.update

    def update(self, step):
        plain(self, step)
        if step % 2 == 0 or step == 119:
            (engine,) = {average.engine for average in self.averages.values()}
            made.saved[step] = {name: tensor.clone() for name, tensor in full_tensors(engine, "weights")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PowerEma, "update", update)
        train_here(made.folder, data, **LONG)
    return made


def snapshot(run: Path, step: int, width: float) -> dict[str, torch.Tensor]:
    return load_file(run / "snapshots" / f"step-{step:08d}" / f"power_ema-{width}.safetensors")


def size(tensors: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(float(tensor.norm()) for tensor in tensors.values()))


# Profiles


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (12**-0.5, 0.0)])
def test_exponents_are_those_of_the_paper(width, gamma):
    """The first two are in section 3.1 of the paper; the last profile is uniform."""
    assert exponent(width) == pytest.approx(gamma, abs=5e-3)
    roots = np.roots(np.poly1d([1, 2]) ** 2 * np.poly1d([1, 3]) - np.poly1d([1, 1]) / width**2)
    assert exponent(width) == pytest.approx(max(root.real for root in roots), abs=1e-9)
    s = (np.arange(10**6) + 0.5) / 10**6
    density = s ** exponent(width) / np.sum(s ** exponent(width))
    assert math.sqrt(density @ s**2 - (density @ s) ** 2) == pytest.approx(width, rel=1e-5)


def test_the_fit_is_that_of_the_paper_in_closed_form():
    """Inner products of continuous profiles, equation 151, of which those over updates are Riemann sums."""
    stored = [(width, step) for step in range(5000, 40001, 5000) for width in (0.05, 0.1)]

    def product(a: tuple[float, int], b: tuple[float, int]) -> float:
        (p, s), (q, t) = sorted([(exponent(width), step) for width, step in (a, b)], key=lambda each: each[1])
        return (p + 1) * (q + 1) * (s / t) ** q / ((p + q + 1) * t)

    gram = np.array([[product(a, b) for b in stored] for a in stored])
    found = fit(stored, [0.05, 0.07, 0.15, 0.2], 40000, 4)
    for place, width in enumerate((0.05, 0.07, 0.15, 0.2)):
        target, own = np.array([product(a, (width, 40000)) for a in stored]), product((width, 40000), (width, 40000))
        expected = np.linalg.solve(gram, target)
        expected /= expected.sum()
        lacking = own - 2 * expected @ target + expected @ gram @ expected
        assert found.coefficients[:, place] == pytest.approx(expected, abs=2e-3)
        assert found.errors[place] == pytest.approx(math.sqrt(max(lacking, 0.0) / own), rel=1e-2, abs=1e-4)
    assert found.errors[0] < 1e-12 < 1e-3 < found.errors[1] < found.errors[2] < found.errors[3]


def test_what_is_kept_does_not_depend_on_the_number_of_updates():
    parts = [kept_share(7.0, step, step + 1) for step in range(30, 60)]
    assert kept_share(7.0, 30, 60) == pytest.approx(math.prod(parts))
    assert kept_share(7.0, 0, 8) == 0  # the random weights that a run starts with are forgotten at once


# Training


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_averages_are_a_sum_of_all_weights(run, width):
    """In checkpoints in fp32, and in snapshots in fp16; at the last step too."""
    for step in (20, 100, 119):
        expected = run.average(width, step)
        found = weights(run.folder, step, f"power_ema-{width}")
        apart = distance(found, run.average(0.15 - width, step))  # those of the other width
        error = distance(found, expected)
        assert error < 1e-3 * apart
        rounded = snapshot(run.folder, step, width)
        differ = [name for name, tensor in found.items() if not torch.equal(rounded[name], tensor.half())]
        assert differ == []
    names = sorted(path.name for path in (run.folder / "snapshots").iterdir())
    assert names == [f"step-{step:08d}" for step in STEPS]


def test_the_training_is_the_same_with_and_without_averages(tmp_path, data):
    """The same losses and weights, and no further files."""
    training = {**ON, "max_train_steps": 4, "checkpoints_total_limit": 9}
    train_here(tmp_path / "on", data, **training)
    train_here(tmp_path / "off", data, **{**training, "power_ema_snapshot_steps": 0})
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    for name in ("model", "ema", "exp_avg", "exp_avg_sq"):
        found, expected = (weights(tmp_path / run, 4, name) for run in ("on", "off"))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    first, average = weights(tmp_path / "on", 2), weights(tmp_path / "on", 2, "power_ema-0.1")
    assert all(
        torch.equal(average[name], tensor) for name, tensor in first.items()
    )  # nothing of the random weights is left
    assert (tmp_path / "on" / "snapshots").exists() and not (tmp_path / "off" / "snapshots").exists()
    folder = tmp_path / "off" / "checkpoints" / "step-00000004"
    assert not list(folder.glob("power*")) and "power_ema_step" not in (folder / "training_state.json").read_text()


@pytest.mark.parametrize(
    ("stage", "precision", "copies"),
    [(0, "bf16", True), (2, "fp32", False), (3, "bf16", True), pytest.param(1, "fp32", True, marks=pytest.mark.slow)],
    ids=["zero0-bf16", "zero2-fp32-without-copies", "zero3-bf16", "zero1-fp32"],
)
def test_a_resumed_run_has_the_same_averages(tmp_path, data, monkeypatch, stage, precision, copies):
    """Equal in every bit, resumed between two updates; with and without copies in host memory."""
    if not copies:
        monkeypatch.setattr(checkpointing, "free_memory", lambda: 0)
    training = {**ON, "max_train_steps": 4, "zero_stage": stage, "precision": precision}
    train_here(tmp_path / "run", data, **training)
    before = fingerprint(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "training_state.json").read_text())
    assert state["power_ema_step"] == 2
    train_here(tmp_path / "run", data, resume="latest", **training)
    assert fingerprint(tmp_path / "run") == before and len(set(before)) == 4


def fingerprint(run: Path) -> list[str]:
    """The hashes of the averages of step 4, in the checkpoint and in the snapshot."""
    files = sorted(file for part in ("checkpoints", "snapshots") for file in (run / part).glob("step-00000004/power*"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_skipped_step_counts_as_one_without_a_change(tmp_path):
    """A step with the study that is not finite is skipped; its weights are those of the step before."""
    data, run = write_prepared(tmp_path / "prepared", cases=4, nan_in="case1"), tmp_path / "run"
    training = {
        "power_ema_every": 1,
        "power_ema_snapshot_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 9,
    }
    train_here(run, data, **training, max_train_steps=6, batch_size=1, ema_decay=0)
    saved = {step: weights(run, step) for step in range(1, 7)}
    assert len(losses(run)) < 6 and distance(saved[1], saved[6]) > 0
    found, expected = weights(run, 6, "power_ema-0.1"), power_average(saved, 0.1)
    logged = {step for step, _ in losses(run)}
    skipped = power_average({step: tensors for step, tensors in saved.items() if step in logged}, 0.1)
    error, other = distance(found, expected), distance(expected, skipped)
    assert error < 1e-2 * other


def test_snapshots_after_the_resumed_step_are_taken_again(tmp_path, data):
    """Of an extended run they differ from those of the run as it was: none of these may be left among the others."""
    run, training = tmp_path / "run", {**ON, "checkpointing_steps": 2, "max_train_steps": 5}
    train_here(run, data, **training)
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    train_here(run, data, **training, resume="latest", extend_to=8)
    names = sorted(path.name for path in (run / "snapshots").iterdir())
    assert names == [f"step-{step:08d}" for step in (2, 4, 6, 8)]


def test_it_cannot_be_turned_on_in_a_run(tmp_path, data):
    short = {"max_train_steps": 2, "checkpointing_steps": 2}
    train_here(tmp_path / "run", data, **short)
    with pytest.raises(ConfigError, match="power_ema_snapshot_steps is 8; this run was started with 0") as caught:
        train_here(tmp_path / "run", data, resume="latest", **short, power_ema_snapshot_steps=8)
    assert "start a new run" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"power_ema_snapshot_steps": 12}, "power_ema_snapshot_steps 12 is not a multiple of power_ema_every 8"),
        ({"power_ema_snapshot_steps": 8, "checkpointing_steps": 3}, "8 is not a multiple of checkpointing_steps 3"),
        ({"power_ema_widths": [0.05, 0.05]}, "must each be given once"),
        ({"power_ema_widths": [0.3]}, "from 0.01 to 0.28, got 0.3"),
        ({"power_ema_widths": []}, "power_ema_widths must be"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings(**{f"training__{name}": value for name, value in changes.items()})


# Other averages, made of snapshots


@pytest.mark.parametrize("width", [0.06, 0.075, 0.12, 0.1])
def test_a_width_that_was_not_stored_is_made(run, tmp_path, width):
    """Against the float64 average of all weights, which training would have maintained."""
    made = write_average(run.folder, tmp_path / "out", width=width)
    expected, found = run.average(width), load_file(tmp_path / "out" / "model.safetensors")
    apart, error = distance(run.average(0.05), run.average(0.1)), distance(found, expected)
    other = run.average(1.6 * width)
    rounding = 3e-4 * size(found)  # of fp16, whose largest relative error is 4.9e-4
    assert error < 0.03 * apart + rounding and rounding < 0.2 * apart
    assert distance(found, other) > 3 * error  # negative control
    assert (made.step, made.snapshots) == (119, 6) and made.error < 0.03
    loaded = load_checkpoint(tmp_path / "out")
    assert (loaded.step, loaded.averaged, loaded.scale_factor) == (119, True, [0.97])
    assert loaded.intensity_scale == {"t2w": 712.0} and loaded.trained_on is not None
    differ = [name for name, tensor in loaded.model.state_dict().items() if not torch.equal(tensor, found[name])]
    assert differ == []


def test_an_average_that_was_made_is_exported_as_averaged_weights(run, tmp_path):
    """`export` asks for averaged weights, of which the new folder has no others; a run without an average is still refused."""
    write_average(run.folder, tmp_path / "model", width=0.08)
    made = load_file(tmp_path / "model" / "model.safetensors")
    for wanted in (None, "ema"):
        loaded = load_checkpoint(tmp_path / "model", weights=wanted)
        assert loaded.averaged and all(
            torch.equal(each, made[name]) for name, each in loaded.model.state_dict().items()
        )
    assert cli.main(["export", "--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "model.pt")]) == 0


def test_an_earlier_step_is_made_of_earlier_snapshots(run, tmp_path):
    made = write_average(run.folder, tmp_path / "out", width=0.09, step=60)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert made.snapshots == 3 and load_checkpoint(tmp_path / "out").step == 60
    error, apart = distance(found, run.average(0.09, 60)), distance(run.average(0.05, 60), run.average(0.1, 60))
    assert error < 0.06 * apart


def test_the_rounding_of_snapshots_does_not_matter(run, tmp_path, monkeypatch):
    """The same sum of the averages in fp32, fp16 and bf16: fp16 costs far less than a rounding of the result to bf16."""
    monkeypatch.setattr("ccella_fast.training.snapshots._verified", lambda folder, widths: folder)
    copy, made = Path(shutil.copytree(run.folder, tmp_path / "run")), {}
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for step in STEPS:
            for width in (0.05, 0.1):
                exact = weights(copy, step, f"power_ema-{width}")
                file = copy / "snapshots" / f"step-{step:08d}" / f"power_ema-{width}.safetensors"
                save_file({key: tensor.to(dtype) for key, tensor in exact.items()}, file)
        write_average(copy, tmp_path / name, width=0.075)
        made[name] = load_file(tmp_path / name / "model.safetensors")
    fp16, bf16 = (distance(made[name], made["fp32"]) for name in ("fp16", "bf16"))
    result = distance({name: tensor.bfloat16() for name, tensor in made["fp32"].items()}, made["fp32"])
    assert 0 < fp16 < 3e-4 * size(made["fp32"]) and 4 * fp16 < result and 4 * fp16 < bf16, (fp16, bf16, result)


def test_what_cannot_be_made_is_refused(run, tmp_path, capsys):
    def refused(*words: object) -> str:
        code = cli.main(["average", "--run", str(run.folder), "--out", str(tmp_path / "out"), *map(str, words)])
        assert code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    answer = refused("--width", 0.02)
    assert "cannot make the width 0.02: the error of its profile would be" in answer and "(at most 0.05)" in answer
    low, high = map(float, answer.split("choose a width of ")[1].split(" to "))
    assert 0.03 < low < 0.05 and 0.1 < high < 0.28
    write_average(run.folder, tmp_path / "low", width=low)
    for width in (low - 0.001, high + 0.001):
        refused("--width", f"{width:.3f}")
    assert "no snapshot of step 50" in (answer := refused("--width", 0.1, "--step", 50)) and "20, 40, 60" in answer
    assert "5 is not the width of an average" in (answer := refused("--width", 5)) and "from 0.01 to 0.28" in answer
    with pytest.raises(ConfigError, match="already exists"):
        write_average(run.folder, tmp_path / "low", width=0.1)
    for wrong, words in (
        (tmp_path / "nowhere", "this path does not exist; a run folder is needed"),
        (tmp_path / "low", "this is a checkpoint, not a run folder"),
        (run.folder / "checkpoints" / "step-00000119", "this is a checkpoint, not a run folder"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            write_average(wrong, tmp_path / "out", width=0.1)
        assert caught.value.field == "--run" and ".pt" not in caught.value.fix


def test_rounding_that_would_be_magnified_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ccella_fast.training.snapshots.MAX_GAIN", 0.8)
    with pytest.raises(ConfigError, match="the rounding of the snapshots would be magnified 1 times"):
        write_average(run.folder, tmp_path / "out", width=0.1)


def test_the_ranges_of_the_page_are_those_of_a_run():
    """A run of 20,000 steps with the default settings."""
    page = (ROOT / "docs" / "how-to" / "average-weights.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (0\.\d+ to 0\.\d+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 3
    for count, widths in rows:
        steps = range(20_000 // int(count), 20_001, 20_000 // int(count))
        stored = [(width, step) for step in steps for width in TrainingConfig().power_ema_widths]
        found = fit(stored, [0.05, *snapshots.WIDTHS], 20_000, TrainingConfig().power_ema_every)
        assert snapshots.possible_widths(found) == widths


def test_damaged_and_missing_snapshots_are_named(run, tmp_path, data):
    copy = Path(shutil.copytree(run.folder, tmp_path / "run"))
    file = copy / "snapshots" / "step-00000040" / "power_ema-0.1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256 differs") as caught:
        write_average(copy, tmp_path / "out", width=0.1)
    assert caught.value.path == str(file) and "remove step-00000040" in caught.value.fix
    shutil.rmtree(file.parent)
    assert write_average(copy, tmp_path / "out", width=0.1).snapshots == 5
    shutil.rmtree(copy / "snapshots")
    with pytest.raises(CheckpointError, match="has no snapshots"):
        write_average(copy, tmp_path / "other", width=0.1)
    with pytest.raises(CheckpointError, match="a prepared folder"):
        write_average(data, tmp_path / "other", width=0.1)
    with pytest.raises(CheckpointError, match="a snapshot of averaged weights"):
        load_checkpoint(run.folder / "snapshots" / "step-00000040")
    assert not list(tmp_path.glob(".*"))
