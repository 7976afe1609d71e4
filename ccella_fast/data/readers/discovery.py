"""Find studies: in a folder (with a CSV beside them), or in the reference's JSON manifest. Nothing is opened but the lists.

A plain folder: a study is the shallowest folder that directly holds a recognised series; what lies deeper inside it is not
looked at. A series is a file `t2w.nii.gz` (`.nii`, `.mha`, `.nrrd`), or `<id>_t2w.mha` as in PI-CAI, or a folder of DICOM
files called `t2w` or `t2w-dicom`; the same with the other names of SERIES_NAMES. A study's id is its `<id>`, or its folder's
name, or, where two folders share a name, its path with / written as _. A BIDS folder: see bids.py.

The class is PI-RADS 1-2 -> [1, 0], 3-5 -> [0, 1] (docs/explanation/method.md, section 1.1). In a CSV `pirads` is the score 1 to
5, `neg` or `pos`, or empty: not known. A report is text; blank means that there is none (`text_isnull` = 1): one rule
everywhere. `synthetic` is `yes` for a study that was drawn and not measured.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ccella_fast.data.manifest import CASE_ID
from ccella_fast.data.readers.bids import find_series, is_bids
from ccella_fast.errors import DataError, did_you_mean
from ccella_fast.storage import read_json, safe_join

SERIES_NAMES = {
    "t2w": ["t2w", "axt2", "t2", "t2_tra", "t2w_tra", "t2_tse_tra"],
    "hbv": ["hbv", "b1600", "dwi_high", "dwi_high_b", "high_b", "highb"],
    "adc": ["adc"],
}
_SEQUENCE = {name: sequence for sequence, names in SERIES_NAMES.items() for name in names}
_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
_JSON_SEQUENCE = {"axt2": "t2w", "b1600": "hbv", "adc": "adc"}
_JSON_KEYS = {*_JSON_SEQUENCE, "dataset", "folder", "pirads", "spacing", "text", "text_isnull"}
_CSV_COLUMNS = {"case", "split", "pirads", "report", "report_file", "dataset", "synthetic"}
_CLASSES = {"1": [1, 0], "2": [1, 0], "3": [0, 1], "4": [0, 1], "5": [0, 1], "neg": [1, 0], "pos": [0, 1], "": None}
_MAX_LIST = 256 * 2**20  # bytes of a JSON or CSV list
_MAX_REPORT = 2**20  # characters

Split = Literal["train", "test"]


class Study(NamedTuple):
    """One study as found. `report` is None where there is none; `text_file`, `latent_files` are the reference's own."""

    id: str
    files: dict[str, Path]  # sequence -> file, or folder of DICOM files
    split: Split = "train"
    dataset: str | None = None
    pirads: list[int] | None = None
    report: str | None = None
    synthetic: bool = False  # drawn, not measured
    spacing: list[float] | None = None  # as the reference's manifest states it
    text_file: Path | None = None
    text_isnull: int | None = None  # as stated; only beside `text_file`
    latent_files: dict[str, Path] = {}
    listed_in: Path | None = None  # for messages
    field: str | None = None


def find_studies(
    data: str | Path,
    *,
    csv_file: str | Path | None = None,
    test_data: str | Path | None = None,
    data_base_dir: str | Path | None = None,
    embedding_base_dir: str | Path | None = None,
) -> list[Study]:
    """Every study of a folder or a JSON manifest, sorted by id; those of the manifest `test_data` have split `test`.

    Raises DataError for the first defect, which says how many more there are."""
    data, defects = Path(data), Defects()
    if not data.exists():
        raise DataError("there is no such file or folder", path=data, fix="check --data")
    if data.is_dir():
        for given, flag in ((test_data, "--test_data"), (embedding_base_dir, "--embedding_base_dir")):
            if given is not None:
                raise DataError(f"{flag} goes with a JSON manifest", path=data, fix=f"leave {flag} out")
        studies = _from_folder(data, Path(csv_file) if csv_file else None, defects)
    else:
        images = Path(data_base_dir) if data_base_dir else data.parent
        embeddings = Path(embedding_base_dir) if embedding_base_dir else None
        studies = _from_json(data, "train", images, embeddings, defects)
        if test_data is not None:
            studies += _from_json(Path(test_data), "test", images, embeddings, defects)
    for name, count in Counter(study.id for study in studies).items():
        if count > 1:
            last = [study for study in studies if study.id == name][-1]
            fix = "give every study its own id"
            defects.add(
                DataError(f"{count} studies have the id '{name}'", path=last.listed_in, field=last.field, fix=fix)
            )
    defects.raise_first()
    if not studies:
        fix = f"name the series {', '.join(sorted(SERIES_NAMES))} (.nii.gz, .mha, .nrrd, or a DICOM folder)"
        raise DataError("no study found", path=data, fix=fix)
    return sorted(studies, key=lambda study: study.id)


