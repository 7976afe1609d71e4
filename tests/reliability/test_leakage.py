"""Forty studies that are known from training are held out: all are found, none among a thousand others; training stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ccella_fast.data.checking.check import check
from ccella_fast.data.checking.duplicates import check_duplicates
from ccella_fast.data.checking.signature import decode_signature, encode_signature, find_copies, make_signature
from ccella_fast.data.checking.study_facts import StudyFacts, facts_of_studies, patient_of
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.preparation.resampling import make_grid, resample
from ccella_fast.data.readers.study import Study
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_file import read_volume
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.storage import read_json
from ccella_fast.training.run import make_run_plan
from planted_defects import TEST, TRAIN, report, texture, write_clean, write_table
from study_fixtures import config, oblique, write_bert, write_nifti, write_vae

Change = Callable[[np.ndarray], np.ndarray]
AFFINE = np.diag([1.5, 1.5, 3.0, 1.0])
COPIES: dict[str, Change] = {
    "flipped left to right": lambda values: values[::-1],
    "flipped in all axes": lambda values: values[::-1, ::-1, ::-1],
    "cropped": lambda values: values[3:, 4:-2, 1:],
    "brighter": lambda values: 1.7 * values + 200,
    "another gamma": lambda values: 255 * (values / values.max()) ** 0.7,
    "eight bits": lambda values: np.rint(values / values.max() * 255),
    "flipped, cropped and scaled": lambda values: 0.01 * values[::-1, 3:-1, :-2],
}


def volume(values: np.ndarray) -> StoredVolume:
    return StoredVolume(np.ascontiguousarray(values, np.float32), AFFINE)


def facts(name: str, split: str, **values: object) -> StudyFacts:
    (plain,) = facts_of_studies([Study(name, {}, split=split)])  # type: ignore[arg-type]
    return plain._replace(**values)


def test_forty_leaks_are_found_and_none_among_a_thousand_clean_studies():
    """Eight of each kind; the clean ones come as 250 patients of four studies each, a patient in one split."""
    clean = [
        facts(f"clean{number}", TEST if number // 4 % 5 == 4 else TRAIN, patient=f"of{number // 4}", words=12,
              report=f"report {number}", images={"t2w": f"hash {number}"},
              signature=make_signature(volume(texture(number))))
        for number in range(1000)
    ]  # fmt: skip
    assert check_duplicates(clean) == []
    sources, planted = [study for study in clean if study.split == TRAIN][::20][:40], []
    for number, source in enumerate(sources):
        leak = facts(f"leak{number}", TEST, words=12, report=f"leaked {number}")
        original = texture(int(source.id.removeprefix("clean")))
        if number < 8:
            leak = leak._replace(patient=source.patient)
        elif number < 16:
            leak = leak._replace(images=source.images)
        elif number < 32:
            change = list(COPIES.values())[number % len(COPIES)]
            leak = leak._replace(signature=make_signature(volume(change(original.astype(np.float32)))))
        else:
            leak = leak._replace(report=source.report)
        planted.append(leak)
    found = [each for each in check_duplicates([*clean, *planted]) if each.name == "leakage"]
    leaks = {study for each in found for study in each.studies if study.startswith("leak")}
    assert leaks == {f"leak{number}" for number in range(40)} and len(found) == 40
    for leak, source in zip(planted, sources, strict=True):
        (finding,) = [each for each in found if leak.id in each.studies]
        assert source.id in finding.studies and finding.severity == "stop"


def test_a_generated_study_is_in_the_split_of_the_case_that_it_was_generated_from():
    real = [facts("a", TRAIN, words=12, report="of a"), facts("b", TEST, words=12, report="of b")]
    made = [facts(f"{name}-synth-0", TRAIN, words=12, report=f"of {name}", source_case=name) for name in "ab"]
    (found,) = check_duplicates([*real, *made])
    assert (found.name, found.studies) == ("leakage", ("b", "b-synth-0"))
    assert check_duplicates([*real, made[0], made[1]._replace(split=TEST)]) == []


@pytest.mark.parametrize("change", COPIES)
def test_copies_are_recognized_by_the_signature_as_it_is_stored(change: str):
    original = texture(1).astype(np.float32)
    copy = make_signature(volume(COPIES[change](original)))
    stored = [decode_signature(encode_signature(each)) for each in (make_signature(volume(original)), copy)]
    others = [make_signature(volume(texture(seed))) for seed in (2, 3, 4)]
    assert list(find_copies([others[0], stored[0], others[1], stored[1], others[2]])) == [(1, 3)]


def test_real_patients_are_not_copies_of_each_other_but_of_themselves_when_resampled(real_data: Path):
    paths = sorted([*real_data.glob("mri/prostate*/t2w.nii.gz"), *real_data.glob("mri/prostate*/t2w.mha")])
    volumes = [read_volume(path) for path in paths]
    signatures = [make_signature(each) for each in volumes]
    assert len(volumes) == 4 and list(find_copies(signatures)) == []
    for number, each in enumerate(volumes):
        grid = make_grid(each, [0.8, 0.8, float(each.spacing[2])], [200, 190, 16])
        resampled = StoredVolume(resample(each, grid)[::-1].copy() * 2, grid.affine)
        assert list(find_copies([*signatures, make_signature(resampled)])) == [(number, 4)]


def test_uniform_and_tiny_images_have_no_points_and_no_copies():
    flat = [make_signature(volume(np.zeros((40, 40, 4)))) for _ in range(2)]
    tiny = [make_signature(volume(np.ones((4, 4, 2)))) for _ in range(2)]
    assert list(find_copies([*flat, *tiny])) == [] and list(find_copies([])) == []


@pytest.mark.parametrize(
    ("study", "listed", "patient"),
    [
        ("sub-01_ses-2", None, "sub-01"), ("p0001_s2", None, "p0001"), ("10000_1000000", None, "10000"),
        ("a_s2", "7", "7"), ("p0001_s2", "7", "7"), ("case1", None, None), ("phantom-0001", None, None),
    ],
)  # fmt: skip
def test_the_patient_is_that_of_the_list_else_of_the_id(study, listed, patient):
    assert patient_of(study, listed) == patient


def test_reports_that_many_studies_share_or_of_a_few_words_are_templates():
    def named(count: int, words: int) -> list[tuple[str, str]]:
        studies = [
            facts(f"s{n}", TEST if n == 0 else TRAIN, report="x", words=words, images={"t2w": str(n)})
            for n in range(count)
        ]
        return [(each.name, each.severity) for each in check_duplicates(studies)]

    assert named(3, 30) == [("leakage", "stop")]
    assert named(4, 30) == named(2, 5) == [("template_reports", "warning")]
    empty = [facts(f"s{n}", split, images={"t2w": str(n)}) for n, split in enumerate((TRAIN, TEST))]
    assert check_duplicates(empty) == []


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("kind", ["patient", "copy", "report", "voxels", "none"])
def test_training_stops_at_a_leak_unless_it_is_allowed(tmp_path: Path, encoder: Path, kind: str, caplog):
    """By what `prepare` has stored: the images are not there any more."""
    settings = config(variant="CCELLA", encoder=encoder, text__max_length=32, data__dim=[48, 48, 16])
    rows = write_clean(tmp_path / "studies", 4)
    values, text, patient = texture(99), report(99), ""
    if kind in ("copy", "voxels"):
        values = texture(1)[::-1, 2:] if kind == "copy" else texture(1)
    if kind == "report":
        text = report(1).upper().replace(" ", "  ")
    if kind == "patient":
        patient = "Mr Quagga"
    write_nifti(tmp_path / "studies" / "held-out" / "t2w.nii.gz", values, oblique())
    rows["held-out"] = [TEST, "3", text]
    write_table(tmp_path / "studies", rows)
    table = tmp_path / "studies" / "studies.csv"
    lines = table.read_text().splitlines()
    owners = [patient if line.startswith(("clean1,", "held-out,")) else "" for line in lines[1:]]
    table.write_text(
        "\n".join([f"{lines[0]},patient", *(f"{a},{b}" for a, b in zip(lines[1:], owners, strict=True))]) + "\n"
    )
    out = tmp_path / "prepared"
    prepare(tmp_path / "studies", out, settings, vae=write_vae(tmp_path / "vae", settings))
    for path in out.glob("images/**/*.npy"):
        path.unlink()
    plan = {"data": out, "run": tmp_path / "run", "deepspeed_file": None}
    if kind == "none":
        make_run_plan(settings, **plan)
        return
    with pytest.raises(
        DataError, match=r"leakage: .*studies: clean1, held-out|leakage: .*studies: held-out, clean1"
    ) as caught:
        make_run_plan(settings, **plan)
    assert caught.value.exit_code == 3 and "--allow leakage" in str(caught.value)
    make_run_plan(settings, **plan, allow=["leakage"])
    assert "leakage" in caplog.text
    with pytest.raises(ConfigError, match="did you mean 'leakage'"):
        make_run_plan(settings, **plan, allow=["leakege"])
    record = read_json(out / "manifest.json")
    assert "Quagga" not in str(record) and "Quagga" not in caplog.text
    if kind == "patient":
        assert [case.get("patient") for case in record["cases"]] == [None, 0, None, None, 0]
    assert check(tmp_path / "studies", settings, workers=1) == 3
    assert check(tmp_path / "studies", settings, workers=1, allow=["leakage"]) == 0
