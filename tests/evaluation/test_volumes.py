"""Volumes for evaluation: every kind of folder, what is known of each volume, and what is refused."""

from __future__ import annotations

import json
import logging

import nibabel
import numpy as np
import pytest

from ccella_fast.errors import CcellaError, ConfigError, DataError
from ccella_fast.evaluation.volumes import open_volumes
from ccella_fast.storage import write_json
from evaluation_fixtures import SHAPE, SPACING, draw, write_nifti, write_prepared, write_samples


def opened(folder, field="--real"):
    return open_volumes(folder, field=field)


def test_a_prepared_folder_gives_its_images_and_what_is_known_of_them(tmp_path):
    arrays = {name: {"t2w": draw(k), "adc": draw(k + 50)} for k, name in enumerate(("a", "b", "c", "d"))}
    splits = {"a": "train", "d": "val"}
    folder = write_prepared(tmp_path / "prepared", arrays, splits=splits, patients={"a": 1, "b": 2, "c": 2, "d": 3})
    volumes = opened(folder)
    assert len(volumes) == 8 and volumes.sequences == ["t2w", "adc"] and volumes.name == "prepared"
    test = opened(f"{folder}:test").of_sequence("t2w")
    assert [volume.id for volume in test] == ["b", "c"] and test.name == "prepared:test"
    assert [volume.pirads for volume in test] == ["pos", None]
    assert np.array_equal(test[1].array, arrays["c"]["t2w"]) and test[1].spacing == SPACING
    assert test[0].patient == test[1].patient != opened(f"{folder}:train")[0].patient is not None


def test_patients_of_two_folders_are_not_confused(tmp_path):
    arrays = [{name: {"t2w": draw(k)}} for k, name in enumerate(("a", "b"))]
    one, two = (
        write_prepared(tmp_path / str(k), each, patients=dict.fromkeys(each, 1)) for k, each in enumerate(arrays)
    )
    assert opened(one)[0].patient != opened(two)[0].patient


def test_samples_are_read_from_nifti_and_from_dicom_alike(tmp_path):
    pytest.importorskip("pydicom")
    arrays = [np.stack([draw(k), draw(k + 50)]) for k in range(2)]
    for form, tolerance in (("nifti", 1e-6), ("dicom", 2e-5)):  # DICOM has 32768 levels
        folder = write_samples(
            tmp_path / form, arrays, sequences=("t2w", "hbv"), format=form, given="pos", report_id="r1"
        )
        volumes = opened(folder)
        assert [(each.id, each.sequence) for each in volumes][:2] == [
            ("sample-000_seed0", "t2w"),
            ("sample-000_seed0", "hbv"),
        ]
        assert volumes[3].pirads == "pos" and volumes[3].prompt == "r1" and volumes[3].spacing == SPACING
        np.testing.assert_allclose(volumes[3].array, arrays[1][1], atol=tolerance)
        assert not np.allclose(volumes[3].array, arrays[1][1][::-1], atol=tolerance)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"given": "neg", "predicted": (0.1, 0.9)}, "neg"),
        ({"given": "5"}, "pos"),
        ({"predicted": (0.1, 0.9)}, "pos"),
        ({"predicted": (0.1, 0.9), "head": "unknown"}, None),
        ({}, None),
    ],
)
def test_the_class_of_a_sample_is_the_one_asked_for_or_else_predicted(tmp_path, facts, expected):
    assert opened(write_samples(tmp_path / "samples", [draw(0), draw(1)], **facts))[0].pirads == expected


def test_the_generator_is_what_all_sidecars_agree_on(tmp_path):
    folder = write_samples(tmp_path / "samples", [draw(k) for k in range(3)])
    volumes = open_volumes(folder, field="--synthetic")
    assert volumes.generator == {"solver": "ddim", "num_inference_steps": 5, "weights_sha256": "0" * 64}
    assert volumes.of_sequence("t2w")[:2].generator == volumes.generator
    sidecar = folder / "sample-002_seed2.json"
    for changed in ({"weights_sha256": "1" * 64}, {"weights_sha256": None}):
        write_json(sidecar, json.loads(sidecar.read_text()) | changed)
        assert open_volumes(folder, field="--synthetic").generator == {"solver": "ddim", "num_inference_steps": 5}
    write_nifti(tmp_path / "other" / "case1.nii.gz", 1000 * draw(0))
    assert not open_volumes(tmp_path / "other", field="--synthetic").generator


def test_a_sample_that_is_not_written_yet_is_left_out(tmp_path):
    folder = write_samples(tmp_path / "samples", [draw(k) for k in range(3)])
    (folder / "sample-001_seed1.nii.gz").unlink()
    assert [volume.id for volume in opened(folder)] == ["sample-000_seed0", "sample-002_seed2"]


def test_any_nifti_files_are_scaled_as_prepare_scales_them(tmp_path):
    array = 1000 * draw(0) + 50
    array[0, 0, 0] = 1e5  # a hot voxel, which the percentile ignores
    write_nifti(tmp_path / "other" / "deep" / "case1.nii.gz", array)
    flipped = nibabel.Nifti1Image(array[::-1], np.diag([-1.5, 1.5, 3.0, 1.0]))
    nibabel.save(flipped, tmp_path / "other" / "case2.nii")
    (tmp_path / "other" / "notes.txt").write_text("not a volume")
    volumes = opened(tmp_path / "other")
    low, high = np.percentile(array.astype(np.float64), [0, 99.5])
    expected = np.clip((array - low) / (high - low), 0, 1)
    assert [volume.id for volume in volumes] == ["case2", "deep/case1"]
    for volume in volumes:
        np.testing.assert_allclose(volume.array, expected, atol=1e-6)
        assert volume.spacing == SPACING and volume.patient is volume.pirads is None and volume.sequence == "t2w"


