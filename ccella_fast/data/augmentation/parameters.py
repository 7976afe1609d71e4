"""One description of an augmentation: plain numbers, drawn from (seed, case id, epoch). Engines only apply it.

What is true of a study stays true. Geometry is a rigid motion in mm and a choice of where voxels lie: zoom and crop change the
voxel size, which is what the model is told (`Augmentation.spacing`), and never the size of the anatomy. A view that cuts into
the gland is not taken: the protocol puts the prostate in the middle of the series, so a central box of `gland` mm (at most four
fifths of the grid) must lie inside it; other geometry is drawn until it does. Left and right change places only by `flip`,
which is refused where the report is read. ADC is a measured quantity: it takes part in geometry, blur and noise alone.

In the order of application, for an image in [0, 1]:

    x <- image at matrix @ (output index, 1), linear, 0 outside         geometry
    x <- Gaussian(x)                                                    blur
    x <- clip(gain * field * x)                                         brightness, receive field
    x <- x ** gamma
    x <- x + 2 contrast x (1 - x) (2x - 1)                              black, mid-grey and white stay
    x <- clip(x + noise * n * clip(x / 0.02))                           padding stays empty
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np

from ccella_fast.config import AugmentationConfig, Config
from ccella_fast.errors import ConfigError

BIAS_FIELD = 16  # points an axis where the receive field is given; linear between them
FAINT = 0.02  # below this the noise fades out
_STARTS = 2**20  # places in the noise where a volume's own may begin
_TRIES = 50
_LARGEST = 0.8  # share of the grid that the gland's box may take


@dataclass(frozen=True)
class Augmentation:
    """rotation: degrees about R, A, S, applied in this order. shift: mm. scale: new voxel size / old, an axis. blur: sigma in
    mm. bias: coefficients of log(field) over u, v, w, u2, v2, w2, uv, uw, vw with u, v, w from -1 to 1 over the output.
    contrast, gain, gamma, noise: see the module. noise_start: where in `normals` this volume's noise begins."""

    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    flip: bool = False
    blur: float = 0.0
    gain: float = 1.0
    bias: tuple[float, ...] = ()
    gamma: float = 1.0
    contrast: float = 0.0
    noise: float = 0.0
    noise_start: int = 0

    def spacing(self, spacing: Sequence[float]) -> list[float]:
        """mm of the result's voxels, from those of the volume."""
        return [old * scale for old, scale in zip(spacing, self.scale, strict=True)]

    def matrix(self, shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
        """(3, 4) float64: index of an output voxel -> index into the input, both of this shape (X, Y, Z)."""
        step = np.array(spacing, float)
        turn = _rotation(self.rotation) @ np.diag([-1.0 if self.flip else 1.0, 1.0, 1.0])
        linear = turn * (step * self.scale) / step[:, None]
        centre = (np.array(shape) - 1) / 2
        return np.column_stack([linear, centre + np.array(self.shift) / step - linear @ centre])

    def field(self) -> np.ndarray:
        """(FIELD, FIELD, FIELD) float32: gain x receive field."""
        points = (np.arange(BIAS_FIELD) + 0.5) / BIAS_FIELD * 2 - 1
        u, v, w = points[:, None, None], points[:, None], points
        log = np.zeros((BIAS_FIELD,) * 3)
        for coefficient, term in zip(self.bias, (u, v, w, u * u, v * v, w * w, u * v, u * w, v * w), strict=False):
            log = log + coefficient * term
        return (self.gain * np.exp(log)).astype(np.float32)

    def for_sequence(self, sequence: str) -> Augmentation:
        """The same view of another series of the study: its own noise, and for ADC no change of intensity."""
        start = (self.noise_start + 7919 * ("t2w", "hbv", "adc").index(sequence)) % _STARTS
        own = replace(self, noise_start=start)
        return own if sequence != "adc" else replace(own, gain=1.0, bias=(), gamma=1.0, contrast=0.0)

    def dump(self) -> dict[str, Any]:
        """Plain JSON values; `Augmentation(**values)` gives an equal augmentation."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


IDENTITY = Augmentation()


def draw_augmentation(
    config: AugmentationConfig,
    *,
    seed: int,
    case_id: str,
    epoch: int,
    shape: Sequence[int],
    spacing: Sequence[float],
    keep_gland: bool = True,
) -> Augmentation:
    """The augmentation of a case in an epoch, for a volume of `shape` voxels of `spacing` mm. A pure function, whatever the
    machine. keep_gland: False for patches, which need not hold it."""
    random = Random(f"{seed} {epoch} {case_id}")  # Python keeps the stream of random() from version to version

    def within(limit: float) -> float:
        return limit * (2 * random.random() - 1)

    amplitude, terms = abs(within(config.bias)), [within(1.0) for _ in range(9)]
    drawn = Augmentation(
        flip=random.random() < config.flip,
        blur=abs(within(config.blur)),
        gain=1 + within(config.brightness),
        bias=tuple(amplitude * term / sum(map(abs, terms)) for term in terms) if config.bias else (),
        gamma=math.exp(within(config.gamma)),
        contrast=within(config.contrast),
        noise=abs(within(config.noise)),
        noise_start=int(random.random() * _STARTS),
    )
    for _ in range(_TRIES):
        view = replace(drawn, **_geometry(config, within, shape, spacing))
        if not keep_gland or keeps_gland_in_view(view, config.gland, shape, spacing):
            return view
    return drawn


def _geometry(
    config: AugmentationConfig, within: Any, shape: Sequence[int], spacing: Sequence[float]
) -> dict[str, Any]:
    zoom = (1 + config.zoom) ** within(1.0)
    kept = [1 - abs(within(share)) for share in config.crop]
    spare = [(1 - part) * size * step / 2 for part, size, step in zip(kept, shape, spacing, strict=True)]
    return {
        "rotation": tuple(within(limit) for limit in config.rotation),
        "shift": tuple(within(limit) + within(room) for limit, room in zip(config.translation, spare, strict=True)),
        "scale": tuple(zoom * part for part in kept),
    }


def keeps_gland_in_view(
    augmentation: Augmentation, gland: Sequence[float], shape: Sequence[int], spacing: Sequence[float]
) -> bool:
    """Does the central box of `gland` mm (at most four fifths of the grid) lie inside the view?"""
    matrix, size = augmentation.matrix(shape, spacing), np.array(shape)
    half = np.minimum(np.array(gland) / np.array(spacing), _LARGEST * size) / 2
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = np.linalg.solve(matrix[:, :3], ((size - 1) / 2 + signs * half - matrix[:, 3]).T).T
    return bool((corners > -0.5).all() and (corners < size - 0.5).all())


def check_conditioning(config: Config) -> None:
    """ConfigError where the model reads the report and volumes would be mirrored."""
    if config.model.traits.text and config.augmentation.flip > 0:
        why = f"{config.model.variant} reads the report: in a mirrored study its 'left' lies on the right"
        fix = "set augmentation.flip=0 (preset text), or take a variant without report"
        raise ConfigError(why, field="augmentation.flip", fix=fix)


def extremes(
    config: AugmentationConfig, shape: Sequence[int], spacing: Sequence[float]
) -> Iterator[tuple[str, Augmentation]]:
    """(title, augmentation) of every operator in use, alone and at its largest that is taken, for people to look at."""
    turns = [(f"rotation {name} {limit:g}°", {"rotation": tuple(limit if axis == i else 0.0 for i in range(3))})
             for axis, (name, limit) in enumerate(zip("RAS", config.rotation, strict=True)) if limit]  # fmt: skip
    spare = [share * size * step / 2 for share, size, step in zip(config.crop, shape, spacing, strict=True)]
    kept: Any = tuple(1 - share for share in config.crop)
    field = tuple(config.bias * term for term in (0.5, 0.3, -0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    every: list[tuple[str, Any, dict[str, Any]]] = [
        *[(title, True, values) for title, values in turns],
        ("translation", any(config.translation), {"shift": tuple(config.translation)}),
        ("zoom in", config.zoom, {"scale": (1 / (1 + config.zoom),) * 3}),
        ("zoom out", config.zoom, {"scale": (1 + config.zoom,) * 3}),
        ("crop", any(config.crop), {"scale": kept, "shift": tuple(spare)}),
        ("mirrored", config.flip, {"flip": True}),
        ("blur", config.blur, {"blur": config.blur}),
        ("brighter", config.brightness, {"gain": 1 + config.brightness}),
        ("receive field", config.bias, {"bias": field}),
        ("gamma down", config.gamma, {"gamma": math.exp(-config.gamma)}),
        ("gamma up", config.gamma, {"gamma": math.exp(config.gamma)}),
        ("contrast", config.contrast, {"contrast": config.contrast}),
        ("noise", config.noise, {"noise": config.noise}),
    ]
    for title, in_use, values in every:
        if in_use:
            yield title, _nearest_taken(Augmentation(**values), config.gland, shape, spacing)


def operators_of(augmentation: Augmentation) -> AugmentationConfig:
    """Strengths that switch on just the operators that this augmentation uses: an engine does no other work for it."""
    moves = replace(IDENTITY, rotation=augmentation.rotation, shift=augmentation.shift, scale=augmentation.scale,
                    flip=augmentation.flip) != IDENTITY  # fmt: skip
    used: dict[str, Any] = {
        "rotation": [float(moves)] * 3,
        "blur": augmentation.blur,
        "brightness": float(augmentation.gain != 1 or bool(augmentation.bias)),
        "gamma": float(augmentation.gamma != 1),
        "contrast": abs(augmentation.contrast),
        "noise": augmentation.noise,
    }
    return AugmentationConfig.model_validate({"preset": "none", **used})


def _nearest_taken(
    view: Augmentation, gland: Sequence[float], shape: Sequence[int], spacing: Sequence[float]
) -> Augmentation:
    """The view, its shift made smaller until the gland lies inside."""
    parts = (replace(view, shift=tuple(part * mm for mm in view.shift)) for part in np.linspace(1, 0, 21).tolist())
    return next((moved for moved in parts if keeps_gland_in_view(moved, gland, shape, spacing)), view)


@lru_cache(maxsize=1)
def normals(voxels: int) -> np.ndarray:
    """The standard normal numbers of which every volume's noise is a part: float32, read-only, the same everywhere.

    A fixed table lets two engines, on two kinds of device, add the same noise without copying it from one to the other."""
    table = np.random.Generator(np.random.PCG64(20230617)).standard_normal(voxels + _STARTS, np.float32)
    table.flags.writeable = False
    return table


def _rotation(degrees: Sequence[float]) -> np.ndarray:
    """Rz @ Ry @ Rx."""
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        result = turn @ result
    return result
