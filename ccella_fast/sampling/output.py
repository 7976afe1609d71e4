"""The results of sampling and their files: NIfTI volumes, each with a JSON sidecar."""

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

from ccella_fast.deprecation import DeprecatedAttribute, deprecated_arguments
from ccella_fast.errors import ConfigError
from ccella_fast.sampling.request import CLASSES
from ccella_fast.storage import atomic_path, check_writable, read_json, write_json

# The factors by which the reference multiplies volumes in [0, 1] (docs/explanation/method.md, section 5), for checkpoints
# that do not store their own.
REFERENCE_INTENSITY = {"t2w": 962.0, "hbv": 117.0, "adc": 3000.0}
DESCRIPTION = b"ccella_fast synthetic"


@dataclass(frozen=True)
class GeneratedVolume:
    """One generated volume. Tensors are on the CPU.

    Attributes:
        index: its position in the request.
        seed: the seed of its noise.
        volume: (sequences, X, Y, Z) fp32 in [0, 1], axes R, A, S; None if not decoded.
        latent: (C, x, y, z) fp32, the model's output.
        class_probabilities: [neg, pos], predicted from the report at the last step; None if the variant does not predict a
            class.
    """

    index: int
    seed: int
    volume: Tensor | None
    latent: Tensor
    class_probabilities: list[float] | None


@dataclass(frozen=True)
class OutputVolume:
    """A volume to write.

    Attributes:
        name: of its files, without suffix.
        report: the number of its report.
        seed: the seed of its noise.
        sample_metadata: the sidecar entries that it does not share with the request's other volumes.
        identity: a hash of everything that the volume depends on, the report included.
    """

    name: str
    report: int
    seed: int
    sample_metadata: dict[str, Any]
    identity: str


@dataclass(frozen=True)
class OutputWriter:
    """Writes the volumes of a request.

    Attributes:
        request_metadata: the sidecar entries that all volumes of the request share.
        sequences: the names of the sequences.
        intensity_scale: by sequence, the factor from [0, 1] to written intensities.
    """

    request_metadata: dict[str, Any]
    sequences: list[str]
    intensity_scale: dict[str, float]

    def describe_volume(
        self, number: int, report: int, report_identity: str | None, seed: int, sample_metadata: dict[str, Any]
    ) -> OutputVolume:
        """The volume with this number in the request; the other arguments are those of `Prompts.metadata_of`."""
        identity = volume_digest([self.request_metadata, sample_metadata, report_identity, seed])
        return OutputVolume(f"sample-{number:03d}_seed{seed}", report, seed, sample_metadata, identity)

    def files(self, out: Path, output: OutputVolume) -> dict[str, Path]:
        """The path of each sequence's volume."""
        if len(self.sequences) == 1:
            return {self.sequences[0]: out / f"{output.name}.nii.gz"}
        return {sequence: out / f"{output.name}_seq-{sequence}.nii.gz" for sequence in self.sequences}

    def write(self, out: Path, output: OutputVolume, generated: GeneratedVolume) -> None:
        """Write the sidecar, then the volumes: a volume without a sidecar could not be attributed to a request."""
        assert generated.volume is not None
        files, probabilities = self.files(out, output), generated.class_probabilities
        rounded = probabilities and dict(zip(CLASSES, [round(p, 5) for p in probabilities], strict=True))
        sidecar = {
            **self.request_metadata,
            **output.sample_metadata,
            "seed": output.seed,
            "report": output.report,
            "files": {sequence: path.name for sequence, path in files.items()},
            "shape": list(generated.volume.shape[1:]),
            "intensity_scale": self.intensity_scale,
            "class_probabilities": rounded,
            "identity": output.identity,
        }
        write_json(out / f"{output.name}.json", sidecar)
        for (sequence, path), volume in zip(files.items(), generated.volume.numpy(), strict=True):
            write_nifti(path, volume * self.intensity_scale[sequence], output.sample_metadata["spacing"])

    def missing(self, out: Path, outputs: Sequence[OutputVolume], *, overwrite: bool = False) -> list[OutputVolume]:
        """The volumes that are not in the folder yet; with `overwrite`, all of them, after existing samples are deleted.

        Raises:
            ConfigError: the folder contains samples of another request.
        """
        identities = {f"{output.name}.json": output.identity for output in outputs}
        names = {path.name for output in outputs for path in self.files(out, output).values()} | set(identities)
        existing = {path for pattern in ("sample-*.nii.gz", "sample-*.json") for path in out.glob(pattern)}
        if overwrite:
            for path in existing:
                path.unlink()
            return list(outputs)
        foreign = {path for path in existing if path.name not in names}
        for path in existing - foreign:
            sidecar = out / f"{path.name.split('.')[0].partition('_seq-')[0]}.json"
            content = read_json(sidecar) if sidecar.is_file() else None
            if not isinstance(content, dict) or content.get("identity") != identities[sidecar.name]:
                foreign.add(path)
        if foreign:
            why = f"this folder contains {len(foreign)} files of another request's samples"
            raise ConfigError(why, path=min(foreign), fix="choose another --out, or add --overwrite")
        return [
            output
            for output in outputs
            if not all(path.is_file() for path in [out / f"{output.name}.json", *self.files(out, output).values()])
        ]


