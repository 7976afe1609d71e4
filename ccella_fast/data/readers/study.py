"""A study as it was found, and the collection of what is wrong with studies."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ccella_fast.data.manifest import Split
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted

FoundSeries = tuple[str, Path, dict[str, Path]]  # name of a study, its folder, sequence -> image file


class Study(NamedTuple):
    """One study as found in a folder or a list. Its files have not been opened.

    Attributes:
        id: Unique name, which becomes part of file names.
        files: Sequence -> image file, or folder of DICOM files.
        split: "train", "val" or "test".
        dataset: Tag that `data.dataset` can select.
        pirads: One-hot class, or None if it is unknown.
        report: Text of the report, or None if there is no report.
        synthetic: Whether the images were drawn, not measured.
        source_case: Of a generated study, the case whose report or class it was generated from.
        class_predicted: Of a generated study, the one-hot class that its model predicts from the report, where it does.
        patient: Whose study it is, where the list says so; studies of one patient belong into one split.
        spacing: Voxel size in mm as stated by the reference's manifest.
        text_file: Text features that the reference prepared.
        text_isnull: 1 if these features are those of an empty report, else 0; given with `text_file` only.
        latent_files: Sequence -> latent that the reference prepared.
        listed_in: The list or folder to name in error messages.
        field: Place in the list to name in error messages.
    """

    id: str
    files: dict[str, Path]
    split: Split = "train"
    dataset: str | None = None
    pirads: list[int] | None = None
    report: str | None = None
    synthetic: bool = False
    source_case: str | None = None
    class_predicted: list[int] | None = None
    patient: str | None = None
    spacing: list[float] | None = None
    text_file: Path | None = None
    text_isnull: int | None = None
    latent_files: dict[str, Path] = {}
    listed_in: Path | None = None
    field: str | None = None


class Defects:
    """Collects DataErrors, so that one pass over the studies finds all of them; it raises the first one after `LIMIT`."""

    LIMIT = 1000

    def __init__(self) -> None:
        self.found: list[DataError] = []

    def add(self, defect: DataError) -> None:
        """Collect one more defect."""
        self.found.append(defect)
        if len(self.found) >= self.LIMIT:
            self.raise_first()

    def raise_first(self) -> None:
        """Raise the first defect, if any; its message counts the others and names up to three of their files."""
        if not self.found:
            return
        first, more = self.found[0], len(self.found) - 1
        if more:
            others = sorted({Path(defect.path).name for defect in self.found[1:] if defect.path})[:3]
            at_least = "at least " if len(self.found) >= self.LIMIT else ""
            first.why += f" (and {at_least}{counted(more, 'more defect')}, in {', '.join(others)})"
        raise first
