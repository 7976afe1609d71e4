"""Synthetic sets: each study is what the sampler generates from its case, labelled, in its case's split, and resumable."""

from __future__ import annotations

import csv
import logging
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from ccella_fast import cli
from ccella_fast.checkpoint import write_manifest
from ccella_fast.config import make_config
from ccella_fast.data.checking.duplicates import check_duplicates
from ccella_fast.data.checking.study_facts import facts_of_studies
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.errors import CcellaError, ConfigError, DataError
from ccella_fast.evaluation.volumes import open_volumes
from ccella_fast.sampling import FastSampler
from ccella_fast.sampling.case_prompts import CasePrompt, Draw, choose_draws
from ccella_fast.storage import read_json, sha256, write_json
from ccella_fast.variants import VARIANTS
from killed_runs import killed_runs
from killed_sampling import draw_set
from sampling_fixtures import TINY, TOKENS, WIDTH, FakeEncoder, write_checkpoint
from study_fixtures import oblique, tree, write_bert, write_nifti, write_studies

ROOT = Path(__file__).resolve().parents[2]
SPACING = [1.5, 1.5, 3.0]
# The last training case has no report, the one before no class.
CASES = [
    ("a", "train", [1, 0]), ("b", "train", [0, 1]), ("t", "test", [0, 1]), ("c", "train", [0, 1]), ("d", "train", None),
    ("e", "train", [1, 0]),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "prepared")


def write_data(folder: Path, **changes: Any) -> Path:
    """A prepared folder of CASES with random text features and oblique grids, but no images."""
    (folder / "text").mkdir(parents=True)
    cases = []
    for number, (name, split, pirads) in enumerate(CASES):
        path = folder / "text" / f"{name}.npy"
        np.save(path, np.random.default_rng(number).standard_normal((TOKENS, WIDTH)).astype(np.float32))
        entry = {"path": f"text/{name}.npy", "sha256": sha256(path), "bytes": path.stat().st_size}
        cases.append({
            "id": name, "split": split, "dataset": None, "spacing": SPACING, "pirads": pirads, "text_isnull": int(name == "e"),
            "affine": oblique(SPACING, tilt=5 + number).tolist(), "window": {"t2w": [0.0, 700.0]}, "files": {"text": entry},
        })  # fmt: skip
    text = {"encoder": "fake", "revision": None, "max_length": TOKENS, "dtype": "float32", "width": WIDTH}
    write_json(folder / "manifest.json", {
        "format": "ccella_fast.prepared", "version": 1,
        "data": {"sequences": ["t2w"], "spacing": SPACING, "dim": TINY["data.dim"], "dataset": None},
        "text": {**text, "fingerprint": "imported"}, "vae": None, "scale_factor": None, "intensity_scale": {"t2w": 700.0},
        "truncated_reports": [], "cases": cases, **changes,
    })  # fmt: skip
    return folder


def trained(folder: Path, variant: str = "CCELLA", **changes: Any) -> Path:
    """A checkpoint whose class head counts as trained."""
    write_checkpoint(folder, variant, **changes)
    state = read_json(folder / "training_state.json")
    write_json(
        folder / "training_state.json", state | {"trained_on": {"classes": [3, 9], "spacing": [SPACING, SPACING]}}
    )
    (folder / "manifest.json").unlink()
    write_manifest(folder, step=12)
    return folder


