"""The evaluation: features of volumes against a MONAI loop that does the same work, and time and memory of the metrics."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import timer
from benchmark_case import BenchmarkCase, Implementation, PreparedCase
from cases.memory import peak
from ccella_fast.config import Config
from ccella_fast.evaluation.collecting import FeatureTable
from ccella_fast.evaluation.features import radiomics, random_networks, taps
from ccella_fast.evaluation.features.cache import FeatureCache, voxel_digest
from ccella_fast.evaluation.features.extractor import load_extractor
from ccella_fast.evaluation.features.medicalnet import MedicalNet
from ccella_fast.evaluation.features.preprocessing import Window, gaussian, mean_of_slices
from ccella_fast.evaluation.features.radimagenet import RadImageNet
from ccella_fast.evaluation.metrics import FEATURE_METRICS, Draws, Sets, feature_rows, memorisation_rows
from ccella_fast.evaluation.prompted import condition_rows, own_study_row
from ccella_fast.evaluation.results import Row
from ccella_fast.evaluation.slices import slice_rows
from ccella_fast.evaluation.volumes import Volume
from ccella_fast.models.feature_networks import MEDICALNET
from fixtures import Workbench

_VOLUMES = {"cpu": 1, "cuda": 4}  # in one run
# The networks whose weights are in a file of the user take a volume on its own grid. On a CPU that takes a minute, so they are
# given every second or fourth voxel along each axis.
_COARSER = {"cpu": {"medicalnet": 2, "radimagenet": 4}, "cuda": {}}

Features = Callable[[Volume], dict[str, np.ndarray]]


# Features


def features_case(bench: Workbench) -> PreparedCase:
    """Volumes in memory to features, one volume after the other, in every feature space.

    MONAI's side consists of its transforms (on the CPU, in their default precision) and its networks, called in eager fp32
    without gradients. TF32 is off on both sides. MONAI has no radiomics: its side has MONAI's resampling, scaling and
    filters, a plain loop that counts pairs of voxels, and our formulas for the features of the counts. The two networks whose
    weights are in a file of the user have random weights here.
    """
    device, folder = bench.device, tempfile.TemporaryDirectory(prefix="ccella-bench-")
    volumes = _draw_volumes(bench.config, _VOLUMES[device.type])
    coarser = _COARSER[device.type]
    given = {name: [_coarser(volume, coarser.get(name, 1)) for volume in volumes] for name in _PAIRS}
    prepared = PreparedCase(shapes={f"volume of {name}": list(given[name][0].array.shape) for name in _PAIRS})
    if not taps.is_installed():
        prepared.missing["taps"] = f"the package {taps.PACKAGE} is not installed: {taps.INSTALL}"
    pairs = {name: make(device, Path(folder.name)) for name, make in _PAIRS.items() if name not in prepared.missing}
    folder.cleanup()
    monai = _Loop({name: pair.monai for name, pair in pairs.items()}, given)
    ours = _Loop({name: pair.ours for name, pair in pairs.items()}, given)
    scales: dict[str, np.ndarray] = {}

    def truth() -> Tensor:
        found = monai.features()
        scales.update({space: _scale(space, rows) for space, rows in found.items()})
        return _joined(found, scales)

    prepared.truth = truth
    prepared.implementations = {
        "monai": Implementation("fp32", monai, calls=len(volumes)),
        "ours": Implementation("fp32", ours, lambda: _joined(ours.features(), scales), calls=len(volumes)),
    }
    prepared.check = lambda: _rates(monai, ours, len(volumes))
    prepared.notes.append("compared relative to the largest feature of a space, in radiomics to each feature")
    return prepared


class _Loop:
    """A call computes the features of all volumes, one program after the other.

    Args:
        programs: name -> from a volume to its features, on the host.
        volumes: name -> those that the program is given.
    """

    def __init__(self, programs: dict[str, Features], volumes: dict[str, list[Volume]]):
        self.programs, self.volumes = programs, volumes
        self.seconds: dict[str, list[float]] = {name: [] for name in programs}

    def __call__(self, stopwatch: timer.Stopwatch) -> None:
        for name, program in self.programs.items():
            start = time.perf_counter()
            for volume in self.volumes[name]:
                program(volume)
            self.seconds[name].append(time.perf_counter() - start)
            stopwatch.mark(name)

    def features(self) -> dict[str, np.ndarray]:
        """Space -> (volumes, features)."""
        found: dict[str, list[np.ndarray]] = {}
        for name, program in self.programs.items():
            for volume in self.volumes[name]:
                for space, vector in program(volume).items():
                    found.setdefault(space, []).append(vector)
        return {space: np.stack(vectors) for space, vectors in found.items()}


def _scale(space: str, rows: np.ndarray) -> np.ndarray:
    """What an error is measured against: the features of networks have one unit, those of radiomics a unit each."""
    return np.abs(rows).max(axis=0 if space == "radiomics" else None) + 1e-2


def _joined(features: dict[str, np.ndarray], scales: dict[str, np.ndarray]) -> Tensor:
    """All features in one row, divided by their scales, so that no large feature hides the others."""
    return torch.from_numpy(np.concatenate([(features[space] / scale).ravel() for space, scale in scales.items()]))


def _rates(monai: _Loop, ours: _Loop, count: int) -> dict[str, float]:
    """Volumes per second and speedup of each program, without its first run."""
    facts = {}
    for name in ours.seconds:
        slow, fast = monai.seconds[name][1:], ours.seconds[name][1:]
        rounds = min(len(slow), len(fast))
        facts[f"{name}: MONAI, volumes/s"] = count / statistics.median(slow)
        facts[f"{name}: ours, volumes/s"] = count / statistics.median(fast)
        facts[f"{name}: times faster"] = timer.ratio(slow[-rounds:], fast[-rounds:])["median"]
    return facts


def _draw_volumes(config: Config, count: int) -> list[Volume]:
    """Random intensities on the grid of the configuration, with a corner of zeros as in a scan with air."""
    rng = np.random.default_rng(0)
    volumes = []
    for number in range(count):
        array = rng.random(tuple(config.data.dim), dtype=np.float32)
        array[:8, :8] = 0
        volumes.append(Volume(array, tuple(config.data.spacing), f"v{number}"))  # type: ignore[arg-type]
    return volumes


def _coarser(volume: Volume, step: int) -> Volume:
    array = np.ascontiguousarray(volume.array[::step, ::step, ::step])
    return volume._replace(array=array, spacing=tuple(step * size for size in volume.spacing))


class _Pair(NamedTuple):
    """Two programs for the same features."""

    monai: Features
    ours: Features


def _taps(device: torch.device, folder: Path) -> _Pair:
    encoder = taps.load_network(str(device)).get_submodule("encoder")  # MONAI's SegResNetDS
    window = _monai_window(taps._FEATURE_WINDOW)

    @_plain
    def monai(volume: Volume) -> dict[str, np.ndarray]:
        levels = encoder(window(volume)[None].to(device))
        return {space: _moments(levels[level]).cpu().numpy() for space, level in taps._LEVELS.items()}

    return _Pair(monai, load_extractor("taps", device=str(device)))


def _random(device: torch.device, folder: Path) -> _Pair:
    window, networks = _monai_window(random_networks._WINDOW), []
    for seed in range(random_networks._NETWORKS):
        network = nn.Sequential()
        for (weight, bias), size in zip(random_networks._draw(seed), random_networks._POOLING, strict=True):
            conv = nn.Conv3d(weight.shape[1], weight.shape[0], 3, padding=1, padding_mode="replicate")
            conv.load_state_dict({"weight": weight, "bias": bias})
            network.extend([conv, nn.ReLU(), nn.AvgPool3d(size)])
        networks.append(network.to(device))

    @_plain
    def monai(volume: Volume) -> dict[str, np.ndarray]:
        x = window(volume)[None].to(device)
        return {"random": torch.cat([_moments(network(x)) for network in networks]).cpu().numpy()}

    return _Pair(monai, load_extractor("random", device=str(device)))


def _medicalnet(device: torch.device, folder: Path) -> _Pair:
    network = _monai_resnet50(3, 1)
    torch.save(network.state_dict(), folder / "medicalnet.pth")
    for layer in range(4):  # MONAI's network strides where MedicalNet dilates
        for number, block in enumerate(network.get_submodule(f"layer{layer + 1}")):
            block.conv2.dilation = block.conv2.padding = (MEDICALNET["dilations"][layer],) * 3
            if number == 0:
                stride = (MEDICALNET["strides"][layer],) * 3
                block.conv2.stride = block.downsample[0].stride = stride
    network.to(device)

    @_plain
    def monai(volume: Volume) -> dict[str, np.ndarray]:
        x = torch.from_numpy(volume.array)[None, None].to(device)
        return {"medicalnet-ccella": network(x)[0].cpu().numpy()}

    return _Pair(monai, MedicalNet(folder / "medicalnet.pth", device=str(device), allow_unknown_weights=True))


def _radimagenet(device: torch.device, folder: Path) -> _Pair:
    network, path = _monai_resnet50(2, 3), folder / "radimagenet.pth"
    # In the authors' file they have numbers.
    modules = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    split = {name: name.partition(".") for name in network.state_dict()}
    torch.save(
        {f"backbone.{modules.index(split[name][0])}.{split[name][2]}": x for name, x in network.state_dict().items()}, path
    )  # fmt: skip
    network.to(device)

    @_plain
    def monai(volume: Volume) -> dict[str, np.ndarray]:
        found = {}
        for axis, plane in enumerate(("sagittal", "coronal", "axial")):
            slices = torch.from_numpy(volume.array).movedim(axis, 0)[:, None].to(device)
            rows = network(slices.expand(-1, 3, -1, -1))
            found[f"radimagenet-ccella-{plane}"] = rows.mean(0).cpu().numpy()
        return found

    return _Pair(monai, RadImageNet(path, "ccella", device=str(device), allow_unknown_weights=True))


def _radiomics(device: torch.device, folder: Path) -> _Pair:
    import monai.transforms as mt
    from monai.networks.layers import separable_filtering

    spacing, sigmas = radiomics._SPACING, radiomics._SIGMAS

    def log_image(x: Tensor, sigma: float) -> Tensor:
        total = torch.zeros_like(x)
        for axis in range(3):
            widths = [sigma / size for size in spacing]
            kernels = [torch.from_numpy(gaussian(width)) for width in widths]
            kernels[axis] = torch.from_numpy(gaussian(widths[axis], derivative=2) * widths[axis] ** 2)
            total += separable_filtering(x[None], kernels, mode="replicate")[0]
        return total

    def cooccurrence(levels: np.ndarray) -> np.ndarray:
        counts = np.zeros((radiomics._LEVELS, radiomics._LEVELS))
        padded = np.pad(levels, 1, constant_values=-1)
        inner = tuple(slice(1, size + 1) for size in levels.shape)
        for offset in np.ndindex(3, 3, 3):  # every neighbour, so that each pair is counted in both orders
            if offset != (1, 1, 1):
                other = padded[tuple(slice(o, o + size) for o, size in zip(offset, levels.shape, strict=True))]
                pairs = np.stack([padded[inner].ravel(), other.ravel()])
                np.add.at(counts, tuple(pairs[:, pairs[1] >= 0]), 1)
        return counts / max(1.0, counts.sum())

    def monai(volume: Volume) -> dict[str, np.ndarray]:
        x = _monai_resampled(volume, spacing).as_tensor().double()
        crop = mt.CenterSpatialCrop(radiomics._BOX)
        images = [(x, radiomics._RANGE), *((log_image(x, sigma), radiomics._LOG_RANGE) for sigma in sigmas)]
        features = []
        for image, limit in images:
            voxels = np.asarray(crop(image)[0])
            levels = radiomics.discretise(voxels, limit)
            features += [radiomics.first_order(voxels, levels), radiomics.texture(cooccurrence(levels))]
        return {"radiomics": np.concatenate(features).astype(np.float32)}

    return _Pair(monai, load_extractor("radiomics"))


_PAIRS: dict[str, Callable[[torch.device, Path], _Pair]] = {
    "taps": _taps,
    "radiomics": _radiomics,
    "random": _random,
    "medicalnet": _medicalnet,
    "radimagenet": _radimagenet,
}


def _plain(features: Features) -> Features:
    """Without gradients, and without TF32, whose precision is that of fp16."""

    def call(volume: Volume) -> dict[str, np.ndarray]:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return features(volume)

    return call


def _monai_resampled(volume: Volume, spacing: Sequence[float]) -> Any:
    """(1, X, Y, Z) z-scores on a grid of the same extent, which MONAI's `Spacing` would move by a part of a voxel."""
    import monai.transforms as mt

    pairs = zip(volume.array.shape, volume.spacing, spacing, strict=True)
    resize = mt.Resize([round(size * old / new) for size, old, new in pairs], mode="trilinear", align_corners=False)
    return mt.NormalizeIntensity(nonzero=True)(resize(torch.from_numpy(volume.array)[None]))


