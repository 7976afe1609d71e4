"""The inputs that are fuzzed: every format and list that a user may give, as {name: content}, and how each is read.

`read` returns what a user gets from the input, and raises a CcellaError if it refuses it. CANARY occurs in the texts of the
inputs and may not occur in any message.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mutations as m
from mutations import Files, Mutation, on_one_file

CANARY = "KANARIENVOGEL"
_SHAPE = (10, 9, 6)


class Content(NamedTuple):
    """What was read: a digest of it, and the number of slices that it has; `noted` if the reader says what it left out."""

    digest: str
    slices: int = 0
    noted: bool = False


class Target(NamedTuple):
    """One kind of input.

    Attributes:
        name: For the table and the command line.
        write: Writes the valid input to a folder.
        read: Reads the input in a folder.
        mutations: How it is damaged.
        count: Inputs of a whole run.
        command: The command line that uses the input, given the input's folder and an output folder; None if there is none.
    """

    name: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Content]
    mutations: list[Mutation]
    count: int
    command: Callable[[Path, Path], list[str]] | None = None


def digest(*parts: object) -> str:
    """SHA-256 of arrays and of the text of everything else."""
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            result.update(f"{part.shape}{part.dtype}".encode())
        result.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return result.hexdigest()


# ---- images ----


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


def _write_dicom(folder: Path) -> None:
    from study_fixtures import write_dicom

    write_dicom(folder / "s1" / "t2w", _voxels(), t0010_0010=CANARY)


def _read_volume(name: str, folder: Path) -> Content:
    from ccella_fast.data.readers.volume_file import read_volume

    volume = read_volume(folder / "s1" / name)
    return Content(digest(volume.array, np.round(volume.affine, 5) + 0.0), volume.array.shape[2], bool(volume.notes))


def _prepare(folder: Path, out: Path) -> list[str]:
    config = ["data.spacing=[1.5,1.5,3.0]", "data.dim=[32,32,16]", "model.variant=MAISI"]
    arguments = ["ccella_fast.cli", "prepare", "--data", str(folder), "--out", str(out), "--workers", "1"]
    return arguments + [word for setting in config for word in ("--set", setting)]


def _image(name: str, write: Callable[[Path], None], mutations: list[Mutation], count: int) -> Target:
    return Target(name, write, partial(_read_volume, name), mutations, count, _prepare)


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


# ---- tables, lists and reports ----


def _write_studies(folder: Path) -> None:
    from study_fixtures import write_nifti

    for number in range(3):
        write_nifti(folder / f"case{number}" / "t2w.nii.gz", _voxels(), seed=number)


def _write_table(folder: Path) -> None:
    _write_studies(folder)
    lines = [
        "case,split,pirads,report,date",
        f'case0,train,2,"Lesion {CANARY} of 4 mm, left",2020-01-01',
        f"case1,test,4,Focus {CANARY},2020-01-02",
        "case2,,,,",
    ]
    (folder / "studies.csv").write_text("\n".join(lines) + "\n")


def _write_reports(folder: Path) -> None:
    _write_studies(folder)
    (folder / "r0.txt").write_text(f"Prostate 42 ml.\nFocus {CANARY} of 18 mm.\nPI-RADS 5.\n")
    (folder / "studies.csv").write_text("case,pirads,report_file\ncase0,5,r0.txt\ncase1,2,\n")


def _write_bids(folder: Path) -> None:
    from study_fixtures import write_nifti

    for number in range(2):
        write_nifti(folder / f"sub-0{number}" / "anat" / f"sub-0{number}_T2w.nii.gz", _voxels(), seed=number)
    (folder / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    table = f"participant_id\tpirads\treport\tage\nsub-00\t4\tFocus {CANARY}\t60\nsub-01\tn/a\tn/a\tn/a\n"
    (folder / "participants.tsv").write_text(table)


def _write_list(folder: Path) -> None:
    from study_fixtures import write_nifti

    for number in range(2):
        write_nifti(folder / f"c{number}" / "axt2.nii.gz", _voxels(), seed=number)
        (folder / f"c{number}" / "text.txt").write_text(f"Focus {CANARY} of 18 mm.")
    entries = [
        {
            "axt2": f"c{n}/axt2.nii.gz",
            "folder": f"c{n}",
            "pirads": [0, 1],
            "spacing": [1.5, 1.5, 3.0],
            "note": f"{CANARY} x",
        }
        for n in range(2)
    ]
    (folder / "list.json").write_text(json.dumps(entries, indent=1))


def _find(entry: str, folder: Path) -> Content:
    from ccella_fast.data.readers.discovery import find_studies

    studies = find_studies(folder / entry)
    fields = [study._replace(listed_in=None, field=None) for study in studies]
    return Content(digest(str(fields).replace(str(folder), "")))


# ---- prepared files, features of the reference, checkpoints, configurations ----


def _write_features(folder: Path) -> None:
    from study_fixtures import write_merged

    write_merged(folder, count=1)


def _read_features(folder: Path) -> Content:
    from ccella_fast.data.manifest import open_array
    from ccella_fast.data.preparation.latent_encoder import import_latent
    from study_fixtures import config

    text = np.array(open_array(folder / "emb" / "c0" / "text.npy"))
    return Content(digest(text, *import_latent(folder / "emb" / "c0" / "axt2_emb.nii.gz", config())))


def _read_array(folder: Path) -> Content:
    from ccella_fast.data.manifest import open_array

    return Content(digest(np.array(open_array(folder / "emb" / "c0" / "text.npy"))))


def _write_prepared(folder: Path) -> None:
    from training_fixtures import write_prepared

    write_prepared(folder / "prepared", cases=2)


def _read_prepared(folder: Path) -> Content:
    from ccella_fast.data.manifest import load_manifest

    manifest = load_manifest(folder / "prepared")
    arrays = [np.array(manifest.array(case, key, verify=True)) for case in manifest.cases for key in sorted(case.files)]
    return Content(digest(manifest.model_dump(), *arrays))


def _write_checkpoint(folder: Path) -> None:
    from sampling_fixtures import write_checkpoint

    write_checkpoint(folder / "checkpoint")


def _read_checkpoint(folder: Path) -> Content:
    from ccella_fast.checkpoint import load_checkpoint

    loaded = load_checkpoint(folder / "checkpoint")
    weights = [value.numpy() for value in loaded.model.state_dict().values()]
    return Content(digest(loaded.config.dump(), loaded.scale_factor, *weights))


def _write_config(folder: Path) -> None:
    from study_fixtures import config

    (folder / "config.json").write_text(json.dumps(config().dump(), indent=1))


def _read_config(folder: Path) -> Content:
    from ccella_fast.config import load_config

    return Content(digest(load_config(folder / "config.json").dump()))


def _write_deepspeed(folder: Path) -> None:
    values = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e7},
        "activation_checkpointing": {"partition_activations": False},
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(values, indent=1))


def _read_deepspeed(folder: Path) -> Content:
    from ccella_fast.training.deepspeed_config import merge_deepspeed_config
    from study_fixtures import config

    merged, passed = merge_deepspeed_config(
        config(), folder / "ds.json", world_size=1, output_dir=Path("run"), auto_precision=lambda: "fp32"
    )
    return Content(digest(merged.dump(), passed))


def _text_target(
    name: str, write: Callable[[Path], None], file: str, read: Callable[[Path], Content], count: int, **more: Any
) -> Target:
    return Target(name, write, read, [Mutation("text", on_one_file(m.text, file))], count, **more)


def _any_file(suffix: str = "", *, guarded: bool) -> list[Mutation]:
    changes = {"flip": m.overwrite, "cut": m.cut, "splice": m.splice, "empty": m.empty}
    return [Mutation(name, on_one_file(change, suffix), guarded) for name, change in changes.items()]


def _list_command(folder: Path, out: Path) -> list[str]:
    return _prepare(folder / "list.json", out)


def _with_config(folder: Path, out: Path) -> list[str]:
    return [
        "ccella_fast.cli",
        "prepare",
        "--data",
        str(folder),
        "--out",
        str(out),
        "--config",
        str(folder / "config.json"),
    ]


def _sample(folder: Path, out: Path) -> list[str]:
    return [
        "ccella_fast.cli",
        "sample",
        "--checkpoint",
        str(folder / "checkpoint"),
        "--out",
        str(out),
        "--pirads",
        "pos",
    ]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in [
        *_nifti_targets(),
        *_itk_targets(),
        Target("DICOM series", _write_dicom, partial(_read_volume, "t2w"), _DICOM, 10000, _prepare),
        _text_target("studies.csv", _write_table, "studies.csv", partial(_find, ""), 1500, command=_prepare),
        _text_target("participants.tsv", _write_bids, ".tsv", partial(_find, ""), 1000, command=_prepare),
        _text_target("report file", _write_reports, "r0.txt", partial(_find, ""), 2000, command=_prepare),
        _text_target("JSON list", _write_list, "list.json", partial(_find, "list.json"), 5000, command=_list_command),
        Target(
            "text.npy", _write_features, _read_array, [Mutation("header", on_one_file(m.header(128), "text.npy"))], 2000
        ),
        Target(
            "latents of the reference", _write_features, _read_features, _any_file("emb.nii.gz", guarded=True), 2000
        ),
        Target("prepared arrays", _write_prepared, _read_prepared, _any_file(".npy", guarded=True), 1000),
        _text_target("prepared manifest", _write_prepared, "manifest.json", _read_prepared, 1000),
        Target(
            "checkpoint", _write_checkpoint, _read_checkpoint, _any_file(".safetensors", guarded=True), 3000, _sample
        ),
        _text_target("checkpoint's JSON", _write_checkpoint, ".json", _read_checkpoint, 1000, command=_sample),
        _text_target("configuration", _write_config, "config.json", _read_config, 1500, command=_with_config),
        _text_target("DeepSpeed file", _write_deepspeed, "ds.json", _read_deepspeed, 500),
    ]
}


def valid_files(target: Target) -> Files:
    """The files of the valid input."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        target.write(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_files(folder: Path, files: Files) -> None:
    """Write the files below `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
