"""The results of sampling and their files: NIfTI volumes, each with a JSON sidecar."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ccella_fast.deprecation import DeprecatedAttribute, deprecated_arguments
from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.optional import require
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.quantities import counted
from ccella_fast.sampling import dicom_output
from ccella_fast.storage import atomic_folder, atomic_path, check_writable, json_text, read_json

# The factors by which the reference multiplies volumes in [0, 1] (docs/explanation/method.md, section 5), for checkpoints
# that do not store their own.
REFERENCE_INTENSITY = {"t2w": 962.0, "hbv": 117.0, "adc": 3000.0}
DESCRIPTION = b"ccella_fast synthetic"
Format = Literal["nifti", "dicom"]


@dataclass(frozen=True)
class GeneratedVolume:
    """One generated volume. Tensors are on the CPU.

    Attributes:
        index: its position in the request.
        seed: the seed of its noise.
        volume: (sequences, X, Y, Z) fp32 in [0, 1], axes R, A, S; None if not decoded.
        latent: (C, x, y, z) fp32, the model's output.
        class_probabilities: [neg, pos], predicted from the report at the last step; None as in `Result`.
    """

    index: int
    seed: int
    volume: Tensor | None
    latent: Tensor
    class_probabilities: list[float] | None

    def __repr__(self) -> str:
        size = "not decoded" if self.volume is None else f"{_times(self.volume.shape)} voxels"
        return f"GeneratedVolume({self.index}, seed {self.seed}, {size}, latent {_times(self.latent.shape)})"


class VolumeMetadata(NamedTuple):
    """The inputs of a volume, for its sidecar.

    Attributes:
        report: the number of its report among the distinct ones.
        report_id: the name that the request gives the report; None without one.
        report_identity: the text of the report, or a hash of given features; None without a report. It is never written.
        seed: the seed of its noise.
        inputs: the other sidecar entries that it does not share with the request's other volumes.
    """

    report: int
    report_id: str | None
    report_identity: str | None
    seed: int
    inputs: dict[str, Any]


@dataclass(frozen=True)
class OutputVolume:
    """A volume to write.

    Attributes:
        name: of its files, without suffix.
        report: the number of its report.
        seed: the seed of its noise.
        sample_metadata: the sidecar entries that it does not share with the request's other volumes.
        identity: a hash of everything that the volume depends on, the report included.
        report_id: the name of its report; None without one.
        report_sha256: a hash of its report, salted with that of the weights; None without a report.
    """

    name: str
    report: int
    seed: int
    sample_metadata: dict[str, Any]
    identity: str
    report_id: str | None = None
    report_sha256: str | None = None


@dataclass(frozen=True)
class OutputWriter:
    """Writes the volumes of a request.

    Attributes:
        request_metadata: the sidecar entries that all volumes of the request share.
        sequences: the names of the sequences.
        intensity_scale: by sequence, the factor from [0, 1] to written intensities.
        class_head: whether the head that predicts classes was trained on both: "trained", "untrained" or "unknown"; None if
            the variant has none.
        format: "nifti", a file per sequence, or "dicom", a folder with a series per sequence.
    """

    request_metadata: dict[str, Any]
    sequences: list[str]
    intensity_scale: dict[str, float]
    class_head: str | None = None
    format: Format = "nifti"

    def describe_volume(self, number: int, metadata: VolumeMetadata) -> OutputVolume:
        """The volume with this number in the request."""
        report, report_id, text, seed, inputs = metadata
        identity = volume_digest([self.request_metadata, inputs, text, seed])
        hashed = None if text is None else report_digest(text, self.request_metadata.get("weights_sha256"))
        return OutputVolume(sample_name(number, seed), report, seed, inputs, identity, report_id, hashed)

    def files(self, out: Path, output: OutputVolume) -> dict[str, Path]:
        """The path of each sequence's volume: a NIfTI file, or a folder with a DICOM series."""
        suffix = {"nifti": ".nii.gz", "dicom": ""}[self.format]
        if len(self.sequences) == 1:
            return {self.sequences[0]: out / f"{output.name}{suffix}"}
        return {sequence: out / f"{output.name}_seq-{sequence}{suffix}" for sequence in self.sequences}

    def write(self, out: Path, output: OutputVolume, generated: GeneratedVolume) -> None:
        """Write the volumes and the sidecar, all or none of them: they are renamed when all are complete.

        The sidecar is renamed first, because a volume without one could not be attributed to a request. A process that is
        killed in between leaves a sidecar without a volume, and the volume is generated again.
        """
        assert generated.volume is not None
        files = self.files(out, output)
        sidecar = self.sidecar(output, generated, files)
        with ExitStack() as renames:  # in the reverse order
            volumes = generated.volume.numpy()
            for number, ((sequence, path), volume) in enumerate(zip(files.items(), volumes, strict=True), start=1):
                scale, spacing = self.intensity_scale[sequence], output.sample_metadata["spacing"]
                if self.format == "nifti":
                    content = nifti_bytes(volume * scale, spacing, window=(0.0, scale))
                    renames.enter_context(atomic_path(path)).write_bytes(content)
                    continue
                remove_sample(path)  # of a volume of which another sequence is missing
                series = dicom_output.Series(sequence, number, volume, scale)
                folder = renames.enter_context(atomic_folder(path))
                dicom_output.write_series(
                    folder, series, spacing, study=output.identity, description=self._describe(output)
                )
            sidecar_path = renames.enter_context(atomic_path(out / f"{output.name}.json"))
            sidecar_path.write_text(json_text(sidecar), encoding="utf-8")

    def sidecar(self, output: OutputVolume, generated: GeneratedVolume, files: Mapping[str, Path]) -> dict[str, Any]:
        """The content of the JSON file of a volume. files: of each sequence."""
        assert generated.volume is not None
        probabilities = generated.class_probabilities
        rounded = probabilities and dict(zip(CLASS_NAMES, [round(p, 5) for p in probabilities], strict=True))
        return {
            **self.request_metadata,
            **output.sample_metadata,
            "seed": output.seed,
            "report": output.report,
            "report_id": output.report_id,
            "report_sha256": output.report_sha256,
            "files": {sequence: path.name for sequence, path in files.items()},
            "shape": list(generated.volume.shape[1:]),
            "intensity_scale": self.intensity_scale,
            "class_head": self.class_head,
            "class_probabilities": rounded,
            "identity": output.identity,
        }

    def _describe(self, output: OutputVolume) -> str:
        """How a volume was generated, in a sentence for its DICOM files."""
        request, seed = self.request_metadata, output.seed
        weights = f"weights {request.get('weights_sha256') or 'in memory'}"
        how = f"{counted(request['num_inference_steps'], 'step')} of {request['solver']}, seed {seed}, {weights}"
        return (
            f"Synthetic image: generated from noise by the diffusion model {request['variant']} of ccella_fast, {how}"
        )

    def missing(self, out: Path, outputs: Sequence[OutputVolume], *, overwrite: bool = False) -> list[OutputVolume]:
        """The volumes that are not in the folder yet; with `overwrite`, all of them, after existing samples are deleted.

        Raises:
            ConfigError: the folder contains samples of another request.
        """
        identities = {f"{output.name}.json": output.identity for output in outputs}
        names = {path.name for output in outputs for path in self.files(out, output).values()} | set(identities)
        existing = {path for pattern in ("sample-*.nii.gz", "sample-*.json") for path in out.glob(pattern)}
        existing |= {path for path in out.glob("sample-*") if path.is_dir()}
        if overwrite:
            for path in existing:
                remove_sample(path)
            return list(outputs)
        foreign = {path for path in existing if path.name not in names}
        for path in existing - foreign:
            sidecar = out / f"{path.name.split('.')[0].partition('_seq-')[0]}.json"
            content = read_json(sidecar) if sidecar.is_file() else None
            if not isinstance(content, dict) or content.get("identity") != identities[sidecar.name]:
                foreign.add(path)
        if foreign:
            why = f"this folder contains {counted(len(foreign), 'file')} of another request's samples"
            raise ConfigError(why, path=min(foreign), fix="choose another --out, or add --overwrite")
        return [
            output
            for output in outputs
            if not all(path.exists() for path in [out / f"{output.name}.json", *self.files(out, output).values()])
        ]


