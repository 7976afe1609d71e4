"""From a checkpoint and reports to volumes: `generate` for library users, `sample_to_folder` behind `ccella-fast sample`."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccella_fast.checkpoint import Checkpoint, load_checkpoint
from ccella_fast.config import Config
from ccella_fast.data.volume import read_nifti_array
from ccella_fast.diffusion import loop
from ccella_fast.diffusion.noise import start_noise
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import get_solver
from ccella_fast.environment import recorded
from ccella_fast.errors import CheckpointError, ConfigError, NonFiniteError
from ccella_fast.models.vae import Autoencoder, load_autoencoder, weights_file
from ccella_fast.storage import atomic_path, check_writable, read_json, sha256, write_json
from ccella_fast.variants import get_variant

logger = logging.getLogger("ccella_fast")

# What the reference multiplies [0, 1] volumes by (reference-method, section 5); for checkpoints that store no scale.
REFERENCE_INTENSITY = {"t2w": 962.0, "hbv": 117.0, "adc": 3000.0}
CLASSES = ["neg", "pos"]  # PI-RADS 1-2, 3-5
DESCRIPTION = b"ccella_fast synthetic"
_SHOWN = 12  # volumes in a montage


class Generated(NamedTuple):
    """volumes: per sequence (X, Y, Z) float32 in [0, 1], axes R, A, S. class_probabilities: [neg, pos] as the model predicted
    them from the report at the last step, None where the variant predicts none."""

    seed: int
    volumes: dict[str, np.ndarray]
    class_probabilities: list[float] | None


def generate(
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    seeds: Sequence[int],
    *,
    text: Tensor | np.ndarray | None = None,  # (n, L, E): one row a seed, or one row for all
    pirads: str | None = None,  # "neg" or "pos", for variants whose class is given
    spacing: Sequence[float] | None = None,  # mm; default: the training grid's
    solver: str | None = None,  # default: the checkpoint's, as for the two below
    num_inference_steps: int | None = None,
    batch_size: int | None = None,
) -> Iterator[Generated]:
    """Draw one volume a seed, in order, on the model's device. A seed gives the same noise in any batch.

    Raises ConfigError for inputs that the variant does not take or settings that are not possible, and NonFiniteError when the
    model has diverged."""
    config, device = checkpoint.config, next(checkpoint.model.parameters()).device
    check_inputs(checkpoint.variant, has_text=text is not None, pirads=pirads)
    grid = config.check_grid()
    settings = config.sampling
    plan = get_solver(solver or settings.solver).plan(
        Schedule.from_config(config.scheduler), num_inference_steps or settings.num_inference_steps,
        prediction=settings.prediction, timestep_spacing=settings.timestep_spacing,
    )  # fmt: skip
    spacing_row = torch.tensor([spacing or config.data.spacing], dtype=torch.float32, device=device) * 100
    class_row = (
        None if pirads is None else torch.tensor([[100.0 * (pirads == name) for name in CLASSES]], device=device)
    )
    features = None if text is None else torch.as_tensor(text).float()
    autoencoder = autoencoder.to(device).eval()
    size = batch_size or settings.batch_size
    for start in range(0, len(seeds), size):
        batch = list(seeds[start : start + size])
        rows = len(batch)
        text_rows = None
        if features is not None:
            text_rows = (features if len(features) == 1 else features[start : start + rows]).to(device)
            text_rows = text_rows.expand(rows, -1, -1)
        logits: Tensor | None = None

        def denoise(x: Tensor, t: Tensor, rows=rows, text_rows=text_rows) -> Tensor:
            nonlocal logits
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                predicted = checkpoint.model(
                    x, t, spacing=spacing_row.expand(rows, -1), text=text_rows,
                    pirads=None if class_row is None else class_row.expand(rows, -1),
                )  # fmt: skip
            logits = predicted.class_logits
            return predicted.noise

        x_T = start_noise([sum(config.model.latent_channels), *grid], batch, device=device)
        trajectory = loop.Trajectory(plan, x_T, batch)

        def advance(_: int, trajectory=trajectory, denoise=denoise) -> None:
            trajectory.advance(denoise)

        description = f"sampling {start + 1}-{start + rows} of {len(seeds)}"
        latents = loop.drive(trajectory, advance, description=description)
        _check_finite(checkpoint, latents, logits)
        probabilities = None if logits is None else logits.float().softmax(1).tolist()
        for row, seed in enumerate(batch):
            volumes = decode(checkpoint, autoencoder, latents[row])
            yield Generated(seed, volumes, None if probabilities is None else probabilities[row])


@torch.no_grad()
def decode(checkpoint: Checkpoint, autoencoder: Autoencoder, latent: Tensor) -> dict[str, np.ndarray]:
    """latent (sum of channels, x, y, z), as the model makes it -> per sequence (X, Y, Z) float32, clipped to [0, 1]."""
    config = checkpoint.config
    parts = latent.split(config.model.latent_channels)
    volumes: dict[str, np.ndarray] = {}
    for sequence, part, factor in zip(config.data.sequences, parts, checkpoint.scale_factor, strict=True):
        with torch.autocast(latent.device.type, torch.bfloat16, enabled=latent.device.type == "cuda"):
            image = autoencoder.decode(part[None] / factor)
        _check_finite(checkpoint, image)
        volumes[sequence] = image[0, 0].float().clamp(0, 1).cpu().numpy()
    return volumes


def _check_finite(checkpoint: Checkpoint, *tensors: Tensor | None) -> None:
    """A diverged model is an error: clipped and saved, its NaN would pass for a black image."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None):
        why, fix = "the generated volume is not finite: the model has diverged", "use a checkpoint from before"
        raise NonFiniteError(why, path=checkpoint.path, field=f"{checkpoint.weights} weights", fix=fix)