class Defects:
    """Collects DataErrors, so that one pass finds them all."""

    def __init__(self) -> None:
        self.found: list[DataError] = []

    def add(self, defect: DataError) -> None:
        self.found.append(defect)

    def raise_first(self) -> None:
        if self.found:
            first, more = self.found[0], len(self.found) - 1
            if more:
                elsewhere = sorted({Path(defect.path).name for defect in self.found[1:] if defect.path})[:3]
                first.why += f" (and {more} more defect{'s' if more > 1 else ''}, in {', '.join(elsewhere)})"
            raise first


# ---- plain folder ----


def _from_folder(root: Path, table: Path | None, defects: Defects) -> list[Study]:
    if is_bids(root):
        return _from_bids(root, table, defects)
    found = list(_walk(root, root, defects))
    names = Counter(name for name, _, _ in found)
    studies = []
    for name, folder, files in found:
        if names[name] > 1:
            name = "_".join(folder.relative_to(root).parts)
        studies.append(Study(_checked_id(name, folder, None), files, listed_in=folder))
    if table is None and (root / "studies.csv").is_file():
        table = root / "studies.csv"
    return studies if table is None else _join(studies, table, defects)


def _from_bids(root: Path, table: Path | None, defects: Defects) -> list[Study]:
    found, wrong = find_series(root)
    defects.found += wrong
    studies = [Study(_checked_id(name, folder, None), files, listed_in=folder) for name, folder, files in found]
    participants = root / "participants.tsv"
    if table is not None or not participants.is_file():
        return studies if table is None else _join(studies, table, defects)
    return _join(studies, participants, defects)


def _walk(root: Path, folder: Path, defects: Defects) -> Iterator[tuple[str, Path, dict[str, Path]]]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    series: dict[tuple[str, str], list[Path]] = {}
    for entry in entries:
        recognised = _recognise(entry)
        if recognised:
            series.setdefault(recognised, []).append(entry)
    prefixes = {prefix for prefix, _ in series}
    for prefix in sorted(prefixes):
        files = {}
        for (_, sequence), candidates in sorted(item for item in series.items() if item[0][0] == prefix):
            if len(candidates) > 1 or (len(prefixes) > 1 and ("", sequence) in series):
                names = " and ".join(
                    path.name for (_, name), paths in series.items() if name == sequence for path in paths
                )
                fix = f"keep one of them, named {sequence}, in this folder"
                defects.add(DataError(f"two series for {sequence}: {names}", path=folder, field=sequence, fix=fix))
            files[sequence] = safe_join(root, candidates[0].relative_to(root).as_posix(), path=folder, field=sequence)
        yield prefix or folder.resolve().name, folder, files
    if not series:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(root, safe_join(root, entry.relative_to(root).as_posix()), defects)


def _recognise(entry: Path) -> tuple[str, str] | None:
    """(study prefix, sequence) of a file or DICOM folder by its name; None: not a series."""
    name = entry.name.lower()
    if entry.is_dir():
        name = re.sub(r"[-_]dicom$", "", name)
        return ("", _SEQUENCE[name]) if name in _SEQUENCE and is_dicom_folder(entry) else None
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        return None
    stem = entry.name[: -len(suffix)]
    if stem.lower() in _SEQUENCE:
        return "", _SEQUENCE[stem.lower()]
    for series_name in sorted(_SEQUENCE, key=len, reverse=True):
        if stem.lower().endswith("_" + series_name):
            return stem[: -len(series_name) - 1], _SEQUENCE[series_name]
    return None


