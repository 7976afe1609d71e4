"""Tables and lists of studies: what is accepted, what is a mistake, and that no message repeats a cell of several words."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pytest

from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.data.readers.study import Study
from ccella_fast.data.readers.study_table import reports_of
from ccella_fast.errors import DataError

SECRET = "Zebedee Quux has a focus in the left zone"


def folder(root: Path, *names: str) -> Path:
    for name in names or ("0001", "0002"):
        (root / name).mkdir(parents=True)
        (root / name / "t2w.nii.gz").touch()
    return root


def bids(root: Path, *names: str) -> Path:
    for name in names or ("sub-01", "sub-02"):
        (root / name / "anat").mkdir(parents=True)
        (root / name / "anat" / f"{name.replace('/', '_')}_T2w.nii.gz").touch()
    (root / "dataset_description.json").write_text("{}")
    return root


def read(root: Path, table: str | bytes, name: str = "studies.csv") -> dict[str, Study]:
    (root / name).write_bytes(table.encode() if isinstance(table, str) else table)
    return {study.id: study for study in find_studies(root)}


def refuse(root: Path, table: str | bytes, name: str = "studies.csv") -> DataError:
    with pytest.raises(DataError) as caught:
        read(root, table, name)
    error = caught.value
    assert len(str(error).splitlines()) <= 5 and error.path == str(root / name) and error.fix
    assert "Zebedee" not in str(error) and "Quux" not in str(error)
    return error


OWN_COLUMNS = (
    "report_date report_id report_text reporter reported dataset_id case_id cases pirads_max pirads_1 pirads_2 split_seed age "
    "date site psa text file id fold patient_id class label notes synthetic_fraction participant_id"
)


@pytest.mark.parametrize("name", OWN_COLUMNS.split())
def test_columns_with_other_words_are_the_users_own(tmp_path: Path, name: str):
    study = read(folder(tmp_path), f"case,{name}\n0001,5\n")["0001"]
    assert (study.pirads, study.report, study.dataset, study.split) == (None, None, None, "train")


MISSPELT = {
    "pirads": "pirad PIRADS Pirads PI-RADS pi_rads pirdas priads piradss pirafs",
    "report": "reprot Report reports repport reort REPORT",
    "split": "splt spilt Split splits plit",
    "report_file": "reportfile Report_File report-file report_fil",
    "dataset": "datset dateset data_set DATASET",
    "synthetic": "syntetic Synthetic synthetc",
}


@pytest.mark.parametrize(("meant", "name"), [(meant, name) for meant in MISSPELT for name in MISSPELT[meant].split()])
def test_a_misspelled_column_is_refused(tmp_path: Path, meant: str, name: str):
    error = refuse(folder(tmp_path), f"case,{name}\n0001,5\n")
    assert error.field == f"line 1, {name}" and error.fix == f"did you mean '{meant}'?"


@pytest.mark.parametrize("name", ["Case", "CASE", "cas", "caes"])
def test_a_misspelled_id_column_is_named(tmp_path: Path, name: str):
    error = refuse(folder(tmp_path), f"{name},pirads\n0001,5\n")
    assert error.why == "the table has no column 'case'" and error.fix == f"rename the column '{name}'"


def test_a_name_like_one_that_is_there_is_the_users_own(tmp_path: Path):
    assert read(folder(tmp_path), "case,report,reports\n0001,x,y\n")["0001"].report == "x"
    refuse(folder(tmp_path / "b"), "case,report,Report\n0001,x,y\n")  # which of them is meant?


SCORES = {
    "4": [0, 1], " 4 ": [0, 1], "4.0": [0, 1], "2.0": [1, 0], "1.00": [1, 0], "neg": [1, 0], "POS": [0, 1], "": None,
    "n/a": None,
}  # fmt: skip


@pytest.mark.parametrize(("cell", "expected"), SCORES.items())
def test_scores(tmp_path: Path, cell: str, expected: list[int] | None):
    assert read(folder(tmp_path), f"case,pirads\n0001,{cell}\n")["0001"].pirads == expected


@pytest.mark.parametrize("cell", ["0", "6", "4.5", "PI-RADS 4", "4/5", "4a", "IV", "nan", "neg.0", "3-4", "44.0", "٤"])
def test_other_scores_are_refused(tmp_path: Path, cell: str):
    error = refuse(folder(tmp_path), f"case,pirads\n0001,{cell}\n")
    assert error.field == "line 2, pirads" and "must be 1 to 5, neg, pos or empty" in error.why


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_splits(tmp_path: Path, split: str):
    assert read(folder(tmp_path), f"case,split\n0001, {split} \n")["0001"].split == split
    assert (
        read(bids(tmp_path / "b"), f"participant_id\tsplit\nsub-01\t{split}\n", "participants.tsv")["sub-01"].split
        == split
    )


@pytest.mark.parametrize("split", ["validation", "Train", "vla", "0"])
def test_other_splits_are_refused(tmp_path: Path, split: str):
    assert (
        refuse(folder(tmp_path), f"case,split\n0001,{split}\n").why
        == f"split must be train, val or test, got '{split}'"
    )


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", "NULL", "NA", "<NA>", "-"])
def test_a_word_for_a_missing_report_is_refused(tmp_path: Path, cell: str):
    """It would be encoded as the text of a report."""
    assert "a word for a missing value" in refuse(folder(tmp_path), f"case,report\n0001,{cell}\n").why
    (tmp_path / "a.txt").write_text(cell + "\n")
    assert "a word for a missing value" in refuse(tmp_path, "case,report_file\n0001,a.txt\n").why
    (tmp_path / "list.json").write_text(json.dumps([{"folder": "a", "axt2": "0001/t2w.nii.gz", "text": cell}]))
    with pytest.raises(DataError, match="a word for a missing value"):
        find_studies(tmp_path / "list.json")


def test_n_a_is_an_empty_cell_in_every_column(tmp_path: Path):
    columns = ["split", "pirads", "report", "report_file", "dataset", "synthetic"]
    row = ["n/a"] * len(columns)
    first = read(folder(tmp_path), f"case,{','.join(columns)}\n0001,{','.join(row)}\n")["0001"]
    table = "\t".join(["participant_id", *columns]) + "\n" + "\t".join(["sub-01", *row]) + "\n"
    second = read(bids(tmp_path / "b"), table, "participants.tsv")["sub-01"]
    for study in (first, second):
        assert study[2:7] == ("train", None, None, None, False)


# ---- ids ----

IDS = [("1", "0001"), ("1.0", "0001"), ("0001.0", "0001"), ("PAT-7", "pat-7"), ("000", "0001")]


@pytest.mark.parametrize(("cell", "meant"), IDS)
def test_an_id_that_a_spreadsheet_changed_is_recognized(tmp_path: Path, cell: str, meant: str):
    error = refuse(folder(tmp_path, *(f"c{number}" for number in range(30)), "0001", "pat-7"), f"case\n{cell}\n")
    assert error.field == "line 2, case" and f"no study is called '{cell}'" in error.why
    assert (f"did you mean '{meant}'?" in error.fix) == (cell != "000")


@pytest.mark.parametrize("name", ["01", "1", "sub-1", "SUB-01"])
def test_participants_that_match_no_study_are_refused(tmp_path: Path, name: str):
    error = refuse(bids(tmp_path), f"participant_id\tpirads\n{name}\t4\n{name}x\t2\n", "participants.tsv")
    assert error.why.startswith(f"no row names a study of this folder; the first of 2 names '{name}'")
    assert "did you mean 'sub-01'?" in error.fix


def test_rows_without_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Studies without a row are a finding of `check` and `prepare`, tests/data/test_check.py."""
    table = f"participant_id\tpirads\nsub-01\t4\nsub-07\t\n{SECRET}\t\nsub-09\t\nsub-10\t\n"
    studies = read(bids(tmp_path, "sub-01/ses-1", "sub-01/ses-2", "sub-02/ses-1"), table, "participants.tsv")
    assert [study.pirads for study in studies.values()] == [[0, 1], [0, 1], None]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'participants.tsv'}: rows without images: 4, 'sub-07', a text of 41 characters, 'sub-09' and 1 more",
    ]


