"""The data engine against MONAI doing the same work: `python benchmarks/cases/data.py [NAME ...]`.

Each function sets a case up and returns a `DataCase`: two sides that are timed in turn, what one call of a side produces, and a
gate that must hold before a time means anything. Volumes are real where CCELLA_TEST_DATA (default ../shared/data) has them,
else phantoms.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmark_case import BenchmarkCase, Implementation, Trial
from ccella_fast.config import AugmentationConfig, Config, load_config, make_config
from ccella_fast.data.augmentation.engine import make_engine
from ccella_fast.data.augmentation.parameters import Augmentation, draw_augmentation
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.data.loading.online_latents import OnlineLatents
from ccella_fast.data.loading.resident_latents import ResidentLatents
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.phantom.phantom import write_phantoms
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.models import build_model
from ccella_fast.models.autoencoder.network import Autoencoder, save_autoencoder
from ccella_fast.training.batches import BatchStream
from ccella_fast.training.loop import joint_loss

ROOT = Path(__file__).resolve().parents[2]
_CPU = torch.device("cpu")
_NIFTI = ("prostate3t-03-0002", "prostate3t-03-0003", "prostate3t-03-0005")


class DataCase(NamedTuple):
    """sides: the first is the baseline. units: volumes of one call. bar: the ratio that is asked for. gate: raises
    AssertionError, or returns what it has measured."""

    sides: dict[str, Callable[[], Any]]
    units: int
    bar: float
    gate: Callable[[], dict[str, float]]


def full_grid() -> Config:
    """The paper's grid, 256 x 256 x 128 at 0.5 x 0.5 x 0.5625 mm; no report, so that only volumes are worked on."""
    return make_config({"model.variant": "MAISI"})


def write_studies(folder: Path, count: int) -> Path:
    """`count` studies as .nii.gz: three real patients over and over, or phantoms."""
    data = Path(os.environ.get("CCELLA_TEST_DATA", ROOT.parent / "shared" / "data")) / "mri"
    if not data.is_dir():
        write_phantoms(folder, num_studies=count)
        return folder
    for number in range(count):
        (folder / f"s{number:02d}").mkdir(parents=True)
        shutil.copy(data / _NIFTI[number % 3] / "t2w.nii.gz", folder / f"s{number:02d}" / "t2w.nii.gz")
    return folder


# ---- preparation ----


def prepare_case(work: Path, *, count: int = 12) -> DataCase:
    """Studies on disk to normalised volumes on one grid, on disk. Ours also verifies every checksum, reads each study twice
    (all are checked before the first is written), interpolates with cubic splines and records SHA-256; MONAI's loop does
    none of that and interpolates linearly."""
    studies, config = write_studies(work / "studies", count), full_grid()
    files = sorted(studies.glob("*/t2w.nii.gz"))

    def ours() -> None:
        shutil.rmtree(work / "ours", ignore_errors=True)
        prepare(studies, work / "ours", config)

    def monai() -> None:
        transform = _monai_prepare(config)
        (work / "monai").mkdir(exist_ok=True)
        for file in files:
            np.save(work / "monai" / f"{file.parent.name}.npy", transform({"t2w": file})["t2w"][0].numpy())

    def gate() -> dict[str, float]:
        return {"least correlation": min(_correlation(work, file.parent.name) for file in files)}

    return DataCase({"monai": monai, "ours": ours}, count, 2.0, gate)


def _monai_prepare(config: Config) -> Any:
    import monai.transforms as mt

    return mt.Compose([
        mt.LoadImaged("t2w", image_only=True), mt.EnsureChannelFirstd("t2w"),
        mt.Orientationd("t2w", axcodes="RAS", labels=None),
        mt.Spacingd("t2w", pixdim=config.data.spacing, mode="bilinear"), mt.ResizeWithPadOrCropd("t2w", config.data.dim),
        mt.ScaleIntensityRangePercentilesd("t2w", lower=0, upper=99.5, b_min=0, b_max=1, clip=True),
    ])  # fmt: skip


def _correlation(work: Path, study: str) -> float:
    """In the middle of the volume, where neither has padding."""
    middle = (slice(64, 192), slice(64, 192), slice(40, 88))
    both = [
        torch.from_numpy(np.load(path)[middle])
        for path in (work / f"ours/images/{study}/t2w.npy", work / f"monai/{study}.npy")
    ]
    # Over 2 mm: where their grid lies differs from ours by part of a voxel.
    ours, theirs = (torch.nn.functional.avg_pool3d(part[None], 4)[0].numpy() for part in both)
    value = float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1])
    assert value > 0.95 and np.corrcoef(ours[::-1].ravel(), theirs.ravel())[0, 1] < 0.9, (study, value)
    return value