def is_dicom_folder(folder: Path) -> bool:
    """Does it directly hold a DICOM file?"""
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and not entry.name.startswith("."):
            with open(entry, "rb") as file:
                return file.read(132)[128:] == b"DICM"
    return False


def _join(studies: list[Study], table: Path, defects: Defects) -> list[Study]:
    """Lay the CSV's columns over the studies. A study that it does not name has no report and no class."""
    by_id = {study.id: study for study in studies}
    seen: dict[str, int] = {}
    participants = table.name == "participants.tsv"
    for line, row in _read_csv(table, column="participant_id" if participants else "case"):
        field = f"line {line}, case"
        case = (row.get("participant_id" if participants else "case") or "").strip()
        sessions = (
            [name for name in by_id if name == case or name.startswith(f"{case}_ses-")] if participants else [case]
        )
        if participants and not sessions:
            continue  # BIDS lists people whose images are elsewhere too
        if case not in by_id and not participants:
            fix = did_you_mean(case, by_id) if len(by_id) < 20 else "check the case ids against the folders"
            defects.add(DataError(f"no study is called {_value(case)}", path=table, field=field, fix=fix))
        elif case in seen:
            why = f"the case '{case}' is already on line {seen[case]}"
            defects.add(DataError(why, path=table, field=field, fix="keep one of the lines"))
        else:
            seen[case] = line
            try:
                values = _csv_values(table, line, row)
                by_id.update({name: by_id[name]._replace(**values) for name in sessions})
            except DataError as defect:
                defects.add(defect)
    return list(by_id.values())


def _read_csv(table: Path, column: str = "case") -> list[tuple[int, dict[str, str]]]:
    """(line, cells) of a CSV, or of a TSV, by its name. column: the one that must be there."""
    text, tab = read_text(table, limit=_MAX_LIST), table.suffix.lower() == ".tsv"
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter="\t" if tab else ",")
    try:
        columns = reader.fieldnames or []
        if column not in columns:
            why, fix = f"there is no column '{column}'", did_you_mean(column, columns or [""])
            raise DataError(why, path=table, field="line 1", fix=fix)
        for other in set(columns) - _CSV_COLUMNS - {column}:
            _refuse_near_miss(other, _CSV_COLUMNS, path=table, field=f"line 1, {_shown(other)}")
        if len(set(columns)) != len(columns):
            raise DataError("a column appears twice", path=table, field="line 1", fix="keep one of them")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                fix = 'put text that holds commas or quotes into "double quotes"'
                raise DataError(
                    "this line has too many or too few cells", path=table, field=f"line {reader.line_num}", fix=fix
                )
            if tab:  # BIDS: what is missing is written n/a
                row = {name: "" if cell.strip() == "n/a" else cell for name, cell in row.items()}
            rows.append((reader.line_num, row))
    except csv.Error as bad:
        raise DataError(
            f"malformed CSV: {bad}", path=table, field=f"line {reader.line_num}", fix="mend that line"
        ) from None
    return rows


def _csv_values(table: Path, line: int, row: dict[str, str]) -> dict[str, Any]:
    split = (row.get("split") or "train").strip()
    if split not in ("train", "test"):
        raise DataError(
            f"{_value(split)} is no split", path=table, field=f"line {line}, split", fix="write train or test"
        )
    synthetic = (row.get("synthetic") or "").strip().lower()
    if synthetic not in ("yes", "no", ""):
        why, fix = f"{_value(synthetic)} is neither yes nor no", "write yes, no, or leave it empty"
        raise DataError(why, path=table, field=f"line {line}, synthetic", fix=fix)
    score = (row.get("pirads") or "").strip().lower()
    if score not in _CLASSES:
        fix = "write the PI-RADS score 1 to 5, or neg, or pos, or leave it empty"
        raise DataError(f"{_value(score)} is no class", path=table, field=f"line {line}, pirads", fix=fix)
    report = row.get("report") or ""
    name = (row.get("report_file") or "").strip()
    if name:
        field = f"line {line}, report_file"
        if report.strip():
            raise DataError(
                "report and report_file are both given", path=table, field=field, fix="leave one of them empty"
            )
        if len(name) > 255 or not name.isprintable():  # a report in the wrong column; its words are not repeated
            raise DataError("this is no file name", path=table, field=field, fix="move the text to the column report")
        file = safe_join(table.parent, name, path=table, field=field)
        if not file.is_file():
            raise DataError("there is no such report", path=table, field=field, fix=f"put it below {table.parent}")
        report = read_text(file, limit=4 * _MAX_REPORT)
    return {
        "split": split,
        "pirads": _CLASSES[score],
        "report": _checked_report(report, table, f"line {line}, report"),
        "synthetic": synthetic == "yes",
        "dataset": (row.get("dataset") or "").strip() or None,
        "listed_in": table,
        "field": f"line {line}",
    }