@deprecated_arguments(writing="writer", jobs="outputs")
@dataclass(frozen=True)
class Result:
    """The volumes of a call, one per row. Tensors are on the CPU.

    Attributes:
        seeds: one per row.
        volumes: (n, sequences, X, Y, Z) fp32 in [0, 1], axes R, A, S; None if not decoded.
        latents: (n, C, x, y, z) fp32.
        class_probabilities: (n, classes), predicted at the last step; None if the variant does not predict a class, or if it
            was not trained on both, so that the numbers mean nothing.
        writer: writes the volumes.
        outputs: the file name and metadata of each row.
    """

    seeds: list[int]
    volumes: Tensor | None
    latents: Tensor
    class_probabilities: Tensor | None
    writer: OutputWriter
    outputs: list[OutputVolume]

    def __repr__(self) -> str:
        volumes = self.volumes
        size = (
            "not decoded"
            if volumes is None
            else f"{', '.join(self.writer.sequences)}, {_times(volumes.shape[2:])} voxels"
        )
        count, latents = counted(len(self.seeds), "volume"), _times(self.latents.shape[1:])
        return f"Result({count}, {size}, latents {latents}, seeds {self.seeds})"

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

    def save(self, folder: str | Path, *, overwrite: bool = False, format: Format = "nifti") -> list[Path]:
        """Write `sample-000_seed0.nii.gz` with its `.json`, and so on: the files of `ccella-fast sample` without the montage.

        Args:
            folder: created if it does not exist. Samples of an equal request that it contains are kept.
            overwrite: delete samples that the folder contains.
            format: "nifti", or "dicom" for a folder with a series per volume and sequence, which needs pydicom.

        Returns:
            The paths of all volumes.

        Raises:
            ConfigError: the latents were not decoded, the folder contains samples of another request, or pydicom is missing.
            DiskError: the folder is not writable.
        """
        out = Path(folder)
        if self.volumes is None:
            why = "the latents were not decoded, so there are no volumes to save"
            raise ConfigError(why, field="decode", fix="call the sampler with decode=True")
        check_format(format)
        check_writable(out, "folder")
        writer = replace(self.writer, format=format)
        missing = writer.missing(out, self.outputs, overwrite=overwrite)
        for row, output in enumerate(self.outputs):
            if output in missing:
                probabilities = None if self.class_probabilities is None else self.class_probabilities[row].tolist()
                generated = GeneratedVolume(row, output.seed, self.volumes[row], self.latents[row], probabilities)
                writer.write(out, output, generated)
        return [path for output in self.outputs for path in writer.files(out, output).values()]


