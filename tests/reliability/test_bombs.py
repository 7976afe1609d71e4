"""Files that claim or unpack to far more than they hold are refused without the memory that they ask for (goal R12)."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
from harness import judge
from study_fixtures import config, oblique, patch_header, write_dicom, write_nifti
from target import Content, Target, digest

MEGABYTE = 2**20


def _nifti_gz(folder: Path) -> Path:
    """100 MB of zeros after the voxels, in a stream of 100 kB."""
    path = write_nifti(folder / "t2w.nii.gz")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(300 * MEGABYTE), 1))
    return path


def _nifti_dim(folder: Path) -> Path:
    return patch_header(write_nifti(folder / "t2w.nii"), 42, struct.pack("<3h", 32767, 32767, 32767))


def _nifti_gz_dim(folder: Path) -> Path:
    return patch_header(write_nifti(folder / "t2w.nii.gz"), 42, struct.pack("<3h", 32767, 32767, 32767))


def _mha(folder: Path, sizes: str = "12 12 6", more: int = 300) -> Path:
    spacing = "ElementSpacing = 1 1 3\nOffset = 0 0 0\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
    head = f"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\n{spacing}DimSize = {sizes}\n"
    content = zlib.compress(bytes(more * MEGABYTE), 1)
    path = folder / "t2w.mha"
    path.write_bytes(head.encode() + b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n" + content)
    return path


def _mha_dim(folder: Path) -> Path:
    return _mha(folder, "32767 32767 32767", 1)


def _nrrd(folder: Path) -> Path:
    head = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 12 12 6\n"
        "space directions: (1,0,0) (0,1,0) (0,0,3)\nspace origin: (0,0,0)\nendian: little\nencoding: gzip\n\n"
    )
    path = folder / "t2w.nrrd"
    path.write_bytes(head.encode() + gzip.compress(bytes(300 * MEGABYTE), 1))
    return path


def _dicom(folder: Path) -> Path:
    """Rows and columns of 65535 in a header of a small slice."""
    import pydicom

    for path in write_dicom(folder / "t2w"):
        dataset = pydicom.dcmread(path)
        dataset.Rows = dataset.Columns = 65535
        dataset.save_as(path)
    return folder / "t2w"


def _deflated_dicom(folder: Path) -> Path:
    """A slice that is followed by 300 MB of zeros, deflated as a whole."""
    import pydicom

    path = write_dicom(folder / "t2w")[0]
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.add_new(0xFFFCFFFC, "OB", bytes(300 * MEGABYTE))
    dataset.save_as(path)
    return folder / "t2w"


def _npy(folder: Path) -> Path:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**9}, 1000), }}".encode()
    path = folder / "text.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    return path


def _npy_header(folder: Path) -> Path:
    path = folder / "text.npy"
    with open(path, "wb") as file:
        file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30))
        file.truncate(2**30 + 12)  # sparse
    return path


def _npz(folder: Path) -> Path:
    path = folder / "text.npy"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        for _ in range(300):
            member.write(bytes(MEGABYTE))
    return path


def _json_depth(folder: Path) -> Path:
    path = folder / "list.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    return path


def _json_length(folder: Path) -> Path:
    path = folder / "list.json"
    path.write_text("[" + ",".join(["{}"] * 10**7) + "]")
    return path


def _csv(folder: Path) -> Path:
    write_nifti(folder / "studies" / "a1" / "t2w.nii.gz")
    with open(folder / "studies" / "studies.csv", "wb") as file:
        file.write(b"case\n")
        file.truncate(2**30)  # sparse
    return folder / "studies"


def _safetensors(folder: Path) -> Path:
    path = folder / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100 * MEGABYTE))
        file.truncate(100 * MEGABYTE + 8)
    return path


def _safetensors_overlap(folder: Path) -> Path:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def _pt(folder: Path) -> Path:
    """A weight file with a record that inflates to 1 GB."""
    import torch

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    path = folder / "model.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content + bytes(300 * MEGABYTE) if name.endswith("data/0") else content)
    return path


def _volume(path: Path) -> Any:
    from ccella_fast.data.readers.volume_file import read_volume

    return read_volume(path).array


def _studies(path: Path) -> Any:
    from ccella_fast.data.readers.discovery import find_studies

    return find_studies(path)


def _array(path: Path) -> Any:
    from ccella_fast.data.manifest import open_array

    return open_array(path)


def _autoencoder(path: Path) -> Any:
    from ccella_fast.models.autoencoder import load_autoencoder

    return load_autoencoder(path, config().autoencoder)


def _configuration(path: Path) -> Any:
    from ccella_fast.config import load_config

    return load_config(path)


BOMBS: list[tuple[Callable[[Path], Path], Callable[[Path], Any]]] = [
    (_nifti_gz, _volume), (_nifti_dim, _volume), (_nifti_gz_dim, _volume), (_mha, _volume), (_mha_dim, _volume),
    (_nrrd, _volume), (_dicom, _volume), (_deflated_dicom, _volume),
    (_npy, _array), (_npy_header, _array), (_npz, _array), (_json_depth, _studies),
    (_json_length, _studies), (_json_depth, _configuration), (_csv, _studies), (_safetensors, _autoencoder),
    (_safetensors_overlap, _autoencoder), (_pt, _autoencoder),
]  # fmt: skip


def test_every_bomb_is_refused_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goal: Callable[..., None]
):
    monkeypatch.setattr(harness, "BYTES", 512 * MEGABYTE)
    wrong = {}
    for number, (write, use) in enumerate(BOMBS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(folder)
        target = Target("bomb", write, lambda _, use=use, path=path: Content(digest(use(path))), [], 1)
        outcome, detail = judge(target, folder, Content(""), guarded=True)
        if outcome != "refused":
            wrong[f"{write.__name__}, {use.__name__}"] = outcome, detail
    assert wrong == {}
    goal("R12", value=len(wrong), target=0, n=len(BOMBS))


READ_LEGAL = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import harness
from ccella_fast.data.readers.volume_file import read_volume
from target import Content, Target, digest
harness.BYTES = 10 * 2**20
target = Target("legal", None, lambda folder: Content(digest(read_volume(folder / "t2w.nii").array)), [], 1)
print(harness.judge(target, Path(sys.argv[1]), Content(""), guarded=False)[0])
"""


def test_the_bound_is_noticed(tmp_path: Path):
    """Control: reading a legal volume of more than the bound is not called refused.

    In a process of its own: in this one, memory that earlier tests have freed would be used again.
    """
    values = np.random.default_rng(0).integers(0, 99, (320, 320, 160), np.uint16)
    write_nifti(tmp_path / "t2w.nii", values, oblique())
    command = [sys.executable, "-c", READ_LEGAL, str(tmp_path), *sys.path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "memory"
