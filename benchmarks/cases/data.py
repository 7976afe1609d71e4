"""The data engine against MONAI doing the same work, and training steps on latents from different places.

Studies are real where CCELLA_TEST_DATA (default ../shared/data) has them, else phantoms.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmark_case import BenchmarkCase, Implementation, PreparedCase
from ccella_fast.config import AugmentationConfig, Config, load_config, make_config
from ccella_fast.data.augmentation.engine import AugmentationEngine
from ccella_fast.data.augmentation.engine_choice import make_engine
from ccella_fast.data.augmentation.parameters import Augmentation, draw_augmentation
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.data.loading.online_latents import OnlineLatents
from ccella_fast.data.loading.resident_latents import ResidentLatents
from ccella_fast.data.phantom.phantom import write_phantoms
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.readers.volume_file import read_volume
from ccella_fast.diffusion.objective import Objective
from ccella_fast.models import build_model
from ccella_fast.models.autoencoder import Autoencoder, save_autoencoder
from ccella_fast.training.batches import BatchStream
from ccella_fast.training.loop import joint_loss
from fixtures import Workbench

ROOT = Path(__file__).resolve().parents[2]
_PATIENTS = ("prostate3t-03-0002", "prostate3t-03-0003", "prostate3t-03-0005")
_STUDIES = 12  # prepared in one run
_VOLUMES = 8  # augmented in one run, in batches of 2
_STEPS, _ONLINE_STEPS = 20, 10  # training steps in one run


def full_grid() -> Config:
    """The grid of the paper, 256 x 256 x 128 at 0.5 x 0.5 x 0.5625 mm, without reports: only volumes are processed."""
    return make_config({"model.variant": "MAISI"})


def write_studies(folder: Path, count: int) -> Path:
    """Write `count` studies as .nii.gz: three real patients repeated, or phantoms."""
    data = Path(os.environ.get("CCELLA_TEST_DATA", ROOT.parent / "shared" / "data")) / "mri"
    if not data.is_dir():
        write_phantoms(folder, num_studies=count)
        return folder
    for number in range(count):
        (folder / f"s{number:02d}").mkdir(parents=True)
        shutil.copy(data / _PATIENTS[number % 3] / "t2w.nii.gz", folder / f"s{number:02d}" / "t2w.nii.gz")
    return folder


# Preparation


def prepare_case(bench: Workbench) -> PreparedCase:
    """Studies on disk to normalized volumes on one grid, on disk.

    Ours also verifies every checksum, reads each study twice (all are checked before the first is written), interpolates with
    cubic splines and records SHA-256. MONAI's loop does none of that and interpolates linearly.
    """
    prepared, work = _with_folder(_STUDIES)
    studies, config = write_studies(work / "studies", _STUDIES), full_grid()
    files = sorted(studies.glob("*/t2w.nii.gz"))

    def ours() -> None:
        shutil.rmtree(work / "ours", ignore_errors=True)
        prepare(studies, work / "ours", config)

    def monai() -> None:
        transform = _monai_prepare(config)
        (work / "monai").mkdir(exist_ok=True)
        for file in files:
            np.save(work / "monai" / f"{file.parent.name}.npy", transform({"t2w": file})["t2w"][0].numpy())

    prepared.implementations = {"monai": _implementation(monai, _STUDIES), "ours": _implementation(ours, _STUDIES)}
    prepared.check = lambda: {"least correlation": min(_correlation(work, file.parent.name) for file in files)}
    prepared.required_speedup = 2.0
    return prepared


def _monai_prepare(config: Config) -> Any:
    import monai.transforms as mt

    return mt.Compose([
        mt.LoadImaged("t2w", image_only=True), mt.EnsureChannelFirstd("t2w"),
        mt.Orientationd("t2w", axcodes="RAS", labels=None),
        mt.Spacingd("t2w", pixdim=config.data.spacing, mode="bilinear"), mt.ResizeWithPadOrCropd("t2w", config.data.dim),
        mt.ScaleIntensityRangePercentilesd("t2w", lower=0, upper=99.5, b_min=0, b_max=1, clip=True),
    ])  # fmt: skip


def _correlation(work: Path, study: str) -> float:
    """Correlation of the two results in the middle of the volume, where neither is padded."""
    middle = (slice(64, 192), slice(64, 192), slice(40, 88))
    both = [
        torch.from_numpy(np.load(path)[middle])
        for path in (work / f"ours/images/{study}/t2w.npy", work / f"monai/{study}.npy")
    ]
    # Averaged over 2 mm, because the two grids are offset by a fraction of a voxel.
    ours, monai = (torch.nn.functional.avg_pool3d(part[None], 4)[0].numpy() for part in both)
    value = float(np.corrcoef(ours.ravel(), monai.ravel())[0, 1])
    assert value > 0.95 and np.corrcoef(ours[::-1].ravel(), monai.ravel())[0, 1] < 0.9, (study, value)
    return value


# Augmentation


def augment_case(bench: Workbench) -> PreparedCase:
    """Prepared volumes on disk to augmented tensors, in batches of 2.

    MONAI's pipeline consists of its own transforms of the same kinds and strengths, in a DataLoader with one worker per core.
    It does not have a counterpart of our tone curve, so it applies one operator less. "ours" is the engine that is chosen on
    this machine; where that is DALI, "torch" is the other one.
    """
    prepared, work = _with_folder(_VOLUMES)
    config, device, cores = full_grid(), bench.device, len(os.sched_getaffinity(0))
    strengths, shape, spacing = config.augmentation, tuple(config.data.dim), tuple(config.data.spacing)
    paths = _write_volumes(work, 4, shape)
    order = [paths[n % len(paths)] for n in range(_VOLUMES)]
    loader = _monai_loader(order, strengths, spacing, workers=cores)
    chosen = make_engine("auto", strengths, device, shape)
    engines = {"ours": chosen}
    if chosen.name == "dali":
        engines = {"torch": make_engine("torch", strengths, device, shape), "ours": chosen}

    def request(n: int) -> VolumeRequest:
        drawn = draw_augmentation(
            strengths, seed=0, case_id=order[n].parent.name, epoch=n, shape=shape, spacing=spacing
        )
        return VolumeRequest(order[n], shape, (0, 0, 0), shape, spacing, drawn)  # type: ignore[arg-type]

    def ours(engine: AugmentationEngine) -> None:
        for batch in engine.stream(order, lambda n: [request(2 * n), request(2 * n + 1)], _VOLUMES // 2):
            assert batch.shape == (2, 1, *shape)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def monai() -> None:
        for batch in loader:
            assert batch["t2w"].shape == (2, 1, *shape)
            batch["t2w"].to(device)

    prepared.implementations = {"monai": _implementation(monai, _VOLUMES)}
    for name, engine in engines.items():
        prepared.implementations[name] = _implementation(partial(ours, engine), _VOLUMES)
    prepared.notes = [f'"ours" is {chosen.name}']
    prepared.check = lambda: {"largest difference from MONAI's warp": _warp_difference(order[0])}
    prepared.required_speedup = 10.0 if device.type == "cuda" else 2.0
    return prepared


def _write_volumes(folder: Path, count: int, shape: Sequence[int]) -> list[Path]:
    """Write phantoms, interpolated to `shape`, as `prepare` would, but without SimpleITK, which a GPU machine may lack."""
    write_phantoms(folder / "studies", num_studies=count)
    paths = []
    for file in sorted((folder / "studies").glob("*/t2w.nii.gz")):
        scan = torch.from_numpy(read_volume(file).array.astype(np.float32))
        values = F.interpolate(scan[None, None], tuple(shape), mode="trilinear")[0, 0]
        paths.append(folder / "images" / file.parent.name / "t2w.npy")
        paths[-1].parent.mkdir(parents=True)
        np.save(paths[-1], (values / values.max()).numpy())
    return paths


def _monai_loader(order: list[Path], strengths: AugmentationConfig, spacing: Any, *, workers: int) -> Any:
    import monai.transforms as mt
    from monai.data import DataLoader, Dataset

    low, high = 1 - strengths.gamma, 1 + strengths.gamma
    sigma = [(1e-3, strengths.blur / step) for step in spacing]
    transform = mt.Compose([
        mt.LoadImaged("t2w", reader="NumpyReader", image_only=True), mt.EnsureChannelFirstd("t2w", channel_dim="no_channel"),
        mt.RandAffined("t2w", prob=1, rotate_range=np.deg2rad(strengths.rotation).tolist(),
                    translate_range=[mm / step for mm, step in zip(strengths.translation, spacing, strict=True)],
                    scale_range=[strengths.zoom] * 3, mode="bilinear", padding_mode="zeros"),
        mt.RandGaussianSmoothd("t2w", *sigma, prob=1),
        mt.RandBiasFieldd("t2w", degree=2, coeff_range=(0, strengths.bias), prob=1),
        mt.RandScaleIntensityd("t2w", factors=strengths.brightness, prob=1),
        mt.RandAdjustContrastd("t2w", prob=1, gamma=(low, high)),
        mt.RandGaussianNoised("t2w", prob=1, std=strengths.noise),
    ])  # fmt: skip
    data = Dataset([{"t2w": str(path)} for path in order], transform)
    return DataLoader(data, batch_size=2, num_workers=workers, persistent_workers=True)


def _warp_difference(path: Path) -> float:
    """Largest difference between the engine's warp and MONAI's, given the same matrix. The engine's also has to move voxels."""
    from monai.transforms import Affine

    config = full_grid()
    shape, spacing = tuple(config.data.dim), tuple(config.data.spacing)
    turned = Augmentation(rotation=(2.0, -1.0, 5.0), shift=(2.0, -3.0, 1.0), scale=(0.95, 0.95, 0.95))
    rotation_only = AugmentationConfig.model_validate({"preset": "none", "rotation": [5, 5, 5]})
    request = VolumeRequest(path, shape, (0, 0, 0), shape, spacing, turned)  # type: ignore[arg-type]
    ours = make_engine("torch", rotation_only, torch.device("cpu"), shape).make(request)  # type: ignore[arg-type]
    matrix, center = turned.matrix(shape, spacing), (np.array(shape) - 1) / 2
    centered = np.eye(4)
    centered[:3] = np.column_stack([matrix[:, :3], matrix[:, 3] + matrix[:, :3] @ center - center])
    moved = Affine(affine=centered, mode="bilinear", padding_mode="zeros", image_only=True)(
        torch.from_numpy(np.load(path))[None]
    )
    difference = float((ours - moved.as_tensor()).abs().max())
    assert difference < 5e-3 and float((ours - torch.from_numpy(np.load(path))).abs().max()) > 0.1, difference
    return difference


