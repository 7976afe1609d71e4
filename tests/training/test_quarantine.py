"""A study that makes steps non-finite is left out by a rule, exactly (goal R13). Two processes: test_two_ranks.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.diffusion.objective import Objective
from ccella_fast.errors import NonFiniteError
from ccella_fast.storage import read_json, sha256, write_json
from ccella_fast.training import loop
from ccella_fast.training.batches import BatchStream, epoch_order
from ccella_fast.training.quarantine import Quarantine
from soak import trials
from training_fixtures import losses, settings, train_here, weights, write_prepared

EVERY = {"max_train_steps": 12, "checkpointing_steps": 1, "checkpoints_total_limit": 20, "batch_size": 2}


def order_by_hand(bad: int | None, steps: int, batch: int = 2, size: int = 5) -> tuple[list[list[int]], int | None]:
    """The studies of each step, and the step after which the study `bad` is left out: a plain loop."""
    taken, seen, since = [], 0, None
    for step in range(steps):
        studies = []
        for position in range(step * batch, (step + 1) * batch):
            order = epoch_order(0, position // size, size)
            at = position % size
            while since is not None and order[at] == bad:
                at = (at + 1) % size
            studies.append(order[at])
        taken.append(studies)
        seen += bad in studies
        if since is None and seen == 3:
            since = step + 1
    return taken, since


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("bad") / "prepared", nan_in="case1")


@pytest.fixture(scope="module")
def left_out(tmp_path_factory, bad_data):
    """A run with one bad study."""
    folder = tmp_path_factory.mktemp("left_out") / "run"
    train_here(folder, bad_data, **EVERY)
    return folder


def test_a_bad_study_costs_three_steps_and_is_recorded(left_out):
    taken, since = order_by_hand(1, 12)
    skipped = [step for step, studies in enumerate(taken, 1) if 1 in studies]
    assert len(skipped) == 3 and since == skipped[-1] < 12
    assert [step for step, _ in losses(left_out)] == [step for step in range(1, 13) if step not in skipped]
    state = read_json(left_out / "checkpoints" / "step-00000012" / "training_state.json")
    assert state["quarantine"] == {"strikes": {"1": 3}, "left_out": {"1": since}}
    before = read_json(left_out / "checkpoints" / f"step-{since - 1:08d}" / "training_state.json")
    assert before["quarantine"] == {"strikes": {"1": 2}, "left_out": {}}
    assert read_json(left_out / "run_status.json")["quarantined"] == ["case1"]
    assert all(value.isfinite().all() for value in weights(left_out, 12).values())


def test_the_other_steps_are_those_of_a_run_that_skips_it(left_out, data, tmp_path, monkeypatch):
    """Bit-equal to a run whose studies are all finite and which skips the same three steps."""
    joint_loss = loop.joint_loss

    def skips(model, micro_batch, *others):
        found = joint_loss(model, micro_batch, *others)
        is_bad = torch.tensor([case == "case1" for case in micro_batch.batch.ids])
        return found._replace(total=found.total * (torch.nan if is_bad.any() else 1.0), finite=~is_bad)

    monkeypatch.setattr(loop, "joint_loss", skips)
    train_here(tmp_path / "run", data, **EVERY)
    assert losses(tmp_path / "run") == losses(left_out)
    for name in ("model", "ema"):
        found, expected = weights(tmp_path / "run", 12, name), weights(left_out, 12, name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    monkeypatch.undo()
    train_here(tmp_path / "control", data, **EVERY)
    assert len(losses(tmp_path / "control")) == 12 and losses(tmp_path / "control")[-1] != losses(left_out)[-1]


@pytest.mark.parametrize("step", [2, 7, 10])
def test_a_resumed_run_leaves_out_the_same_study(left_out, bad_data, tmp_path, step):
    folder = shutil.copytree(left_out, tmp_path / "run")
    for later in range(step + 1, 13):
        shutil.rmtree(folder / "checkpoints" / f"step-{later:08d}")
    train_here(folder, bad_data, **EVERY, resume="latest")
    assert losses(folder) == losses(left_out)
    states = [run / "checkpoints" / "step-00000012" / "training_state.json" for run in (folder, left_out)]
    assert read_json(states[0]) == read_json(states[1])
    found, expected = weights(folder, 12), weights(left_out, 12)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_json(folder / "run_status.json")["quarantined"] == ["case1"]


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_the_stream_follows_the_rule_also_when_prefetched(data, background):
    stream = BatchStream(
        PreparedDataset(data, settings()), seed=0, batch_size=2, accumulation=1, rank=0, world_size=1,
        scale=torch.full((4,), 0.97), objective=Objective(),
    )  # fmt: skip
    expected, since = order_by_hand(1, 12)
    found = []
    for step, (micro_batch,) in enumerate(stream.steps(0, 12, background=background), start=1):
        ids = micro_batch.batch.ids
        found.append([int(case.removeprefix("case")) for case in ids])
        if "case1" in ids:
            stream.quarantine.count({"case1"}, set(ids), step)
    assert found == expected and stream.quarantine.left_out == {1: since}
    plain, _ = order_by_hand(None, 12)
    assert found[:since] == plain[:since] and found != plain


def test_a_broken_model_leaves_out_no_study():
    quarantine = Quarantine(["a", "b"], {})
    for step in range(9):
        quarantine.count({"a", "b"}, {"a", "b"}, step)
        quarantine.count(set(), {"a", "b"}, step)  # the gradient alone is not finite
    assert quarantine.state() == {"strikes": {}, "left_out": {}}
    for step in range(3):
        quarantine.count({"b"}, {"b"}, step)  # a batch of one
    assert quarantine.ids == ["b"] and not quarantine.uses(1, 2) and quarantine.uses(1, 1) and quarantine.uses(0, 2)


@pytest.mark.parametrize(("studies", "limit"), [(5, 4), (400, 10), (2000, 20)])
def test_too_many_bad_studies_end_the_run(studies, limit):
    names = [f"case{number}" for number in range(studies)]
    quarantine = Quarantine(names, {"strikes": {str(number): 2 for number in range(studies)}})
    for number in range(limit):
        quarantine.count({names[number]}, set(names), 7)
    with pytest.raises(NonFiniteError, match=f"{limit + 1} studies made steps non-finite.*; {limit} may be"):
        quarantine.count({names[limit]}, set(names), 7)


# Random values at random places


def spoil(folder: Path, kind: str, study: int, value: float, random: Random) -> None:
    """Set a random element of a study's latent or text to a value that is not finite."""
    manifest = read_json(folder / "manifest.json")
    entry = manifest["cases"][study]["files"]["latent_mean/t2w" if kind == "latent" else kind]
    array = np.load(folder / entry["path"])
    array.flat[random.randrange(array.size)] = value
    np.save(folder / entry["path"], array)
    entry["sha256"] = sha256(folder / entry["path"])
    write_json(folder / "manifest.json", manifest)


