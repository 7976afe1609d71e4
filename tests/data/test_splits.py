"""The split val is held out: what is trained or measured on the data does not depend on its studies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.errors import DataError
from ccella_fast.report.html import write_report
from ccella_fast.training.autoencoder.patches import read_images
from report_fixtures import read, write_run
from study_fixtures import config, write_nifti, write_studies, write_vae


def prepared(folder: Path, splits: list[str]) -> Path:
    """A prepared folder with latents of a study per split; none of them has a report."""
    settings = config()
    for number in range(len(splits)):
        write_nifti(folder / f"studies/case{number}/t2w.nii.gz", seed=number)
    lines = [f"case{number},{split}" for number, split in enumerate(splits)]
    (folder / "studies/studies.csv").write_text("\n".join(["case,split", *lines]) + "\n")
    prepare(folder / "studies", folder / "prepared", settings, vae=write_vae(folder / "vae", settings))
    return folder / "prepared"


@pytest.fixture(scope="module")
def with_val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("val"), ["train", "test", "train", "val"])


def test_validation_studies_are_neither_trained_nor_tested_on(with_val: Path):
    assert [case.split for case in load_manifest(with_val).cases] == ["train", "test", "train", "val"]
    assert PreparedDataset(with_val, config()).ids == ["case0", "case2"]
    assert PreparedDataset(with_val, config(), "val").ids == ["case3"]
    assert [[image.case for image in images] for images in read_images(with_val)] == [["case0", "case2"], ["case1"]]


def test_what_is_computed_from_the_training_studies_stays_equal(with_val: Path, tmp_path: Path):
    """The scale factor of latents and the scale of intensities; control: as a training study, it changes the first."""
    without = load_manifest(prepared(tmp_path / "without", ["train", "test", "train"]))
    as_train = load_manifest(prepared(tmp_path / "train", ["train", "test", "train", "train"]))
    manifest = load_manifest(with_val)
    assert manifest.scale_factor == without.scale_factor != as_train.scale_factor
    assert manifest.intensity_scale == without.intensity_scale


def test_the_report_page_counts_them(tmp_path: Path):
    run = write_run(tmp_path, ["a", "b", "c"])
    path = run / "prepared/manifest.json"
    manifest = json.loads(path.read_text())
    for case, split in zip(manifest["cases"], ("train", "val", "test"), strict=True):
        case["split"] = split
    path.write_text(json.dumps(manifest))
    assert "1 train, 1 val, 1 test" in " ".join(read(write_report(run)).words)


def write_list(path: Path, *splits: str | None) -> Path:
    entries = [{"folder": f"{path.stem}{number}", "axt2": "x.nii.gz"} for number in range(len(splits))]
    path.write_text(json.dumps([e | ({"split": s} if s else {}) for e, s in zip(entries, splits, strict=True)]))
    return path


def test_splits_in_lists(tmp_path: Path):
    train, test = (
        write_list(tmp_path / "a.json", None, "val", "test", "train"),
        write_list(tmp_path / "b.json", None, "test"),
    )
    studies = find_studies(train, test_data=test)
    assert [study.split for study in studies] == ["train", "val", "test", "train", "test", "test"]


@pytest.mark.parametrize("split", ["validation", "Test", 1, None, ["val"]])
def test_other_splits_in_lists_are_refused(tmp_path: Path, split: object):
    (tmp_path / "a.json").write_text(json.dumps([{"folder": "a", "axt2": "x.nii.gz", "split": split}]))
    with pytest.raises(DataError, match="split must be train or val or test in this list") as caught:
        find_studies(tmp_path / "a.json")
    assert caught.value.field == "[0].split"


def test_a_list_of_test_studies_holds_no_others(tmp_path: Path):
    lists = write_list(tmp_path / "a.json", None), write_list(tmp_path / "b.json", "val")
    with pytest.raises(DataError, match="split must be test in this list, got 'val'") as caught:
        find_studies(lists[0], test_data=lists[1])
    assert caught.value.path == str(lists[1])


def test_prepared_folders_without_val_stay_valid(tmp_path: Path):
    prepare(write_studies(tmp_path / "studies"), tmp_path / "out", config())
    assert {case.split for case in load_manifest(tmp_path / "out").cases} == {"train", "test"}
