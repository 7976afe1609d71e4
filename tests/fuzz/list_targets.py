"""Tables, lists and reports, and an export with what `import` reads and writes next to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import mutations as m
from mutations import Mutation, on_one_file
from target import CANARY, Content, Target, digest, prepare_command, text_target

if TYPE_CHECKING:
    from ccella_fast.data.importing.sequence_choice import Judgement
    from ccella_fast.data.importing.series import ExportedStudy


def _write_studies(folder: Path) -> None:
    from study_fixtures import write_nifti

    for number in range(3):
        write_nifti(folder / f"case{number}" / "t2w.nii.gz", seed=number)


def _write_table(folder: Path) -> None:
    _write_studies(folder)
    lines = [
        "case,split,pirads,report,date",
        f'case0,train,2,"Lesion {CANARY} of 4 mm, left",2020-01-01',
        f"case1,test,4,Focus {CANARY},2020-01-02",
        "case2,,,,",
    ]
    (folder / "studies.csv").write_text("\n".join(lines) + "\n")


def _write_reports(folder: Path) -> None:
    _write_studies(folder)
    (folder / "r0.txt").write_text(f"Prostate 42 ml.\nFocus {CANARY} of 18 mm.\nPI-RADS 5.\n")
    (folder / "studies.csv").write_text("case,pirads,report_file\ncase0,5,r0.txt\ncase1,2,\n")


def _write_bids(folder: Path) -> None:
    from study_fixtures import write_nifti

    for number in range(2):
        write_nifti(folder / f"sub-0{number}" / "anat" / f"sub-0{number}_T2w.nii.gz", seed=number)
    (folder / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    table = f"participant_id\tpirads\treport\tage\nsub-00\t4\tFocus {CANARY}\t60\nsub-01\tn/a\tn/a\tn/a\n"
    (folder / "participants.tsv").write_text(table)


def _write_list(folder: Path) -> None:
    from study_fixtures import write_nifti

    for number in range(2):
        write_nifti(folder / f"c{number}" / "axt2.nii.gz", seed=number)
        (folder / f"c{number}" / "text.txt").write_text(f"Focus {CANARY} of 18 mm.")
    entries = [
        {
            "axt2": f"c{n}/axt2.nii.gz",
            "folder": f"c{n}",
            "pirads": [0, 1],
            "spacing": [1.5, 1.5, 3.0],
            "note": f"{CANARY} x",
        }
        for n in range(2)
    ]
    (folder / "list.json").write_text(json.dumps(entries, indent=1))


def _find(entry: str, folder: Path) -> Content:
    from ccella_fast.data.readers.discovery import find_studies

    studies = find_studies(folder / entry)
    fields = [study._replace(listed_in=None, field=None) for study in studies]
    return Content(digest(str(fields).replace(str(folder), "")))


# ---- import ----


def _write_export(folder: Path) -> None:
    """One study of three series, a table of reports, and the choices and the key as a first import has written them."""
    from ccella_fast.data.importing.choices import write_choices
    from ccella_fast.data.importing.deidentification import extend_key, write_key
    from pacs_fixtures import change, remove, write_export

    export = folder / "export"
    write_export(export, patients=1, visits=1)
    for series in (1, 2, 3, 5, 6, 7, 8, 11, 12, 13):
        remove(export, series=series)
    for path in (export / "empty.dcm", export / "QUAGGA0" / "letter.txt"):
        path.unlink()
    for name in ("PatientName", "PatientID", "AccessionNumber", "InstitutionName", "ReferringPhysicianName"):
        change(export, name, CANARY)
    (folder / "reports.csv").write_text(
        f'accession;report;pirads\n{CANARY};"Focus {CANARY} of 18 mm;\nPI-RADS 5.";5\nother;{CANARY} x;\n'
    )
    studies, judged, _ = _choose(export)
    key = extend_key({}, studies, (1, 0, 0))
    write_key(folder / "private" / "key.csv", key)
    shown = {key[study.uid].id: each for study, each in zip(studies, judged, strict=True)}
    write_choices(folder / "studies.import" / "choices.csv", shown, shown, {})


def _choose(export: Path) -> tuple[list[ExportedStudy], list[list[Judgement]], int]:
    """The studies, their volumes with what each is chosen as, and the number of files that are not used."""
    from ccella_fast.data.importing.scan import FileHeader, read_headers
    from ccella_fast.data.importing.sequence_choice import choose_sequences
    from ccella_fast.data.importing.series import group_studies

    found = read_headers(sorted(str(path) for path in export.rglob("*.dcm")))
    headers = [each for each in found if isinstance(each, FileHeader)]
    studies, _ = group_studies(headers)
    return studies, [choose_sequences(study.volumes) for study in studies], len(found) - len(headers)


def _read_export(folder: Path) -> Content:
    """What is chosen of the export, and its voxels."""
    from ccella_fast.data.importing.write import read_series, task_of

    _, judged, unused = _choose(folder / "export")
    tasks = [task_of("p0001_s1", each, folder / "out", folder / "out.private") for each in judged]
    volumes = [read_series(task, sequence) for task in tasks for sequence in task.series]
    # A file that is not used is listed, and a volume that is not chosen is shown with the reason.
    unchosen = any(not volume.use for each in judged for volume in each)
    noted = unused > 0 or unchosen or any(volume.notes for volume in volumes)
    slices = sum(volume.array.shape[2] for volume in volumes)
    return Content(
        digest(*(part for each in volumes for part in (each.array, each.affine.round(5) + 0.0))), slices, noted
    )


def _read_choices(folder: Path) -> Content:
    from ccella_fast.data.importing.choices import read_choices

    return Content(digest(sorted(read_choices(folder / "studies.import" / "choices.csv").items())))


def _read_key(folder: Path) -> Content:
    from ccella_fast.data.importing.deidentification import read_key

    return Content(digest(sorted(read_key(folder / "private" / "key.csv").items())))


def _read_reports(folder: Path) -> Content:
    from ccella_fast.data.importing.pirads_text import read_pirads
    from ccella_fast.data.importing.report_sources import read_sources

    sources = read_sources(folder / "reports.csv", None, None)
    return Content(digest(sources, [read_pirads(source.text) for source in sources]))


def _import(folder: Path, out: Path) -> list[str]:
    """The second run, which writes the studies to where the first one put its choices."""
    command = [
        "ccella_fast.cli",
        "import",
        "--data",
        str(folder / "export"),
        "--out",
        str(folder / "studies"),
        "--write",
    ]
    return [*command, "--private", str(folder / "private"), "--reports", str(folder / "reports.csv"), "--workers", "1"]


_EXPORT = [
    Mutation("header", on_one_file(m.header(1500), ".dcm")),
    Mutation("tags", on_one_file(m.dicom_tags, ".dcm")),
    Mutation("tags", on_one_file(m.dicom_tags, ".dcm")),
    Mutation("cut", on_one_file(m.cut, ".dcm")),
    Mutation("splice", on_one_file(m.splice, ".dcm")),
]


def _list_command(folder: Path, out: Path) -> list[str]:
    return prepare_command(folder / "list.json", out)


def _import_target(name: str, file: str, read: Callable[[Path], Content], count: int) -> Target:
    return text_target(name, _write_export, file, read, count, command=_import)


TARGETS = [
    text_target("studies.csv", _write_table, "studies.csv", partial(_find, ""), 1500, command=prepare_command),
    text_target("participants.tsv", _write_bids, ".tsv", partial(_find, ""), 1000, command=prepare_command),
    text_target("report file", _write_reports, "r0.txt", partial(_find, ""), 2000, command=prepare_command),
    text_target("JSON list", _write_list, "list.json", partial(_find, "list.json"), 5000, command=_list_command),
    Target("export", _write_export, _read_export, _EXPORT, 3000, _import),
    _import_target("choices of import", "choices.csv", _read_choices, 1000),
    _import_target("key of import", "key.csv", _read_key, 1000),
    _import_target("reports of import", "reports.csv", _read_reports, 1500),
]