@deprecated_arguments(writing="writer", jobs="outputs")
@dataclass(frozen=True)
class Result:
    """The volumes of a call, one per row. Tensors are on the CPU.

    Attributes:
        seeds: one per row.
        volumes: (n, sequences, X, Y, Z) fp32 in [0, 1], axes R, A, S; None if not decoded.
        latents: (n, C, x, y, z) fp32.
        class_probabilities: (n, classes), predicted at the last step; None if the variant does not predict a class.
        writer: writes the volumes.
        outputs: the file name and metadata of each row.
    """

    seeds: list[int]
    volumes: Tensor | None
    latents: Tensor
    class_probabilities: Tensor | None
    writer: OutputWriter
    outputs: list[OutputVolume]

    writing = DeprecatedAttribute("writer")
    jobs = DeprecatedAttribute("outputs")

    @classmethod
    def from_volumes(
        cls, generated: Sequence[GeneratedVolume], writer: OutputWriter, outputs: list[OutputVolume]
    ) -> Result:
        """The volumes stacked."""
        volumes = [each.volume for each in generated if each.volume is not None]
        probabilities = [each.class_probabilities for each in generated if each.class_probabilities is not None]
        return cls(
            seeds=[each.seed for each in generated],
            volumes=torch.stack(volumes) if volumes else None,
            latents=torch.stack([each.latent for each in generated]),
            class_probabilities=torch.tensor(probabilities) if probabilities else None,
            writer=writer,
            outputs=outputs,
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write `sample-000_seed0.nii.gz` with its `.json`, and so on: the files of `ccella-fast sample` without the montage.

        Args:
            folder: created if it does not exist. Samples of an equal request that it contains are kept.
            overwrite: delete samples that the folder contains.

        Returns:
            The paths of all volumes.

        Raises:
            ConfigError: the latents were not decoded, or the folder contains samples of another request.
            DiskError: the folder is not writable.
        """
        out = Path(folder)
        if self.volumes is None:
            why = "the latents were not decoded, so there are no volumes to save"
            raise ConfigError(why, field="decode", fix="call the sampler with decode=True")
        check_writable(out, "folder")
        missing = self.writer.missing(out, self.outputs, overwrite=overwrite)
        for row, output in enumerate(self.outputs):
            if output in missing:
                probabilities = None if self.class_probabilities is None else self.class_probabilities[row].tolist()
                generated = GeneratedVolume(row, output.seed, self.volumes[row], self.latents[row], probabilities)
                self.writer.write(out, output, generated)
        return [path for output in self.outputs for path in self.writer.files(out, output).values()]


def write_nifti(path: str | Path, volume: np.ndarray, spacing: Sequence[float]) -> None:
    """Write a float32 NIfTI-1 file `.nii.gz` atomically; equal inputs give equal bytes.

    The axes are R, A, S in mm, sform = qform with code 1, and the center of the grid is at the origin.

    Args:
        path: of the file.
        volume: (X, Y, Z).
        spacing: voxel size in mm, (3,).
    """
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
    """The SHA-256 of `values` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