def check_inputs(variant: str, *, has_text: bool, pirads: str | None) -> None:
    """ConfigError when a report or a class is missing or not wanted."""
    row = get_variant(variant)
    if has_text and not row.text:
        raise ConfigError(f"{variant} takes no report", field="--report", fix="leave the report out")
    if row.text and not has_text:
        raise ConfigError(f"{variant} needs text features", field="text", fix="encode the report, or an empty one")
    if row.class_input == "given" and pirads not in CLASSES:
        raise ConfigError(f"{variant} needs the class", field="--pirads", fix="add --pirads neg or --pirads pos")
    if row.class_input != "given" and pirads is not None:
        why = "predicts the class from the report" if row.class_input == "predicted" else "knows no class"
        raise ConfigError(f"{variant} {why}", field="--pirads", fix="leave --pirads out")


def sample_to_folder(
    checkpoint: str | Path,
    out: str | Path,
    *,
    reports: Sequence[str] | None,
    num_samples: int,
    seed: int,
    solver: str | None = None,
    num_inference_steps: int | None = None,
    spacing: Sequence[float] | None = None,
    pirads: str | None = None,
    batch_size: int | None = None,
    vae: str | Path | None = None,
    text_encoder: Any = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
) -> None:
    """Write `num_samples` volumes for each report, with seeds `seed`, `seed` + 1, ...: `sample-000_seed0.nii.gz` and its
    `.json`, then montage.png and run_record.json.

    text_encoder: anything with `encode(reports).features` and `identity` (default: the checkpoint's). A volume that an equal
    request has already written is kept. Raises ConfigError (inputs; the folder holds other samples), CheckpointError, DiskError
    and NonFiniteError (nothing of such a volume is written)."""
    out = Path(out)
    if num_samples < 1 or seed < 0 or (batch_size is not None and batch_size < 1):
        raise ConfigError("--num_samples and --batch_size are 1 or more, --seed is 0 or more", fix="change the value")
    if spacing is not None and not all(0 < step < 100 for step in spacing):
        raise ConfigError(f"a spacing of {list(spacing)} mm", field="--spacing", fix="give three lengths in mm")
    check_writable(out, "--out")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_checkpoint(checkpoint, device=device)
    config, row = loaded.config, get_variant(loaded.variant)
    if row.text and not reports:
        logger.info("no report is given: the null report is used")
        reports = [""]
    check_inputs(loaded.variant, has_text=bool(reports), pirads=pirads)
    autoencoder, vae_hash = _load_vae(vae or loaded.autoencoder, config, loaded.path)
    features, encoder = _encode(reports, text_encoder, config)
    request = {
        **_origin(loaded, vae_hash),
        "solver": solver or config.sampling.solver,
        "num_inference_steps": num_inference_steps or config.sampling.num_inference_steps,
        "spacing": list(spacing or config.data.spacing),
        "class_given": pirads,
        "text_encoder": encoder,
    }
    get_solver(request["solver"]).plan(
        Schedule.from_config(config.scheduler), request["num_inference_steps"],
        prediction=config.sampling.prediction, timestep_spacing=config.sampling.timestep_spacing,
    )  # fmt: skip
    jobs = _jobs(request, reports, num_samples, seed)
    todo = _missing(out, jobs, config.data.sequences, overwrite)
    if not todo and (out / "montage.png").is_file() and (out / "run_record.json").is_file():
        logger.info("the samples in %s are complete, nothing to do", out)
        return
    with recorded(out, "sample", volumes=len(jobs), generated=len(todo), solver=request["solver"],
                  num_inference_steps=request["num_inference_steps"], device=str(device)):  # fmt: skip
        made = generate(
            loaded, autoencoder, [job["seed"] for job in todo], pirads=pirads, spacing=spacing, solver=solver,
            text=None if features is None else features[[job["report"] for job in todo]],
            num_inference_steps=num_inference_steps, batch_size=batch_size,
        )  # fmt: skip
        scale: dict[str, float] = {
            name: loaded.intensity_scale.get(name, REFERENCE_INTENSITY[name]) for name in config.data.sequences
        }
        for job, result in zip(todo, made, strict=True):
            _write(out, job, result, request, scale)
        _montage(out, jobs, scale)


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


def _load_vae(path: str | Path | None, config: Config, checkpoint: Path) -> tuple[Autoencoder, str]:
    if path is None:
        fix = "add --vae with a VAE folder or MAISI's weight file"
        raise CheckpointError("this checkpoint holds no autoencoder", path=checkpoint, fix=fix)
    return load_autoencoder(path, config.autoencoder), sha256(weights_file(path))


