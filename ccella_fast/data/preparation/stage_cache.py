"""The record of completed work that makes `prepare` resumable: one JSON file per case, written when a stage is complete.

`cases/<id>.json` contains for each stage (image, text, latent) a digest of everything that its result depends on, its files
with their SHA-256, and a few facts for the manifest. A stage is run again if its digest or its files differ.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.data.readers.volume_file import files_of_volume
from ccella_fast.errors import DataError
from ccella_fast.storage import atomic_path, read_json, sha256, write_json


class StageCache:
    """The records in `out/cases`."""

    def __init__(self, out: Path):
        self.out = out
        self._verified: set[tuple[str, str]] = set()  # (path, SHA-256) pairs that were verified in this run
        self._fingerprints: dict[Path, list[Any]] = {}

    def get(self, case: str, stage: str) -> dict[str, Any]:
        """The record of a completed stage with the keys "inputs", "files" and "facts", or {} if it is not complete."""
        return self._read(case).get(stage, {})

    def is_done(self, case: str, stage: str, inputs: str) -> bool:
        """Whether the stage is complete with these inputs and its files are unchanged."""
        record = self.get(case, stage)
        return record.get("inputs") == inputs and all(map(self._intact, record["files"].values()))

    def put(self, case: str, stage: str, inputs: str, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
        """Record a stage as complete.

        Args:
            case: id of the study.
            stage: name of the stage.
            inputs: digest of everything that the result depends on.
            files: file entries by key.
            facts: JSON values for the manifest.
        """
        record = self._read(case)
        record[stage] = {"inputs": inputs, "files": files, "facts": facts}
        write_json(self._path(case), {name: record[name] for name in sorted(record)})

    def write_array(self, relative: str, array: np.ndarray) -> dict[str, Any]:
        """Write the `.npy` file `relative` and return its file entry."""
        entry = write_array(self.out, relative, array)
        self.trust([entry])
        return entry

    def trust(self, entries: Iterable[dict[str, Any]]) -> None:
        """Accept files that this run wrote, possibly in another process, without reading them again."""
        self._verified |= {(entry["path"], entry["sha256"]) for entry in entries}

    def fingerprint(self, source: Path) -> list[Any]:
        """[name, size, SHA-256] of a source file, or a list of these for several files; read once per run.

        These are the files in a folder, or those of a series in several files, such as a header and its voxels.
        """
        if source not in self._fingerprints:
            self._fingerprints[source] = _fingerprint(source)
        return self._fingerprints[source]

    def _intact(self, entry: dict[str, Any]) -> bool:
        path, key = self.out / entry["path"], (entry["path"], entry["sha256"])
        if key not in self._verified and path.is_file() and path.stat().st_size == entry["bytes"]:
            self._verified |= {key} if sha256(path) == entry["sha256"] else set()
        return key in self._verified

    def _path(self, case: str) -> Path:
        return self.out / "cases" / f"{case}.json"

    def _read(self, case: str) -> dict[str, Any]:
        try:
            record = read_json(self._path(case)) if self._path(case).is_file() else {}
        except DataError:
            return {}  # a damaged record is treated as missing
        is_valid = isinstance(record, dict) and all(
            isinstance(stage, dict) and stage.keys() == {"inputs", "files", "facts"} for stage in record.values()
        )
        return record if is_valid else {}


def write_array(out: Path, relative: str, array: np.ndarray) -> dict[str, Any]:
    """Write `out/relative`, a `.npy` file (version 1, C order, float32).

    Returns:
        The file entry, a dictionary with the keys "path", "sha256" and "bytes".
    """
    path, header = out / relative, io.BytesIO()
    array = np.ascontiguousarray(array, np.float32)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    digest = hashlib.sha256(header.getvalue())
    digest.update(array.data)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.getvalue())
        file.write(array.data)
    return {"path": relative, "sha256": digest.hexdigest(), "bytes": len(header.getvalue()) + array.nbytes}


def file_entry(out: Path, relative: str) -> dict[str, Any]:
    """The manifest entry of the existing file `out/relative`."""
    path = out / relative
    return {"path": relative, "sha256": sha256(path), "bytes": path.stat().st_size}


def fingerprint_of(values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _fingerprint(path: Path) -> list[Any]:
    try:
        files = files_of_volume(path)
    except DataError:  # a damaged header, which the check of the series reports
        files = [path]
    each = [[file.name, file.stat().st_size, sha256(file)] for file in files]
    return each if path.is_dir() or len(each) > 1 else each[0]
