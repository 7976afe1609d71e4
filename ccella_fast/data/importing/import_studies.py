"""`ccella-fast import`: from a PACS export to a folder of studies that `prepare` reads.

The first run reads headers, proposes a series per sequence and shows the choice. The run with `write` writes what was shown, as
the user has edited it. Nothing that is logged or written outside the private folder holds a name, an id or a date of the
hospital.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ccella_fast.data.importing.choices import apply_edits, read_choices, write_choices
from ccella_fast.data.importing.deidentification import (
    KeyRow,
    extend_key,
    read_key,
    warnings_of,
    write_key,
    write_private_table,
)
from ccella_fast.data.importing.page import Picture, draw_study, write_pages
from ccella_fast.data.importing.report_sources import StudyReport, match_reports, read_sources, shortened
from ccella_fast.data.importing.scan import UnusedFile, scan_export
from ccella_fast.data.importing.sequence_choice import SEQUENCES, Judgement, choose_sequences
from ccella_fast.data.importing.series import ExportedStudy, group_studies
from ccella_fast.data.importing.splitting import SPLITS, check_fractions
from ccella_fast.data.importing.write import StudyTask, is_written, remove_study, task_of, write_study
from ccella_fast.data.preparation.worker_pool import WorkerPool
from ccella_fast.data.readers.text_checks import read_text
from ccella_fast.entrypoint import sibling
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.folder_kinds import check_output
from ccella_fast.folder_lock import lock_folder
from ccella_fast.quantities import counted
from ccella_fast.storage import check_writable, remove_partial_files, write_csv

logger = logging.getLogger("ccella_fast")
TABLE_COLUMNS = ("case", "split", "pirads", "report")
_BYTES_PER_STUDY = 2**30


class Places(NamedTuple):
    """out: the studies. review: what to look at. private: what must not be passed on."""

    out: Path
    review: Path
    private: Path

    @property
    def choices(self) -> Path:
        """The file that the user edits."""
        return self.review / "choices.csv"


class Export(NamedTuple):
    """What was found. studies: new id -> study. Further: unused files, copies of files, warnings."""

    studies: dict[str, ExportedStudy]
    key: dict[str, KeyRow]
    unused: list[UnusedFile]
    copies: int
    notices: list[str]


def import_studies(
    data: str | Path,
    out: str | Path,
    *,
    reports: str | Path | None = None,
    report_column: str | None = None,
    id_column: str | None = None,
    private: str | Path | None = None,
    split: Sequence[float] = (0.7, 0.15, 0.15),
    write: bool = False,
    workers: int | None = None,
) -> Path:
    """Find the axial T2, high-b and ADC series of a PACS export, show the choice, and with `write` write the studies.

    Args:
        data: Folder of the export, in any layout.
        out: Folder of the studies. The folder `<out>.import` gets the page and `choices.csv`.
        reports: CSV file, or folder of text files.
        report_column: Column of the report's text, if it is not recognized.
        id_column: Column of accession number, study UID or patient id, if it is not recognized.
        private: Folder of the key and of the list of unused files. Default: `<out>.private`.
        split: Shares of train, val and test; they hold for patients that are not in the key yet.
        write: Write what `choices.csv` says.
        workers: Number of processes that read files.

    Returns:
        The page to look at; with `write` the folder of the studies.

    Raises:
        ConfigError: If folders are inside one another, if `out` holds results of a command, if `write` is given before the
            choice was shown, or if another import writes to the same studies or key.
        DataError: If there is no DICOM file, no T2 series, or a chosen series cannot be read.
    """
    places = _places(Path(data), Path(out), private)
    check_output(out, "studies", field="--out")
    check_fractions(split)
    sources = None if reports is None else read_sources(Path(reports), report_column, id_column)
    with _lock(places):
        export = _read_export(Path(data), places, split, workers)
        proposed = {study: choose_sequences(exported.volumes) for study, exported in export.studies.items()}
        lines = read_choices(places.choices)
        if write:
            _check_shown(proposed, lines, places)
        used = apply_edits(proposed, lines, places.choices)
        write_choices(places.choices, proposed, used, lines)
        _print_choices(used)
        matched, notes = match_reports(sources or [], export.studies, export.key)
        notices = export.notices + notes + _summary(used, matched, export, sources is not None)
        _write_report_list(places.review / "reports.csv", matched)
        for notice in notices:
            logger.info("%s", notice)
        tasks = {study: task_of(study, judged, places.out, places.private) for study, judged in used.items()}
        if write:
            return _write_all(tasks, matched, export.key, places, workers)
        return _show(tasks, used, notices, places, workers)


@contextmanager
def _lock(places: Places) -> Iterator[None]:
    """Let no other import write to the studies, or to the key, which imports into several folders may share.

    The lock of the key is next to its folder, which is created later, for its owner alone.
    """
    command, private = "ccella-fast import", places.private
    with lock_folder(places.out, command), lock_folder(private.parent, command, name=f".{private.name}.lock"):
        yield


def _places(data: Path, out: Path, private: str | Path | None) -> Places:
    name = out.absolute().name
    places = Places(
        out,
        sibling(out, f"{name}.import"),
        sibling(out, f"{name}.private") if private is None else Path(private),
    )
    export = data.resolve()
    for folder, option in ((places.out, "--out"), (places.private, "--private")):
        path = folder.resolve()
        if path == export or path.is_relative_to(export) or export.is_relative_to(path):
            why = "this folder and the export are one, or one is in the other"
            raise ConfigError(why, path=folder, field=option, fix="choose a folder next to the export")
        check_writable(folder, option)
    if places.private.resolve().is_relative_to(places.out.resolve()):
        why = "the key would be in the folder of studies, and be copied with it"
        raise ConfigError(why, path=places.private, field="--private", fix="choose a folder outside of --out")
    return places


def _read_export(data: Path, places: Places, split: Sequence[float], workers: int | None) -> Export:
    headers, unused = scan_export(data, workers)
    places.private.mkdir(parents=True, exist_ok=True, mode=0o700)
    remove_partial_files(places.private)
    found, copies = group_studies(headers)
    key = extend_key(read_key(places.private / "key.csv"), found, split)
    mixed = {study.uid for study in found if study.uid not in key}
    unused += [
        UnusedFile(header.path, "its study has several patient ids") for header in headers if header.study_uid in mixed
    ]
    listed = places.private / "unused_files.csv"
    write_private_table(listed, UnusedFile._fields, unused)
    if not headers:
        why = f"no DICOM file was found among {counted(len(unused), 'file')}"
        raise DataError(why, path=data, fix=f"see {listed} for the reason of each file")
    write_key(places.private / "key.csv", key)
    notices = warnings_of(found)
    if mixed:
        notices.append(f"studies that are left out, since their files have several patient ids: {len(mixed)}")
    if unused:
        notices.append(f"files of the export that are not used: {len(unused)}; {listed} says why")
    if copies:
        notices.append(f"files that are copies of others: {copies}")
    sizes = {name: len({row.patient for row in key.values() if row.split == name}) for name in SPLITS}
    for name, share in zip(SPLITS, split, strict=True):
        if share > 0 and sizes[name] == 0:
            notices.append(f"the split {name} is empty: the export has {counted(sum(sizes.values()), 'patient')}")
    studies = {key[study.uid].id: study for study in found if study.uid in key}
    return Export(dict(sorted(studies.items())), key, unused, copies, notices)


def _check_shown(
    proposed: Mapping[str, Sequence[Judgement]], lines: Mapping[tuple[str, str], object], places: Places
) -> None:
    new = [
        study for study, judged in proposed.items() if any((study, each.volume.name) not in lines for each in judged)
    ]
    if new:
        why = f"studies with series that you have not been shown yet: {len(new)}, {shortened(new, 6)}"
        fix = f"run the command without --write, look at {places.review / 'import.html'}, then run it with --write"
        raise ConfigError(why, path=places.choices, field="--write", fix=fix)


def _print_choices(used: Mapping[str, Sequence[Judgement]]) -> None:
    rows: list[tuple[str, ...]] = [("study", *SEQUENCES, "look at")]
    for study, judged in used.items():
        by_use = {each.use: each for each in judged if each.use}
        doubts = ", ".join(use for use, each in by_use.items() if each.doubt)
        rows.append((study, *(by_use[name].volume.name if name in by_use else "-" for name in SEQUENCES), doubts))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _summary(
    used: Mapping[str, Sequence[Judgement]], matched: Mapping[str, StudyReport], export: Export, has_reports: bool
) -> list[str]:
    lines = []
    for sequence in SEQUENCES:
        missing = [study for study, judged in used.items() if all(each.use != sequence for each in judged)]
        if missing:
            left_out = ", which are left out" if sequence == "t2w" else ""
            lines.append(f"studies without {sequence}{left_out}: {len(missing)} of {len(used)}, {shortened(missing)}")
    if has_reports:
        without = [study for study, report in matched.items() if not report.text]
        unscored = [study for study, report in matched.items() if report.text and not report.score]
        replaced = [study for study, report in matched.items() if report.replaced]
        for studies, what in (
            (without, "studies without a report"),
            (unscored, "reports without a certain PI-RADS score (see reports.csv)"),
            (
                replaced,
                "reports with a name, id or date of the patient's headers, which was replaced (others may be left)",
            ),
        ):
            if studies:
                lines.append(f"{what}: {len(studies)}, {shortened(studies)}")
    return lines


def _write_report_list(path: Path, matched: Mapping[str, StudyReport]) -> None:
    """Which study has which score and why, without any text."""
    columns = ("study", "characters", "pirads", "reason", "replaced")
    rows = ((study, len(each.text), each.score, each.reason, each.replaced) for study, each in matched.items())
    write_csv(path, columns, rows)


def _show(
    tasks: Mapping[str, StudyTask],
    used: Mapping[str, Sequence[Judgement]],
    notices: Sequence[str],
    places: Places,
    workers: int | None,
) -> Path:
    pictures: dict[str, Picture] = {}
    names = list(tasks)
    with WorkerPool(workers) as pool, tqdm(total=len(names), desc="pictures", unit="study", mininterval=1) as progress:
        for done in pool.run(draw_study, list(tasks.values()), names, bytes_each=_BYTES_PER_STUDY):
            pictures[names[done.task]] = done.result
            progress.update()
    defects = [study for study, picture in pictures.items() if picture.defects]
    if defects:
        logger.warning(
            "studies with a chosen series that cannot be read, see the page: %d, %s", len(defects), shortened(defects)
        )
    counts = {sequence: sum(sequence in task.series for task in tasks.values()) for sequence in SEQUENCES}
    patients = len({study.split("_")[0] for study in tasks})
    facts = [("patients", str(patients)), ("studies", str(len(tasks)))]
    facts += [(f"with {sequence}", str(count)) for sequence, count in counts.items()]
    page = write_pages(places.review, used, pictures, facts, notices)
    if counts["t2w"] == 0:
        why = f"no study has an axial T2 series that the rule recognizes (studies: {len(tasks)})"
        raise DataError(why, path=page, fix=f"see the reasons there; write t2w into the column use of {places.choices}")
    logger.info("no study is in %s yet: look at %s and correct the column use of %s", places.out, page, places.choices)
    logger.info("%s holds the key to the old ids: do not pass it on", places.private)
    return page


def _write_all(
    tasks: Mapping[str, StudyTask],
    matched: Mapping[str, StudyReport],
    key: Mapping[str, KeyRow],
    places: Places,
    workers: int | None,
) -> Path:
    places.out.mkdir(parents=True, exist_ok=True)
    remove_partial_files(places.out)
    chosen = {study: task for study, task in tasks.items() if "t2w" in task.series}
    for study, task in tasks.items():
        if study not in chosen and remove_study(task):
            logger.info("%s has no T2 series any more and was removed", study)
    todo = {study: task for study, task in chosen.items() if not is_written(task)}
    names, defects = list(todo), []
    with WorkerPool(workers) as pool, tqdm(total=len(names), desc="studies", unit="study", mininterval=1) as progress:
        for done in pool.run(write_study, list(todo.values()), names, bytes_each=_BYTES_PER_STUDY):
            progress.update()
            if isinstance(done.result, DataError):
                defects.append(done.result)
            else:
                for sequence, notes in done.result.items():
                    for note in notes:
                        logger.warning("%s %s: %s", names[done.task], sequence, note)
    written = [study for study, task in chosen.items() if is_written(task)]
    splits = {row.id: row.split for row in key.values()}
    table = _write_table(places.out / "studies.csv", written, matched, splits)
    splits_of = ", ".join(f"{sum(row['split'] == name for row in table)} {name}" for name in SPLITS)
    reports, scores = (sum(bool(row[name]) for row in table) for name in ("report", "pirads"))
    logger.info(
        "%s in %s (written now: %d): %s; %d with a report, %d with a PI-RADS score",
        counted(len(table), "study", "studies"), places.out, len(todo) - len(defects), splits_of, reports, scores,
    )  # fmt: skip
    if defects:
        first, more = defects[0], len(defects) - 1
        first.why += f" (and {counted(more, 'more study', 'more studies')})" if more else ""
        raise first
    return places.out


def _write_table(
    path: Path, written: Sequence[str], matched: Mapping[str, StudyReport], splits: Mapping[str, str]
) -> list[dict[str, str]]:
    """Write studies.csv and return its rows. Filled cells are kept, as they may be the user's; the split is the key's."""
    rows: dict[str, dict[str, str]] = {}
    columns = list(TABLE_COLUMNS)
    if path.is_file():
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
        columns += [name for name in reader.fieldnames or () if name not in columns]
        if "case" not in (reader.fieldnames or ()):
            raise DataError("the table has no column 'case'", path=path, field="line 1", fix="restore its first line")
        for row in reader:
            if None in row:
                fix = "put a text that holds commas into double quotes"
                raise DataError("this line has too many cells", path=path, field=f"line {reader.line_num}", fix=fix)
            if row["case"] and (path.parent / row["case"]).is_dir():
                rows[row["case"]] = row
    for study in written:
        report = matched[study]
        row = rows.setdefault(study, dict.fromkeys(columns, ""))
        row["case"] = study
        row["split"] = splits[study]
        row["pirads"] = row["pirads"] or report.score
        row["report"] = row["report"] or report.text
    write_csv(path, columns, ([row.get(name, "") for name in columns] for _, row in sorted(rows.items())))
    return list(rows.values())