def _monai_window(window: Window) -> Callable[[Volume], Tensor]:
    """A function to (1, X, Y, Z) as `window` gives it."""
    from monai.transforms import ResizeWithPadOrCrop

    crop = ResizeWithPadOrCrop(window.shape)
    return lambda volume: crop(_monai_resampled(volume, window.spacing)).as_tensor()


def _monai_resnet50(dimensions: int, in_channels: int) -> nn.Module:
    """With random weights; it returns the mean of the last map."""
    from monai.networks.nets.resnet import resnet50

    torch.manual_seed(dimensions)
    network = resnet50(
        spatial_dims=dimensions, n_input_channels=in_channels, conv1_t_stride=2, feed_forward=False, shortcut_type="B",
        bias_downsample=False,
    )  # fmt: skip
    return network.eval()


def _moments(level: Tensor) -> Tensor:
    voxels = level[0].flatten(1)
    return torch.cat([voxels.mean(1), voxels.std(1)])


# Metrics


class _Bar(NamedTuple):
    """What the metrics of one feature space may take.

    Attributes:
        timed: volumes in each set whose metrics are timed, with `draws` random splits.
        large: volumes in each set whose memory is measured; it does not depend on the number of splits.
        slices: of a volume, in the space whose rows are slices.
    """

    timed: int = 1000
    large: int = 2000
    slices: int = 256
    dimensions: int = 2048
    draws: int = 100
    seconds: float = 60.0
    gigabytes: float = 4.0