def table(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "studies.csv", newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def test_each_study_is_what_the_sampler_generates_from_its_case(checkpoint, data, tmp_path):
    draw_set(checkpoint, data, tmp_path / "out", batch_size=1, guidance_scale=2.0)
    rows, manifest = table(tmp_path / "out"), load_manifest(data)
    cases = {case.id: case for case in manifest.cases}
    assert list(rows) == [f"{case}-synth-{k}" for case in "abcd" for k in (0, 1)]
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())
    for name, row in rows.items():
        case = cases[row["source_case"]]
        assert name.startswith(f"{case.id}-synth-") and row["synthetic"] == "yes" and row["report"] == ""
        result = sampler(
            text=np.array(manifest.array(case, "text"))[None], seeds=[int(row["seed"])], num_inference_steps=2,
            guidance_scale=2.0, spacing=case.spacing, progress=False,
        )  # fmt: skip
        image = nibabel.load(tmp_path / "out" / name / "t2w.nii.gz")
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), result.volumes[0, 0].numpy() * np.float32(700))
        np.testing.assert_allclose(image.affine, case.affine, atol=1e-4)
        np.testing.assert_allclose(image.get_qform(), case.affine, atol=1e-4)
        sidecar = read_json(tmp_path / "out" / name / "generated.json")
        assert (sidecar["report_id"], sidecar["guidance_scale"], sidecar["seed"]) == (case.id, 2.0, int(row["seed"]))
    assert len({row["seed"] for row in rows.values()}) == len(rows)
    assert len({sha256(path) for path in tmp_path.rglob("t2w.nii.gz")}) == len(rows)


def test_the_noise_of_a_study_depends_on_its_case_and_number_alone(checkpoint, data, tmp_path):
    draw_set(checkpoint, data, tmp_path / "two", batch_invariant=True)
    draw_set(checkpoint, data, tmp_path / "one", batch_invariant=True, per_case=1)
    other = read_json(data / "manifest.json")
    other["cases"] = [case for case in reversed(other["cases"]) if case["id"] != "a"]
    write_json(tmp_path / "manifest.json", other)
    shutil.copytree(data / "text", tmp_path / "text")
    draw_set(checkpoint, tmp_path, tmp_path / "reversed", batch_invariant=True)
    two, one, reverse = (tree(tmp_path / name) for name in ("two", "one", "reversed"))
    volumes = {name: value for name, value in two.items() if name.endswith(".nii.gz")}
    assert {name: two[name] for name in one if name.endswith(".gz")} == {k: v for k, v in volumes.items() if "-0/" in k}
    assert {name: two[name] for name in reverse if name.endswith(".gz")} == {
        name: value for name, value in volumes.items() if not name.startswith("a-")
    }
    draw_set(checkpoint, data, tmp_path / "other seed", batch_invariant=True, seed=4)
    different = tree(tmp_path / "other seed")
    assert all(different[name] != value for name, value in volumes.items())


def test_prepare_reads_the_set_and_knows_where_each_study_comes_from(tmp_path):
    real = write_studies(tmp_path / "real")
    settings = make_config(TINY | {"model.variant": "MAISI"})
    prepare(real, tmp_path / "prepared", settings, workers=1)
    folder = write_checkpoint(tmp_path / "step", "MAISI")
    for split in ("train", "test"):
        draw_set(folder, tmp_path / "prepared", tmp_path / split, split=split, text_encoder=None)
        prepare(tmp_path / split, tmp_path / f"prepared-{split}", settings, workers=1)
    made = load_manifest(tmp_path / "prepared-train").cases + load_manifest(tmp_path / "prepared-test").cases
    found = {case.id: (case.synthetic, case.split, case.source_case, case.pirads) for case in made}
    assert found["case0-synth-0"] == (True, "train", "case0", [1, 0])
    assert found["case1-synth-1"] == (True, "test", "case1", [0, 1])
    assert found["case2-synth-0"] == (True, "train", "case2", None) and len(found) == 6
    before = {case.id: case for case in load_manifest(tmp_path / "prepared").cases}
    for case in made:  # nothing is resampled: the grid is that of the case
        np.testing.assert_allclose(case.affine, before[case.source_case].affine, atol=1e-3)
    assert [source.prompt for source in open_volumes(tmp_path / "prepared-test", field="x").sources] == ["case1"] * 2
    # A study that was generated from a test case, put into training, is leakage.
    leak = find_studies(tmp_path / "test")[0]._replace(split="train")
    (finding,) = check_duplicates(facts_of_studies([*find_studies(real), leak]))
    assert (finding.name, finding.studies) == ("leakage", ("case1", "case1-synth-0"))


def prompts(*cases: tuple[str, str | None, bool]) -> list[CasePrompt]:
    return [
        CasePrompt(name, "train", pirads, (1, 1, 1), None, (lambda: np.zeros(1)) if has_report else None)
        for name, pirads, has_report in cases
    ]