# Training


def wait_case(bench: Workbench) -> PreparedCase:
    """Training steps of the demo's model on memory-mapped latents, and on latents resident on the device.

    The quantity of interest is the share of a step spent waiting for data; it is a fact of both implementations.
    """
    prepared, work = _with_folder(_STEPS)
    config, dataset = _latents(work, "stored")
    sources = {"memory-mapped": dataset, "ours": ResidentLatents(dataset, bench.device, torch.float32)}
    runs = {name: _TrainingRun(config, dataset, source, bench.device, _STEPS) for name, source in sources.items()}

    def check() -> dict[str, float]:
        assert torch.equal(runs["ours"].first_latents(), runs["memory-mapped"].first_latents())
        return {f"{name}: % of a step waiting": 100 * run.waiting_share() for name, run in runs.items()}

    prepared.implementations = {name: _implementation(run, _STEPS) for name, run in runs.items()}
    prepared.check = check
    prepared.required_speedup = 1.0
    return prepared


def online_case(bench: Workbench) -> PreparedCase:
    """Training steps of the demo's model on stored latents, and with `--latents online`.

    On a GPU online latents may take at most 1.25 times as long. On a CPU the encoder competes with training for the same
    cores, so no speedup is required there.
    """
    prepared, work = _with_folder(_ONLINE_STEPS)
    config, stored = _latents(work, "stored")
    _, images = _latents(work, "online")
    resident = ResidentLatents(stored, bench.device, torch.float32)
    online = OnlineLatents(images, work / "vae", bench.device, seed=0)
    runs = {
        "stored": _TrainingRun(config, stored, resident, bench.device, _ONLINE_STEPS),
        "ours": _TrainingRun(config, images, online, bench.device, _ONLINE_STEPS),
    }
    prepared.implementations = {name: _implementation(run, _ONLINE_STEPS) for name, run in runs.items()}
    prepared.check = lambda: {"% of a step waiting": 100 * runs["ours"].waiting_share()}
    prepared.required_speedup = 1 / 1.25 if bench.device.type == "cuda" else None
    return prepared


