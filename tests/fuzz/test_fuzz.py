"""A short fuzz run over every reader; inputs that once failed; and the harness itself. `make fuzz` runs the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from faulty_targets import TARGETS as FAULTY
from harness import FAILURES, VALID, judge, mutate, run_command, run_inputs
from target import valid_files, write_files
from targets import TARGETS

FAILED = sorted(path for path in (Path(__file__).parent / "failed").glob("*/*") if path.is_dir())
SHARE = 1 / 60  # of the inputs of a whole run


def test_damaged_inputs_are_refused_or_unchanged():
    inputs = [(name, index) for name, target in TARGETS.items() for index in range(round(target.count * SHARE))]
    results = run_inputs(inputs, seed=1)
    assert len(results) == len(inputs)
    assert [result for result in results if result.outcome in FAILURES] == []
    refused = {result.target for result in results if result.outcome == "refused"}
    assert refused == TARGETS.keys()  # control: the damage reaches every reader


@pytest.mark.parametrize("folder", FAILED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_inputs_that_once_failed(folder: Path, tmp_path: Path):
    target = TARGETS[folder.parent.name]
    (tmp_path / "valid").mkdir()
    target.write(tmp_path / "valid")
    base = target.read(tmp_path / "valid")
    outcome, detail = judge(target, folder, base, guarded=True)
    assert outcome in ("refused", "same"), detail


def test_the_harness_notices_every_failure():
    results = run_inputs([(name, 0) for name in FAULTY], seed=0, module="faulty_targets", hangs=20)
    assert {result.target: result.outcome for result in results} == {name: name for name in FAULTY}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.command is not None])
def test_commands_accept_what_is_not_damaged(name: str):
    """Else their refusals would say nothing about damage."""
    result = run_command(TARGETS[name], 0, VALID)
    assert result.outcome == "accepted", result.detail


def test_a_command_that_refuses_a_valid_input_is_a_failure():
    target = TARGETS["configuration"]
    wrong = target._replace(command=lambda folder, out: [*target.command(folder, out), "--set", "data.dim=[31,32,32]"])
    assert run_command(wrong, 0, VALID).outcome == "valid refused"


def test_the_same_seed_gives_the_same_inputs(tmp_path: Path):
    for name in ("t2w.nii.gz", "studies.csv"):
        target = TARGETS[name]
        files = valid_files(target)
        once, again, other = (mutate(target, seed, 3, files)[0] for seed in (0, 0, 1))
        assert once == again != other
        assert files != once
        write_files(tmp_path, once)
