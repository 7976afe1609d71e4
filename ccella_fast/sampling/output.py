"""What sampling gives back, and how a volume is written: NIfTI with geometry, JSON beside it."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccella_fast.errors import ConfigError
from ccella_fast.sampling.request import CLASSES
from ccella_fast.storage import atomic_path, check_writable, read_json, write_json

# What the reference multiplies [0, 1] volumes by (docs/explanation/method.md, section 5); for checkpoints that store no scale.
REFERENCE_INTENSITY = {"t2w": 962.0, "hbv": 117.0, "adc": 3000.0}
DESCRIPTION = b"ccella_fast synthetic"


@dataclass(frozen=True)
class GeneratedVolume:
    """One generated volume. Tensors are on the CPU.

    Attributes:
        index: its place in the request.
        seed: the seed of its noise.
        volume: (sequences, X, Y, Z) fp32 in [0, 1], axes R, A, S; None when not decoded.
        latent: (C, x, y, z) fp32 as the model makes it.
        class_probabilities: [neg, pos] as the model predicted them from the report at the last step; None where the variant
            predicts none.
    """

    index: int
    seed: int
    volume: Tensor | None
    latent: Tensor
    class_probabilities: list[float] | None


@dataclass(frozen=True)
class OutputVolume:
    """A volume to write. own: what it does not share with the request's others. identity covers everything that it depends on,
    the report only as a hash."""

    name: str
    report: int
    seed: int
    own: dict[str, Any]
    identity: str


@dataclass(frozen=True)
class OutputWriter:
    """What the files of a request share. facts: the sidecar's first entries. intensity: by sequence, the factor for [0, 1]."""

    facts: dict[str, Any]
    sequences: list[str]
    intensity: dict[str, float]

    def job(self, number: int, report: int, text: str | None, seed: int, own: dict[str, Any]) -> OutputVolume:
        identity = volume_digest([self.facts, own, text, seed])
        return OutputVolume(f"sample-{number:03d}_seed{seed}", report, seed, own, identity)

    def files(self, out: Path, job: OutputVolume) -> dict[str, Path]:
        """Path of each sequence's volume."""
        if len(self.sequences) == 1:
            return {self.sequences[0]: out / f"{job.name}.nii.gz"}
        return {sequence: out / f"{job.name}_seq-{sequence}.nii.gz" for sequence in self.sequences}

    def write(self, out: Path, job: OutputVolume, result: GeneratedVolume) -> None:
        """The sidecar first: a volume without one would be nobody's."""
        assert result.volume is not None
        files, probabilities = self.files(out, job), result.class_probabilities
        rounded = probabilities and dict(zip(CLASSES, [round(p, 5) for p in probabilities], strict=True))
        sidecar = {
            **self.facts,
            **job.own,
            "seed": job.seed,
            "report": job.report,
            "files": {sequence: path.name for sequence, path in files.items()},
            "shape": list(result.volume.shape[1:]),
            "intensity_scale": self.intensity,
            "class_probabilities": rounded,
            "identity": job.identity,
        }
        write_json(out / f"{job.name}.json", sidecar)
        for (sequence, path), volume in zip(files.items(), result.volume.numpy(), strict=True):
            write_nifti(path, volume * self.intensity[sequence], job.own["spacing"])

    def missing(self, out: Path, jobs: Sequence[OutputVolume], *, overwrite: bool = False) -> list[OutputVolume]:
        """The jobs still to do. What is there and does not belong to them is refused, or removed with `overwrite`."""
        wanted = {f"{job.name}.json": job.identity for job in jobs}
        names = {path.name for job in jobs for path in self.files(out, job).values()} | set(wanted)
        there = {path for pattern in ("sample-*.nii.gz", "sample-*.json") for path in out.glob(pattern)}
        if overwrite:
            for path in there:
                path.unlink()
            return list(jobs)
        foreign = {path for path in there if path.name not in names}
        for path in there - foreign:
            sidecar = out / f"{path.name.split('.')[0].partition('_seq-')[0]}.json"
            known = read_json(sidecar) if sidecar.is_file() else None
            if not isinstance(known, dict) or known.get("identity") != wanted[sidecar.name]:
                foreign.add(path)
        if foreign:
            why = f"this folder holds samples of another request ({len(foreign)} files)"
            raise ConfigError(why, path=min(foreign), fix="choose another --out, or add --overwrite")
        return [
            job
            for job in jobs
            if not all(path.is_file() for path in [out / f"{job.name}.json", *self.files(out, job).values()])
        ]


@dataclass(frozen=True)
class Result:
    """The volumes of a call, one row each. Tensors are on the CPU.

    Attributes:
        seeds: one per row.
        volumes: (n, sequences, X, Y, Z) fp32 in [0, 1], axes R, A, S; None when not decoded.
        latents: (n, C, x, y, z) fp32.
        class_probabilities: (n, classes), as predicted at the last step; None where the variant predicts none.
    """

    seeds: list[int]
    volumes: Tensor | None
    latents: Tensor
    class_probabilities: Tensor | None
    writing: OutputWriter
    jobs: list[OutputVolume]

    @classmethod
    def of(cls, generated: Sequence[GeneratedVolume], writing: OutputWriter, jobs: list[OutputVolume]) -> Result:
        volumes = [each.volume for each in generated if each.volume is not None]
        probabilities = [each.class_probabilities for each in generated if each.class_probabilities is not None]
        return cls(
            seeds=[each.seed for each in generated],
            volumes=torch.stack(volumes) if volumes else None,
            latents=torch.stack([each.latent for each in generated]),
            class_probabilities=torch.tensor(probabilities) if probabilities else None,
            writing=writing,
            jobs=jobs,
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write what `ccella-fast sample` writes, but for its montage: `sample-000_seed0.nii.gz` and its `.json`. Files of an
        equal request are kept. Raises ConfigError (not decoded; the folder holds other samples) and DiskError."""
        out = Path(folder)
        if self.volumes is None:
            raise ConfigError("these latents were not decoded", field="decode", fix="call the sampler with decode=True")
        check_writable(out, "folder")
        todo = self.writing.missing(out, self.jobs, overwrite=overwrite)
        for row, job in enumerate(self.jobs):
            if job in todo:
                probabilities = None if self.class_probabilities is None else self.class_probabilities[row].tolist()
                each = GeneratedVolume(row, job.seed, self.volumes[row], self.latents[row], probabilities)
                self.writing.write(out, job, each)
        return [path for job in self.jobs for path in self.writing.files(out, job).values()]


def write_nifti(path: str | Path, volume: np.ndarray, spacing: Sequence[float]) -> None:
    """float32 NIfTI-1 `.nii.gz`: axes R, A, S, mm, sform = qform with code 1, the grid's centre at the origin. Atomic; equal
    input gives equal bytes."""
    import nibabel

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.asarray(spacing) * (np.asarray(volume.shape) - 1) / 2
    image = nibabel.Nifti1Image(np.asarray(volume, dtype=np.float32), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = DESCRIPTION
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def volume_digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
