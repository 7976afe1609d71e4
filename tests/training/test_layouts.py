"""A run that goes on with another number of processes, ZeRO stage or precision is the same run up to rounding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ccella_fast.errors import ConfigError
from ccella_fast.storage import read_json, write_json
from soak import trials
from training_fixtures import launch_jobs, losses, rewrite_manifest, train_here

# On one process; on two, a batch of half the size.
STEPS, EACH = 9, 3
ALONE: dict[str, Any] = {
    "batch_size": 4, "max_train_steps": STEPS, "checkpointing_steps": EACH, "checkpoints_total_limit": 9, "zero_stage": 0,
}  # fmt: skip
RELATIVE = 1e-5


def without_later(run: Path, to: Path, step: int) -> Path:
    """A copy of a run that looks as if it had ended after `step` steps."""
    shutil.copytree(run, to)
    for folder in (to / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return to


def relative_difference(run: Path, expected: Path) -> float:
    """The largest relative difference of the losses, of which none may be missing."""
    found, right = losses(run), losses(expected)
    assert [step for step, _ in found] == [step for step, _ in right]
    return max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(found, right, strict=True))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train_here(folder, data, **ALONE)
    return folder


@pytest.fixture(scope="module")
def on_two(tmp_path_factory, data, unbroken):
    """The folder with runs zero0 and zero2: one process to step 3, then two to the end."""
    folder = tmp_path_factory.mktemp("two")
    without_later(unbroken, folder / "begun", EACH)
    names = {f"zero{stage}": stage for stage in (0, 2)}
    jobs = {
        name: {"set": {**ALONE, "batch_size": 2, "zero_stage": stage}, "continues": "begun"}
        for name, stage in names.items()
    }
    launch_jobs(folder, data, jobs)
    return folder


@pytest.mark.parametrize("stage", [0, 2])
def test_one_then_two_then_one_process_equal_one(on_two, unbroken, data, tmp_path, stage):
    run = on_two / f"zero{stage}"
    assert relative_difference(run, unbroken) < RELATIVE
    assert read_json(run / "checkpoints" / "step-00000006" / "manifest.json")["world_size"] == 2
    back = without_later(run, tmp_path / "run", 2 * EACH)
    assert train_here(back, data, resume="latest", **{**ALONE, "zero_stage": stage}) == 0
    assert relative_difference(back, unbroken) < RELATIVE
    assert losses(back)[:6] == losses(run)[:6] and losses(run)[3:6] != losses(unbroken)[3:6]  # the rounding differs


@pytest.mark.parametrize("stages", [(2, 0), (3, 1)], ids=["0-2-0", "0-3-1"])
def test_other_stages_on_one_process_equal_the_unbroken_run(unbroken, data, tmp_path, stages):
    """Up to rounding: a stage sums gradients and their norm in its own order."""
    run = without_later(unbroken, tmp_path / "run", EACH)
    train_here(run, data, resume="latest", **{**ALONE, "zero_stage": stages[0]})
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    train_here(run, data, resume="latest", **{**ALONE, "zero_stage": stages[1]})
    assert relative_difference(run, unbroken) < RELATIVE


def test_bf16_and_accumulation_may_change(unbroken, data, tmp_path, caplog):
    """In bf16 the losses differ by its rounding. The master weights stay in fp32, so a step back to fp32 goes on from them."""
    caplog.set_level("INFO", logger="ccella_fast")
    run = without_later(unbroken, tmp_path / "run", EACH)
    changed = {"precision": "bf16", "zero_stage": 1, "batch_size": 2, "gradient_accumulation_steps": 2}
    train_here(run, data, resume="latest", **{**ALONE, **changed})
    assert "training.precision was fp32 and is bf16" in caplog.text and "the global batch is still 4" in caplog.text
    assert RELATIVE < relative_difference(run, unbroken) < 2e-2
    weights = load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())


def zero(folder: Path, name: str) -> None:
    """Set all values of a file of a checkpoint to zero, or the number of Adam's steps."""
    if name == "adam_steps":
        state = folder / "training_state.json"
        write_json(state, read_json(state) | {"adam_steps": 0})
    else:
        values = {key: torch.zeros_like(value) for key, value in load_file(folder / name).items()}
        save_file(values, folder / name, metadata={"format": "pt"})
    rewrite_manifest(folder)


@pytest.mark.parametrize("name", ["exp_avg.safetensors", "exp_avg_sq.safetensors", "adam_steps"])
@pytest.mark.parametrize("stage", [0, 2])
def test_the_comparison_notices_a_moment_that_is_not_restored(unbroken, data, tmp_path, name, stage):
    run = without_later(unbroken, tmp_path / "run", EACH)
    zero(run / "checkpoints" / f"step-{EACH:08d}", name)
    train_here(run, data, resume="latest", **{**ALONE, "zero_stage": stage})
    assert relative_difference(run, unbroken) > 10 * RELATIVE


@pytest.mark.parametrize(("batch_size", "accumulation", "product"), [(2, 1, 2), (4, 2, 8), (3, 1, 3)])
def test_another_global_batch_is_refused(unbroken, data, batch_size, accumulation, product):
    changed = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    with pytest.raises(ConfigError, match=rf"{batch_size} x {accumulation} x 1 = {product}; this run .* = 4"):
        train_here(unbroken, data, resume="latest", **{**ALONE, **changed})


@pytest.mark.soak
def test_sixty_steps_on_changing_layouts_equal_one_process(tmp_path, data):
    """Goal R3: three numbers of processes and ZeRO stages, which change at random steps."""
    long = {**ALONE, "max_train_steps": 60, "checkpointing_steps": 5, "checkpoints_total_limit": 99, "lr": 5e-4}
    train_here(tmp_path / "unbroken", data, **long)
    for trial in trials("R3"):
        with trial:
            counts = trial.random.choice([(1, 2, 1), (2, 4, 1), (4, 1, 2), (2, 1, 4)])
            changes = sorted(trial.random.sample(range(5, 60, 5), 2))
            for part, count in enumerate(counts):
                folder = tmp_path / str(trial.number) / str(part)
                folder.mkdir(parents=True)
                settings = {**long, "batch_size": 4 // count, "zero_stage": trial.random.randrange(4)}
                job = {"set": settings}
                if part:
                    without_later(folder.parent / str(part - 1) / "run", folder / "begun", changes[part - 1])
                    job["continues"] = "begun"
                launch_jobs(folder, data, {"run": job}, processes=count)
            assert relative_difference(folder / "run", tmp_path / "unbroken") < RELATIVE
