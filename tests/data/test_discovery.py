"""Studies in folders, in CSV tables and in the JSON manifests of the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.errors import DataError

PATIENTS = ["prostate3t-03-0001", "prostate3t-03-0002", "prostate3t-03-0003", "prostate3t-03-0005", "prostatex-0000"]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def dicom(root: Path, folder: str) -> None:
    (root / folder).mkdir(parents=True)
    (root / folder / "000.dcm").write_bytes(b"\0" * 128 + b"DICM")


def found(root: Path, **options) -> dict[str, list[str]]:
    return {study.id: sorted(study.files) for study in find_studies(root, **options)}


@pytest.mark.parametrize("root", ["mri", "."])
def test_real_studies_from_either_root(real_data: Path, root: str):
    studies = find_studies(real_data / root)
    assert [study.id for study in studies] == PATIENTS
    assert [study.files["t2w"].name for study in studies] == ["t2w-dicom", *["t2w.nii.gz"] * 3, "t2w.mha"]
    assert studies[-1].files["adc"] == real_data / "mri" / "prostatex-0000" / "adc.mha"
    assert all(study.report is None and study.pirads is None and study.split == "train" for study in studies)


def test_shallowest_folder_is_the_study(tmp_path: Path):
    touch(
        tmp_path, "a/t2w.nii.gz", "a/resampled/t2w.nii.gz", "a/t2w-coronal.mha", "a/lesion.nii.gz", "deep/er/b/axT2.mha"
    )
    touch(tmp_path, "notes/readme.txt", "a/._t2w.nii.gz", "deep/er/b/HBV.nrrd", "deep/er/b/adc.nii")
    assert found(tmp_path) == {"a": ["t2w"], "b": ["adc", "hbv", "t2w"]}


def test_names_of_picai_and_dicom(tmp_path: Path):
    touch(tmp_path, *[f"10000/10000_1000000_{name}.mha" for name in ("t2w", "adc", "hbv", "sag", "cor")])
    dicom(tmp_path, "p1/t2w-dicom")
    dicom(tmp_path, "p2/t2_tse_tra")
    assert found(tmp_path) == {"10000_1000000": ["adc", "hbv", "t2w"], "p1": ["t2w"], "p2": ["t2w"]}


def test_two_studies_in_one_folder_have_their_own_ids(tmp_path: Path):
    touch(tmp_path, "x/1_100_t2w.mha", "x/1_101_t2w.mha")
    assert found(tmp_path) == {"1_100": ["t2w"], "1_101": ["t2w"]}


def test_equal_folder_names_become_paths(tmp_path: Path):
    touch(tmp_path, "site1/001/t2w.nii.gz", "site2/001/t2w.nii.gz", "site2/002/t2w.nii.gz")
    assert sorted(found(tmp_path)) == ["002", "site1_001", "site2_001"]


def test_values_of_the_table_reach_the_studies(tmp_path: Path):
    touch(tmp_path, *[f"c{n}/t2w.nii.gz" for n in range(7)])
    (tmp_path / "c0.txt").write_bytes(b"\xef\xbb\xbfline one\r\nline two \x00 end\r\n")
    (tmp_path / "studies.csv").write_bytes(
        b"\xef\xbb\xbfcase,split,pirads,report,report_file,dataset,age\n"
        b"c0,train,2,,c0.txt,Institute1,70\n"
        b'c1,test,3,"two, with ""quotes""\nand lines",,,\n'
        b"c2,,neg,  ,,,\nc3,,pos,x,,,\nc4,,5,x,,,\nc5,,,x,,,\n"
    )
    studies = {study.id: study for study in find_studies(tmp_path)}
    assert studies["c0"].report == "line one\nline two   end" and studies["c0"].dataset == "Institute1"
    assert studies["c1"].report == 'two, with "quotes"\nand lines' and studies["c1"].split == "test"
    classes = {name: study.pirads for name, study in studies.items()}
    assert classes == {"c0": [1, 0], "c1": [0, 1], "c2": [1, 0], "c3": [0, 1], "c4": [0, 1], "c5": None, "c6": None}
    assert studies["c2"].report is None and studies["c6"].report is None  # blank; not listed


def test_every_score_has_its_class(tmp_path: Path):
    """PI-RADS 1 and 2 are negative, 3 to 5 positive (docs/explanation/method.md, section 1.1)."""
    scores = {"1": [1, 0], "2": [1, 0], "3": [0, 1], "4": [0, 1], "5": [0, 1], " neg": [1, 0], "POS ": [0, 1], "": None}
    touch(tmp_path, *[f"c{number}/t2w.nii.gz" for number in range(len(scores))])
    lines = [f"c{number},{score}\n" for number, score in enumerate(scores)]
    (tmp_path / "studies.csv").write_text("case,pirads\n" + "".join(lines))
    assert [study.pirads for study in find_studies(tmp_path)] == list(scores.values())


TABLE_MISTAKES = [
    ("case,pirads\na,6\n", "line 2, pirads", "must be 1 to 5, neg, pos or empty"),
    ("case,pirads\na,0\n", "line 2, pirads", "must be 1 to 5, neg, pos or empty"),
    ("case,split\na,vla\n", "line 2, split", "must be train, val or test, got 'vla'"),
    ("case,pirad\na,1\n", "line 1, pirad", "did you mean 'pirads'"),
    ("case,Report\na,x\n", "line 1, Report", "did you mean 'report'"),
    ("case,spilt\na,test\n", "line 1, spilt", "did you mean 'split'"),
    ("Case,pirads\na,1\n", "line 1", "no column 'case'"),
    ("case,pirads\nb,1\n", "line 2, case", "no study is called 'b'"),
    ("case,pirads\na,1\na,2\n", "line 3, case", "already listed on line 2"),
    ("case,pirads\na,1,surplus\n", "line 2", "has 3 cells, but the table has 2 columns"),
    ("case,case\na,a\n", "line 1", "the column 'case' appears twice"),
    ("case,synthetic\na,perhaps\n", "line 2, synthetic", "must be yes, no or empty, got 'perhaps'"),
    ("case,source_case\na,b\n", "line 2, source_case", "only a synthetic study can have"),
    ("case,source_case,synthetic\na,b/c,yes\n", "line 2, source_case", "must be the name of a case, got 'b/c'"),
    ("case,class_predicted\na,maybe\n", "line 2, class_predicted", "must be 1 to 5, neg, pos or empty"),
    ("case,report,report_file\na,x,a.txt\n", "line 2, report_file", "both"),
    ("case,report_file\na,../secret.txt\n", "line 2, report_file", "leaves the data folder"),
    ("case,report_file\na,/etc/hostname\n", "line 2, report_file", "leaves the data folder"),
    ("case,report_file\na,absent.txt\n", "line 2, report_file", "report file does not exist"),
    ('case,report\na,"open\n', "line", "not valid CSV"),
]


@pytest.mark.parametrize(
    ("table", "field", "words"), TABLE_MISTAKES, ids=[f"{field}-{words}" for _, field, words in TABLE_MISTAKES]
)
def test_mistake_in_the_table_raises(tmp_path: Path, table: str, field: str, words: str):
    touch(tmp_path, "a/t2w.nii.gz")
    (tmp_path / "studies.csv").write_text(table)
    with pytest.raises(DataError) as caught:
        find_studies(tmp_path)
    assert caught.value.path == str(tmp_path / "studies.csv") and caught.value.field.startswith(field)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 5


def test_unknown_columns_are_ignored(tmp_path: Path):
    touch(tmp_path, "a/t2w.nii.gz")
    (tmp_path / "studies.csv").write_text("case,date,report_date,site,age,psad\na,2020-01-01,2020-01-02,x,70,0.1\n")
    study = find_studies(tmp_path)[0]
    assert study.dataset is None and study.report is None and study.pirads is None and study.split == "train"


def test_the_longest_report(tmp_path: Path):
    touch(tmp_path, "a/t2w.nii.gz")
    (tmp_path / "studies.csv").write_text("case,report_file\na,a.txt\n")
    (tmp_path / "a.txt").write_text("é" * 2**20)
    assert len(find_studies(tmp_path)[0].report) == 2**20
    (tmp_path / "a.txt").write_text("é" * (2**20 + 1))
    with pytest.raises(DataError, match="the report has 1048577 characters"):
        find_studies(tmp_path)


@pytest.mark.parametrize("column", ["case", "split", "pirads", "synthetic", "report_file"])
@pytest.mark.parametrize("report", ["Zebedee has a focus.", "Zebedee has a focus. " * 20], ids=["short", "long"])
def test_a_report_in_the_wrong_column_is_not_repeated(tmp_path: Path, column: str, report: str):
    touch(tmp_path, "a/t2w.nii.gz")
    columns = ["case", "dataset"] if column == "case" else ["case", column]
    (tmp_path / "studies.csv").write_text(
        f"{','.join(columns)}\n{f'{report},x' if column == 'case' else f'a,{report}'}\n"
    )
    with pytest.raises(DataError) as caught:
        find_studies(tmp_path)
    assert "Zebedee" not in str(caught.value) and caught.value.field == f"line 2, {column}"


def test_what_a_generated_study_was_made_from(tmp_path: Path):
    touch(tmp_path, "a/t2w.nii.gz", "b/t2w.nii.gz")
    columns = "case,synthetic,pirads,class_predicted,source_case\n"
    (tmp_path / "studies.csv").write_text(f"{columns}a,yes,neg,pos,real 1\nb,,5,,\n")
    a, b = find_studies(tmp_path)
    assert (a.pirads, a.class_predicted, a.source_case) == ([1, 0], [0, 1], "real 1")
    assert (b.pirads, b.class_predicted, b.source_case) == ([0, 1], None, None)


def test_synthetic_studies_are_marked(tmp_path: Path):
    touch(tmp_path, *(f"{name}/t2w.nii.gz" for name in "abcd"))
    (tmp_path / "studies.csv").write_text("case,synthetic\na,yes\nb,no\nc,\n")
    assert {study.id: study.synthetic for study in find_studies(tmp_path)} == {
        "a": True,
        "b": False,
        "c": False,
        "d": False,
    }


@pytest.mark.parametrize(
    ("content", "words", "field"),
    [("ok\nok\nok\né".encode("latin-1"), "not UTF-8", "line 4"), ("é".encode("utf-16"), "UTF-16", None)],
    ids=["latin-1", "utf-16"],
)
def test_report_in_another_encoding_raises(tmp_path: Path, content: bytes, words: str, field: str | None):
    touch(tmp_path, "a/t2w.nii.gz")
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "studies.csv").write_text("case,report_file\na,a.txt\n")
    with pytest.raises(DataError, match=words) as caught:
        find_studies(tmp_path)
    assert caught.value.field == field


def test_two_series_for_a_sequence_raise(tmp_path: Path):
    touch(tmp_path, "a/t2w.nii.gz", "a/t2w.mha")
    with pytest.raises(DataError, match="two series for t2w: t2w.mha and t2w.nii.gz") as caught:
        find_studies(tmp_path)
    assert caught.value.path == str(tmp_path / "a")
    (tmp_path / "a/t2w.mha").unlink()
    assert found(tmp_path) == {"a": ["t2w"]}
    touch(tmp_path, "a/7_t2w.mha")  # may belong to the study 7 or to a
    with pytest.raises(DataError, match="two series for t2w: 7_t2w.mha and t2w.nii.gz"):
        find_studies(tmp_path)


def test_link_out_of_the_root_raises(tmp_path: Path):
    outside = touch(tmp_path / "outside", "t2w.nii.gz")
    root = touch(tmp_path / "root", "b/t2w.nii.gz")
    (root / "a").symlink_to(outside)
    with pytest.raises(DataError, match="leaves the data folder"):
        find_studies(root)


def test_folder_without_studies_raises(tmp_path: Path):
    touch(tmp_path, "a/image.nii.gz")
    with pytest.raises(DataError, match="no study was found"):
        find_studies(tmp_path)


# ---- the manifest of the reference implementation ----

ENTRY = {
    "axt2": "c0/axt2.nii.gz",
    "dataset": "Institute1",
    "folder": "c0",
    "pirads": [1, 0],
    "spacing": [0.5, 0.5, 0.5625],
    "text": "a report",
    "text_isnull": 0,
}


def write(path: Path, *changes: dict) -> Path:
    path.write_text(json.dumps([{k: v for k, v in {**ENTRY, **change}.items() if v != "DROP"} for change in changes]))
    return path


def test_reference_manifests(tmp_path: Path):
    second = {
        "folder": "site/c1",
        "axt2": "c1.nii.gz",
        "b1600": "b.nii.gz",
        "adc": "a.nii.gz",
        "text": " ",
        "text_isnull": 1,
    }
    train = write(tmp_path / "train.json", {}, second)
    test = write(tmp_path / "test.json", {"folder": "c2", "pirads": [0.0, 1.0]})
    studies = {study.id: study for study in find_studies(train, test_data=test, data_base_dir=tmp_path / "images")}
    assert list(studies) == ["c0", "c2", "site_c1"]
    assert studies["c0"].files == {"t2w": tmp_path / "images/c0/axt2.nii.gz"} and studies["c0"].report == "a report"
    assert sorted(studies["site_c1"].files) == ["adc", "hbv", "t2w"] and studies["site_c1"].report is None
    assert [studies[name].split for name in studies] == ["train", "test", "train"]
    assert studies["c2"].pirads == [0, 1] and studies["c2"].dataset == "Institute1"


def test_reference_prepared_files_are_found(tmp_path: Path):
    touch(tmp_path / "emb", "c0/axt2_emb.nii.gz", "c0/text.npy", "c1/text.npy")
    absolute = str((tmp_path / "emb" / "c1" / "text.npy").absolute())  # as the reference writes it
    merged = write(tmp_path / "m.json", {"text": "c0/text.npy"}, {"folder": "c1", "axt2": "x.nii.gz", "text": absolute})
    first, second = find_studies(merged, embedding_base_dir=tmp_path / "emb")
    assert first.text_file == tmp_path / "emb/c0/text.npy"
    assert first.latent_files == {"t2w": tmp_path / "emb/c0/axt2_emb.nii.gz"}
    assert second.text_file == tmp_path / "emb/c1/text.npy" and second.latent_files == {}
    with pytest.raises(DataError, match="embedding_base_dir"):
        find_studies(merged)


MANIFEST_MISTAKES = [
    ({"pirads": [1, 1]}, "pirads", "the class must be one-hot or null, got [1, 1]"),
    ({"pirads": [0, 0]}, "pirads", "got [0, 0]"),
    ({"pirads": [True, False]}, "pirads", "got [true, false]"),
    ({"pirads": 3}, "pirads", "got 3"),
    ({"pirads": ["secret words"]}, "pirads", "got a value of type list"),
    ({"spacing": [0.5, 0.5]}, "spacing", "must be three numbers between 0 and 100 mm, got [0.5, 0.5]"),
    ({"spacing": [0.5, 0.5, 0]}, "spacing", "got [0.5, 0.5, 0]"),
    ({"text_isnull": 1}, "text_isnull", "text_isnull is 1, but 'text' is not blank"),
    ({"text": "  "}, "text_isnull", "text_isnull is 0, but 'text' is blank"),
    ({"text_isnull": 2}, "text_isnull", "must be 0 or 1, got 2"),
    ({"text_isnull": "secret words"}, "text_isnull", "must be 0 or 1, got a text of 12 characters"),
    ({"text_isnull": False}, "text_isnull", "got false"),
    ({"text": "c0/text.npy", "text_isnull": 2}, "text_isnull", "must be 0 or 1, got 2"),
    ({"folder": "DROP"}, "folder", "'folder' must be a text that is not empty"),
    ({"folder": "../x"}, "folder", "cannot be the id of a study"),
    ({"axt2": "../x.nii.gz"}, "axt2", "leaves the data folder"),
    ({"axt2": "/etc/passwd"}, "axt2", "leaves the data folder"),
    ({"axt2": "a\0b"}, "axt2", "leaves the data folder"),
    ({"axt2": 5}, "axt2", "'axt2' must be a text that is not empty"),
    ({"b1600": 5}, "b1600", "'b1600' must be text, got 5"),
    ({"text": ["x"]}, "text", "'text' must be text, got a value of type list"),
    ({"text_is_null": 1}, "text_is_null", "the name 'text_is_null' is not known"),
]


@pytest.mark.parametrize(
    ("change", "key", "words"), MANIFEST_MISTAKES, ids=[json.dumps(change) for change, _, _ in MANIFEST_MISTAKES]
)
def test_mistake_in_a_manifest_raises(tmp_path: Path, change: dict, key: str, words: str):
    manifest = write(tmp_path / "train.json", change)
    with pytest.raises(DataError) as caught:
        find_studies(manifest)
    assert (caught.value.path, caught.value.field) == (str(manifest), f"[0].{key}")
    assert words in caught.value.why and "secret" not in str(caught.value)
    assert caught.value.fix and len(str(caught.value).splitlines()) <= 5


def test_all_defects_are_counted(tmp_path: Path):
    manifest = write(tmp_path / "train.json", {"pirads": [1, 1]}, {"folder": "c1", "spacing": [0]}, {"folder": "c2"})
    with pytest.raises(DataError, match=r"1 more defect, in train\.json\)"):
        find_studies(manifest)


def test_overlap_of_train_and_test_raises(tmp_path: Path):
    train, test = write(tmp_path / "train.json", {}), write(tmp_path / "test.json", {})
    with pytest.raises(DataError, match="2 studies have the id 'c0'"):
        find_studies(train, test_data=test)


def test_unknown_keys_are_ignored(tmp_path: Path):
    assert len(find_studies(write(tmp_path / "train.json", {"scanner": "x", "gleason": 7}))) == 1