def fault(kind: str, step: int, value: float, random: Random):
    """As `joint_loss`, with a value that is not finite in the loss, the gradient or the weights of one step."""
    joint_loss, calls, hooks = loop.joint_loss, [], []
    place = random.randrange(20)

    def spoil_gradient(gradient):
        hooks.append(None)
        if gradient is None or len(calls) != step or len(hooks) != place + 1:
            return gradient
        spoiled = gradient.clone().flatten()
        spoiled[random.randrange(len(spoiled))] = value
        return spoiled.view_as(gradient)

    def faulty(engine, *others):
        calls.append(None)
        if len(calls) != step:
            return joint_loss(engine, *others)
        parameters = list(engine.module.parameters())
        if kind == "weight":
            weight = random.choice(parameters).data.view(-1)
            weight[random.randrange(len(weight))] = value
        if kind == "gradient":
            for parameter in parameters:
                parameter.register_hook(spoil_gradient)
        found = joint_loss(engine, *others)
        return found._replace(total=found.total + value) if kind == "loss" else found

    return faulty


def is_finite(run: Path) -> bool:
    """Whether all tensors of all checkpoints are."""
    files = list(run.glob("checkpoints/*/*.safetensors"))
    return bool(files) and all(value.isfinite().all() for file in files for value in load_file(file).values())


@pytest.mark.soak
def test_no_value_that_is_not_finite_gets_into_a_checkpoint(data, tmp_path):
    """Goal R13: in the loss, the gradient, a latent, a text feature or a weight, at a random step and place."""
    train_here(tmp_path / "unbroken" / "run", data, **EVERY)
    unbroken = losses(tmp_path / "unbroken" / "run")
    for trial in trials("R13"):
        with trial, pytest.MonkeyPatch.context() as patched:
            kind = ("loss", "gradient", "latent", "text", "weight")[trial.number % 5]
            value, step = trial.random.choice([torch.nan, torch.inf, -torch.inf]), trial.random.randrange(2, 12)
            trial.counts[kind] += 1
            folder = tmp_path / str(trial.number) / "run"
            if kind in ("latent", "text"):
                study = trial.random.randrange(5)
                spoiled = Path(shutil.copytree(data, folder.parent / "data"))
                spoil(spoiled, kind, study, value, trial.random)
                train_here(folder, spoiled, **EVERY)
                taken, since = order_by_hand(study, 12)
                assert [done for done, _ in losses(folder)] == [
                    done for done, used in enumerate(taken, 1) if study not in used
                ]
                assert read_json(folder / "run_status.json")["quarantined"] == [f"case{study}"] and since
            else:
                patched.setattr(loop, "joint_loss", fault(kind, step, value, trial.random))
                if kind == "weight":
                    with pytest.raises(NonFiniteError):
                        train_here(folder, data, **EVERY)
                    assert is_finite(folder)
                    status = read_json(folder / "run_status.json")
                    assert (status["state"], status["exit_code"]) == ("failed", 6) and status["step"] < step
                    patched.undo()
                    train_here(folder, data, **EVERY, resume="latest")
                    assert losses(folder) == unbroken
                else:
                    train_here(folder, data, **EVERY)
                    assert [done for done, _ in losses(folder)] == [done for done in range(1, 13) if done != step]
                    assert losses(folder)[: step - 1] == unbroken[: step - 1]
                    for name in ("model", "ema", "exp_avg", "exp_avg_sq"):
                        before, after = weights(folder, step - 1, name), weights(folder, step, name)
                        assert all(torch.equal(before[key], after[key]) for key in before)
            assert is_finite(folder)
            shutil.rmtree(folder.parent)
