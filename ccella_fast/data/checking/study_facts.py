"""What the checks know of a study, from a folder or list of studies, or from a prepared folder without opening its images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ccella_fast.data.checking.signature import Signature, decode_signature
from ccella_fast.data.manifest import Manifest, StudyEntry
from ccella_fast.data.readers.study import Study
from ccella_fast.errors import DataError
from ccella_fast.storage import read_json

# Ids that name the patient first: BIDS, `ccella-fast import`, PI-CAI.
_PATIENT_IN_ID = re.compile(r"(sub-[A-Za-z0-9]+)_ses-[A-Za-z0-9]+|(p\d+)_s\d+|(\d{5})_\d{7}")


class SeriesFacts(NamedTuple):
    """What one series is like, as it was measured.

    Attributes:
        shape: Voxels along R, A, S.
        spacing: Voxel size in mm along R, A, S.
        voxels_sha256: Identity of the voxels, whatever the file's name and format; None if they were not read.
        low: Lowest intensity; None if the voxels were not read.
        high: 99.5th percentile of the intensities.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    voxels_sha256: str | None = None
    low: float | None = None
    high: float | None = None


class StudyFacts(NamedTuple):
    """What the checks know of a study.

    Attributes:
        id: The study's id.
        split: "train", "val" or "test".
        dataset: Tag that `data.dataset` can select.
        patient: Which patient, or None if neither the list nor the id says so.
        pirads: One-hot class, or None.
        report: Identity of the report's text, or None if there is no report.
        words: Length of the report; None if it is unknown.
        synthetic: Whether the images were drawn, not measured.
        images: Sequence -> identity of its voxels.
        signature: By which flipped, cropped and rescaled copies are recognized; None if it was not made.
        series: Sequence -> facts of the series that was measured; empty for a prepared folder.
        source_case: Of a generated study, the case that it was generated from, if that is known.
    """

    id: str
    split: str
    dataset: str | None
    patient: str | None
    pirads: list[int] | None
    report: str | None
    words: int | None
    synthetic: bool
    images: dict[str, str] = {}
    signature: Signature | None = None
    series: dict[str, SeriesFacts] = {}
    source_case: str | None = None


def facts_of_studies(studies: Sequence[Study]) -> list[StudyFacts]:
    """Facts from the list alone; no image is opened."""
    return [
        StudyFacts(
            study.id,
            study.split,
            study.dataset,
            patient_of(study.id, study.patient),
            study.pirads,
            *_report(study),
            study.synthetic,
            source_case=study.source_case,
        )
        for study in studies
    ]


def facts_of_manifest(manifest: Manifest) -> list[StudyFacts]:
    """Facts of a prepared folder from its manifest and records; no image is opened."""
    return [_facts_of_entry(manifest, case) for case in manifest.cases]


def patient_of(study: str, patient: str | None) -> str | None:
    """The patient as the list states it, else as the id implies it, else None."""
    if patient is not None:
        return patient
    match = _PATIENT_IN_ID.fullmatch(study)
    return match and next(group for group in match.groups() if group)


def _report(study: Study) -> tuple[str | None, int | None]:
    """Identity and length of the report. Letter case and spaces do not matter."""
    if study.text_file is not None:  # the features are not read; equal reports may have equal features in several files
        return (None if study.text_isnull else str(study.text_file)), None
    words = (study.report or "").lower().split()
    return (hashlib.sha256(" ".join(words).encode()).hexdigest() if words else None), len(words)


def _facts_of_entry(manifest: Manifest, case: StudyEntry) -> StudyFacts:
    images = {
        key.partition("/")[2]: entry.sha256
        for kind in ("latent_mean", "image")  # equal images have equal latents; without images, latents are compared
        for key, entry in case.files.items()
        if key.startswith(f"{kind}/")
    }
    text = case.files.get("text")
    record = _read_record(manifest, case.id)
    signature = record.get("image", {}).get("facts", {}).get("signature")
    return StudyFacts(
        case.id,
        case.split,
        case.dataset,
        patient_of(case.id, None if case.patient is None else str(case.patient)),
        None if case.pirads is None else [*case.pirads],
        None if case.text_isnull or text is None else text.sha256,
        record.get("text", {}).get("facts", {}).get("words"),
        case.synthetic,
        images,
        None if signature is None else decode_signature(signature),
        source_case=case.source_case,
    )


def _read_record(manifest: Manifest, study: str) -> dict[str, Any]:
    """What prepare has recorded of the study; {} if the record is missing or damaged, which only costs some checks."""
    try:
        record = read_json(manifest.folder / "cases" / f"{study}.json")
    except DataError:
        return {}
    return record if isinstance(record, dict) else {}