def test_names_say_the_sequence_and_masks_are_left_out(tmp_path, caplog):
    for name in ("a/t2w.nii.gz", "a/adc.nii.gz", "b_t2w.nii.gz", "a/mask.nii.gz", ".hidden/t2w.nii.gz"):
        write_nifti(tmp_path / "other" / name, 3000 * draw(len(name)))
    with caplog.at_level(logging.WARNING, "ccella_fast"):
        volumes = opened(tmp_path / "other")
    assert {(each.id, each.sequence) for each in volumes.sources} == {("a", "t2w"), ("a", "adc"), ("b", "t2w")}
    assert "a/mask.nii.gz" in caplog.text
    # ADC has a fixed window, in which another volume's maximum plays no part.
    adc = volumes.of_sequence("adc")[0].array
    np.testing.assert_allclose(adc, draw(len("a/adc.nii.gz")), atol=1e-6)


def test_a_table_gives_class_patient_and_sequence(tmp_path):
    for name in ("x.nii.gz", "y.nii.gz", "z.nii.gz"):
        write_nifti(tmp_path / "other" / name, 2000 * draw(len(name)))
    table = tmp_path / "other" / "volumes.csv"
    table.write_text("file,pirads,patient,sequence\nx.nii.gz,4,p1,\ny.nii.gz,,p1,hbv\n")
    found = {source.id: source for source in opened(tmp_path / "other").sources}
    assert (found["x"].pirads, found["x"].patient, found["x"].sequence) == ("pos", "p1", "t2w")
    assert (found["y"].pirads, found["y"].patient, found["y"].sequence) == (None, "p1", "hbv")
    assert found["z"].patient is None
    for wrong, what in (("x.nii.gz,6,,\n", "pirads"), ("w.nii.gz,,,\n", "no file"), ("x.nii.gz,1,,t1\n", "sequence")):
        table.write_text("file,pirads,patient,sequence\n" + wrong)
        with pytest.raises(DataError, match=what):
            opened(tmp_path / "other")


def make(tmp_path, name):
    """The folder of a mistake."""
    folder = tmp_path / name
    if name == "results":
        write_prepared(folder / "prepared", {"a": {"t2w": draw(0)}})
    elif name in ("empty", "only text"):
        folder.mkdir()
        if name == "only text":
            (folder / "readme.txt").write_text("nothing here")
    elif name == "run":
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    elif name == "samples":
        write_samples(folder, [draw(0)])
    elif name == "prepared":
        write_prepared(folder, {"a": {"t2w": draw(0)}})
    return folder


@pytest.mark.parametrize(
    ("name", "split", "error", "words"),
    [
        ("missing", "", DataError, "does not exist"),
        ("empty", "", DataError, "an empty folder"),
        ("only text", "", DataError, "no volumes"),
        ("run", "", DataError, "a run folder"),
        ("results", "", DataError, "results/prepared"),
        ("prepared", ":tset", ConfigError, "did you mean 'test'"),
        ("prepared", ":train", DataError, "it has studies in test"),
        ("samples", ":test", ConfigError, "leave out the colon"),
    ],
)
def test_wrong_folders_are_named(tmp_path, name, split, error, words):
    folder = make(tmp_path, name)
    with pytest.raises(error) as caught:
        opened(f"{folder}{split}")
    assert words in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
@pytest.mark.parametrize("kind", ["prepared", "samples", "files"])
def test_a_volume_without_content_is_named_with_its_file(tmp_path, kind, value):
    bad = draw(0)
    if value == 0.5:
        bad[:] = value
    bad[2, 3, 4] = value
    writers = {
        "prepared": lambda folder: write_prepared(folder, {"a": {"t2w": draw(1)}, "bad": {"t2w": bad}}),
        "samples": lambda folder: write_samples(folder, [draw(1), bad]),
        "files": lambda folder: [
            write_nifti(folder / f"{name}.nii.gz", x) for name, x in (("a", draw(1)), ("bad", bad))
        ],
    }
    writers[kind](tmp_path / kind)
    volumes = opened(tmp_path / kind)
    assert volumes[0].array.shape == SHAPE
    with pytest.raises(DataError, match="equal" if value == 0.5 else "not finite") as caught:
        volumes[1]
    assert "bad" in str(caught.value.path) or "sample-001" in str(caught.value.path)


def test_a_damaged_image_and_a_damaged_sidecar_are_named(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", {"a": {"t2w": draw(1)}, "b": {"t2w": draw(2)}})
    file = prepared / "images" / "b" / "t2w.npy"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        opened(prepared)[1]
    samples = write_samples(tmp_path / "samples", [draw(1)])
    sidecar = samples / "sample-000_seed0.json"
    intact = sidecar.read_text()
    for text, words in (
        ('{"files": {"t2w": 3}}', "missing or of another kind"),
        (intact.replace("sample-000_seed0.nii.gz", "../elsewhere.nii.gz"), "leaves the data folder"),
    ):
        sidecar.write_text(text)
        with pytest.raises(CcellaError, match=words):
            opened(samples)