# ---- the syntax of tables ----


def test_quotes_in_tsv(tmp_path: Path):
    """BIDS: quotes enclose a cell that holds tabs; others are part of the text."""
    cells = {
        '"Left" lesion': '"Left" lesion', '"a"': "a", '"a\tb"': "a\tb", '"say ""no"""': 'say "no"', 'a"b': 'a"b',
        '"Left" and "right"': '"Left" and "right"', '"open': '"open', '"': '"', "": None,
    }  # fmt: skip
    names = [f"sub-{number:02}" for number in range(len(cells))]
    table = "age\tparticipant_id\treport\n" + "".join(f"\t{n}\t{c}\r\n" for n, c in zip(names, cells, strict=True))
    studies = read(bids(tmp_path, *names), table, "participants.tsv")
    assert [studies[name].report for name in names] == list(cells.values())


def test_tables_of_pandas_are_read(tmp_path: Path):
    """A float column of scores, an index without a name, quotes where needed."""
    table = ',case,pirads,report\n0,0001,4.0,"a, b"\n1,0002,,\n'
    studies = read(folder(tmp_path), table)
    assert studies["0001"].pirads == [0, 1] and studies["0001"].report == "a, b" and studies["0002"].pirads is None


def test_spaces_and_blank_lines(tmp_path: Path):
    studies = read(folder(tmp_path), "\n case , pirads \n\n 0001 , 4 \n,,\n\n")
    assert studies["0001"].pirads == [0, 1]
    assert refuse(tmp_path, "case,pirads\n\n\n0001,9\n").field == "line 4, pirads"


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "the character |")])
def test_another_separator_is_named(tmp_path: Path, separator: str, name: str):
    table = f"case,pirads,report\n0001,4,{SECRET}\n".replace(",", separator)
    assert f"separated by {name}, not by commas" in refuse(folder(tmp_path), table).why
    quoted = "\n".join('"' + '";"'.join(line.split(separator)) + '"' for line in table.splitlines())
    assert "separated by semicolons, not by commas" in refuse(tmp_path, quoted).why
    table = f"participant_id,pirads,report\nsub-01,4,{SECRET}\n"
    assert "separated by commas, not by tabs" in refuse(bids(tmp_path / "b"), table, "participants.tsv").why