# ---- augmentation ----


def augment_case(work: Path, *, volumes: int = 8, engine: str = "auto", device: torch.device = _CPU) -> DataCase:
    """Prepared volumes on disk to augmented tensors, batch 2. MONAI's pipeline is its own transforms of the same kinds at the
    same strengths (it has no counterpart of our tone curve, so it does one operator less) in a DataLoader with a worker a
    core."""
    config, cores = full_grid(), len(os.sched_getaffinity(0))
    if not (work / "prepared" / "manifest.json").is_file():
        prepare(write_studies(work / "studies", 4), work / "prepared", config)
    prepared = load_manifest(work / "prepared")
    paths = [prepared.folder / case.files["image/t2w"].path for case in prepared.cases]
    strengths, shape, spacing = config.augmentation, tuple(config.data.dim), tuple(config.data.spacing)
    order = [paths[n % len(paths)] for n in range(volumes)]
    loader = _monai_loader(order, strengths, spacing, workers=cores)
    made = make_engine(engine, strengths, device, shape)  # type: ignore[arg-type]

    def job(n: int) -> VolumeRequest:
        drawn = draw_augmentation(
            strengths, seed=0, case_id=order[n].parent.name, epoch=n, shape=shape, spacing=spacing
        )
        return VolumeRequest(order[n], shape, (0, 0, 0), shape, spacing, drawn)  # type: ignore[arg-type]

    def ours() -> None:
        for batch in made.stream(order, lambda n: [job(2 * n), job(2 * n + 1)], volumes // 2):
            assert batch.shape == (2, 1, *shape)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def monai() -> None:
        for batch in loader:
            assert batch["t2w"].shape == (2, 1, *shape)
            batch["t2w"].to(device)

    return DataCase(
        {"monai": monai, "ours": ours}, volumes, 10.0 if device.type == "cuda" else 2.0, lambda: _same_warp(order[0])
    )


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


def _same_warp(path: Path) -> dict[str, float]:
    """The engine's geometry against MONAI's, told the same matrix."""
    from monai.transforms import Affine

    config = full_grid()
    shape, spacing = tuple(config.data.dim), tuple(config.data.spacing)
    turned = Augmentation(rotation=(2.0, -1.0, 5.0), shift=(2.0, -3.0, 1.0), scale=(0.95, 0.95, 0.95))
    only = AugmentationConfig.model_validate({"preset": "none", "rotation": [5, 5, 5]})
    ours = make_engine("torch", only, _CPU, shape).make(VolumeRequest(path, shape, (0, 0, 0), shape, spacing, turned))  # type: ignore
    matrix, centre = turned.matrix(shape, spacing), (np.array(shape) - 1) / 2
    centred = np.eye(4)
    centred[:3] = np.column_stack([matrix[:, :3], matrix[:, 3] + matrix[:, :3] @ centre - centre])
    moved = Affine(affine=centred, mode="bilinear", padding_mode="zeros", image_only=True)(
        torch.from_numpy(np.load(path))[None]
    )
    apart = float((ours - moved.as_tensor()).abs().max())
    assert apart < 5e-3 and float((ours - torch.from_numpy(np.load(path))).abs().max()) > 0.1, apart
    return {"largest difference from MONAI's warp": apart}


# ---- training ----


def wait_case(work: Path, *, device: torch.device = _CPU, steps: int = 20) -> DataCase:
    """Training steps of the demo's model on latents from memory maps, and resident on the device. What the bar is about is the
    share of a step that is spent waiting for data: the gate measures it for both."""
    config, dataset = _latents(work, "stored")
    sources = {"memory-mapped": dataset, "ours": ResidentLatents(dataset, device, torch.float32)}
    runs = {name: _Steps(config, dataset, source, device, steps) for name, source in sources.items()}

    def gate() -> dict[str, float]:
        shares = {f"{name}: % of a step waiting": 100 * run.waiting_share() for name, run in runs.items()}
        assert runs["ours"].first_batch_equals(runs["memory-mapped"])
        return shares

    return DataCase({name: run for name, run in runs.items()}, steps, 1.0, gate)


def online_case(work: Path, *, device: torch.device = _CPU, steps: int = 10) -> DataCase:
    """Training steps of the demo's model on stored latents, and with `--latents online`. The bar is for a GPU: at most 1.25
    times the time; on a CPU the encoder wants the same cores as the training."""
    config, stored = _latents(work, "stored")
    _, images = _latents(work, "online")
    online = OnlineLatents(images, work / "vae", device, seed=0)
    runs = {
        "stored": _Steps(config, stored, ResidentLatents(stored, device, torch.float32), device, steps),
        "ours": _Steps(config, images, online, device, steps),
    }
    return DataCase(dict(runs), steps, 1 / 1.25, lambda: {"% of a step waiting": 100 * runs["ours"].waiting_share()})


def _latents(work: Path, kind: str) -> tuple[Config, PreparedDataset]:
    """The demo's grid and model without reports, phantoms, and an autoencoder that has learned nothing."""
    config = load_config(ROOT / "configs" / "demo.json", {"model.variant": "MAISI"})
    if not (work / "latents" / "manifest.json").is_file():
        write_phantoms(work / "phantoms", num_studies=8)
        torch.manual_seed(0)
        save_autoencoder(Autoencoder(config.autoencoder), work / "vae")
        prepare(work / "phantoms", work / "latents", config, vae=work / "vae")
    return config, PreparedDataset(work / "latents", config, needs="images" if kind == "online" else "latents")


class _Steps:
    """Called, it trains `steps` steps, and remembers how much of the time it waited."""

    def __init__(self, config: Config, dataset: PreparedDataset, source: Any, device: torch.device, steps: int):
        self.feed = BatchStream(
            dataset, seed=0, batch_size=config.training.batch_size, accumulation=1, rank=0, world_size=1,
            scale=torch.ones(4), num_timesteps=1000, source=source, device=device,
        )  # fmt: skip
        self.device, self.steps, self.seconds = device, steps, 0.0
        self.model, self.schedule = build_model(config).to(device), Schedule.from_config(config.scheduler)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def __call__(self) -> None:
        begun, self.feed.waited = time.perf_counter(), 0.0
        for (samples,) in self.feed.steps(0, self.steps, background=self.device.type == "cuda"):
            joint_loss(self.model, samples, self.schedule, 0.0).total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - begun

    def waiting_share(self) -> float:
        return self.feed.waited / self.seconds

    def first_batch_equals(self, other: _Steps) -> bool:
        return torch.equal(self.feed.micro_batch(0, 0).latents, other.feed.micro_batch(0, 0).latents)


# ---- the list ----

MAKERS: dict[str, Callable[..., DataCase]] = {
    "prepare": prepare_case, "augment": augment_case, "wait": wait_case, "online": online_case,
}  # fmt: skip


def _case(name: str, about: str, *, budget: float, set_up: dict[str, float]) -> BenchmarkCase:
    """The case as run.py knows it: set up, run once, through its gate, then timed."""

    def build(bench: Any) -> Trial:
        folder = tempfile.TemporaryDirectory(prefix="ccella-bench-")
        here = {} if name == "prepare" else {"device": bench.device}
        case = MAKERS[name](Path(folder.name), **here)
        for run in case.sides.values():
            run()
        sides = {
            side: Implementation("fp32", lambda watch, run=run: run(), calls=case.units)
            for side, run in case.sides.items()
        }
        facts = [(what, value, "") for what, value in case.gate().items()]
        return Trial(sides, facts=facts, shapes={"units of one run": case.units, "bar": case.bar}, holds=[folder])

    return BenchmarkCase(name, "data", about, build, budget=budget, set_up=set_up)


CASES = [
    _case("prepare", "studies on disk to prepared images: MONAI's dictionary transforms in a loop, and `ccella-fast prepare`",
          budget=90, set_up={"cpu": 60, "cuda": 60}),
    _case("augment", "prepared images to augmented volumes: MONAI's transforms in a DataLoader, and the data engine",
          budget=90, set_up={"cpu": 60, "cuda": 60}),
    _case("wait", "training steps of the demo's model on stored latents: memory-mapped, and resident",
          budget=20, set_up={"cpu": 30, "cuda": 30}),
    _case("online", "training steps of the demo's model: stored latents, and made from augmented images while training",
          budget=20, set_up={"cpu": 30, "cuda": 30}),
]  # fmt: skip


def main(names: list[str]) -> None:
    """Sides in turn, three rounds after one to warm up; the median ratio."""
    for name in [name for name in MAKERS if not names or name in names]:
        with tempfile.TemporaryDirectory() as folder:
            case = MAKERS[name](Path(folder))
            seconds: dict[str, list[float]] = {side: [] for side in case.sides}
            for side in list(case.sides) + 3 * list(case.sides):
                begun = time.perf_counter()
                case.sides[side]()
                seconds[side].append(time.perf_counter() - begun)
            first, second = (seconds[side][1:] for side in case.sides)
            ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
            each = ", ".join(f"{side} {statistics.median(seconds[side][1:]) / case.units:.3f}" for side in case.sides)
            print(
                f"{name}: {ratio:.2f} times (bar {case.bar:.2g}); seconds a unit: {each}; gate: {case.gate()}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
