"""`check` refuses the images that `prepare` refuses, with the same sentence, and reads them with the same options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from ccella_fast import cli
from ccella_fast.config import Config
from ccella_fast.data.checking.check import check
from ccella_fast.data.preparation.images import ImageTask, check_images
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import DataError
from ccella_fast.storage import write_json
from study_fixtures import SHAPE, config, oblique, voxels, write_dicom, write_nifti

Change = Callable[[np.ndarray], np.ndarray]


def settings(**changes: Any) -> Config:
    return config(data__sequences=["t2w", "hbv", "adc"], model__latent_channels=[4, 4, 4], **changes)


def write_study(folder: Path, **changes: Change) -> Path:
    """A plausible study of three sequences; `changes` are made to the voxels of the sequence of that name."""
    plain = {"t2w": voxels(), "hbv": voxels(seed=1), "adc": 600 + 4.0 * voxels(seed=2)}
    for name, values in plain.items():
        change = changes.get(name, lambda each: each)
        write_nifti(folder / f"{name}.nii.gz", change(values.astype(np.float32)))
    return folder


def padded(value: float) -> Change:
    def change(values: np.ndarray) -> np.ndarray:
        values.ravel()[:800] = value
        return values

    return change


def outside_the_grid(values: np.ndarray) -> np.ndarray:
    """Nothing but background in the part that the grid of 16 x 16 voxels has."""
    values[6:-6, 4:-4] = 0
    return values


#: Name of a study -> what is wrong with one of its series.
DEFECTS: dict[str, dict[str, Change]] = {
    "adc-in-mm2": {"adc": lambda values: values * np.float32(1e-6)},
    "adc-times-ten": {"adc": lambda values: values * 10},
    "adc-negative": {"adc": lambda values: -values},
    "adc-padding": {"adc": padded(-32768)},
    "t2w-padding": {"t2w": padded(32767)},
    "hbv-hot": {"hbv": lambda values: np.where(values == values.max(), np.float32(1e30), values)},
    "t2w-empty": {"t2w": outside_the_grid},
    "hbv-constant": {"hbv": np.ones_like},
}


def found_by_check(folder: Path, out: Path, configuration: Config, **options: Any) -> dict[str, list[tuple]]:
    """Study -> (sentence, fix, path, field) of its errors, of one run."""
    check(folder, configuration, out=out, workers=1, **options)
    found: dict[str, list[tuple]] = {}
    for each in json.loads((out / "check.json").read_text())["findings"]:
        if each["severity"] == "error":
            for study in each["studies"]:
                found.setdefault(study, []).append(tuple(each[key] for key in ("message", "fix", "path", "field")))
    return found


def test_check_shows_what_prepare_refuses_with_the_same_sentence(tmp_path: Path):
    configuration = settings(data__dim=[16, 16, 16])
    expected = {}
    for name, changes in {"plausible": {}, **DEFECTS}.items():
        folder = write_study(tmp_path / "studies" / name, **changes)
        files = {sequence: folder / f"{sequence}.nii.gz" for sequence in configuration.data.sequences}
        try:
            check_images(ImageTask(name, files, configuration.data, tmp_path))
        except DataError as defect:
            expected[name] = [(defect.why, defect.fix, str(defect.path), defect.field)]
    assert expected.keys() == DEFECTS.keys()
    assert found_by_check(tmp_path / "studies", tmp_path / "out", configuration) == expected
    wide = found_by_check(tmp_path / "studies", tmp_path / "wide", settings(data__dim=[48, 48, 16]))
    assert DEFECTS.keys() - wide.keys() == {"t2w-empty"}  # control: a larger grid contains its tissue


def test_check_shows_the_notes_that_prepare_records(tmp_path: Path):
    """About a series that covers half of the grid; none about a complete one."""
    folder = write_study(tmp_path / "studies" / "half", adc=lambda values: values[:, :, :11].copy())
    write_study(tmp_path / "studies" / "whole")
    prepare(tmp_path / "studies", tmp_path / "prepared", settings(), workers=1)
    recorded = json.loads((tmp_path / "prepared/cases/half.json").read_text())["image"]["facts"]["notes"]
    assert recorded.keys() == {"adc"} and "adc covers" in recorded["adc"][0]
    check(tmp_path / "studies", settings(), out=tmp_path / "out", workers=1)
    findings = json.loads((tmp_path / "out" / "check.json").read_text())["findings"]
    notes = [(each["studies"], each["path"], each["message"]) for each in findings if each["name"] == "note"]
    assert notes == [(["half"], str(folder / "adc.nii.gz"), recorded["adc"][0])]


def test_prepare_refuses_a_grid_without_contrast_before_it_writes(tmp_path: Path):
    write_study(tmp_path / "studies" / "a")
    write_study(tmp_path / "studies" / "b", hbv=outside_the_grid)
    with pytest.raises(DataError, match="hbv has no contrast or no positive values inside the grid"):
        prepare(tmp_path / "studies", tmp_path / "out", settings(data__dim=[16, 16, 16]), workers=1)
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_both_commands_read_the_same_b_value(tmp_path: Path):
    """The image of b 50 is sound, that of b 1400 has a padding value."""
    folder = write_study(tmp_path / "studies" / "a")
    (folder / "hbv.nii.gz").unlink()
    images = np.stack([voxels(seed=1), voxels(seed=3)], -1).astype(np.float32)
    images[:6, ..., 1] = -32768
    image = nibabel.Nifti1Image(images, oblique())
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    nibabel.save(image, folder / "hbv.nii.gz")
    (folder / "hbv.bval").write_text("50 1400\n")
    data, highest = tmp_path / "studies", 6 * SHAPE[1] * SHAPE[2]
    ((why, *_),) = found_by_check(data, tmp_path / "highest", settings())["a"]
    assert f"{highest} voxels are -32768" in why
    assert found_by_check(data, tmp_path / "low", settings(), b_value=50) == {}
    ((why, *_),) = found_by_check(data, tmp_path / "none", settings(), b_value=800)["a"]
    assert "no image of b-value 800, only of 50, 1400 s/mm2" in why
    write_json(tmp_path / "config.json", settings().dump())
    command = ["check", "--data", str(data), "--config", str(tmp_path / "config.json"), "--allow", "too_few_studies"]
    assert cli.main(command) == 3 and cli.main([*command, "--b_value", "50"]) == 0


def test_both_commands_follow_links_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_dicom(tmp_path / "archive" / "series")
    for name in ("a", "b"):
        (tmp_path / "studies" / name).mkdir(parents=True)
        (tmp_path / "studies" / name / "t2w").symlink_to(tmp_path / "archive" / "series")
    write_json(tmp_path / "config.json", config().dump())
    command = ["check", "--data", str(tmp_path / "studies"), "--config", str(tmp_path / "config.json")]
    assert cli.main(command) == 3
    assert "--follow_links" in capsys.readouterr().out
    assert cli.main([*command, "--follow_links"]) == 0
    assert "studies checked: 2; nothing has to be corrected" in capsys.readouterr().out