BROKEN = {
    "a quote that is not closed": (f'case,report\n0001,x\n0002,"{SECRET}\nb\nc\n', "line 3", "unexpected end of data"),
    "text after a quote": (f'case,report\n0001,x\n0002,"a" {SECRET}\n', "line 3", "expected after"),
    "a quote closed lines later": (f'case,report\n0001,"{SECRET}\nb\nc" d\n0002,x\n', "line 2", "expected after"),
    "too many cells": (f"case,report\n0001,x\n0002,a,{SECRET}\n", "line 3", "has 3 cells, but the table has 2"),
    "too few cells": (
        f'case,report\n0001,"a\nb"\n0002\n"{SECRET}"\n',
        "line 4",
        "has 1 cell, but the table has 2 columns",
    ),
}


@pytest.mark.parametrize(("table", "field", "words"), BROKEN.values(), ids=BROKEN)
def test_the_line_of_an_error_is_where_its_row_starts(tmp_path: Path, table: str, field: str, words: str):
    error = refuse(folder(tmp_path), table)
    assert error.field == field and words in error.why


ENCODINGS = {
    "UTF-8 with a mark": (b"\xef\xbb\xbfcase,report\n0001,\xc3\xa9\n", None),
    "Latin-1": ("case,report\n0001,é\n".encode("latin-1"), "not UTF-8"),
    "UTF-16": ("case,report\n0001,é\n".encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ("case,report\n0001,é\n".encode("utf-16-le"), "UTF-16"),
    "a spreadsheet": (b"PK\x03\x04\x14\x00\x06\x00\x08\x00", "a spreadsheet"),
    "binary": (bytes(range(256)), "not UTF-8"),
}


@pytest.mark.parametrize(("table", "words"), ENCODINGS.values(), ids=ENCODINGS)
def test_encodings(tmp_path: Path, table: bytes, words: str | None):
    if words is None:
        assert read(folder(tmp_path), table)["0001"].report == "é"
    else:
        assert words in refuse(folder(tmp_path), table).why


def test_a_long_report_in_a_cell(tmp_path: Path):
    """The csv module refuses cells of more than 131,072 characters, unless told otherwise."""
    limit = csv.field_size_limit()
    assert len(read(folder(tmp_path), f"case,report\n0001,{'a' * 2**20}\n")["0001"].report or "") == 2**20
    assert "has 1048577 characters" in refuse(tmp_path, f"case,report\n0001,{'a' * (2**20 + 1)}\n").why
    assert csv.field_size_limit() == limit


def test_control_characters_and_surrogates_in_reports(tmp_path: Path):
    (tmp_path / "0001").mkdir()
    text = "a\x00b\x1b[31mc\ud800d\r\ne\tf"
    (tmp_path / "list.json").write_text(json.dumps([{"folder": "a", "axt2": "x.nii.gz", "text": text}]))
    assert find_studies(tmp_path / "list.json")[0].report == "a b [31mc d\ne\tf"


# ---- privacy: a cell of several words may be a report, wherever it is ----

LEAKY = {
    "no header": f"0001,train,4,{SECRET}\n0002,test,2,{SECRET}\n",
    "no header, quoted": f'0001,train,4,"{SECRET}, and more"\n',
    "no header, only reports": f"{SECRET}\n",
    "no header, semicolons": f"0001;train;4;{SECRET}\n",
    "header of another table": f"id,{SECRET}\n0001,x\n",
    "misspelt header next to a report": f"case,pirad,{SECRET}\n0001,4,x\n",
    "column named by a report, twice": f"case,{SECRET},{SECRET},pirad\n0001,4,x,y\n",
    "shifted to case": f"case,pirads,report\n{SECRET},4,\n",
    "shifted to split": f"case,split\n0001,{SECRET}\n",
    "shifted to pirads": f"case,pirads\n0001,{SECRET}\n",
    "shifted to synthetic": f"case,synthetic\n0001,{SECRET}\n",
    "shifted to class_predicted": f"case,class_predicted\n0001,{SECRET}\n",
    "shifted to source_case": f"case,source_case\n0001,{SECRET}\n",
    "shifted to report_file": f"case,report_file\n0001,{SECRET}\n",
    "report_file that starts with /": f"case,report_file\n0001,/ {SECRET}\n",
    "report_file that starts with ..": f"case,report_file\n0001,../{SECRET}\n",
    "report_file that starts with ~": f"case,report_file\n0001,~/{SECRET}\n",
    "report_file with control characters": f"case,report_file\n0001,\x1b{SECRET}\n",
    "shifted to dataset": f"case,dataset\n0001,{SECRET} {SECRET}\n",
    "both reports": f"case,report,report_file\n0001,{SECRET},{SECRET}\n",
    "twice": f"case,report\n0001,{SECRET}\n0001,{SECRET}\n",
    "surplus cells": f"case,report\n0001,{SECRET}, {SECRET}\n",
    "a script without spaces": "case,pirads\n0001,前列腺左侧外周带病灶\n",
}


@pytest.mark.parametrize("table", LEAKY.values(), ids=LEAKY)
def test_no_cell_of_several_words_is_repeated(tmp_path: Path, table: str):
    error = refuse(folder(tmp_path), table)
    assert "前列腺" not in str(error)
    (tmp_path / "studies.csv").unlink()
    text = table.replace(",", "\t").replace("case\t", "participant_id\t").replace("\n0001", "\nsub-01")
    if "twice" not in table and "surplus" not in table:
        refuse(bids(tmp_path / "b"), text, "participants.tsv")


LISTS = {
    "folder": {"folder": SECRET + "!"},
    "path": {"axt2": f"/{SECRET}.nii.gz"},
    "path with ..": {"axt2": f"../{SECRET}.nii.gz"},
    "features": {"text": f"/{SECRET}.npy", "text_isnull": 0},
    "class": {"pirads": SECRET},
    "class in a list": {"pirads": [SECRET]},
    "spacing": {"spacing": SECRET},
    "text_isnull": {"text_isnull": SECRET, "text": SECRET},
    "text of another type": {"text": [SECRET]},
    "dataset": {"dataset": SECRET + SECRET},
    "dataset of another type": {"dataset": {SECRET: SECRET}},
}


@pytest.mark.parametrize("change", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("embeddings", [False, True], ids=["reports", "features"])
def test_no_text_of_a_list_is_repeated(tmp_path: Path, change: dict, embeddings: bool):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"folder": "a", "axt2": "a.nii.gz"} | change]))
    with pytest.raises(DataError) as caught:
        find_studies(path, embedding_base_dir=tmp_path if embeddings else None)
    assert "Zebedee" not in str(caught.value) and caught.value.field and caught.value.field.startswith("[0].")


