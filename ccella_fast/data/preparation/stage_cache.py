"""What is done: one JSON record a case, written when a stage of it is complete. It is what makes `prepare` resumable.

`cases/<id>.json` holds for each stage (image, text, latent) a digest of everything that its result depends on, the files with
their SHA-256, and a few facts for the manifest. A stage whose digest or files differ is done again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.storage import atomic_path, read_json, sha256, write_json


class StageCache:
    """The records below `out/cases`."""

    def __init__(self, out: Path):
        self.out = out
        self._sound: set[tuple[str, str]] = set()  # (path, SHA-256) seen to be right in this run
        self._fingerprints: dict[Path, list[Any]] = {}

    def get(self, case: str, stage: str) -> dict[str, Any]:
        """{"inputs", "files", "facts"} of a finished stage, or {}."""
        return self._read(case).get(stage, {})

    def is_done(self, case: str, stage: str, inputs: str) -> bool:
        """Is the stage finished with these inputs, and are its files as they were written?"""
        record = self.get(case, stage)
        return record.get("inputs") == inputs and all(map(self._intact, record["files"].values()))

    def put(self, case: str, stage: str, inputs: str, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
        record = self._read(case)
        record[stage] = {"inputs": inputs, "files": files, "facts": facts}
        write_json(self._path(case), {name: record[name] for name in sorted(record)})

    def write_array(self, relative: str, array: np.ndarray) -> dict[str, Any]:
        """Write `.npy` and return its file entry."""
        entry = write_array(self.out, relative, array)
        self.trust([entry])
        return entry

    def trust(self, entries: Iterable[dict[str, Any]]) -> None:
        """These files were written in this run, perhaps by another process."""
        self._sound |= {(entry["path"], entry["sha256"]) for entry in entries}

    def fingerprint(self, source: Path) -> list[Any]:
        """[name, size, SHA-256] of a source file, or of the files directly in a folder; read once a run."""
        if source not in self._fingerprints:
            self._fingerprints[source] = _fingerprint(source)
        return self._fingerprints[source]

    def _intact(self, entry: dict[str, Any]) -> bool:
        path, key = self.out / entry["path"], (entry["path"], entry["sha256"])
        if key not in self._sound and path.is_file() and path.stat().st_size == entry["bytes"]:
            self._sound |= {key} if sha256(path) == entry["sha256"] else set()
        return key in self._sound

    def _path(self, case: str) -> Path:
        return self.out / "cases" / f"{case}.json"

    def _read(self, case: str) -> dict[str, Any]:
        try:
            record = read_json(self._path(case)) if self._path(case).is_file() else {}
        except DataError:
            return {}  # damaged: as if it were not done
        sound = isinstance(record, dict) and all(
            isinstance(stage, dict) and stage.keys() == {"inputs", "files", "facts"} for stage in record.values()
        )
        return record if sound else {}


def write_array(out: Path, relative: str, array: np.ndarray) -> dict[str, Any]:
    """Write `out/relative`, a `.npy` file (version 1, C order, float32); returns {"path", "sha256", "bytes"}."""
    path, head = out / relative, io.BytesIO()
    array = np.ascontiguousarray(array, np.float32)
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    hashed = hashlib.sha256(head.getvalue())
    hashed.update(array.data)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(head.getvalue())
        file.write(array.data)
    return {"path": relative, "sha256": hashed.hexdigest(), "bytes": len(head.getvalue()) + array.nbytes}


def file_entry(out: Path, relative: str) -> dict[str, Any]:
    """The manifest's entry of a file that is there."""
    path = out / relative
    return {"path": relative, "sha256": sha256(path), "bytes": path.stat().st_size}


def fingerprint_of(values: Any) -> str:
    """SHA-256 of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _fingerprint(path: Path) -> list[Any]:
    if path.is_dir():
        return [_fingerprint(file) for file in sorted(path.iterdir()) if file.is_file() and file.name[0] != "."]
    return [path.name, path.stat().st_size, sha256(path)]
