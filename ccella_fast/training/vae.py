"""Train the autoencoder from scratch: L1 + KL on random patches of the prepared images.

Step k draws its patches and its posterior noise from (seed, k) alone, so a run that was stopped goes on from its last saved
state as if nothing had happened. The finished autoencoder replaces that state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ccella_fast.config import Config, VaeTrainingConfig
from ccella_fast.data.augment import IDENTITY, draw
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.volumes import Job, check_engine, make_engine
from ccella_fast.diffusion.noise import generator, randn_per_sample
from ccella_fast.environment import recorded
from ccella_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from ccella_fast.models.vae import Autoencoder, load_autoencoder, save_autoencoder
from ccella_fast.models.weights import read_pt
from ccella_fast.storage import atomic_path, disk_error, read_json, write_json
from ccella_fast.training.feed import epoch_order

logger = logging.getLogger("ccella_fast")

_SAVE_SECONDS = 60.0
_READ_EVERY = 10  # steps between host reads of the loss
_SHOWN = 4  # volumes whose reconstruction is kept for the report


class Image(NamedTuple):
    """One prepared volume. values: a read-only memory map (X, Y, Z), float32 in [0, 1], of the file `path`. spacing: mm."""

    case: str
    sequence: str
    sha256: str
    values: np.ndarray
    path: Path
    spacing: tuple[float, float, float]


def train_vae(data: str | Path, out: str | Path, config: Config) -> None:
    """Train `config.autoencoder` on the train split of the prepared folder `data`; write it to the folder `out`.

    `out` then also holds metrics.jsonl, run_record.json (with L1 and PSNR of the test split) and a few reconstructions. A
    finished run with equal settings and images is kept as it is, an unfinished one goes on. Raises DataError, ConfigError,
    NonFiniteError (the loss diverged) and CheckpointError (`out` holds another autoencoder)."""
    out = Path(out)
    check_engine(config.data.engine)
    train, test = read_images(data)
    _check(config, train, data)
    identity = _identity(config, train)
    if _finished(out, identity):
        logger.info("the autoencoder in %s is complete, nothing to do", out)
        return
    write_json(out / "training.json", {"identity": identity})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with recorded(out, "train-vae", device=str(device), images=len(train)) as facts:
        vae, facts["steps_per_second"] = _train(train, out, config, device)
        if not all(bool(parameter.isfinite().all()) for parameter in vae.parameters()):
            fix = f"delete the folder and lower vae_training.lr ({config.vae_training.lr:g})"
            raise NonFiniteError("the last step made weights that are not finite", path=out, fix=fix)
        # Without a test split there is still something to look at, but no figure to report.
        measured = evaluate(vae, test or train[:_SHOWN], out / "reconstructions", device)
        facts["test"] = measured if test else None
        save_autoencoder(vae, out)
        (out / "state.pt").unlink(missing_ok=True)


def read_images(data: str | Path) -> tuple[list[Image], list[Image]]:
    """Every sequence of every study, by split: (train, test). DataError when a file is missing or changed."""
    prepared = load_manifest(data)
    splits: dict[str, list[Image]] = {"train": [], "test": []}
    for case in tqdm(prepared.cases, desc="checking images", unit="study", mininterval=_interval()):
        for sequence in prepared.data.sequences:
            key = f"image/{sequence}"
            values = prepared.array(case, key, verify=True)
            path, (r, a, s) = prepared.folder / case.files[key].path, case.spacing
            splits[case.split].append(Image(case.id, sequence, case.files[key].sha256, values, path, (r, a, s)))
    return splits["train"], splits["test"]


def patch_jobs(images: Sequence[Image], settings: VaeTrainingConfig, step: int) -> list[Job]:
    """The patches of `step`: each image is used once before any is used again, at random places."""
    places, (i, j, k) = generator(settings.seed, "place", step), settings.patch
    jobs = []
    for number in range(step * settings.batch_size, (step + 1) * settings.batch_size):
        image, epoch = _image_at(images, settings, number)
        x, y, z = (
            int(torch.randint(size - width + 1, (1,), generator=places))
            for size, width in zip(image.values.shape, settings.patch, strict=True)
        )
        drawn, strengths = IDENTITY, settings.augmentation
        if strengths.active:
            drawn = draw(
                strengths, seed=settings.seed, case_id=f"{image.case} {x} {y} {z}", epoch=epoch, shape=settings.patch,
                spacing=image.spacing, keep_gland=False,
            ).for_sequence(image.sequence)  # fmt: skip
        jobs.append(Job(image.path, image.values.shape, (x, y, z), (i, j, k), image.spacing, drawn))
    return jobs


def _image_at(images: Sequence[Image], settings: VaeTrainingConfig, number: int) -> tuple[Image, int]:
    epoch, position = divmod(number, len(images))
    return images[epoch_order(settings.seed, epoch, len(images))[position]], epoch


def _patches(train: list[Image], config: Config, device: torch.device, start: int) -> Iterator[Tensor]:
    """(B, 1, *patch) for the steps from `start`."""
    settings = config.vae_training
    first, last = (step * settings.batch_size for step in (start, settings.max_train_steps))
    engine = make_engine(config.data.engine, settings.augmentation, device, settings.patch)
    paths = [_image_at(train, settings, number)[0].path for number in range(first, last)]
    return engine.stream(paths, lambda n: patch_jobs(train, settings, start + n), settings.max_train_steps - start)


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)), summed over a sample's latent and averaged over the batch (Kingma and Welling 2014,
    arXiv 1312.6114, appendix B), in fp32."""
    mean, sigma = mean.float(), sigma.float()
    return 0.5 * (mean.square() + sigma.square() - 2 * sigma.log() - 1).sum() / len(mean)


