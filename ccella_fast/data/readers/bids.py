"""Find studies in a BIDS folder (bids-specification.readthedocs.io, version 1.10): `sub-*[/ses-*]/anat|dwi/*.nii.gz`.

    T2       anat/sub-01[_ses-1][_acq-tra][_run-1]_T2w.nii.gz
    high b   dwi/sub-01_acq-b1400_dwi.nii.gz: a 3D image with b of 1000 or more in its `acq`, or acq-highb, acq-hbv
    ADC      dwi/sub-01_ADC.nii.gz, also under anat/

Columns of `participants.tsv` called as those of studies.csv hold for all sessions of a `participant_id`; `n/a` is an empty
cell."""

from __future__ import annotations

import re
from pathlib import Path

from ccella_fast.errors import DataError
from ccella_fast.storage import safe_join

MARK = "dataset_description.json"
_NAME = re.compile(r"sub-[A-Za-z0-9]+(_[A-Za-z0-9]+-[A-Za-z0-9]+)*_(?P<suffix>[A-Za-z0-9]+)\.nii(\.gz)?")
_HIGH_B = 1000  # s/mm2


def is_bids(folder: Path) -> bool:
    return (folder / MARK).is_file()


def find_series(root: Path) -> tuple[list[tuple[str, Path, dict[str, Path]]], list[DataError]]:
    """((id, folder, sequence -> file) of every session, what is wrong). id: `sub-01`, or `sub-01_ses-1`."""
    found, defects = [], []
    for subject in sorted(path for path in root.glob("sub-*") if path.is_dir()):
        sessions = sorted(path for path in subject.glob("ses-*") if path.is_dir()) or [subject]
        for session in sessions:
            files: dict[str, Path] = {}
            for path in sorted(path for kind in ("anat", "dwi") for path in (session / kind).glob("sub-*.nii*")):
                sequence = _sequence(path.name)
                if sequence is None:
                    continue
                if sequence in files:
                    fix = "keep one; name planes acq-tra, acq-cor, acq-sag"
                    why = f"two series for {sequence}: {files[sequence].name} and {path.name}"
                    defects.append(DataError(why, path=path.parent, field=sequence, fix=fix))
                files[sequence] = safe_join(root, path.relative_to(root).as_posix(), path=path.parent, field=sequence)
            if files:
                name = subject.name if session == subject else f"{subject.name}_{session.name}"
                found.append((name, session, files))
    return found, defects


def _sequence(name: str) -> str | None:
    """What a file holds, by its name; None: something else, or another plane than axial."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    entities = dict(part.split("-", 1) for part in name.split("_")[:-1])
    acquired, suffix = entities.get("acq", "").lower(), match["suffix"].lower()
    if "cor" in acquired or "sag" in acquired:
        return None
    if suffix in ("t2w", "adc"):
        return suffix
    weighting = re.search(r"b(\d+)", acquired)
    high = acquired in ("highb", "hbv") or (weighting is not None and int(weighting[1]) >= _HIGH_B)
    return "hbv" if suffix == "dwi" and high else None
