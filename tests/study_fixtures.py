"""Small studies on disk, a configuration small enough to prepare them in a second, and tiny encoders."""

from __future__ import annotations

import gzip
import locale
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from ccella_fast.config import Config, make_config
from ccella_fast.storage import sha256

SHAPE, SPACING = (40, 36, 18), (1.5, 1.5, 3.0)
_SETTINGS: dict[str, Any] = {
    "model.num_channels": [8, 16, 16],
    "model.attention_levels": [False, True, True],
    "model.num_head_channels": [0, 8, 8],
    "model.norm_num_groups": 8,
    "model.cross_attention_dim": 32,
    "model.input_dim": 32,
    "autoencoder.num_channels": [4, 4, 8],
    "autoencoder.num_res_blocks": [1, 1, 1],
    "autoencoder.norm_num_groups": 4,
    "data.spacing": [1.5, 1.5, 3.0],
    "data.dim": [32, 32, 16],
    "text.max_length": 12,
    "text.dtype": "float32",
    "text.batch_size": 2,
}


def config(*, variant: str = "MAISI", encoder: Path | None = None, **changes: Any) -> Config:
    """MAISI (no text) unless told; dotted keys as `data__dim=[...]`."""
    given = {key.replace("__", "."): value for key, value in changes.items()}
    encoders = {} if encoder is None else {"text.encoder": str(encoder)}
    return make_config({**_SETTINGS, "model.variant": variant, **encoders, **given})


def oblique(spacing=SPACING, *, tilt: float = 12, twist: float = 3) -> np.ndarray:
    """An affine (RAS mm) of a grid that runs to the left, the back and the head, as a scanner writes it."""
    a, b = np.deg2rad([tilt, twist])
    rx = np.array([[1, 0, 0], [0, np.cos(a), np.sin(a)], [0, -np.sin(a), np.cos(a)]])
    rz = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ rz @ rx @ np.diag(spacing)
    affine[:3, 3] = [31.5, 40.25, -20.75]
    return affine


def voxels(shape=SHAPE, *, seed: int = 0) -> np.ndarray:
    """Smooth positive values with noise, uint16."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    smooth = 300 + 150 * np.sin(4 * grid[0] + seed) * np.cos(3 * grid[1]) + 100 * grid[2]
    return np.clip(smooth + 15 * rng.standard_normal(shape), 0, None).astype(np.uint16)


def write_nifti(
    path: Path, values: np.ndarray | None = None, affine: np.ndarray | None = None, *, seed: int = 0
) -> Path:
    """`.nii` or `.nii.gz`; sform = qform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(
        voxels(seed=seed) if values is None else values, oblique() if affine is None else affine
    )
    image.set_qform(image.affine, code=1)
    image.set_sform(image.get_qform(), code=1)
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)
    return path


def patch_header(path: Path, offset: int, replacement: bytes) -> Path:
    """Overwrite bytes of a NIfTI's raw header (and write a sound gzip stream again)."""
    zipped = path.suffix == ".gz"
    content = bytearray(gzip.decompress(path.read_bytes()) if zipped else path.read_bytes())
    content[offset : offset + len(replacement)] = replacement
    path.write_bytes(gzip.compress(bytes(content), 1, mtime=0) if zipped else bytes(content))
    return path


def write_studies(folder: Path, count: int = 3) -> Path:
    """`case0/t2w.nii.gz` ... and studies.csv. The last case has neither report nor class; the second is of the test split."""
    lines = ["case,split,pirads,report"]
    for number in range(count):
        write_nifti(folder / f"case{number}" / "t2w.nii.gz", seed=number)
        last = number == count - 1
        report = "" if last else f"lesion of {number + 4} mm in the left zone"
        lines.append(f"case{number},{'test' if number == 1 else 'train'},{'' if last else (2, 4)[number % 2]},{report}")
    (folder / "studies.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_bert(folder: Path, *, width: int = 32, positions: int = 64) -> Path:
    """A tiny random BERT with a vocabulary of characters and a few words."""
    import torch
    from transformers import BertConfig, BertModel

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] lesion left right zone mm of in the no .".split()
    words += [str(digit) for digit in range(10)] + [f"##{digit}" for digit in range(10)] + ["word", "end", "start"]
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=positions, **sizes))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


def write_vae(folder: Path, settings: Config, *, seed: int = 0) -> Path:
    """A random autoencoder of the configured sizes."""
    import torch

    from ccella_fast.models.vae import Autoencoder, save_autoencoder

    torch.manual_seed(seed)
    save_autoencoder(Autoencoder(settings.autoencoder), folder)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but run_record.json, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run_record.json"]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}


def write_dicom(folder: Path, values: np.ndarray | None = None, **tags: Any) -> list[Path]:
    """One axial series, a file a slice, the slices 3 mm apart and the file names in another order than the positions. tags:
    DICOM tags such as `t0010_0010="Name"`, for all slices; a function of the slice's number gives each its own, None no tag."""
    import SimpleITK as sitk

    values = voxels() if values is None else values
    folder.mkdir(parents=True, exist_ok=True)
    writer, paths = sitk.ImageFileWriter(), []
    writer.KeepOriginalImageUIDOn()
    count = values.shape[2]
    for number in range(count):
        image = sitk.GetImageFromArray(np.ascontiguousarray(values[:, :, number].T).astype(np.uint16))
        image.SetSpacing(SPACING[:2])
        known = {
            "0008|0060": "MR", "0020|000e": "1.2.3.4", "0020|000d": "1.2.3", "0008|0018": f"1.2.3.4.{number + 1}",
            "0020|0013": str(number + 1), "0018|0050": "3", "0020|0032": f"-31.5\\-40.25\\{-20.75 + 3 * number}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }  # fmt: skip
        for name, value in tags.items():
            own = value(number) if callable(value) else value
            known[name[1:].replace("_", "|")] = own
        for tag, value in known.items():
            if value is not None:
                image.SetMetaData(tag, value)
        spacing = known.get("0028|0030")
        if spacing is not None:
            row, column = map(float, spacing.split("\\"))
            image.SetSpacing((column, row))
        paths.append(folder / f"{(7 * number) % count:03d}.dcm")
        writer.SetFileName(str(paths[-1]))
        with same_locale():
            writer.Execute(image)
    return paths


@contextmanager
def same_locale() -> Iterator[None]:
    """Writing DICOM, SimpleITK sets the process's locale to "C", and text files are then ASCII to whoever names no encoding."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)