BAR = _Bar()


def metrics_case(bench: Workbench) -> PreparedCase:
    """Seconds of each metric of one feature space on cached features, and the peak memory for larger sets.

    Memorisation and condition include what `evaluate` derives from the same features: the own study of a prompt, and the class.
    The Fréchet distance of slices is timed in a space of its own, from files.
    """
    prepared = PreparedCase(shapes=BAR._asdict())
    sets, draws, total = _feature_sets(BAR.timed), Draws(BAR.draws, 0), 0.0
    parts: dict[str, Callable[[], list[Row]]] = {
        metric: functools.partial(lambda metric: list(feature_rows(sets, "space", {metric}, draws, {})), metric)
        for metric in FEATURE_METRICS
    }
    parts["memorisation"] = lambda: memorisation_rows(sets, "space", draws, {})[0] + own_study_row(sets, "space", {})
    parts["condition"] = lambda: condition_rows(sets, {"space": {}}, None, draws)
    for name, rows_of in parts.items():
        bench.on_progress(f"{name} of {BAR.timed} + {BAR.timed} volumes")
        seconds = _seconds(rows_of)
        prepared.facts.append((name, seconds, "s"))
        total += seconds
    prepared.facts.append((f"all, {_verdict(total, BAR.seconds, 's')}", total, "s"))
    with tempfile.TemporaryDirectory(prefix="ccella-bench-") as folder:
        store, extractor = _kept_slices(Path(folder), sets)
        bench.on_progress(f"fd_slices of {BAR.timed} + {BAR.timed} volumes")
        seconds = _seconds(lambda: slice_rows(sets, extractor, store, draws, {}))
    prepared.facts.append((f"fd_slices, {_verdict(seconds, BAR.seconds, 's')}", seconds, "s"))
    large = _feature_sets(BAR.large)
    bench.on_progress(f"memory for {BAR.large} + {BAR.large} volumes")
    few = Draws(2, 0)
    used = peak(lambda: list(feature_rows(large, "space", set(FEATURE_METRICS), few, {})), torch.device("cpu")) / 1e9
    what = f"peak for {BAR.large} + {BAR.large} volumes, {_verdict(used, BAR.gigabytes, 'GB')}"
    prepared.facts.append((what, used, "GB"))
    prepared.notes.append("the peak is that of the process beyond its level with the features in memory")
    return prepared


