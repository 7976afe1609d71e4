"""The best checkpoint is kept whatever its age, and overfitting is noticed."""

from __future__ import annotations

import pytest

from ccella_fast.checkpoint import load_checkpoint, step_folders
from ccella_fast.errors import ConfigError
from ccella_fast.training.overfitting import overfits_since
from ccella_fast.training.validation import FixedNoiseLoss
from training_fixtures import settings, train_here, validations

EACH = {"checkpointing_steps": 1, "monitoring__validation_steps": 1, "monitoring__validation_fraction": 0.3}


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(3.0, 1.0, ...)`: the validation losses from now on; the loss of training studies falls."""

    def script(*values: float | None) -> None:
        both = iter([loss for number, value in enumerate(values) for loss in (value, 1.0 - 0.01 * number)])
        monkeypatch.setattr(FixedNoiseLoss, "measure", lambda self, engine: {"loss": next(both)})

    return script


def kept(run) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in step_folders(run))


def test_the_best_checkpoint_is_kept(tmp_path, data, scripted, caplog):
    """Also over a resumption; and the newest ones are kept as ever."""
    run, settings = tmp_path / "run", {**EACH, "monitoring__best_metric": "val_loss"}
    scripted(3.0, 1.0, 2.0, 2.1, None, 2.3)
    train_here(run, data, **settings, max_train_steps=6)
    assert kept(run) == [2, 5, 6]
    assert (run / "best").resolve() == (run / "checkpoints" / "step-00000002").resolve()
    assert (load_checkpoint(run / "best").step, load_checkpoint(run).step) == (2, 6)
    assert [line["overfits_since"] for line in validations(run)] == [None] * 5 + [2]
    assert caplog.text.count("learning them by heart") == 1

    for step in (5, 6):
        for file in sorted((run / "checkpoints" / f"step-{step:08d}").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (run / "checkpoints" / f"step-{step:08d}").rmdir()
    scripted(1.5, 0.5, 0.7, 0.8)
    train_here(run, data, resume="latest", **settings, max_train_steps=6)
    assert kept(run) == [4, 5, 6] and load_checkpoint(run / "best").step == 4


def test_without_the_setting_old_checkpoints_are_removed(tmp_path, data, scripted):
    scripted(3.0, 1.0, 2.0, 2.0, 2.0)
    train_here(tmp_path / "run", data, **EACH, max_train_steps=5)
    assert kept(tmp_path / "run") == [4, 5] and not (tmp_path / "run" / "best").exists()


def test_a_metric_that_is_not_measured_at_every_checkpoint_is_refused():
    changes = {"training__checkpointing_steps": 10, "monitoring__best_metric": "val_loss"}
    assert settings(**changes, monitoring__validation_steps=5).monitoring.best_metric == "val_loss"
    with pytest.raises(ConfigError, match="val_loss is not measured at every checkpoint"):
        settings(**changes, monitoring__validation_steps=4)
    for steps in ({}, {"monitoring__sample_steps": 5}):
        with pytest.raises(ConfigError, match="val_loss is never measured: monitoring.validation_steps is 0"):
            settings(**changes, **steps)


def lines(losses: list[float | None], train: list[float]) -> list[dict]:
    return [
        {"step": 10 * number, "val_loss": loss, "train_eval_loss": seen}
        for number, (loss, seen) in enumerate(zip(losses, train, strict=True))
    ]


@pytest.mark.parametrize(
    ("losses", "train", "since"),
    [
        ([2.0, 1.0, 1.02, 1.03, 1.02], [2.0, 1.0, 0.9, 0.8, 0.7], 10),
        ([2.0, 1.0, 1.02, 1.03, 1.02], [2.0, 1.0, 1.1, 1.1, 1.1], None),
        ([2.0, 1.0, 1.02, 1.005, 1.02], [2.0, 1.0, 0.9, 0.8, 0.7], None),
        ([2.0, 1.0, 1.02, 1.03], [2.0, 1.0, 0.9, 0.8], None),
        ([2.0, 1.0, None, 1.02, 1.03], [2.0, 1.0, 0.9, 0.8, 0.7], None),
        ([2.0, 1.0, 1.1, 1.2, 1.3, 0.9], [2.0, 1.0, 0.9, 0.8, 0.7, 0.6], None),
        ([], [], None),
    ],
    ids=["overfits", "both-rise", "within-1-percent", "two-in-a-row", "one-unknown", "lower-again", "empty"],
)
def test_overfitting_is_three_rises_in_a_row_while_training_studies_improve(losses, train, since):
    assert overfits_since(lines(losses, train)) == since