def names(draws: list[Draw]) -> list[str]:
    return [draw.name for draw in draws]


def test_cases_without_what_the_variant_needs_are_left_out_and_counted(caplog):
    given = prompts(("a", "neg", True), ("b", None, True), ("c", "pos", False))
    assert names(choose_draws(given, VARIANTS["CCELLA"])) == ["a-synth-0", "b-synth-0"]
    assert "cases without a report, which are left out: 1" in caplog.text
    assert names(choose_draws(given, VARIANTS["RADMAISI"])) == ["a-synth-0", "c-synth-0"]
    assert "cases without a class, which are left out: 1" in caplog.text
    caplog.clear()
    assert len(choose_draws(given, VARIANTS["MAISI"])) == 3 and not caplog.records
    with pytest.raises(ConfigError, match="none of 1 case has what DECOUPLED is conditioned on"):
        choose_draws(given[1:2], VARIANTS["DECOUPLED"])


def test_classes_are_balanced_by_using_cases_in_turn():
    given = prompts(*((f"n{k}", "neg", True) for k in range(3)), ("p", "pos", True), ("u", None, True))
    draws = choose_draws(given, VARIANTS["CCELLA"], per_class=7)
    count = {case: sum(draw.prompt.case == case for draw in draws) for case in ("n0", "n1", "n2", "p", "u")}
    assert count == {"n0": 3, "n1": 2, "n2": 2, "p": 7, "u": 0}
    assert len(set(names(draws))) == 14 and names(draws)[:3] == ["n0-synth-0", "n0-synth-1", "n0-synth-2"]
    assert len(choose_draws(given, VARIANTS["CCELLA"], per_class=2)) == 4  # n2 is not used
    with pytest.raises(ConfigError, match="no case of the class pos is left, of which --per_class wants 2"):
        choose_draws(given[:3], VARIANTS["CCELLA"], per_class=2)


def test_a_name_that_prepare_would_refuse_is_refused_first():
    (draw,) = choose_draws(prompts(("c" * 113, "neg", True)), VARIANTS["CCELLA"])
    assert len(draw.name) == 121
    with pytest.raises(ConfigError, match="leaves no room for that of a study from it: 114 characters"):
        choose_draws(prompts(("c" * 114, "neg", True)), VARIANTS["CCELLA"])


def test_labels_are_those_of_the_cases_or_predicted(data, tmp_path):
    folder = trained(tmp_path / "step")
    draw_set(folder, data, tmp_path / "report")
    draw_set(folder, data, tmp_path / "predicted", label="predicted")
    asked, predicted = table(tmp_path / "report"), table(tmp_path / "predicted")
    classes = {"a": "neg", "b": "pos", "c": "pos", "d": ""}
    for name, row in asked.items():
        probability = read_json(tmp_path / "report" / name / "generated.json")["class_probabilities"]["pos"]
        expected = "pos" if probability > 0.5 else "neg"
        assert row["pirads"] == row["class_prompt"] == classes[row["source_case"]]
        assert (row["class_predicted"], float(row["p_pos"])) == (expected, probability)
        assert predicted[name] == {**row, "pirads": expected}
    studies = {study.id: study for study in find_studies(tmp_path / "report")}
    assert studies["d-synth-0"].pirads is None and studies["d-synth-0"].class_predicted is not None
    draw_set(folder, data, tmp_path / "report", label="predicted")  # another label needs no new volume
    assert tree(tmp_path / "report") == tree(tmp_path / "predicted")


def test_what_an_untrained_head_predicts_is_no_label(checkpoint, data, tmp_path):
    draw_set(checkpoint, data, tmp_path / "a")
    assert {row["class_predicted"] + row["p_pos"] for row in table(tmp_path / "a").values()} == {""}
    with pytest.raises(ConfigError, match="this CCELLA model was not trained to predict a class"):
        draw_set(checkpoint, data, tmp_path / "b", label="predicted")
    assert not (tmp_path / "b").exists() or not any((tmp_path / "b").glob("[!.]*"))


