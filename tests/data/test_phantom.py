"""Synthetic studies are reproducible and marked as synthetic, and their reports agree with their volumes."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, get_args

import nibabel
import numpy as np
import pytest

from ccella_fast.data.phantom import phantom
from ccella_fast.data.phantom.phantom import write_phantoms
from ccella_fast.data.phantom.report_text import Content
from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.errors import ConfigError
from study_fixtures import tree


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantoms(folder, 8, seed=0)
    return folder


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return rows_without_volumes(tmp_path_factory.mktemp("rows"))


def rows_without_volumes(folder: Path, **changes: Any) -> list[dict[str, str]]:
    """The table of many studies whose volumes are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "_scan", lambda rng, patient, difficulty: (None, None, patient.center))
        patch.setattr(phantom, "_write_nifti", lambda *args: None)
        write_phantoms(folder, 96, seed=5, **changes)
    return read_rows(folder)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "studies.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_same_seed_gives_the_same_bytes(studies: Path, tmp_path: Path):
    write_phantoms(tmp_path / "again", 2, seed=0)
    write_phantoms(tmp_path / "again", 2, seed=0)  # overwriting the same phantoms is allowed
    write_phantoms(tmp_path / "other", 2, seed=1)
    whole, again, other = tree(studies), tree(tmp_path / "again"), tree(tmp_path / "other")
    volumes = [name for name in again if name.endswith(".nii.gz")]
    assert len(volumes) == 2
    assert all(again[name] == whole[name] for name in volumes)  # and therefore independent of num_studies
    assert all(again[name] != other[name] for name in volumes)


def test_factors_change_the_lesion_and_the_noise_and_nothing_else(tmp_path: Path):
    """Study 1 has a lesion: its difference to the usual phantom lies there, or is noise everywhere."""
    changes = {
        "usual": {}, "larger": {"lesion_size": 1.5}, "half": {"lesion_contrast": 0.5}, "none": {"lesion_contrast": 0.0},
        "noisier": {"noise": 2.0},
    }  # fmt: skip
    images, sizes = {}, {}
    for name, factors in changes.items():
        write_phantoms(tmp_path / name, 2, seed=0, difficulty=phantom.Difficulty(**factors))
        files = sorted((tmp_path / name).glob("*/t2w.nii.gz"))
        images[name] = np.stack([nibabel.load(file).get_fdata() for file in files])
        sizes[name] = int(read_rows(tmp_path / name)[1]["lesion_size_mm"])
        assert ("factors" in (tmp_path / name / "README").read_text()) == bool(factors)
    assert abs(sizes["larger"] - 1.5 * sizes["usual"]) <= 1 and sizes["half"] == sizes["none"] == sizes["usual"]
    for name in ("larger", "half", "none"):
        assert np.array_equal(images[name][0], images["usual"][0])  # a study without a lesion
    change, middle = ((images[name] - images["usual"])[1] for name in ("none", "half"))
    assert 20 < (change != 0).sum() < 0.01 * change.size
    assert abs(np.median(middle[change > 100] / change[change > 100]) - 0.5) < 0.02
    air = images["usual"][0] < 60  # Rician: noise alone
    assert 1.5 < np.median(images["noisier"][0][air]) / np.median(images["usual"][0][air]) < 2.5