# ---- the reference's manifest ----


def _from_json(path: Path, split: Split, images: Path, embeddings: Path | None, defects: Defects) -> list[Study]:
    if path.is_file() and path.stat().st_size > _MAX_LIST:
        raise DataError(f"larger than {_MAX_LIST >> 20} MiB", path=path, fix="is this a list of studies?")
    values = read_json(path)
    if not isinstance(values, list):
        fix = "start the file with [ (a prepared folder is not given to `prepare` again)"
        raise DataError("a manifest is a JSON list of objects", path=path, fix=fix)
    studies = []
    for index, entry in enumerate(values):
        try:
            studies.append(_json_study(path, index, entry, split, images, embeddings))
        except DataError as defect:
            defects.add(defect)
    return studies


def _checker(path: Path, index: int) -> Callable[[bool, str, str, str], None]:
    """`check(good, key, why, fix)` for the entry at `index`."""

    def check(good: bool, key: str, why: str, fix: str) -> None:
        if not good:
            raise DataError(why, path=path, field=f"[{index}].{key}" if key else f"[{index}]", fix=fix)

    return check


def _check_entry(path: Path, index: int, entry: Any) -> None:
    """Keys and types of one entry of the list."""
    check = _checker(path, index)
    check(isinstance(entry, dict), "", "an entry is an object", 'write {"folder": ..., "axt2": ..., ...}')
    for key in entry.keys() - _JSON_KEYS:
        _refuse_near_miss(key, _JSON_KEYS, path=path, field=f"[{index}].{_shown(key)}")
    for key in ("folder", "axt2"):
        check(
            isinstance(entry.get(key), str) and entry[key] != "",
            key,
            f"'{key}' is missing or no text",
            "give it as text",
        )
    for key in ("b1600", "adc", "dataset", "text"):
        check(isinstance(entry.get(key), str | None), key, f"'{key}' must be text", "give it as text or leave it out")
    pirads = entry.get("pirads")
    good = pirads is None or (
        isinstance(pirads, list) and pirads in ([0, 1], [1, 0]) and not any(v is True for v in pirads)
    )
    check(good, "pirads", "the class is not one-hot", "write [1, 0] (PI-RADS 1-2), [0, 1] (3-5) or null (not known)")
    spacing = entry.get("spacing")
    good = spacing is None or (
        isinstance(spacing, list)
        and len(spacing) == 3
        and all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 100 for v in spacing)
    )
    check(good, "spacing", "the spacing is not three positive numbers", "write mm along x, y, z")
    is_null = entry.get("text_isnull")
    check(
        is_null is None or (is_null in (0, 1) and not isinstance(is_null, bool)),
        "text_isnull",
        "not 0 or 1",
        "write 0 or 1",
    )