def test_a_variant_that_is_given_a_class_gets_that_of_the_case(data, tmp_path):
    folder = write_checkpoint(tmp_path / "step", "DECOUPLED")
    draw_set(folder, data, tmp_path / "out", per_case=1)
    given = {
        name: read_json(tmp_path / "out" / name / "generated.json")["class_given"] for name in table(tmp_path / "out")
    }
    assert given == {"a-synth-0": "neg", "b-synth-0": "pos", "c-synth-0": "pos"}


def test_a_table_of_reports(checkpoint, data, tmp_path):
    text = "Zebedee has a focus"
    (tmp_path / "list.csv").write_text(f"case,split,pirads,report\none,test,5,{text}\ntwo,,2,{text}\nthree,,1,\n")
    draw_set(checkpoint, None, tmp_path / "out", report_table=tmp_path / "list.csv", per_case=1)
    rows = table(tmp_path / "out")
    assert {name: (row["split"], row["pirads"], row["report"]) for name, row in rows.items()} == {
        "one-synth-0": ("test", "pos", text), "two-synth-0": ("train", "neg", text),
    }  # fmt: skip
    affine = nibabel.load(tmp_path / "out" / "one-synth-0" / "t2w.nii.gz").affine
    np.testing.assert_allclose(affine @ [7.5, 5.5, 3.5, 1], [0, 0, 0, 1], atol=1e-5)
    for path in (tmp_path / "out").rglob("*"):  # the table is the data set; nothing else has the text
        assert path.is_dir() or path.name == "studies.csv" or text.encode() not in path.read_bytes(), path


def test_killed_sets_are_finished_to_the_same_bytes(checkpoint, data, tmp_path):
    run = partial(draw_set, checkpoint, data)
    run(tmp_path / "whole")
    expected, unfinished = tree(tmp_path / "whole"), 0
    preload = ["ccella_fast.sampling.synthesis", "killed_sampling"]
    for out in killed_runs(run, tmp_path, 5, by_time=False, preload=preload):
        before = {path: path.stat().st_mtime_ns for path in out.rglob("t2w.nii.gz") if path.parent.name[0] != "."}
        unfinished += len(before) < 8
        run(out)
        assert tree(out) == expected and {path: path.stat().st_mtime_ns for path in before} == before
    assert unfinished >= 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "other settings, weights or reports"),
        ({"num_inference_steps": 3}, "other settings, weights or reports"),
        ({"per_case": 1}, "not a study of this set"),
        ({"split": "test"}, "not a study of this set"),
    ],
)
def test_another_set_is_refused_and_nothing_is_lost(checkpoint, data, tmp_path, changes, words):
    draw_set(checkpoint, data, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(ConfigError, match=words) as caught:
        draw_set(checkpoint, data, tmp_path / "out", **changes)
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) <= 5
    assert tree(tmp_path / "out") == before


def test_real_studies_are_never_written_to(checkpoint, data, tmp_path):
    real = write_studies(tmp_path / "real")
    before = tree(real)
    with pytest.raises(ConfigError, match="not a study of this set"):
        draw_set(checkpoint, data, real)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "studies.csv").write_text("case,pirads\na,1\n")
    with pytest.raises(ConfigError, match="not the table of a synthetic set"):
        draw_set(checkpoint, data, alone)
    write_nifti(tmp_path / "same" / "a-synth-0" / "t2w.nii.gz")
    with pytest.raises(ConfigError, match="other settings"):
        draw_set(checkpoint, data, tmp_path / "same")
    assert tree(real) == before and (alone / "studies.csv").read_text() == "case,pirads\na,1\n"