def _latents(work: Path, kind: str) -> tuple[Config, PreparedDataset]:
    """Phantoms on the demo's grid for the demo's model without reports, encoded by an untrained autoencoder."""
    config = load_config(ROOT / "configs" / "demo.json", {"model.variant": "MAISI"})
    if not (work / "latents" / "manifest.json").is_file():
        write_phantoms(work / "phantoms", num_studies=8)
        torch.manual_seed(0)
        save_autoencoder(Autoencoder(config.autoencoder), work / "vae")
        prepare(work / "phantoms", work / "latents", config, vae=work / "vae")
    return config, PreparedDataset(work / "latents", config, needs="images" if kind == "online" else "latents")


class _TrainingRun:
    """A call trains for `steps` steps and records the share of the time spent waiting for data."""

    def __init__(self, config: Config, dataset: PreparedDataset, source: Any, device: torch.device, steps: int):
        self.feed = BatchStream(
            dataset, seed=0, batch_size=config.training.batch_size, accumulation=1, rank=0, world_size=1,
            scale=torch.ones(4), objective=Objective(), source=source, device=device,
        )  # fmt: skip
        self.device, self.steps, self.seconds = device, steps, 0.0
        self.model, self.objective = build_model(config).to(device), Objective()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def __call__(self) -> None:
        begin, self.feed.waited = time.perf_counter(), 0.0
        for (samples,) in self.feed.steps(0, self.steps, background=self.device.type == "cuda"):
            joint_loss(self.model, samples, self.objective, 0.0).total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - begin

    def waiting_share(self) -> float:
        return self.feed.waited / self.seconds

    def first_latents(self) -> torch.Tensor:
        return self.feed.micro_batch(0, 0).latents