@pytest.mark.parametrize("name", ["lesion_size", "lesion_contrast", "noise"])
def test_factors_out_of_range_are_named(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=f"--{name} must be between"):
        write_phantoms(tmp_path / "out", 2, difficulty=phantom.Difficulty(**{name: 11.0}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["studies.csv", "patient-1", "phantom-0002"])
def test_folder_with_other_files_raises_and_is_not_changed(tmp_path: Path, name: str):
    (tmp_path / name).write_text("case,report\n")
    with pytest.raises(ConfigError, match="other files"):
        write_phantoms(tmp_path, 2)
    assert tree(tmp_path).keys() == {name} and (tmp_path / name).read_text() == "case,report\n"


def test_numbers_out_of_range_raise(tmp_path: Path):
    for arguments, message in [
        ((0, 0), "--num_studies must be at least 1, got 0"),
        ((-1, 0), "--num_studies must be at least 1, got -1"),
        ((1, -1), "--seed must be at least 0, got -1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            write_phantoms(tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_discovered_studies_are_marked_synthetic(studies: Path):
    found = find_studies(studies)
    assert len(found) == 8 and all(study.synthetic for study in found)


def test_header_is_marked_synthetic_and_oblique(studies: Path):
    for row in read_rows(studies):
        image = nibabel.load(studies / row["case"] / "t2w.nii.gz")
        assert row["synthetic"] == "yes"
        assert image.header["descrip"].item() == b"ccella_fast phantom 3 (synthetic)"
        (qform, q_code), (sform, s_code) = image.get_qform(coded=True), image.get_sform(coded=True)
        assert q_code == s_code == 1
        np.testing.assert_allclose(qform, sform, atol=1e-4)
        assert image.get_data_dtype() == np.uint16
        assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
        tilt = np.rad2deg(np.arccos(image.affine[2, 2] / image.header.get_zooms()[2]))
        assert 4.9 < tilt < 18.1
        assert 600 < np.asarray(image.dataobj).max() < 1600
    assert "SYNTHETIC" in (studies / "README").read_text()


def test_lesion_is_dark_at_the_position_in_the_table(studies: Path):
    rows = [row for row in read_rows(studies) if row["zone"] == "PZ"]
    assert len(rows) >= 2
    for row in rows:
        image = nibabel.load(studies / row["case"] / "t2w.nii.gz")
        values = np.asarray(image.dataobj, dtype=float)
        centre = np.array([float(row[f"lesion_{axis}_mm"]) for axis in "xyz"])
        index = nibabel.affines.apply_affine(np.linalg.inv(image.affine), centre)
        middle = (image.shape[0] - 1) / 2
        assert (index[0] > middle) == (row["side"] == "left"), "the first axis points to the patient's left"
        mirrored = index * [-1, 1, 1] + [2 * middle, 0, 0]
        lesion, healthy = _mean_around(values, index), _mean_around(values, mirrored)
        assert lesion < 0.6 * healthy, (row["case"], lesion, healthy)


def test_sides_are_similar_without_a_lesion(studies: Path):
    """Negative control of the test above: its measure does not find a lesion in a study without one."""
    image = nibabel.load(studies / "phantom-0000" / "t2w.nii.gz")
    values = np.asarray(image.dataobj, dtype=float)
    lesion = next(row for row in read_rows(studies) if row["zone"] == "PZ")
    other = nibabel.load(studies / lesion["case"] / "t2w.nii.gz")
    centre = np.array([float(lesion[f"lesion_{axis}_mm"]) for axis in "xyz"])
    index = nibabel.affines.apply_affine(np.linalg.inv(other.affine), centre)
    mirrored = index * [-1, 1, 1] + [image.shape[0] - 1, 0, 0]
    ratio = _mean_around(values, index) / _mean_around(values, mirrored)
    assert 0.6 < ratio < 1 / 0.6


def test_reports_agree_with_the_table(many_rows: list[dict[str, str]]):
    zones = {"PZ": ["peripheral zone", "PZ"], "TZ": ["transition zone", "TZ"]}
    levels = {"apex": ["apex", "apical"], "mid": ["mid-gland", "midgland"], "base": ["base", "basal"]}
    for row in many_rows:
        report = row["report"]
        if not report:
            continue
        assert str(row["psa"]) in report and str(row["prostate_ml"]) in report
        assert (f"PI-RADS {row['pirads']}" in report.replace("category ", "").replace("score ", "")) == bool(
            row["pirads"]
        )
        if row["zone"]:
            assert row["side"] in report.lower() and f"{row['lesion_size_mm']} mm" in report
            assert {"left": "right", "right": "left"}[row["side"]] not in report.lower()
            assert any(word in report for word in zones[row["zone"]]) and any(
                word in report for word in levels[row["level"]]
            )
        else:
            assert " mm " not in report
    assert len({row["report"] for row in many_rows}) > 80, "wording varies"


def test_findings_follow_pirads(many_rows: list[dict[str, str]]):
    """PI-RADS v2.1: category 5 from 15 mm on, and the category is the score of the dominant sequence of the zone."""
    bounds = {"3": (5, 15), "4": (5, 15), "5": (15, 30)}
    seen = set()
    for row in many_rows:
        if row["zone"] and row["pirads"]:
            low, high = bounds[row["pirads"]]
            assert low <= int(row["lesion_size_mm"]) < high, row
            if row["report"]:
                dominant = "DWI" if row["zone"] == "PZ" else "T2"
                scores = re.findall(rf"{dominant} (?:score )?(\d)", row["report"])
                assert scores == [row["pirads"]], row["report"]
                seen.add((row["zone"], row["pirads"]))
    assert seen == {(zone, score) for zone in ("PZ", "TZ") for score in "345"}


def test_gland_volume_and_psa_are_plausible_together(many_rows: list[dict[str, str]]):
    density = {score: [] for score in "12345"}
    for row in many_rows:
        assert 20 <= int(row["prostate_ml"]) <= 60 and 0.5 < float(row["psa"]) < 40
        if row["pirads"]:
            density[row["pirads"]].append(float(row["psa"]) / int(row["prostate_ml"]))
    medians = [float(np.median(density[score])) for score in "12345"]
    assert medians[0] < 0.15 < medians[4] and medians == sorted(medians)  # 0.15 ng/ml per ml: the usual threshold
    assert all(0.02 < value < 0.8 for values in density.values() for value in values)


def canvas(seed: int = 0, fill: float = 0.0) -> phantom.Canvas:
    """An upright grid of 0.8 x 0.8 x 3 mm around the prostate, without noise."""
    axes = [(np.arange(n) - n / 2) * step for n, step in zip(phantom.SIZE, (0.8, 0.8, 3.0), strict=True)]
    grid = np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij")
    empty = phantom.Canvas(np.random.default_rng(seed), *grid)
    empty.image += np.float32(fill)
    return empty


@pytest.fixture(scope="module")
def drawn_lesions() -> list[tuple[phantom.Patient, phantom.Canvas, np.ndarray]]:
    """40 patients with a lesion, each with its canvas and the voxels where the lesion covers at least half."""
    found = []
    for index in range(40):
        patient = phantom._draw_patient(np.random.default_rng([3, index]), positive=True)
        blank = canvas(index, fill=1.0)
        phantom._draw_lesion(blank, patient, 1.0)
        found.append((patient, blank, blank.image < (1 + np.median(blank.image[blank.image < 0.5])) / 2))
    return found


def largest_axial_diameter(mask: np.ndarray, spacing: float) -> float:
    """As a radiologist measures: the longest straight line in one axial slice, to the outer edges of its voxels."""
    angles = np.deg2rad(np.arange(0, 180, 3))
    directions = np.stack([np.cos(angles), np.sin(angles)])
    slices = [np.argwhere(mask[..., k]) @ directions for k in range(mask.shape[2]) if mask[..., k].any()]
    return max(float(np.ptp(extents, axis=0).max()) for extents in slices) * spacing + spacing / 2


def test_lesions_are_drawn_with_the_size_side_level_and_zone_of_the_report(drawn_lesions):
    seen = set()
    for patient, c, lesion in drawn_lesions:
        facts, half = patient.findings, patient.prostate
        size = largest_axial_diameter(lesion, 0.8)
        assert -1.4 < size - facts.size_mm < 1.8, facts  # category 3 has an indistinct margin
        assert (facts.pirads == 5) == (size >= 15), (facts, size)
        to_side = c.x * (1 if facts.side == "left" else -1)
        assert (to_side[lesion] > 0).mean() > 0.85, facts
        height = c.z[lesion].mean() / half[2]
        assert facts.level == ("apex" if height < -1 / 3 else "base" if height > 1 / 3 else "mid"), facts
        # The transition zone is darker than the peripheral zone: 0.34 and 0.72 on average.
        gland = canvas()
        phantom._draw_prostate(gland, patient)
        assert ((gland.image[lesion] < 0.55).mean() > 0.7) == (facts.zone == "TZ"), facts
        assert ((gland.image[lesion] > 0.55).mean() > 0.5) == (facts.zone == "PZ"), facts
        seen.add((facts.zone, facts.pirads, facts.level))
    assert len(seen) > 12


def test_a_lesion_across_the_capsule_is_smaller_than_reported(drawn_lesions):
    """Negative control of the test above: this is how large lesions were drawn before they followed the capsule."""
    sizes = []
    for patient, c, _ in drawn_lesions:
        if patient.findings.pirads == 5 and patient.findings.zone == "PZ":
            c.image[:] = 1
            phantom._draw_lesion(c, patient._replace(turn=patient.turn + np.pi / 2), 1.0)
            lesion = c.image < (1 + np.median(c.image[c.image < 0.5])) / 2
            sizes.append(largest_axial_diameter(lesion, 0.8) - patient.findings.size_mm)
    assert min(sizes) < -2


def test_the_gland_has_the_volume_of_the_report(drawn_lesions):
    """The voxels between the dark capsule on both sides; 0.52 x length x width x height is the volume of an ellipsoid."""
    ratios = []
    for index, (patient, _, _) in enumerate(drawn_lesions[:12]):
        gland = canvas(index, fill=1.0)
        phantom._draw_prostate(gland, patient)
        dark = gland.image < 0.3
        within = np.maximum.accumulate(dark, axis=0) & np.maximum.accumulate(dark[::-1], axis=0)[::-1]
        ratios.append(within.sum() * 0.8 * 0.8 * 3 / 1000 / patient.findings.volume_ml)
    assert min(ratios) > 0.95 and max(ratios) < 1.05


def test_category_2_darkens_the_peripheral_zone_on_both_sides():
    patient = phantom._draw_patient(np.random.default_rng([0, 2]), positive=False)
    images = {}
    for score in (1, 2):
        drawn = canvas()
        phantom.draw_phantom(drawn, patient._replace(findings=patient.findings._replace(pirads=score)))
        images[score] = drawn.image
    change = images[2] - images[1]
    left, right = change[96:].min(), change[:96].min()
    assert left < -0.1 and right < -0.1 and change.max() < 0.02
    assert (change < -0.05).sum() < 0.1 * (np.abs(drawn.x) < 30).sum()  # a part of the gland, not all of it


def test_numbers_of_studies_per_split(tmp_path: Path):
    few, many = (rows_without_volumes(tmp_path / str(train), splits=(train, 3, 5)) for train in (2, 9))
    assert [row["split"] for row in few] == ["test"] * 5 + ["val"] * 3 + ["train"] * 2
    assert many[:10] == few and [row["split"] for row in many[10:]] == ["train"] * 7
    with pytest.raises(ConfigError, match="--splits is 0 for each split"):
        write_phantoms(tmp_path / "none", splits=(0, 0, 0))


def test_reports_without_what_gives_the_class_away(tmp_path: Path, studies: Path):
    """All else is the same: the volumes, the other columns, and the wording of what is said."""
    write_phantoms(tmp_path / "drawn", 2, 0, reports="no_findings")
    volumes = {name: value for name, value in tree(tmp_path / "drawn").items() if name.endswith(".nii.gz")}
    assert len(volumes) == 2 and {name: tree(studies)[name] for name in volumes} == volumes
    assert "reports: no_findings" in (tmp_path / "drawn" / "README").read_text()
    full, without, least = (rows_without_volumes(tmp_path / name, reports=name) for name in get_args(Content))
    gives_away = re.compile(r"PI-RADS|DWI|T2 score|T2 \d|likely|equivocal|cancer")
    findings = re.compile(r"peripheral zone|transition zone|PZ|TZ|lesion|focus|suspicious")
    for a, b, c in zip(full, without, least, strict=True):
        assert {**a, "report": ""} == {**b, "report": ""} == {**c, "report": ""}
        if a["report"]:
            assert gives_away.search(a["report"]) or not a["pirads"]
            assert findings.search(b["report"]) and not gives_away.search(b["report"])
            assert a["side"] in b["report"].lower()
            assert not findings.search(c["report"]) and not gives_away.search(c["report"]) and "PSA" in c["report"]
            assert set(c["report"].split()) <= set(b["report"].split())
    with pytest.raises(ConfigError, match="there are no reports 'short'"):
        write_phantoms(tmp_path / "x", reports="short")


def test_proportions_of_splits_classes_and_missing_values(many_rows: list[dict[str, str]]):
    assert sum(row["split"] == "test" for row in many_rows) == 12
    assert sum(not row["report"] for row in many_rows) == 8
    assert sum(not row["pirads"] for row in many_rows) == 8
    assert sum(bool(row["zone"]) for row in many_rows) == 48
    test = [bool(row["zone"]) for row in many_rows if row["split"] == "test"]
    assert 0 < sum(test) < len(test)
    sides = {row["side"] for row in many_rows if row["zone"]}
    assert sides == {"left", "right"}
    assert all((row["zone"] != "") == (row["pirads"] in "345") for row in many_rows if row["pirads"])


def _mean_around(values: np.ndarray, index: np.ndarray, radius: int = 3) -> float:
    x, y, z = np.rint(index).astype(int)
    return values[x - radius : x + radius + 1, y - radius : y + radius + 1, z].mean()