def _json_study(path: Path, index: int, entry: Any, split: Split, images: Path, embeddings: Path | None) -> Study:
    _check_entry(path, index, entry)
    check, pirads, is_null = _checker(path, index), entry.get("pirads"), entry.get("text_isnull")

    def at(key: str) -> str:
        return f"[{index}].{key}"

    files = {
        name: safe_join(images, entry[key], path=path, field=at(key))
        for key, name in _JSON_SEQUENCE.items()
        if entry.get(key)
    }
    study = Study(
        id=_checked_id(entry["folder"].replace("/", "_"), path, at("folder")),
        files=files,
        split=split,
        dataset=entry.get("dataset"),
        pirads=None if pirads is None else [int(value) for value in pirads],
        spacing=entry.get("spacing"),
        listed_in=path,
        field=f"[{index}]",
    )
    text = entry.get("text") or ""
    if text.endswith(".npy"):
        check(
            embeddings is not None,
            "text",
            "text features are named, but not where they lie",
            "give --embedding_base_dir",
        )
        assert embeddings is not None
        check(
            is_null is not None, "text_isnull", "'text_isnull' is missing", "write 1 where there is no report, else 0"
        )
        latents = {
            name: safe_join(embeddings, _embedding_name(entry[key]), path=path, field=at(key))
            for key, name in _JSON_SEQUENCE.items()
            if entry.get(key)
        }
        text_file = safe_join(embeddings, _relative(text, embeddings), path=path, field=at("text"))
        check(text_file.is_file(), "text", f"there is no file '{_shown(text)}'", f"put it below {embeddings}")
        latents = {name: file for name, file in latents.items() if file.is_file()}
        return study._replace(text_file=text_file, text_isnull=is_null, latent_files=latents)
    blank = not text.strip()
    check(
        is_null in (None, int(blank)),
        "text_isnull",
        f"contradicts 'text', which is {'' if blank else 'not '}blank",
        "mend one",
    )
    return study._replace(report=_checked_report(text, path, at("text")))


def _embedding_name(image: str) -> str:
    return image.removesuffix(".nii.gz").removesuffix(".nii") + "_emb.nii.gz"


def _relative(entry: str, root: Path) -> str:
    """The reference writes the full path of a text feature file; below `root` that is the same as a relative one."""
    path = Path(entry)
    return path.relative_to(root.absolute()).as_posix() if path.is_relative_to(root.absolute()) else entry


# ---- shared ----


def read_text(path: Path, *, limit: int) -> str:
    """A UTF-8 file, with or without byte order mark. DataError for any other encoding, and above `limit` bytes."""
    if not path.is_file():
        raise DataError("this file does not exist", path=path, fix="check the path")
    if path.stat().st_size > limit:
        raise DataError(f"larger than {limit >> 20} MiB", path=path, fix="is this the right file?")
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("this is UTF-16 text", path=path, fix="save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        line = raw.count(b"\n", 0, bad.start) + 1
        raise DataError("not UTF-8 text (Latin-1?)", path=path, field=f"line {line}", fix="save it as UTF-8") from None


def _checked_report(report: str, path: Path, field: str) -> str | None:
    """Control characters become spaces; line ends stay. None when nothing is left."""
    if len(report) > _MAX_REPORT:
        raise DataError(f"the report has {len(report)} characters", path=path, field=field, fix="is this a report?")
    report = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", " ", report.replace("\r\n", "\n")).strip()
    return report or None


def _checked_id(name: str, path: Path, field: str | None) -> str:
    if not re.fullmatch(CASE_ID, name):
        fix = "use letters, digits, space and . _ - + (at most 120)"
        raise DataError(f"{name!r:.60} cannot name a study", path=path, field=field, fix=fix)
    return name


def _shown(word: str) -> str:
    """A stranger's word in a message: one line, not long."""
    return "".join(letter if letter.isprintable() else "?" for letter in word)[:60]


def _value(word: str) -> str:
    """A cell in a message. More than one word may be a report in the wrong column, and is not shown."""
    return f"'{word}'" if re.fullmatch(r"[\w.+@=-]{1,40}", word) else f"a text of {len(word)} characters"


def _refuse_near_miss(word: str, known: set[str], *, path: Path, field: str) -> None:
    """Unknown words are someone else's and ignored, but not one that is nearly ours."""
    near = difflib.get_close_matches(word.lower().strip(), known, n=1, cutoff=0.75)  # not date for dataset
    if near:
        raise DataError(f"unknown name '{_shown(word)}'", path=path, field=field, fix=f"did you mean '{near[0]}'?")
