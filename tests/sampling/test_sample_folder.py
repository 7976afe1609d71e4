"""A folder of samples: traced to its reports, repaired after a full disk, a kill or too little memory."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import logging
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from ccella_fast import cli
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import ConfigError, DataError, DiskError
from ccella_fast.folder_kinds import check_folder
from ccella_fast.sampling import FastSampler
from ccella_fast.storage import read_json, write_json
from killed_runs import killed_runs
from killed_sampling import REPORTS, draw
from sampling_fixtures import FakeEncoder, write_checkpoint
from study_fixtures import config, tree, write_bert


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step")


def sidecars(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("sample-*.json"))]


# ---- reports ----


def test_seeds_begin_anew_with_each_report_unless_they_are_to_be_distinct(checkpoint, tmp_path):
    draw(checkpoint, tmp_path / "shared", num_samples=2)
    draw(checkpoint, tmp_path / "distinct", num_samples=2, distinct_seeds=True)
    shared, distinct = sidecars(tmp_path / "shared"), sidecars(tmp_path / "distinct")
    assert [each["seed"] for each in shared] == [3, 4, 3, 4, 3, 4]
    assert [each["seed"] for each in distinct] == [3, 4, 5, 6, 7, 8]
    assert [each["report"] for each in distinct] == [each["report"] for each in shared]
    volumes = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).glob("*.nii.gz"))]
        for name in ("shared", "distinct")
    }
    assert (
        volumes["shared"][:2] == volumes["shared"][4:] and len(set(volumes["distinct"])) == 6
    )  # reports 1 and 3 are equal


def test_every_volume_names_its_report(checkpoint, tmp_path):
    draw(checkpoint, tmp_path / "a", report_ids=["first", "second", "third"], num_samples=2, overwrite=True)
    found = sidecars(tmp_path / "a")
    assert [each["report_id"] for each in found] == ["first", "first", "second", "second", "third", "third"]
    salt = found[0]["weights_sha256"]
    expected = [hashlib.sha256(f"{salt}\n{report}".encode()).hexdigest() for report in np.repeat(REPORTS, 2)]
    assert [each["report_sha256"] for each in found] == expected and len(set(expected)) == 2
    with open(tmp_path / "a" / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["report_id"] for row in rows] == [each["report_id"] for each in found]
    assert [row["report_sha256"] for row in rows] == expected
    for row, sidecar in zip(rows, found, strict=True):
        assert row["case"] == row["t2w"].removesuffix(".nii.gz") and (tmp_path / "a" / row["t2w"]).is_file()
        assert (row["synthetic"], row["pirads"], row["spacing"]) == ("yes", "", "1.5 1.5 3")
        assert int(row["seed"]) == sidecar["seed"]
        assert float(row["p_pos"]) == sidecar["class_probabilities"]["pos"]
    for path in (tmp_path / "a").iterdir():
        assert b"focus" not in path.read_bytes(), path


def test_report_files_of_a_glob_give_the_ids(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ccella_fast"), "handlers", [])  # the command's are removed afterwards
    folder = write_checkpoint(tmp_path / "step", **text_encoder(tmp_path))
    for name, text in (("one", "left zone"), ("two", "right zone")):
        (tmp_path / f"{name}.txt").write_text(text)
    files = [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    shared = ["sample", "--checkpoint", str(folder), "--num_inference_steps", "1", "--out", str(tmp_path / "out")]
    assert cli.main([*shared, "--report", "lesion", "--report_file", *files]) == 0
    assert [each["report_id"] for each in sidecars(tmp_path / "out")] == ["report-1", "one", "two"]
    assert cli.main([*shared, "--report_file", files[0], "--report_file", files[0], "--overwrite"]) == 2
    assert "used more than once" in capsys.readouterr().err
    assert len(sidecars(tmp_path / "out")) == 3  # nothing was deleted


def text_encoder(folder: Path) -> dict:
    return {"text.encoder": str(write_bert(folder / "bert", width=16)), "text.dtype": "float32"}


def test_the_ids_are_not_part_of_the_request(checkpoint, tmp_path):
    """A folder of the release before, whose sidecars have no ids, is continued."""
    draw(checkpoint, tmp_path / "a")
    for path in (tmp_path / "a").glob("*.json"):
        write_json(path, {key: value for key, value in read_json(path).items() if not key.startswith("report_")})
    before = tree(tmp_path / "a")
    draw(checkpoint, tmp_path / "a", report_ids=["x", "y", "z"])
    assert tree(tmp_path / "a") == before


def test_what_the_encoder_did_not_read_is_said_without_the_text(tmp_path, caplog):
    folder = write_checkpoint(tmp_path / "step", **text_encoder(tmp_path))
    sampler = FastSampler.from_checkpoint(folder, device="cpu", dtype="float32")
    reports = ["left zone", "left zone", "lesion left right zone mm of in the no", "lésion de zebedee gauche", " ", ""]
    sampler(reports=reports, num_inference_steps=1, decode=False)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        "2 of 6 reports are missing or blank: the null report is used",
        "report 3 is longer than 6 tokens: its first 5 tokens are cut off",
        f"75 % of the tokens of report 4 are unknown to the tokenizer of {tmp_path / 'bert'}: is it in another language?",
    ]
    caplog.clear()
    sampler(reports=["left zone"], num_inference_steps=1, decode=False)
    assert not caplog.records


def test_a_blank_report_is_the_null_report(checkpoint):
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())
    latents = sampler(
        reports=["", " \n", "a"], seeds=[1, 1, 1], num_inference_steps=2, batch_size=1, decode=False
    ).latents
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


# ---- the end of the command ----


def test_the_command_says_what_it_wrote_and_what_it_predicted(checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ccella_fast"):
        draw(checkpoint, tmp_path / "a", report_ids=["zebedee", "b", "c"])
    said = caplog.text
    assert f"{tmp_path / 'a'} contains 3 synthetic volumes, listed in samples.csv" in said
    predicted = {each["report"]: each["class_probabilities"]["pos"] for each in sidecars(tmp_path / "a")}
    for number, probability in predicted.items():
        assert f"report {number + 1}: P(PI-RADS 3 to 5) {probability:.2f}" in said
    assert "does not say whether it was trained to predict classes" in said and "next: look at" in said
    assert "zebedee" not in said  # a file name may name a patient


@pytest.mark.parametrize(
    ("classes", "changes", "head"),
    [
        ([3, 9], {}, "trained"),
        ([12, 0], {}, "untrained"),
        ([0, 0], {}, "untrained"),
        ([3, 9], {"training.text_class_pred_weight": 0.0}, "untrained"),
        ([3, 9], {"model.variant": "L1ONLY"}, "untrained"),
        (None, {}, "unknown"),
        (None, {"model.variant": "DECOUPLED"}, None),
    ],
)
def test_numbers_of_a_class_head_that_was_not_trained_are_not_shown(tmp_path, caplog, classes, changes, head):
    from ccella_fast.checkpoint import write_manifest
    from ccella_fast.report.html import write_report

    folder = write_checkpoint(tmp_path / "step", **changes)
    state = read_json(folder / "training_state.json")
    if classes is not None:
        state["trained_on"] = {"classes": classes, "spacing": [[1.5, 1.5, 3.0], [1.5, 1.5, 3.0]]}
    write_json(folder / "training_state.json", state)
    (folder / "manifest.json").unlink()
    write_manifest(folder, step=12)
    given = {"pirads": 4} if head is None else {}
    with caplog.at_level(logging.INFO, "ccella_fast"):
        draw(folder, tmp_path / "samples", reports=["abc"], num_inference_steps=1, **given)
    (sidecar,) = sidecars(tmp_path / "samples")
    page = write_report(tmp_path).read_text()
    shown = head in ("trained", "unknown")
    assert sidecar["class_head"] == head and (sidecar["class_probabilities"] is not None) == shown
    assert ("P(PI-RADS 3 to 5)" in caplog.text) == shown
    assert ("was not trained to predict it" in caplog.text) == (head == "untrained")
    assert ("P is not shown for models" in page) == (head == "untrained")
    assert ("without that, P means nothing" in page) == (head == "unknown")


def test_training_records_what_it_has_seen(data):
    """The counts and ranges of the prepared folder, counted from its manifest."""
    from ccella_fast.config import make_config
    from ccella_fast.data.loading.dataset import PreparedDataset
    from training_fixtures import CONFIG

    manifest = read_json(data / "manifest.json")
    cases = [case for case in manifest["cases"] if case["split"] == "train"]
    with_report = [case["pirads"] for case in cases if case["pirads"] is not None and not case["text_isnull"]]
    expected = [sum(each[0] for each in with_report), sum(each[1] for each in with_report)]
    found = PreparedDataset(data, make_config(CONFIG)).trained_on()
    assert found["classes"] == expected and sum(expected) > 0
    spacings = np.array([case["spacing"] for case in cases])
    assert found["spacing"] == [spacings.min(0).tolist(), spacings.max(0).tolist()]


def test_a_spacing_that_training_did_not_have_is_named_with_the_trained_range(checkpoint, caplog):
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())
    sampler.origin = sampler.origin._replace(
        trained_on={"classes": [1, 1], "spacing": [[1.0, 1.5, 3.0], [2.0, 1.5, 3.0]]}
    )
    request = {"reports": ["a"], "num_inference_steps": 1, "decode": False}
    for inside in (None, [1.0, 1.5, 3.0], [2.0, 1.5, 3.0]):
        sampler(spacing=inside, **request)
    assert not caplog.records
    sampler(spacing=[3.0, 3.0, 10.0], **request)
    assert [record.getMessage() for record in caplog.records] == [
        "the spacing of 3 x 3 x 10 mm is outside of what the model was trained on, (1 to 2) x 1.5 x 3 mm: volumes may be "
        "implausible",
        "the field of view of 48 x 36 x 80 mm is outside of what the model was trained on, (16 to 32) x 18 x 24 mm: volumes "
        "may be implausible",
    ]
    caplog.clear()
    sampler(latent_shape=(4, 8, 6, 8), **request)  # twice as many slices
    (record,) = caplog.records
    assert record.getMessage().startswith("the field of view of 24 x 18 x 48 mm")


# ---- failures ----


def test_a_full_disk_leaves_neither_volume_nor_sidecar_and_is_repaired(checkpoint, tmp_path, monkeypatch):
    draw(checkpoint, tmp_path / "whole")
    write = Path.write_bytes
    for failing in (1, 2):  # the number of the volume that does not fit
        out, written = tmp_path / f"out{failing}", []

        def full(path, content, failing=failing, written=written):
            written.append(path)
            if len(written) > failing:
                write(path, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, content)

        with monkeypatch.context() as patch, pytest.raises(DiskError, match="the disk is full") as caught:
            patch.setattr(Path, "write_bytes", full)
            draw(checkpoint, out)
        assert caught.value.exit_code == 5
        names = sorted(path.name.split(".")[0] for path in out.iterdir())
        assert names == sorted([f"sample-{k:03d}_seed3" for k in range(failing)] * 2)  # a volume and its sidecar
        kept = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        draw(checkpoint, out)
        assert tree(out) == tree(tmp_path / "whole")
        assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_too_little_memory_keeps_what_was_written(checkpoint, tmp_path, monkeypatch):
    draw(checkpoint, tmp_path / "out", reports=REPORTS[:1])
    before = tree(tmp_path / "out")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="iB in addition to the weights") as caught:
        patch.setattr("ccella_fast.sampling.denoising.run_trajectory", full)
        draw(checkpoint, tmp_path / "out", reports=REPORTS)
    assert all(remedy in caught.value.fix for remedy in ("batch_size", "bfloat16", "latent_shape"))
    after = tree(tmp_path / "out")
    assert {name: after[name] for name in before} == before and len(after) == len(before)


def readable_volumes(folder: Path) -> dict[str, int]:
    """The time stamps of the volumes, each of which is complete."""
    for path in folder.glob("*.nii.gz"):
        assert np.isfinite(np.asarray(nibabel.load(path).dataobj)).all()
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz") if path.with_name(
        path.name.replace(".nii.gz", ".json")).is_file()}  # fmt: skip


def kill_and_finish(checkpoint: Path, folder: Path, trials: int, *, by_time: bool) -> None:
    """Kill runs at random file operations or instants, and finish each. A third of them must die with volumes missing."""
    run, preload = partial(draw, checkpoint), ["ccella_fast.sampling.command", "killed_sampling", "matplotlib.figure"]
    run(folder / "whole")
    expected, unfinished = tree(folder / "whole"), 0
    for out in killed_runs(run, folder, trials, by_time=by_time, preload=preload):
        finished = readable_volumes(out)
        unfinished += len(finished) < len(REPORTS)
        run(out)
        assert tree(out) == expected, out.name
        after = readable_volumes(out)
        assert {name: after[name] for name in finished} == finished  # not generated again
    assert unfinished >= trials / 3


def test_killed_runs_are_finished_to_the_same_bytes(checkpoint, tmp_path):
    kill_and_finish(checkpoint, tmp_path, 8, by_time=False)


@pytest.mark.slow
@pytest.mark.parametrize("by_time", [False, True])
def test_a_hundred_killed_runs_are_finished_to_the_same_bytes(checkpoint, tmp_path, by_time):
    kill_and_finish(checkpoint, tmp_path, 100, by_time=by_time)


def test_a_partial_file_of_a_killed_run_is_removed_and_of_other_folders_is_not(checkpoint, tmp_path):
    other = tmp_path / "out" / "model" / "checkpoints" / ".partial-step-00000400"
    other.mkdir(parents=True)
    (tmp_path / "out" / ".partial-abc.nii.gz").write_bytes(b"half")
    draw(checkpoint, tmp_path / "out")
    assert other.is_dir() and not (tmp_path / "out" / ".partial-abc.nii.gz").exists()


@pytest.mark.parametrize("format", ["nifti", "dicom"])
def test_samples_are_prepared_as_the_message_of_a_wrong_folder_says(checkpoint, tmp_path, format):
    out, studies = tmp_path / "samples", tmp_path / "studies"
    draw(checkpoint, out, format=format)
    with pytest.raises(DataError, match="generated samples"):
        check_folder(out, "studies", error=DataError)
    for path in [*out.glob("sample-*.nii.gz"), *(path for path in out.glob("sample-*") if path.is_dir())]:
        name, dot, suffix = path.name.partition(".")
        (studies / name).mkdir(parents=True)
        path.rename(studies / name / f"t2w{dot}{suffix}")
    check_folder(studies, "studies", error=DataError)
    prepare(studies, tmp_path / "prepared", config(), csv=out / "samples.csv", workers=1)
    cases = load_manifest(tmp_path / "prepared").cases
    names = sorted(path.name for path in studies.iterdir())
    assert [case.id for case in cases] == names and all(case.synthetic for case in cases)