def _seconds(rows_of: Callable[[], list[Row]]) -> float:
    start = time.perf_counter()
    rows = rows_of()
    seconds = time.perf_counter() - start
    assert rows and all(np.isfinite(row.value) for row in rows)  # type: ignore[arg-type]
    return seconds


def _verdict(found: float, most: float, unit: str) -> str:
    return f"limit of {most:g} {unit} {'kept' if found <= most else 'EXCEEDED'}"


def _feature_sets(count: int) -> Sets:
    """A training, a real and a synthetic set whose features are correlated, as those of networks are."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((64, BAR.dimensions)) / 4

    def table(name: str, shift: float) -> FeatureTable:
        rows = rng.standard_normal((count, 64)) @ mix + rng.standard_normal((count, BAR.dimensions)) + shift
        ids, prompts = [f"{name}-{row}" for row in range(count)], [f"train-{row}" for row in range(count)]
        classes, digests = [("neg", "pos")[row % 2] for row in range(count)], [b""] * count
        spaces = {"space": rows.astype(np.float32)}
        return FeatureTable(
            name, "t2w", ids, [None] * count, classes, prompts, digests, np.ones((count, 3)), spaces
        )  # fmt: skip

    return Sets(table("real", 0.0), table("synthetic", 0.1), table("train", 0.0))


class _Slices:
    """The features of slices in one direction, as a stand-in for a network."""

    sequences = None
    identity: dict[str, object] = {"extractor": "slices"}

    def __init__(self) -> None:
        self.spaces = {"slices-axial": BAR.dimensions}
        self._rng = np.random.default_rng(0)

    def slices(self, volume: Volume) -> dict[str, np.ndarray]:
        rows = self._rng.standard_normal((BAR.slices, BAR.dimensions), np.float32)
        return {space: rows * np.linspace(1, 1e-3, BAR.dimensions, dtype=np.float32) for space in self.spaces}

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        return mean_of_slices(self.slices(volume))


def _kept_slices(folder: Path, sets: Sets) -> tuple[FeatureCache, _Slices]:
    """The slices of 32 volumes in files; every volume of the two sets is made one of these."""
    store, extractor = FeatureCache(folder), _Slices()
    for kind, table in enumerate((sets.real, sets.synthetic)):
        known = [Volume(np.full((1, 1, 1), 16 * kind + k, np.float32), (1.0, 1.0, 1.0), f"{k}") for k in range(16)]
        digests = [voxel_digest(volume) for volume in known]
        for volume in known:
            store.features(extractor, volume)
        table.digests[:] = [digests[row % len(known)] for row in range(len(table))]
    return store, extractor


CASES = [
    BenchmarkCase("evaluation_features", "evaluation", "volumes to features in every feature space: a loop of MONAI's "
          "transforms and networks, and `ccella-fast evaluate`", features_case, budget=30, set_up={"cpu": 40, "cuda": 40}),
    BenchmarkCase("evaluation_metrics", "evaluation", "seconds and memory of the metrics on cached features of one space",
          metrics_case, budget=0, set_up={"cpu": 60, "cuda": 40}),
]  # fmt: skip
