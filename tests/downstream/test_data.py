"""Leaks that were planted are refused, clean folders are not; what is left out is counted."""

from __future__ import annotations

from typing import Any

import pytest

from ccella_fast.downstream.data import check_labels, data_digest, read_generated, read_real
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.storage import read_json, write_json
from downstream_fixtures import made_of, real_studies, study, write_classified

SETTINGS: dict[str, Any] = {"validation_fraction": 0.0, "num_real": None}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """12 training, 4 validation and 8 test studies; real1 and real14 (val) are of one of two numbered patients."""
    return write_classified(tmp_path_factory.mktemp("real") / "prepared", real_studies())


def read_made(real, folder, studies):
    return read_generated(write_classified(folder, studies, seed=1), read_real(real, **SETTINGS), field="--synthetic")


def refused(*arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_made(*arguments)
    return str(caught.value)


def test_studies_generated_from_training_studies_are_accepted(real, tmp_path):
    """The control of the plants below: nothing is refused without one."""
    found = read_made(real, tmp_path / "made", made_of(real_studies()[:12]))
    assert (len(found.asked), len(found.predicted)) == (12, 12)
    assert set(found.counts.values()) == {0}


@pytest.mark.parametrize(("source", "split"), [(12, "val"), (15, "val"), (16, "test"), (23, "test")])
def test_a_study_generated_from_a_held_out_one_is_refused_in_training(real, tmp_path, source: int, split: str):
    rows = real_studies()
    planted = {**made_of([rows[source]])[0], "split": "train"}
    said = refused(real, tmp_path / "made", [*made_of(rows[:12]), planted])
    assert f"'real{source}-synth-0', which was generated from 'real{source}'," in said and f"split {split}" in said
    assert f"field: real{source}-synth-0.source_case" in said
    # In its own split it is not trained on.
    clean = read_made(real, tmp_path / "clean", made_of([*rows[:12], rows[source]]))
    assert len(clean.asked) == 12 and clean.counts["other_splits"] == 1


def test_a_study_generated_from_another_study_of_a_held_out_patient_is_refused(tmp_path):
    """The patient is known by a number, or by the id."""
    rows = real_studies()
    rows[20] |= {"patient": 7}
    extra = study("real99", "train", None)  # of no class, so that only its patient matters
    shared = write_classified(tmp_path / "number", [*rows, extra | {"patient": 8}])
    assert len(read_made(shared, tmp_path / "clean", made_of([*rows[:12], extra])).asked) == 12
    leaking = write_classified(tmp_path / "leaking", [*rows, extra | {"patient": 7, "split": "test"}])
    said = refused(
        leaking, tmp_path / "a", [*made_of(rows[:11]), {**made_of([extra])[0], "split": "train", "pirads": 1}]
    )
    assert "leakage" in said and "split test" in said
    by_id = [*rows, study("p0004_s1", "test", 1)]
    folder = write_classified(tmp_path / "id", by_id)
    elsewhere = {**made_of([study("p0004_s2", "train", 1)])[0], "id": "x"}  # --real does not have this study
    assert "the same patient" in refused(folder, tmp_path / "b", [*made_of(rows[:12]), elsewhere])
    other = {**made_of([study("p0005_s2", "train", 1)])[0], "id": "x"}
    assert read_made(folder, tmp_path / "c", [*made_of(rows[:12]), other]).counts["unknown_source"] == 1


def test_real_studies_of_one_patient_are_not_in_two_splits(tmp_path):
    rows = real_studies()
    rows[3] |= {"patient": 1}
    assert read_real(write_classified(tmp_path / "clean", rows), **SETTINGS).train
    rows[20] |= {"patient": 1}
    with pytest.raises(DataError, match="training study 'real3' is known in the split test: the same patient"):
        read_real(write_classified(tmp_path / "leak", rows), **SETTINGS)


def test_the_voxels_of_a_held_out_study_are_refused_under_any_name(real, tmp_path):
    made = write_classified(tmp_path / "made", made_of(real_studies()[:12]), seed=1)
    (made / "images" / "real2-synth-0" / "t2w.npy").write_bytes((real / "images" / "real18" / "t2w.npy").read_bytes())
    manifest, original = read_json(made / "manifest.json"), read_json(real / "manifest.json")
    manifest["cases"][2]["files"]["image/t2w"]["sha256"] = original["cases"][18]["files"]["image/t2w"]["sha256"]
    write_json(made / "manifest.json", manifest)
    with pytest.raises(DataError, match="the same voxels"):
        read_generated(made, read_real(real, **SETTINGS), field="--synthetic")


def test_a_volume_that_is_named_like_a_held_out_study_and_states_no_source_is_refused(real, tmp_path):
    rows = [{**row, "source_case": None} for row in made_of(real_studies()[:12])]
    assert read_made(real, tmp_path / "clean", rows).counts["unknown_source"] == 12
    assert "leakage" in refused(real, tmp_path / "made", [*rows, {**rows[0], "id": "real17"}])


@pytest.mark.parametrize("number", [2, 17])
def test_generated_studies_among_the_real_ones_are_refused(tmp_path, number: int):
    rows = real_studies()
    rows[number] |= {"synthetic": True}
    with pytest.raises(DataError, match=f"'real{number}' of the split (train|test) is synthetic"):
        read_real(write_classified(tmp_path / "mixed", rows), **SETTINGS)
    phantoms = [{**row, "synthetic": True} for row in real_studies()]
    assert len(read_real(write_classified(tmp_path / "phantoms", phantoms), **SETTINGS).test) == 8
    with pytest.raises(DataError, match="'real0-synth-0' of the split train is synthetic"):
        read_real(write_classified(tmp_path / "made", made_of(real_studies())), **SETTINGS)


def test_a_folder_of_real_studies_or_of_another_grid_is_not_taken_for_a_generated_one(real, tmp_path):
    assert "'real0' is not marked as synthetic" in refused(real, tmp_path / "a", real_studies())
    small = write_classified(tmp_path / "b", made_of(real_studies()[:12]), grid=(16, 16, 7))
    with pytest.raises(DataError, match=r"its dim is \[16, 16, 7\], not \[16, 16, 8\]"):
        read_generated(small, read_real(real, **SETTINGS), field="--baseline")


def test_patients_are_set_aside_for_validation_if_there_is_no_split_val(tmp_path, real):
    rows = real_studies(train=20, val=0)
    for row in rows:
        row["patient"] = int(row["id"][4:]) // 2 + 1 if row["split"] == "train" else None
    folder = write_classified(tmp_path / "real", rows)
    found = read_real(folder, validation_fraction=0.3, num_real=None)
    train, val = ({case.id for case in part} for part in (found.train, found.val))
    assert len(val) == 6 and len(train) == 14 and not train & val
    assert not {case.patient for case in found.train} & {case.patient for case in found.val}
    made = write_classified(tmp_path / "made", made_of(rows[:20]), seed=1)
    generated = read_generated(made, found, field="--synthetic")
    assert generated.counts["of_set_aside"] == 6 and {case.id for case in generated.asked} == {
        f"{name}-synth-0" for name in train
    }
    few = read_real(folder, validation_fraction=0.3, num_real=6)
    assert {case.id for case in few.val} == val and {case.id for case in few.train} < train
    assert not read_real(folder, validation_fraction=0.0, num_real=None).val
    assert len(read_real(real, validation_fraction=0.3, num_real=None).val) == 4  # there is a split val


def test_a_few_real_studies_are_chosen_in_the_proportion_of_the_classes_and_nested(tmp_path):
    rows = real_studies(train=0) + [study(f"t{n}", "train", int(n % 4 == 0)) for n in range(40)]
    folder, before = write_classified(tmp_path / "real", rows), set()
    for number in range(2, 41):
        chosen = read_real(folder, validation_fraction=0.0, num_real=number).train
        assert len(chosen) == number and abs(sum(case.label for case in chosen) - max(1, number / 4)) <= 0.5
        assert before <= {case.id for case in chosen}
        before = {case.id for case in chosen}
    with pytest.raises(ConfigError, match="41 real training studies are wanted, but 40"):
        read_real(folder, validation_fraction=0.0, num_real=41)


def test_studies_without_a_class_are_left_out_and_counted(tmp_path, real):
    rows = real_studies()
    rows[0]["pirads"] = rows[20]["pirads"] = None
    found = read_real(write_classified(tmp_path / "real", rows), **SETTINGS)
    assert (len(found.train), len(found.test), found.without_class) == (11, 7, {"train": 1, "val": 0, "test": 1})
    made = made_of(real_studies()[:12])
    made[1]["pirads"], made[2]["class_predicted"] = None, None
    generated = read_made(real, tmp_path / "made", made)
    assert (len(generated.asked), len(generated.predicted)) == (11, 11)
    assert (generated.counts["without_asked"], generated.counts["without_predicted"]) == (1, 1)
    about: Any = {"path": tmp_path, "field": "x"}
    check_labels(generated.asked, 1, "s", "the class", partly=True, **about)
    with pytest.raises(
        DataError, match="the arm sl needs the predicted class of every generated study, and 1 study lacks it"
    ):
        check_labels(generated.predicted, 1, "sl", "the predicted class", partly=False, **about)
    with pytest.raises(DataError, match="the class 'pos' alone"):
        check_labels([case for case in generated.asked if case.label], 0, "s", "the class", partly=True, **about)


def test_what_cannot_be_trained_or_tested_is_refused(tmp_path):
    with pytest.raises(DataError, match="no study with a class in the split test"):
        read_real(write_classified(tmp_path / "a", real_studies(test=0)), **SETTINGS)
    rows = [{**row, "pirads": 1} for row in real_studies()]
    with pytest.raises(DataError, match="the class 'pos' alone"):
        read_real(write_classified(tmp_path / "b", rows), **SETTINGS)


def test_the_identity_of_studies_is_that_of_ids_classes_and_voxels(real):
    train = read_real(real, **SETTINGS).train
    changes = [case._replace(**change) for case in train[:1] for change in ({"id": "x"}, {"label": 1}, {"key": "0"})]
    digests = {data_digest([change, *train[1:]]) for change in changes}
    assert len(digests | {data_digest(train)}) == 4 and data_digest(train) == data_digest(list(train))
    assert data_digest(train[:3], train[3:]) != data_digest(train[:4], train[4:])