# Registry


def _with_folder(units: int) -> tuple[PreparedCase, Path]:
    """A case that works in a temporary folder, and the folder."""
    folder = tempfile.TemporaryDirectory(prefix="ccella-bench-")
    return PreparedCase(shapes={"units of one run": units}, keep_alive=[folder]), Path(folder.name)


def _implementation(run: Callable[[], Any], units: int) -> Implementation:
    return Implementation("fp32", lambda stopwatch: run(), calls=units)


CASES = [
    BenchmarkCase("prepare", "data", "studies on disk to prepared images: MONAI's dictionary transforms in a loop, and "
          "`ccella-fast prepare`", prepare_case, budget=90, set_up={"cpu": 60, "cuda": 60}),
    BenchmarkCase("augment", "data", "prepared images to augmented volumes: MONAI's transforms in a DataLoader, and the data "
          "engine", augment_case, budget=90, set_up={"cpu": 60, "cuda": 60}),
    BenchmarkCase("wait", "data", "training steps of the demo's model on stored latents: memory-mapped, and resident",
          wait_case, budget=20, set_up={"cpu": 30, "cuda": 30}),
    BenchmarkCase("online", "data", "training steps of the demo's model: stored latents, and made from augmented images while "
          "training", online_case, budget=20, set_up={"cpu": 30, "cuda": 30}),
]  # fmt: skip
