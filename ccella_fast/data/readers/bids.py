"""Find the series of a BIDS folder (bids-specification.readthedocs.io, version 1.10): `sub-*[/ses-*]/anat|dwi/*.nii.gz`.

    T2       anat/sub-01[_ses-1][_acq-tra][_run-1]_T2w.nii.gz
    high b   dwi/sub-01_acq-b1400_dwi.nii.gz: a 3D image with a b-value of at least 1000 in `acq`, or acq-highb, acq-hbv
    ADC      dwi/sub-01_ADC.nii.gz, also in anat/

Series with the word `cor`, `coronal`, `sag` or `sagittal` in `acq` are not read. The columns of `participants.tsv` that have
the names of those of studies.csv hold for all sessions of a `participant_id`; `n/a` is an empty cell.
"""

from __future__ import annotations

import re
from pathlib import Path

from ccella_fast.data.readers.links import join_series
from ccella_fast.data.readers.study import Defects, FoundSeries
from ccella_fast.data.readers.volume_file import volume_suffix
from ccella_fast.errors import DataError

MARK = "dataset_description.json"
_NAME = re.compile(r"sub-[A-Za-z0-9]+(_[A-Za-z0-9]+-[A-Za-z0-9]+)*_(?P<suffix>[A-Za-z0-9]+)\.nii(\.gz)?")
_HIGH_B = 1000  # s/mm2
_OTHER_PLANES = {"cor", "coronal", "sag", "sagittal"}


def is_bids(folder: Path) -> bool:
    """Whether `folder` is the root of a BIDS dataset."""
    return (folder / MARK).is_file()


def find_bids_series(
    root: Path, follow_links: bool, defects: Defects
) -> tuple[list[FoundSeries], dict[Path, list[str]]]:
    """The series of every session that has any, and the images of a folder that are not read.

    Names of studies are `sub-01`, or `sub-01_ses-1` if the subject has sessions.
    """
    found, unread = [], dict[Path, list[str]]()
    for subject in sorted(path for path in root.glob("sub-*") if path.is_dir()):
        sessions = sorted(path for path in subject.glob("ses-*") if path.is_dir())
        for session in [*sessions, subject]:
            files: dict[str, Path] = {}
            for path in sorted(session.glob("*/sub-*")):
                if path.parent in sessions or volume_suffix(path.name) is None:
                    continue
                sequence = _sequence_of(path)
                if sequence is None:
                    unread.setdefault(path.parent, []).append(path.name)
                elif sequence in files:
                    why = f"this folder holds two series for {sequence}: {files[sequence].name} and {path.name}"
                    fix = "keep one; name planes acq-tra, acq-cor, acq-sag"
                    defects.add(DataError(why, path=path.parent, field=sequence, fix=fix))
                else:
                    try:
                        relative = path.relative_to(root).as_posix()
                        files[sequence] = join_series(
                            root, relative, follow_links=follow_links, path=path, field=sequence
                        )
                    except DataError as defect:
                        defects.add(defect)
            if files:
                name = subject.name if session == subject else f"{subject.name}_{session.name}"
                found.append((name, session, files))
            elif session != subject or not sessions:
                unread.setdefault(session.parent, []).append(f"{session.name}/")
    return found, unread


def _sequence_of(path: Path) -> str | None:
    """The sequence of a file by its name; None for other files and for planes other than the axial one."""
    match = _NAME.fullmatch(path.name)
    if match is None or path.parent.name not in ("anat", "dwi"):
        return None
    entities = dict(part.split("-", 1) for part in path.name.split("_")[:-1])
    label, suffix = entities.get("acq", ""), match["suffix"].lower()
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", label)  # of acq-tseCor or acq-3dsag
    if _OTHER_PLANES & {word.lower() for word in words}:
        return None
    if suffix in ("t2w", "adc"):
        return suffix
    b_value = re.search(r"b(\d+)", label.lower())
    is_high_b = label.lower() in ("highb", "hbv") or (b_value is not None and int(b_value[1]) >= _HIGH_B)
    return "hbv" if suffix == "dwi" and is_high_b else None
