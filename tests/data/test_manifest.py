"""The manifest of a prepared folder: a round trip is exact, and invalid contents raise an error."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccella_fast.data.manifest import Manifest, load_manifest, open_array
from ccella_fast.errors import DataError
from ccella_fast.storage import sha256, write_json


def case(name: str, file: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "split": "train",
        "synthetic": True,
        "dataset": None,
        "spacing": [1.5, 1.5, 3.0],
        "pirads": [0, 1],
        "text_isnull": 0,
        "affine": np.eye(4).tolist(),
        "window": {"t2w": [0.0, 700.0]},
        "files": {"image/t2w": file},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "a.npy", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    entry = {"path": "a.npy", "sha256": sha256(tmp_path / "a.npy"), "bytes": (tmp_path / "a.npy").stat().st_size}
    manifest = {
        "format": "ccella_fast.prepared",
        "version": 1,
        "data": {"sequences": ["t2w"], "spacing": [1.5, 1.5, 3.0], "dim": [2, 3, 4], "dataset": None},
        "text": None,
        "vae": None,
        "scale_factor": None,
        "intensity_scale": {"t2w": 712.0},
        "truncated_reports": [],
        "cases": [case("c0", entry), case("c1", entry)],
    }
    write_json(tmp_path / "manifest.json", manifest)
    return tmp_path


def test_round_trip(folder: Path):
    values = json.loads((folder / "manifest.json").read_text())
    values["cases"][0] |= {"source_case": "real-1", "class_predicted": [1, 0]}
    write_json(folder / "manifest.json", values)
    prepared = load_manifest(folder)
    assert prepared.folder == folder and prepared.data.dim == [2, 3, 4]
    assert [(each.source_case, each.class_predicted) for each in prepared.cases] == [("real-1", [1, 0]), (None, None)]
    assert prepared.model_dump(mode="json") == json.loads((folder / "manifest.json").read_text())
    array = prepared.array(prepared.cases[0], "image/t2w", verify=True)
    np.testing.assert_array_equal(array, np.arange(24).reshape(2, 3, 4))
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0, 0] = 1


OUTSIDE = {"path": "../a.npy", "sha256": "0" * 64, "bytes": 1}
AUGMENTED = {"parameters": {}, "spacing": [1.5, 1.5, 3.0], "files": {"latent_mean/t2w": OUTSIDE}}
MISTAKES = [
    (("version",), 2, "version"),
    (("format",), "else", "format"),
    (("surplus",), 1, "surplus"),
    (("cases",), [], "cases"),
    (("cases", 1, "pirads"), [1, 1], "cases[1].pirads"),
    (("cases", 1, "pirads"), [2, -1], "cases[1].pirads[0]"),
    (("cases", 1, "split"), "vla", "cases[1].split"),
    (("cases", 1, "id"), "c0", "cases[1].id"),
    (("cases", 1, "id"), "../c1", "cases[1].id"),
    (("cases", 1, "spacing"), [1.5, 0, 3], "cases[1].spacing[1]"),
    (("cases", 1, "affine"), [[1, 0, 0, 0]], "cases[1].affine"),
    (("cases", 0, "text_isnull"), 2, "cases[0].text_isnull"),
    (("cases", 0, "files", "image/t2w", "path"), "../a.npy", "cases[0].files.image/t2w.path"),
    (("cases", 0, "files", "image/t2w", "path"), "/etc/passwd", "cases[0].files.image/t2w.path"),
    (("cases", 0, "files", "image/t2w", "sha256"), "x", "cases[0].files.image/t2w.sha256"),
    (("cases", 0, "augmented"), [AUGMENTED], "cases[0].files.latent_mean/t2w.path"),
    (("scale_factor",), [0], "scale_factor[0]"),
    (("data", "dims"), [1, 2, 3], "data.dims"),
]


@pytest.mark.parametrize(
    ("keys", "value", "field"), MISTAKES, ids=[f"{field}={str(value)[:20]}" for _, value, field in MISTAKES]
)
def test_invalid_field_is_named(folder: Path, keys: tuple, value: Any, field: str):
    manifest = json.loads((folder / "manifest.json").read_text())
    target = manifest
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = copy.deepcopy(value)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError) as caught:
        load_manifest(folder)
    assert caught.value.path == str(folder / "manifest.json") and caught.value.field == field
    assert len(str(caught.value).splitlines()) <= 5


def test_malformed_json_names_line_and_column(folder: Path):
    (folder / "manifest.json").write_text('{\n "format": "ccella_fast.prepared",\n "version" 1}')
    with pytest.raises(DataError, match="line 3, column 12"):
        load_manifest(folder)
    (folder / "manifest.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply|malformed"):
        load_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="not prepared, or its preparation is not complete"):
        load_manifest(folder)


def test_link_out_of_the_folder_raises(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    outside = tmp_path_factory.mktemp("outside") / "a.npy"
    (folder / "a.npy").rename(outside)
    (folder / "a.npy").symlink_to(outside)
    with pytest.raises(DataError, match="leaves the data folder"):
        load_manifest(folder)


def test_changed_files_are_detected(folder: Path):
    prepared = load_manifest(folder)
    path, first = folder / "a.npy", prepared.cases[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    prepared.array(first, "image/t2w")  # control: only `verify` reads the whole file
    with pytest.raises(DataError, match="SHA-256"):
        prepared.array(first, "image/t2w", verify=True)
    path.write_bytes(content[:-4])
    with pytest.raises(
        DataError, match=f"must be {len(content)} bytes according to the manifest, got {len(content) - 4}"
    ):
        prepared.array(first, "image/t2w")
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        prepared.array(first, "image/t2w")
    with pytest.raises(DataError, match="has no latent_mean/t2w") as caught:
        prepared.array(first, "latent_mean/t2w")
    assert "--vae" in caught.value.fix


def test_input_output_error_is_not_reported_as_a_malformed_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, *_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    np.save(folder / "a.npy", np.ones(3, np.float32))
    np.testing.assert_array_equal(open_array(folder / "a.npy"), 1)
    monkeypatch.setattr(np, "memmap", fail)
    with pytest.raises(DataError, match="cannot be read: Input/output error") as caught:
        open_array(folder / "a.npy")
    assert caught.value.path == str(folder / "a.npy")


@pytest.mark.parametrize("kind", ["object", "float64", "npz", "text"])
def test_only_plain_float32_arrays_are_accepted(folder: Path, kind: str):
    path = folder / "a.npy"
    if kind == "object":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "float64":
        np.save(path, np.zeros((2, 3, 4)))
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(3))
    else:
        path.write_text("hello")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cases"][0]["files"]["image/t2w"] |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    prepared: Manifest = load_manifest(folder)
    with pytest.raises(DataError, match="not a plain .npy array|must contain a float32 array, got"):
        prepared.array(prepared.cases[0], "image/t2w", verify=True)
