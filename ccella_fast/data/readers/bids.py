"""Find the series of a BIDS folder (bids-specification.readthedocs.io, version 1.10): `sub-*[/ses-*]/anat|dwi/*.nii.gz`.

    T2       anat/sub-01[_ses-1][_acq-tra][_run-1]_T2w.nii.gz
    high b   dwi/sub-01_acq-b1400_dwi.nii.gz: a 3D image with a b-value of at least 1000 in `acq`, or acq-highb, acq-hbv
    ADC      dwi/sub-01_ADC.nii.gz, also in anat/

The columns of `participants.tsv` that have the names of those of studies.csv hold for all sessions of a `participant_id`; `n/a`
is an empty cell.
"""

from __future__ import annotations

import re
from pathlib import Path

from ccella_fast.data.readers.study import Defects, FoundSeries
from ccella_fast.errors import DataError
from ccella_fast.storage import safe_join

MARK = "dataset_description.json"
_NAME = re.compile(r"sub-[A-Za-z0-9]+(_[A-Za-z0-9]+-[A-Za-z0-9]+)*_(?P<suffix>[A-Za-z0-9]+)\.nii(\.gz)?")
_HIGH_B = 1000  # s/mm2


def is_bids(folder: Path) -> bool:
    """Whether `folder` is the root of a BIDS dataset."""
    return (folder / MARK).is_file()


def find_bids_series(root: Path, defects: Defects) -> list[FoundSeries]:
    """The series of every session that has any. Names are `sub-01`, or `sub-01_ses-1` if the subject has sessions."""
    found = []
    for subject in sorted(path for path in root.glob("sub-*") if path.is_dir()):
        sessions = sorted(path for path in subject.glob("ses-*") if path.is_dir()) or [subject]
        for session in sessions:
            files: dict[str, Path] = {}
            for path in sorted(path for kind in ("anat", "dwi") for path in (session / kind).glob("sub-*.nii*")):
                sequence = _sequence_of(path.name)
                if sequence is None:
                    continue
                if sequence in files:
                    why = f"this folder holds two series for {sequence}: {files[sequence].name} and {path.name}"
                    fix = "keep one; name planes acq-tra, acq-cor, acq-sag"
                    defects.add(DataError(why, path=path.parent, field=sequence, fix=fix))
                files[sequence] = safe_join(root, path.relative_to(root).as_posix(), path=path.parent, field=sequence)
            if files:
                name = subject.name if session == subject else f"{subject.name}_{session.name}"
                found.append((name, session, files))
    return found


def _sequence_of(name: str) -> str | None:
    """The sequence of a file by its name; None for other files and for planes other than the axial one."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    entities = dict(part.split("-", 1) for part in name.split("_")[:-1])
    acquisition, suffix = entities.get("acq", "").lower(), match["suffix"].lower()
    if "cor" in acquisition or "sag" in acquisition:
        return None
    if suffix in ("t2w", "adc"):
        return suffix
    b_value = re.search(r"b(\d+)", acquisition)
    is_high_b = acquisition in ("highb", "hbv") or (b_value is not None and int(b_value[1]) >= _HIGH_B)
    return "hbv" if suffix == "dwi" and is_high_b else None
