"""Random augmentations as plain numbers, drawn from (seed, case id, epoch). The engines only apply them.

An augmentation keeps what is known about a study true. Geometry is a rigid motion in mm and a choice of the voxel grid: zoom
and crop change the voxel size, which is an input of the model (`Augmentation.spacing`), and never the size of the anatomy. The
prostate must stay in view: the protocol places it in the middle of the series, so a central box of `gland` mm (at most four
fifths of the grid) must be inside the view, and the geometry is drawn again until it is. Only `flip` exchanges left and right,
which is an error if the model reads the report. ADC is a measured quantity, so only geometry, blur and noise apply to it.

For an image x in [0, 1], in the order of application:

    x <- image at matrix @ (output index, 1), linear, 0 outside         geometry
    x <- Gaussian(x)                                                    blur
    x <- clip(gain * field * x)                                         brightness, bias field
    x <- x ** gamma
    x <- x + 2 contrast x (1 - x) (2x - 1)                              black, mid-gray and white stay
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

BIAS_FIELD_SIZE = 16  # points per axis at which the bias field is given; linear between them
NOISE_FADE_LIMIT = 0.02  # below this intensity the noise fades out
_NUM_NOISE_STARTS = 2**20  # offsets in `standard_normals` at which the noise of a volume may start
_MAX_DRAWS = 50  # of the geometry, until the prostate is in view
_MAX_KEPT_SHARE = 0.8  # of the grid, for the central box that must stay in view


@dataclass(frozen=True)
class Augmentation:
    """The parameters of one augmentation; the default changes nothing.

    Attributes:
        rotation: degrees about R, A, S, applied in this order.
        shift: translation in mm.
        scale: new voxel size divided by the old one, per axis.
        flip: whether left and right are exchanged.
        blur: standard deviation of the Gaussian in mm.
        gain: factor of the intensities.
        bias: coefficients of log(bias field) over u, v, w, u2, v2, w2, uv, uw, vw with u, v, w from -1 to 1 over the output.
        gamma: exponent of the intensities.
        contrast: see the formula in the module's docstring.
        noise: standard deviation of the noise.
        noise_start: offset in `standard_normals` at which this volume's noise starts.
    """

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
        """Voxel size of the output in mm, given that of the input."""
        return [old * scale for old, scale in zip(spacing, self.scale, strict=True)]

    def matrix(self, shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
        """(3, 4) float64, maps the index of an output voxel to an index into the input.

        Args:
            shape: (X, Y, Z) of both volumes in voxels.
            spacing: voxel size of the input in mm.
        """
        step = np.array(spacing, float)
        rotation = _rotation_matrix(self.rotation) @ np.diag([-1.0 if self.flip else 1.0, 1.0, 1.0])
        linear = rotation * (step * self.scale) / step[:, None]
        center = (np.array(shape) - 1) / 2
        return np.column_stack([linear, center + np.array(self.shift) / step - linear @ center])

    def field(self) -> np.ndarray:
        """Gain times bias field, float32, with BIAS_FIELD_SIZE points per axis."""
        points = (np.arange(BIAS_FIELD_SIZE) + 0.5) / BIAS_FIELD_SIZE * 2 - 1
        u, v, w = points[:, None, None], points[:, None], points
        log = np.zeros((BIAS_FIELD_SIZE,) * 3)
        for coefficient, term in zip(self.bias, (u, v, w, u * u, v * v, w * w, u * v, u * w, v * w), strict=False):
            log = log + coefficient * term
        return (self.gain * np.exp(log)).astype(np.float32)

    def for_sequence(self, sequence: str) -> Augmentation:
        """The same geometry for one series of the study, with its own noise, and without intensity operators for ADC."""
        start = (self.noise_start + 7919 * ("t2w", "hbv", "adc").index(sequence)) % _NUM_NOISE_STARTS
        own = replace(self, noise_start=start)
        return own if sequence != "adc" else replace(own, gain=1.0, bias=(), gamma=1.0, contrast=0.0)

    def dump(self) -> dict[str, Any]:
        """The parameters as JSON values; `Augmentation(**values)` is equivalent to this augmentation."""
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
    """Draw the augmentation of a case in an epoch.

    A pure function of its arguments, with the same result on every machine.

    Args:
        config: strengths of the operators.
        seed: seed of the run.
        case_id: the study.
        epoch: the epoch.
        shape: shape of the volume in voxels.
        spacing: voxel size of the volume in mm.
        keep_gland: whether the prostate must stay in view; False for patches, which need not contain it.
    """
    random = Random(f"{seed} {epoch} {case_id}")  # random() gives the same sequence in every version of Python

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
        noise_start=int(random.random() * _NUM_NOISE_STARTS),
    )
    for _ in range(_MAX_DRAWS):
        view = replace(drawn, **_draw_geometry(config, within, shape, spacing))
        if not keep_gland or keeps_gland_in_view(view, config.gland, shape, spacing):
            return view
    return drawn


def _draw_geometry(
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


def augmented_spacings(
    config: AugmentationConfig, low: Sequence[float], high: Sequence[float]
) -> tuple[list[float], list[float]]:
    """The range of voxel sizes in mm of augmented volumes, whose own are from `low` to `high` along each axis."""
    zoom = 1 + config.zoom
    return [step * (1 - part) / zoom for step, part in zip(low, config.crop, strict=True)], [
        step * zoom for step in high
    ]


def keeps_gland_in_view(
    augmentation: Augmentation, gland: Sequence[float], shape: Sequence[int], spacing: Sequence[float]
) -> bool:
    """Whether the central box of `gland` mm (at most four fifths of the grid) is inside the view."""
    matrix, size = augmentation.matrix(shape, spacing), np.array(shape)
    half = np.minimum(np.array(gland) / np.array(spacing), _MAX_KEPT_SHARE * size) / 2
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = np.linalg.solve(matrix[:, :3], ((size - 1) / 2 + signs * half - matrix[:, 3]).T).T
    return bool((corners > -0.5).all() and (corners < size - 0.5).all())


def check_conditioning(config: Config) -> None:
    """Check that volumes are not mirrored if the model reads the report.

    Raises:
        ConfigError: the variant reads the report and `augmentation.flip` is greater than 0.
    """
    if config.model.traits.text and config.augmentation.flip > 0:
        why = (
            f"augmentation.flip must be 0, got {config.augmentation.flip:g}: {config.model.variant} reads the report, "
            "whose 'left' is on the right in a mirrored study"
        )
        fix = "set augmentation.flip=0 (preset text), or use a variant without report"
        raise ConfigError(why, field="augmentation.flip", fix=fix)


def strongest_augmentations(
    config: AugmentationConfig, shape: Sequence[int], spacing: Sequence[float]
) -> Iterator[tuple[str, Augmentation]]:
    """(title, augmentation) of each enabled operator, alone and at its largest accepted strength, for visual inspection."""
    rotations = [(f"rotation {name} {limit:g}°", {"rotation": tuple(limit if axis == i else 0.0 for i in range(3))})
                 for axis, (name, limit) in enumerate(zip("RAS", config.rotation, strict=True)) if limit]  # fmt: skip
    spare = [share * size * step / 2 for share, size, step in zip(config.crop, shape, spacing, strict=True)]
    kept: Any = tuple(1 - share for share in config.crop)
    field = tuple(config.bias * term for term in (0.5, 0.3, -0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    operators: list[tuple[str, Any, dict[str, Any]]] = [
        *[(title, True, values) for title, values in rotations],
        ("translation", any(config.translation), {"shift": tuple(config.translation)}),
        ("zoom in", config.zoom, {"scale": (1 / (1 + config.zoom),) * 3}),
        ("zoom out", config.zoom, {"scale": (1 + config.zoom,) * 3}),
        ("crop", any(config.crop), {"scale": kept, "shift": tuple(spare)}),
        ("mirrored", config.flip, {"flip": True}),
        ("blur", config.blur, {"blur": config.blur}),
        ("brighter", config.brightness, {"gain": 1 + config.brightness}),
        ("bias field", config.bias, {"bias": field}),
        ("gamma down", config.gamma, {"gamma": math.exp(-config.gamma)}),
        ("gamma up", config.gamma, {"gamma": math.exp(config.gamma)}),
        ("contrast", config.contrast, {"contrast": config.contrast}),
        ("noise", config.noise, {"noise": config.noise}),
    ]
    for title, in_use, values in operators:
        if in_use:
            yield title, _shift_into_view(Augmentation(**values), config.gland, shape, spacing)


def minimal_config(augmentation: Augmentation) -> AugmentationConfig:
    """A configuration that enables only the operators that this augmentation uses, so that an engine skips all others."""
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


def _shift_into_view(
    view: Augmentation, gland: Sequence[float], shape: Sequence[int], spacing: Sequence[float]
) -> Augmentation:
    """The view with its shift reduced until the prostate is in view."""
    views = (replace(view, shift=tuple(part * mm for mm in view.shift)) for part in np.linspace(1, 0, 21).tolist())
    return next((reduced for reduced in views if keeps_gland_in_view(reduced, gland, shape, spacing)), view)


@lru_cache(maxsize=1)
def standard_normals(voxels: int) -> np.ndarray:
    """The fixed table of standard normal numbers from which the noise of every volume of `voxels` voxels is taken.

    With a fixed table, two engines on two kinds of device add the same noise without copying it from one to the other.

    Returns:
        A read-only float32 vector, the same on every machine.
    """
    table = np.random.Generator(np.random.PCG64(20230617)).standard_normal(voxels + _NUM_NOISE_STARTS, np.float32)
    table.flags.writeable = False
    return table


def _rotation_matrix(degrees: Sequence[float]) -> np.ndarray:
    """(3, 3) float64: Rz @ Ry @ Rx."""
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        about_axis = np.eye(3)
        about_axis[i, i] = about_axis[j, j] = math.cos(angle)
        about_axis[i, j], about_axis[j, i] = -math.sin(angle), math.sin(angle)
        result = about_axis @ result
    return result
