"""Invalid studies raise one error of at most five lines that names file, field and fix, and nothing is written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import ConfigError, DataError, DiskError
from study_fixtures import SHAPE, config, patch_header, tree, voxels, write_bert, write_nifti, write_studies


class Bad(NamedTuple):
    """A defect of a folder of studies.

    Attributes:
        name: Id of the test.
        damage: Called with the folder of studies; returns the value of --data, or None for the folder itself.
        words: Words of the message.
        file: End of the path that the message names.
        field: Field that the message names.
    """

    name: str
    damage: Callable[[Path], Path | None]
    words: str
    file: str
    field: str | None


def _series(folder: Path, number: int = 1) -> Path:
    return folder / f"case{number}" / "t2w.nii.gz"


def _cut(folder: Path) -> None:
    path = _series(folder)
    path.write_bytes(path.read_bytes()[:-2000])


def _flip(folder: Path) -> None:
    path = _series(folder)
    content = bytearray(path.read_bytes())
    content[-6] ^= 16  # in the checksum
    path.write_bytes(content)


def _nan(folder: Path) -> None:
    values = voxels().astype(np.float32)
    values[0, 0, 0] = np.nan
    write_nifti(_series(folder), values)


def _json(studies: Path, text: str | None = None, **changes) -> Path:
    entries = [{"axt2": f"case{n}/t2w.nii.gz", "folder": f"case{n}", "pirads": [0, 1], "text": ""} for n in range(3)]
    entries[1] |= changes
    (studies / "train.json").write_text(json.dumps(entries) if text is None else text)
    return studies / "train.json"


def _link(folder: Path) -> Path:
    outside = write_nifti(folder.parent / "outside" / "t2w.nii.gz")
    _series(folder).unlink()
    _series(folder).symlink_to(outside)
    return _json(folder)


def _table(folder: Path, old: str, new: str) -> None:
    path = folder / "studies.csv"
    path.write_text(path.read_text().replace(old, new))


def _coronal(folder: Path) -> None:
    write_nifti(_series(folder), affine=np.array([[-1.5, 0, 0, 30], [0, 0, 3, -20], [0, -1.5, 0, 30], [0, 0, 0, 1]]))


def _remove(path: Path) -> None:
    path.unlink()


MANY = [
    Bad("missing file", lambda f: (_remove(_series(f)), _json(f))[1], "does not exist", "case1/t2w.nii.gz", "[1]"),
    Bad("truncated gzip", _cut, "cut off", "case1/t2w.nii.gz", "gzip stream"),
    Bad("flipped bit", _flip, "damaged", "case1/t2w.nii.gz", "gzip stream"),
    Bad("NaN voxels", _nan, "not finite", "case1/t2w.nii.gz", "voxels"),
    Bad("flat", lambda f: write_nifti(_series(f), np.ones(SHAPE)) and None, "equal", "case1/t2w.nii.gz", "voxels"),
    Bad(
        "zero spacing",
        lambda f: patch_header(_series(f), 84, bytes(4)) and None,
        "voxel size",
        "case1/t2w.nii.gz",
        "pixdim",
    ),
    Bad(
        "4D",
        lambda f: write_nifti(_series(f), np.stack([voxels()] * 2, -1)) and None,
        "2 volumes",
        "case1/t2w.nii.gz",
        "dim",
    ),
    Bad("coronal", _coronal, "coronal, not axial", "case1/t2w.nii.gz", "direction"),
    Bad(
        "absurd size",
        lambda f: patch_header(_series(f), 40, struct.pack("<4h", 3, 32767, 32767, 32767)) and None,
        "claims a size",
        "case1/t2w.nii.gz",
        "dim",
    ),
    Bad("wrong one-hot", lambda f: _json(f, pirads=[1, 1]), "one-hot", "train.json", "[1].pirads"),
    Bad("duplicate id", lambda f: _json(f, folder="case0"), "2 studies have the id 'case0'", "train.json", "[1]"),
    Bad("malformed JSON", lambda f: _json(f, '[\n {"folder" 1}]'), "line 2, column 12", "train.json", None),
    Bad("JSON of another kind", lambda f: _json(f, '{"a": 1}'), "a JSON list", "train.json", None),
    Bad("duplicate key", lambda f: _json(f, '[{"folder": "a", "folder": "b"}]'), "appears twice", "train.json", None),
    Bad("path with ..", lambda f: _json(f, axt2="../x/t2w.nii.gz"), "leaves the data folder", "train.json", "[1].axt2"),
    Bad("absolute path", lambda f: _json(f, axt2="/etc/passwd"), "leaves the data folder", "train.json", "[1].axt2"),
    Bad("link out", _link, "leaves the data folder", "train.json", "[1].axt2"),
    Bad(
        "class",
        lambda f: _table(f, "train,2,", "train,7,"),
        "pirads must be 1 to 5, neg, pos or empty, got '7'",
        "studies.csv",
        "line 2, pirads",
    ),
    Bad(
        "misspelt column",
        lambda f: _table(f, "pirads", "pi_rads"),
        "did you mean 'pirads'",
        "studies.csv",
        "line 1, pi_rads",
    ),
    Bad(
        "unknown case",
        lambda f: _table(f, "case1,", "case9,"),
        "no study is called 'case9'",
        "studies.csv",
        "line 3, case",
    ),
    Bad("no data", lambda f: f / "absent", "no such file or folder", "absent", None),
]


@pytest.mark.parametrize("bad", MANY, ids=[bad.name for bad in MANY])
def test_bad_study_raises(tmp_path: Path, bad: Bad):
    folder, out = write_studies(tmp_path / "studies"), tmp_path / "out"
    data = bad.damage(folder) or folder
    with pytest.raises(DataError) as caught:
        prepare(data, out, config())
    error = caught.value
    lines = str(error).splitlines()
    assert len(lines) <= 5 and bad.words in str(error), str(error)
    assert error.path and error.path.endswith(bad.file) and error.field == bad.field and error.fix
    assert error.exit_code == 3
    assert not out.exists(), "nothing is written"


def test_valid_studies_are_accepted(tmp_path: Path):
    """Negative control of the table."""
    folder = write_studies(tmp_path / "studies")
    prepare(folder, tmp_path / "a", config())
    prepare(_json(folder), tmp_path / "b", config())
    assert (tmp_path / "a/manifest.json").is_file() and (tmp_path / "b/manifest.json").is_file()


def test_series_linked_from_elsewhere_are_prepared_on_request(tmp_path: Path):
    from ccella_fast.cli import main

    folder = write_studies(tmp_path / "studies")
    data = _link(folder)  # the list; the folder itself is a second way to the series
    prepare(data, tmp_path / "a", config(), follow_links=True)
    (tmp_path / "config.json").write_text(config().model_dump_json())
    arguments = ["prepare", "--data", str(folder), "--config", str(tmp_path / "config.json"), "--out"]
    assert main([*arguments, str(tmp_path / "b")]) == 3 and not (tmp_path / "b").exists()
    assert main([*arguments, str(tmp_path / "b"), "--follow_links"]) == 0
    assert (tmp_path / "b/manifest.json").is_file()


def test_a_bad_study_keeps_earlier_results(tmp_path: Path):
    folder, out = write_studies(tmp_path / "studies"), tmp_path / "out"
    prepare(folder, out, config())
    before = tree(out)
    _flip(folder)
    with pytest.raises(DataError):
        prepare(folder, out, config())
    assert tree(out) == before


def test_all_defects_are_counted(tmp_path: Path):
    folder = write_studies(tmp_path / "studies")
    _flip(folder)
    write_nifti(_series(folder, 2), np.ones(SHAPE))
    with pytest.raises(DataError, match="1 more defect") as caught:
        prepare(folder, tmp_path / "out", config())
    assert len(str(caught.value).splitlines()) <= 5


def test_grid_that_is_not_divisible_raises(tmp_path: Path):
    with pytest.raises(ConfigError, match="not divisible by 16"):
        prepare(write_studies(tmp_path / "studies"), tmp_path / "out", config(data__dim=[32, 40, 16]))
    assert not (tmp_path / "out").exists()


def test_missing_sequence_raises(tmp_path: Path):
    changes = {"data__sequences": ["t2w", "adc"], "model__latent_channels": [4, 4]}
    studies = write_studies(tmp_path / "studies")
    (studies / "studies.csv").unlink()
    with pytest.raises(DataError, match="the study 'case0' has no adc .and 2 more defects") as caught:
        prepare(studies, tmp_path / "out", config(**changes))
    assert "data.sequences" in caught.value.fix and caught.value.path == str(studies / "case0")


def test_unwritable_output_raises(tmp_path: Path):
    folder = write_studies(tmp_path / "studies")
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(DiskError) as caught:
            prepare(folder, out, config())
        assert caught.value.exit_code == 5 and caught.value.path == str(out) and caught.value.fix
    assert (tmp_path / "file").read_text() == "x"
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(DiskError, match="this folder cannot be written"):
            prepare(folder, tmp_path / "locked" / "out", config())


def test_full_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskError, match="KiB are needed, but only 1000 bytes are free"):
        prepare(write_studies(tmp_path / "studies"), tmp_path / "out", config())
    assert not (tmp_path / "out").exists()


def test_corrupted_prepared_file_raises(tmp_path: Path):
    from study_fixtures import write_vae

    folder, out, settings = write_studies(tmp_path / "studies"), tmp_path / "out", config()
    prepare(folder, out, settings, vae=write_vae(tmp_path / "vae", settings))
    assert len(PreparedDataset(out, settings)) == 2
    path = out / "latents/case0/t2w_sigma.npy"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256") as caught:
        PreparedDataset(out, settings)
    assert caught.value.path == str(path) and caught.value.field == "case0.files.latent_sigma/t2w"
    prepare(folder, out, settings, vae=tmp_path / "vae")
    assert len(PreparedDataset(out, settings)) == 2


def test_report_text_never_appears(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture):
    """With the text stage; tests/project/test_privacy.py covers the other stages."""
    folder, settings = (
        write_studies(tmp_path / "studies"),
        config(variant="CCELLA", encoder=write_bert(tmp_path / "bert")),
    )
    secret = "KANARIENVOGEL"
    for old, new in [("lesion of 4 mm", secret), ("train,2", "train,8")]:
        _table(folder, old, new)
        try:
            prepare(folder, tmp_path / "out", settings)
        except DataError as error:
            assert secret not in str(error)
    _table(folder, "train,8", "train,2")
    prepare(folder, tmp_path / "out", settings)
    captured = capfd.readouterr()
    assert secret not in caplog.text + captured.out + captured.err
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.parent.name == "text" for path in written)
    assert not any(secret.encode() in path.read_bytes() for path in written)


def _damage(content: bytes, reach: int, rng: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(reach))
        patches = [
            bytes([damaged[at] ^ (1 << int(rng.integers(8)))]),
            bytes(4),
            b"\xff" * 4,
            b"\0\0\xc0\x7f",
            rng.bytes(4),
        ]
        patch = patches[int(rng.integers(len(patches)))]
        damaged[at : at + len(patch)] = patch
    return bytes(damaged)


def test_random_damage_raises_nothing_but_data_errors(tmp_path: Path):
    """Headers, tables and manifests with random damage are read, or raise a DataError of at most five lines."""
    from ccella_fast.data.readers.discovery import find_studies
    from ccella_fast.data.readers.volume_file import read_volume

    studies = write_studies(tmp_path / "studies", 2)
    volume = write_nifti(tmp_path / "t2w.nii", voxels((10, 9, 6)))
    subjects = [
        (volume, 352, lambda: read_volume(volume)),
        (studies / "studies.csv", 60, lambda: find_studies(studies)),
        (_json(studies), 150, lambda: find_studies(studies / "train.json")),
    ]
    rng = np.random.default_rng(0)
    for path, reach, read in subjects:
        content, errors = path.read_bytes(), 0
        for _ in range(400):
            path.write_bytes(_damage(content, reach, rng))
            try:
                read()
            except DataError as error:
                errors += 1
                assert len(str(error).splitlines()) <= 5, str(error)
        assert 100 < errors <= 400, path  # control: the damage reaches the checks
        path.write_bytes(content)