def _encode(reports: Sequence[str] | None, encoder: Any, config: Config) -> tuple[np.ndarray | None, Any]:
    """(features (n, L, E), the encoder's identity)."""
    if not reports:
        return None, None
    if encoder is None:
        from ccella_fast.data.text import TextEncoder

        encoder = TextEncoder(config.text)
    encoded = encoder.encode(list(reports))
    if encoded.features.shape[2] != config.model.input_dim:
        why = f"the text features are {encoded.features.shape[2]} wide, the model takes {config.model.input_dim}"
        raise ConfigError(why, field="text.encoder", fix="use the encoder that the model was trained with")
    for number, cut in enumerate(encoded.truncated, start=1):
        if cut:
            logger.warning("report %d is longer than %d tokens: its beginning is cut", number, config.text.max_length)
    return encoded.features, encoder.identity


def _origin(loaded: Checkpoint, vae_hash: str) -> dict[str, Any]:
    weights = {"ema": "ema.safetensors", "raw": "model.safetensors"}[loaded.weights]
    file = loaded.path if loaded.path.is_file() else loaded.path / weights
    return {
        "synthetic": True,
        "variant": loaded.variant,
        "step": loaded.step,
        "weights": loaded.weights,
        "weights_sha256": sha256(file),
        "vae_sha256": vae_hash,
        "config_sha256": _hash(loaded.config.dump()),
    }


def _jobs(request: dict[str, Any], reports: Sequence[str] | None, num_samples: int, seed: int) -> list[dict[str, Any]]:
    """One entry a volume. `identity` covers everything that the volume depends on, and the report only as a hash."""
    jobs: list[dict[str, Any]] = []
    for index, report in enumerate(reports or [None]):
        for number in range(num_samples):
            identity = _hash([request, report, seed + number])
            name = f"sample-{len(jobs):03d}_seed{seed + number}"
            jobs.append({"name": name, "report": index, "seed": seed + number, "identity": identity})
    return jobs


def _missing(out: Path, jobs: list[dict[str, Any]], sequences: Sequence[str], overwrite: bool) -> list[dict[str, Any]]:
    """The jobs still to do. What is there and does not belong to them is refused, or removed with `overwrite`."""
    wanted = {f"{job['name']}.json": job["identity"] for job in jobs}
    names = {path.name for job in jobs for path in _files(out, job, sequences).values()} | set(wanted)
    there = {path for pattern in ("sample-*.nii.gz", "sample-*.json") for path in out.glob(pattern)}
    if overwrite:
        for path in there:
            path.unlink()
        return jobs
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
        if not all(path.is_file() for path in [out / f"{job['name']}.json", *_files(out, job, sequences).values()])
    ]


def _files(out: Path, job: dict[str, Any], sequences: Sequence[str]) -> dict[str, Path]:
    """Path of each sequence's volume."""
    if len(sequences) == 1:
        return {sequences[0]: out / f"{job['name']}.nii.gz"}
    return {sequence: out / f"{job['name']}_seq-{sequence}.nii.gz" for sequence in sequences}


def _write(out: Path, job: dict[str, Any], result: Generated, request: dict[str, Any], scale: dict[str, float]) -> None:
    """The sidecar first: a volume without one would be nobody's."""
    probabilities = result.class_probabilities
    files = _files(out, job, list(result.volumes))
    sidecar = {
        **request,
        "seed": job["seed"],
        "report": job["report"],
        "files": {sequence: path.name for sequence, path in files.items()},
        "shape": list(next(iter(result.volumes.values())).shape),
        "intensity_scale": scale,
        "class_probabilities": probabilities and dict(zip(CLASSES, [round(p, 5) for p in probabilities], strict=True)),
        "identity": job["identity"],
    }
    write_json(out / f"{job['name']}.json", sidecar)
    for sequence, path in files.items():
        write_nifti(path, result.volumes[sequence] * scale[sequence], request["spacing"])


def _montage(out: Path, jobs: list[dict[str, Any]], scale: dict[str, float]) -> None:
    from ccella_fast.report.figures import Panel, montage

    panels = []
    for job in jobs:
        sidecar = read_json(out / f"{job['name']}.json")
        for sequence, path in _files(out, job, list(scale)).items():
            volume = read_nifti_array(path)[0] / scale[sequence]
            title = f"report {job['report'] + 1}, seed {job['seed']}" + (f", {sequence}" if len(scale) > 1 else "")
            if sidecar["class_probabilities"]:
                title += f", P(pos) {sidecar['class_probabilities']['pos']:.2f}"
            panels.append(Panel(volume, sidecar["spacing"], title))
    top = " / ".join(f"{name} 0 to {value:g}" for name, value in scale.items())
    caption = f"Synthetic images generated by ccella_fast. Not for diagnosis. Window: {top}"
    with atomic_path(out / "montage.png") as temporary:
        temporary.write_bytes(montage(panels[:_SHOWN], window=(0.0, 1.0), caption=caption))


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