def learning_rate(settings: VaeTrainingConfig, step: int) -> float:
    """Linear warm-up over the first 5 % (100 steps at most), then half a cosine down to 1 %."""
    total = settings.max_train_steps
    warm = min(100, max(1, total // 20))
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))))


def _train(train: list[Image], out: Path, config: Config, device: torch.device) -> tuple[Autoencoder, float]:
    """The loop. Returns the autoencoder and steps per second."""
    settings = config.vae_training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(settings.seed, "weights").initial_seed())
        vae = Autoencoder(config.autoencoder).to(device).train()
    vae.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # faster on CPU and GPU
    # Start with a nearly noiseless posterior (sigma e^-2): at sigma 1 the decoder sees only noise until the encoder's scale has
    # grown, which wastes the first hundreds of steps. The KL term settles sigma afterwards.
    torch.nn.init.constant_(vae.get_parameter("quant_conv_log_sigma.conv.bias"), -4.0)
    # A short memory of squared gradients (0.95): in hundreds of steps 0.999 would still remember the first ones.
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.lr, betas=(0.9, 0.95))
    start = _restore(out / "state.pt", vae, optimizer)
    latent = [config.autoencoder.latent_channels, *(width // config.autoencoder.factor for width in settings.patch)]
    begun = saved = time.monotonic()
    waiting: list[Tensor] = []
    with _metrics(out / "metrics.jsonl", start) as log:
        bar = tqdm(
            range(start, settings.max_train_steps), desc="training the autoencoder", unit="step",
            initial=start, total=settings.max_train_steps, mininterval=_interval(),
        )  # fmt: skip
        for step, patches in zip(bar, _patches(train, config, device, start), strict=True):
            rate = learning_rate(settings, step)
            x = patches.to(device, memory_format=torch.channels_last_3d)
            sources = [generator(settings.seed, "posterior", step, row) for row in range(len(x))]
            waiting.append(_step(vae, optimizer, x, randn_per_sample(latent, sources, device=device), rate, settings))
            done = step + 1
            if done % _READ_EVERY and done < settings.max_train_steps:
                continue
            l1, kl = torch.stack(waiting).mean(0).tolist()
            waiting.clear()
            if not math.isfinite(l1 + kl):
                fix = f"lower vae_training.lr ({settings.lr:g})"
                raise NonFiniteError(f"the loss is not finite before step {done}", path=out, fix=fix)
            bar.set_postfix(l1=f"{l1:.4f}", kl=f"{kl:.0f}")
            seconds = (time.monotonic() - begun) / (done - start)
            values = {"step": done, "loss": l1 + settings.kl_weight * kl, "loss_l1": l1, "loss_kl": kl, "lr": rate}
            print(json.dumps({**values, "seconds_per_step": round(seconds, 5)}), file=log, flush=True)
            if time.monotonic() - saved > _SAVE_SECONDS or done == settings.max_train_steps:
                _save(out / "state.pt", vae, optimizer, done)
                saved = time.monotonic()
    seconds = time.monotonic() - begun
    return vae, round(max(0, settings.max_train_steps - start) / max(seconds, 1e-9), 3)


def _step(
    vae: Autoencoder,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    noise: Tensor,
    rate: float,
    settings: VaeTrainingConfig,
) -> Tensor:
    """One update; returns (L1, KL) on the device."""
    # bf16 is for GPUs: on a CPU it would make the result depend on which instructions the CPU has.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        reconstruction, mean, sigma = vae(x, noise)
    l1, kl = F.l1_loss(reconstruction.float(), x), kl_divergence(mean, sigma)
    optimizer.zero_grad(set_to_none=True)
    (l1 + settings.kl_weight * kl).backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return torch.stack([l1.detach(), kl.detach()])


@torch.no_grad()
def evaluate(vae: Autoencoder, images: list[Image], out: Path, device: torch.device) -> dict[str, Any]:
    """Mean L1 and PSNR (peak 1) of whole volumes decoded from their posterior mean, in fp32.

    The first few reconstructions are written to `out/<case>/<sequence>.npy`, float32 in [0, 1]."""
    vae.eval()
    l1, psnr = [], []
    for number, image in enumerate(tqdm(images, desc="reconstructing", unit="volume", mininterval=_interval())):
        x = torch.from_numpy(np.array(image.values))[None, None].to(device)
        decoded = vae.decode(vae.encode(x)[0]).clamp(0, 1)
        l1.append(float((decoded - x).abs().mean(dtype=torch.float64)))
        psnr.append(-10 * math.log10(max(1e-12, float((decoded - x).square().mean(dtype=torch.float64)))))
        if number < _SHOWN:
            with atomic_path(out / image.case / f"{image.sequence}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, decoded[0, 0].cpu().numpy(), allow_pickle=False)
    return {"volumes": len(images), "l1": round(float(np.mean(l1)), 5), "psnr": round(float(np.mean(psnr)), 2)}


def _check(config: Config, train: list[Image], data: str | Path) -> None:
    """The images exist and the patch fits them and the network."""
    if not train:
        raise DataError("the train split is empty", path=data, fix="prepare more studies")
    if (config.autoencoder.in_channels, config.autoencoder.out_channels) != (1, 1):
        fix = "set in_channels and out_channels to 1: each sequence is encoded alone"
        raise ConfigError("train-vae makes one-channel autoencoders", field="autoencoder.in_channels", fix=fix)
    patch, grid, factor = config.vae_training.patch, train[0].values.shape, config.autoencoder.factor
    if any(width % factor or width > size for width, size in zip(patch, grid, strict=True)):
        fix = f"use {[min(width, size) // factor * factor or factor for width, size in zip(patch, grid, strict=True)]}"
        why = f"the patch {patch} must be a multiple of {factor} and not larger than the grid {list(grid)}"
        raise ConfigError(why, field="vae_training.patch", fix=fix)


def _identity(config: Config, train: list[Image]) -> str:
    """What the weights depend on, as one hash."""
    plain = not config.vae_training.augmentation.active
    settings = config.vae_training.model_dump(exclude={"augmentation"} if plain else None)
    parts = [config.autoencoder.model_dump(), settings, [image.sha256 for image in train]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _finished(out: Path, identity: str) -> bool:
    """True when `out` holds this very autoencoder, complete. CheckpointError when it holds, or was to hold, another."""
    begun, complete = (out / "training.json").is_file(), (out / "manifest.json").is_file()
    same = begun and read_json(out / "training.json", error=CheckpointError).get("identity") == identity
    if not same and (complete or (out / "state.pt").is_file()):
        why = "this folder holds an autoencoder of other settings or other images"
        raise CheckpointError(why, path=out, fix="choose another --out, or delete the folder to train anew")
    if same and complete:
        load_autoencoder(out)  # a damaged one is an error here, not in the next command
    return same and complete


def _save(path: Path, vae: Autoencoder, optimizer: torch.optim.Optimizer, step: int) -> None:
    with atomic_path(path) as temporary:
        torch.save({"step": step, "model": vae.state_dict(), "optimizer": optimizer.state_dict()}, temporary)


def _restore(path: Path, vae: Autoencoder, optimizer: torch.optim.Optimizer) -> int:
    """Load a saved state, if there is one; the number of steps already done."""
    if not path.is_file():
        return 0
    state = read_pt(path)
    vae.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


@contextlib.contextmanager
def _metrics(path: Path, start: int):
    """The metrics file, open for appending, without lines of steps that will be run again."""
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in lines if _logged_step(line) <= start]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept))
    try:
        with path.open("a") as log:
            yield log
    except OSError as error:
        raise disk_error(error, path) from error


def _logged_step(line: str) -> float:
    """Infinite for half a line, where a kill fell into the write."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _interval() -> float:
    return 0.1 if sys.stderr.isatty() else 1.0
