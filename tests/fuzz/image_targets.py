"""Images of every format: the voxels and the geometry that the readers return."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mutations as m
from mutations import Mutation, on_one_file
from target import CANARY, Content, Target, digest, prepare_command

_SHAPE = (10, 9, 6)


def _voxels() -> np.ndarray:
    from study_fixtures import voxels

    return voxels(_SHAPE)


def _write_nifti(name: str, folder: Path, *, version: int = 1, dtype: str = "uint16", big_endian: bool = False) -> None:
    import gzip

    import nibabel

    from study_fixtures import oblique

    cls = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = cls(_voxels().astype(dtype), oblique())
    image.set_sform(oblique(), code=1)
    image.set_qform(oblique(), code=1)
    if big_endian:
        image = cls(_voxels().astype(np.dtype(dtype).newbyteorder(">")), image.affine, image.header.as_byteswapped(">"))
    content = image.to_bytes()
    path = folder / "s1" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content)


def _write_itk(name: str, folder: Path, *, compress: bool) -> None:
    import nibabel
    import SimpleITK as sitk

    from study_fixtures import oblique

    image = sitk.GetImageFromArray(_voxels().transpose(2, 1, 0).astype(np.int16))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ oblique()
    spacing = nibabel.affines.voxel_sizes(affine)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    (folder / "s1").mkdir(parents=True)
    sitk.WriteImage(image, str(folder / "s1" / name), compress)


def _write_diffusion(folder: Path) -> None:
    """A 4D file with its b-values."""
    from study_fixtures import write_nifti

    write_nifti(folder / "s1" / "hbv.nii.gz", np.stack([_voxels(), _voxels() // 2, _voxels() // 4], -1))
    (folder / "s1" / "hbv.bval").write_text("50 400 1400\n")
    write_nifti(folder / "s1" / "t2w.nii.gz", _voxels())


def _write_dicom(folder: Path) -> None:
    from study_fixtures import write_dicom

    write_dicom(folder / "s1" / "t2w", _voxels(), t0010_0010=CANARY)


def _write_enhanced(folder: Path) -> None:
    """Two b-values in one file."""
    from dicom_fixtures import slices, write_enhanced

    frames = [{"slice": number % 6, "b_value": 1000.0 * (number // 6)} for number in range(12)]
    write_enhanced(folder / "s1" / "t2w" / "image.dcm", slices((12, 10, 12)), frames)


def _write_two_b_values(folder: Path) -> None:
    """A series that holds two volumes, one file per slice."""
    from dicom_fixtures import slices, write_slices

    for number, b_value in enumerate((50.0, 1400.0)):

        def describe(dataset: Any, place: int, number: int = number, b_value: float = b_value) -> None:
            dataset.DiffusionBValue, dataset.InstanceNumber = b_value, 6 * number + place + 1
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{6 * number + place + 1}"

        write_slices(folder / "s1" / "t2w", slices(seed=number), describe, first_file=6 * number)


def _read_volume(name: str, folder: Path) -> Content:
    from ccella_fast.data.readers.volume_file import read_volume

    volume = read_volume(folder / "s1" / name)
    return Content(digest(volume.array, np.round(volume.affine, 5) + 0.0), volume.array.shape[2], bool(volume.notes))


def _image(name: str, write: Callable[[Path], None], mutations: list[Mutation], count: int) -> Target:
    return Target(name, write, partial(_read_volume, name), mutations, count, prepare_command)


def _nifti_targets() -> list[Target]:
    plain = [
        Mutation("header", on_one_file(m.header(360))),
        Mutation("cut", on_one_file(m.cut), guarded=True),
        Mutation("splice", on_one_file(m.splice)),
    ]
    zipped = [
        Mutation("flip", on_one_file(m.overwrite), guarded=True),
        Mutation("cut", on_one_file(m.cut), guarded=True),
        Mutation("splice", on_one_file(m.splice), guarded=True),
        Mutation("header inside", on_one_file(m.inside_gzip(m.header(360)))),
        Mutation("cut inside", on_one_file(m.inside_gzip(m.cut)), guarded=True),
        Mutation("empty", on_one_file(m.empty), guarded=True),
    ]
    nifti_2 = partial(_write_nifti, "t2w.nii.gz", version=2, dtype="float32")
    return [
        _image("t2w.nii.gz", partial(_write_nifti, "t2w.nii.gz"), zipped, 5000),
        _image("t2w.nii.gz", nifti_2, zipped, 1500)._replace(name="t2w.nii.gz (NIfTI-2)"),
        _image("t2w.nii", partial(_write_nifti, "t2w.nii", dtype="float32"), plain, 2500),
        _image("t2w.nii", partial(_write_nifti, "t2w.nii", big_endian=True), plain, 1000)._replace(
            name="t2w.nii (big-endian)"
        ),
    ]


def _itk_targets() -> list[Target]:
    def itk(name: str, compress: bool, end: bytes, count: int) -> Target:
        header_of = "" if name.endswith((".mha", ".nrrd")) else name
        mutations = [
            Mutation("header", on_one_file(partial(m.text, end=end), header_of)),
            Mutation("cut", on_one_file(m.cut), guarded=True),
            Mutation("splice", on_one_file(m.splice)),
            Mutation("flip", on_one_file(m.overwrite)),
        ]
        write = partial(_write_itk, name, compress=compress)
        return _image(name, write, mutations, count)._replace(name=f"{name}{' (compressed)' if compress else ''}")

    mha, nrrd = b"ElementDataFile", b"\n\n"
    return [
        itk("t2w.mha", True, mha, 1500), itk("t2w.mha", False, mha, 1000), itk("t2w.nrrd", True, nrrd, 1000),
        itk("t2w.nrrd", False, nrrd, 500), itk("t2w.mhd", False, mha, 500), itk("t2w.nhdr", False, b"", 500),
    ]  # fmt: skip


_DICOM = [
    Mutation("header", on_one_file(m.header(1500))),
    Mutation("tags", on_one_file(m.dicom_tags)),
    Mutation("cut", on_one_file(m.cut), guarded=True),
    Mutation("splice", on_one_file(m.splice)),
    Mutation("empty", on_one_file(m.empty), guarded=True),
]


def _dicom_target(name: str, write: Callable[[Path], None], count: int) -> Target:
    return Target(name, write, partial(_read_volume, "t2w"), _DICOM, count, prepare_command)


_SERIES = [
    Mutation("b-values", on_one_file(m.text, ".bval")),
    Mutation("bytes of b-values", on_one_file(m.overwrite, ".bval")),
    Mutation("header", on_one_file(m.inside_gzip(m.header(360)), "hbv.nii.gz")),
    Mutation("cut inside", on_one_file(m.inside_gzip(m.cut), "hbv.nii.gz"), guarded=True),
]

TARGETS = [
    *_nifti_targets(),
    Target("hbv.nii.gz, .bval", _write_diffusion, partial(_read_volume, "hbv.nii.gz"), _SERIES, 2000, prepare_command),
    *_itk_targets(),
    _dicom_target("DICOM series", _write_dicom, 10000),
    _dicom_target("DICOM series of two b-values", _write_two_b_values, 1500),
    _dicom_target("enhanced DICOM", _write_enhanced, 2500),
]