@pytest.mark.parametrize("name", ["../a.nii.gz", "/a.nii.gz", "a/../../b.nii.gz"])
def test_followed_links_do_not_allow_other_paths(tmp_path: Path, name: str):
    (tmp_path / "list.json").write_text(json.dumps([{"folder": "a", "axt2": name}]))
    with pytest.raises(DataError, match="leaves the data folder"):
        find_studies(tmp_path / "list.json", follow_links=True)


def test_no_key_of_a_list_is_repeated(tmp_path: Path):
    for text in (f'[{{"{SECRET}": 1, "{SECRET}": 2}}]', f'[{{"folder": "{SECRET}" 1}}]', f'"{SECRET}"', f"[{SECRET}]"):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(DataError) as caught:
            find_studies(tmp_path / "list.json")
        assert "Zebedee" not in str(caught.value)


# ---- sizes ----


@pytest.mark.parametrize(
    "text",
    ["[" + "0," * 5_000_001 + "0]", "[" + "[]," * 999_999 + "[],[]]"],
    ids=["5,000,002 numbers", "1,000,001 lists"],
)
def test_long_lists_are_refused_within_bounds(tmp_path: Path, text: str):
    (tmp_path / "list.json").write_text(text)
    tracemalloc.start()
    with pytest.raises(DataError, match="check that this is the right file"):
        find_studies(tmp_path / "list.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28


def test_reading_stops_after_many_defects(tmp_path: Path):
    """A table of other studies has a defect on every row; each takes memory."""
    error = refuse(folder(tmp_path), "case\n" + "x\n" * 3000)
    assert "(and at least 999 more defects, in studies.csv)" in error.why


def test_rows_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ccella_fast.data.readers import study_table

    table = "participant_id\tage\nsub-01\t1\n" + "".join(f"sub-x{number}\t50\n" for number in range(50_000))
    tracemalloc.start()
    read(bids(tmp_path), table, "participants.tsv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(table)  # the text in three forms; the rows would take another 30
    monkeypatch.setattr(study_table, "MAX_STUDIES", 50_000)
    assert refuse(tmp_path, table, "participants.tsv").why == "this table has more than 50000 rows"


def test_options_that_would_be_ignored_are_refused(tmp_path: Path):
    root = folder(tmp_path)
    (root / "list.json").write_text("[]")
    with pytest.raises(DataError, match="--csv needs a folder"):
        find_studies(root / "list.json", csv_file=root / "studies.csv")
    with pytest.raises(DataError, match="--data_base_dir needs a JSON list"):
        find_studies(root, data_base_dir=root)


# Reports as prompts


def test_the_reports_of_a_table_by_case(tmp_path):
    (tmp_path / "b.txt").write_text("No focus.\n")
    table = tmp_path / "table.csv"
    table.write_text("case,report,report_file,pirads\nx,Focus on the left.,,4\ny,,,1\nz,,b.txt,\n")
    assert reports_of(table) == {"x": "Focus on the left.", "z": "No focus."}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (f"case,report\na,{SECRET}\na,\n", "already listed on line 2"),
        ("case,report\na,\n", "no row of this table has a report"),
        ("case,report\n,Focus.\n", "a case must be a name of 1 to 255 printable characters, got ''"),
        (f'case,report\n"a\nb",{SECRET}\n', "a case must be a name .* got a text of 3 characters"),
        (f"case,report\n{'a' * 256},{SECRET}\n", "a case must be a name .* got a text of 256 characters"),
        ("case,text\na,b\n", "no row of this table has a report"),
        (f"id,report\na,{SECRET}\n", "no column 'case'"),
    ],
)
def test_a_table_without_usable_reports_is_named(tmp_path, content, word):
    table = tmp_path / "table.csv"
    table.write_text(content)
    with pytest.raises(DataError, match=word) as caught:
        reports_of(table)
    assert caught.value.path == str(table) and caught.value.fix and "Zebedee" not in str(caught.value)