def test_data_of_another_model_is_refused_before_weights_are_loaded(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(FastSampler, "from_checkpoint", lambda *_, **__: pytest.fail("weights were loaded"))
    grid = {"sequences": ["t2w"], "spacing": SPACING, "dim": [16, 16, 8], "dataset": None}
    text = {"encoder": "x", "revision": None, "max_length": 9, "dtype": "float32", "width": WIDTH, "fingerprint": "y"}
    mistakes: list[tuple[type[CcellaError], dict[str, Any], dict[str, Any]]] = [
        (DataError, {"data": grid}, {}),
        (DataError, {"data": grid | {"dim": TINY["data.dim"], "spacing": [1.0, 1.0, 3.0]}}, {}),
        (DataError, {"text": text}, {}),
        (DataError, {}, {"split": "val"}),
        (ConfigError, {}, {"per_class": 0}),
        (ConfigError, {}, {"label": "guess"}),
        (ConfigError, {}, {"solver": "euler"}),
        (ConfigError, {}, {"report_table": tmp_path / "x.csv"}),
    ]
    for number, (kind, of_data, of_call) in enumerate(mistakes):
        folder = write_data(tmp_path / f"data{number}", **of_data)
        with pytest.raises(kind) as caught:
            draw_set(checkpoint, folder, tmp_path / "out", **of_call)
        assert caught.value.fix and len(str(caught.value).splitlines()) <= 5
        assert not any((tmp_path / "out").glob("[!.]*"))


def test_two_processes_write_the_set_of_one_with_one_table(data, tmp_path):
    folder = write_checkpoint(tmp_path / "step", "RADMAISI")
    flags = ["--checkpoint", folder, "--data", data, "--per_case", 2, "--seed", 3, "--num_inference_steps", 2]
    flags += ["--device", "cpu", "--dtype", "float32"]
    assert cli.main(["synthesize", *map(str, flags), "--out", str(tmp_path / "one")]) == 0
    launcher = Path(sys.executable).with_name("torchrun")
    command = [launcher, "--standalone", "--nproc-per-node", 2, "-m", "ccella_fast.cli", "synthesize", *flags]
    command += ["--out", tmp_path / "two"]
    completed = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert tree(tmp_path / "two") == tree(tmp_path / "one") and len(table(tmp_path / "one")) == 8
    assert read_json(tmp_path / "two" / "run_record.json")["processes"] == 2


def test_an_untrained_voxel_size_is_warned_of_once(data, tmp_path, caplog):
    folder = trained(tmp_path / "step")
    other = read_json(data / "manifest.json")
    for case in other["cases"]:
        case["spacing"] = [2.0, 2.0, 3.0]
    write_json(tmp_path / "manifest.json", other)
    shutil.copytree(data / "text", tmp_path / "text")
    with caplog.at_level(logging.WARNING, "ccella_fast"):
        draw_set(folder, tmp_path, tmp_path / "out")
    assert caplog.text.count("the spacing of 2 x 2 x 3 mm is outside of what the model was trained on") == 1


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["case,split,pirads,report"]
    for number in range(8):
        write_nifti(tmp_path / "studies" / f"case{number}" / "t2w.nii.gz", seed=number)
        split, pirads = ("test" if number % 2 else "train"), 2 + number // 4 * 2
        lines.append(f"case{number},{split},{pirads},lesion of {number} mm in the left zone")
    (tmp_path / "studies" / "studies.csv").write_text("\n".join(lines) + "\n")
    encoder = {"text.encoder": str(write_bert(tmp_path / "bert", width=WIDTH)), "text.dtype": "float32"}
    trained(tmp_path / "model", **encoder)
    (tmp_path / "configs").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "configs" / "ccella.json")
    assert cli.main(["prepare", "--data", "studies", "--out", "prepared", "--config", "configs/ccella.json"]) == 0
    page = (ROOT / "docs" / "how-to" / "synthesize.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^    ccella-fast (\S.*)", page, flags=re.MULTILINE)]
    assert [words[0] for words in commands] == ["synthesize", "prepare"] * 2 + ["evaluate"]
    for words in commands:
        assert cli.main([*words, *(["--features", "random"] if words[0] == "evaluate" else [])]) == 0
    prepared = load_manifest(tmp_path / "synthetic_prepared")
    assert {case.split for case in prepared.cases} == {"train"} and len(prepared.cases) == 4
    assert all(case.class_predicted for case in prepared.cases)
    rows = read_json(tmp_path / "evaluation" / "metrics.json")["rows"]
    assert {row["n_synthetic"] for row in rows} == {4}