def check_format(name: str) -> None:
    """Check that volumes can be written in this format.

    Raises:
        ConfigError: there is no such format, or pydicom is missing.
    """
    if name not in get_args(Format):
        fix = did_you_mean(str(name), get_args(Format))
        raise ConfigError(f"there is no output format '{name!s:.40}'", field="format", fix=fix)
    if name == "dicom":
        require("pydicom", "writing DICOM")


def sample_name(number: int, seed: int) -> str:
    """The name of the files of a volume, without suffix. number: of the volume in its request."""
    return f"sample-{number:03d}_seed{seed}"


def remove_sample(path: Path) -> None:
    """Remove the file or folder of a sample if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def nifti_bytes(
    volume: np.ndarray,
    spacing: Sequence[float],
    *,
    window: tuple[float, float] | None = None,
    affine: Sequence[Sequence[float]] | None = None,
) -> bytes:
    """The content of a float32 NIfTI-1 file `.nii.gz`; equal inputs give equal bytes.

    The axes are R, A, S in mm, and sform = qform with code 1. float32 and not int16, so that a scaled volume keeps what the
    autoencoder computed.

    Args:
        volume: (X, Y, Z).
        spacing: voxel size in mm, (3,).
        window: the intensities that a viewer shows as black and white (cal_min, cal_max); None: it guesses.
        affine: from voxels to mm, (4, 4); None: the center of the grid is at the origin.
    """
    require("nibabel", "writing NIfTI files")
    import nibabel

    matrix = np.diag([*spacing, 1.0]) if affine is None else np.asarray(affine, np.float64)
    if affine is None:
        matrix[:3, 3] = -np.asarray(spacing) * (np.asarray(volume.shape) - 1) / 2
    image = nibabel.Nifti1Image(np.asarray(volume, dtype=np.float32), matrix)
    image.set_sform(matrix, code=1)
    image.set_qform(matrix, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = DESCRIPTION
    if window is not None:
        image.header["cal_min"], image.header["cal_max"] = window
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def report_digest(report: str, weights_sha256: str | None) -> str:
    """The SHA-256 of a report, salted with the hash of the model's weights.

    Equal reports have equal hashes in all samples of a model, and other ones with other weights. Whoever has a sidecar and
    guesses the report can confirm the guess.
    """
    return hashlib.sha256(f"{weights_sha256}\n{report}".encode(errors="surrogatepass")).hexdigest()


def volume_digest(values: Any) -> str:
    """The SHA-256 of `values` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
