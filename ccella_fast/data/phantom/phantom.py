"""Synthetic studies: labelled, pelvis-like axial T2 volumes with reports, written as any folder of real studies would be.

They stand in for patients in the demo and in tests. Nothing in them is measured: shapes are ellipsoids and tubes in the
patient frame (x to the patient's left, y to the back, z to the head; mm; the prostate's centre is the origin), tissue is a
grey value with smooth texture, and a coil's shading and Rician noise are laid over it. A study with PI-RADS 3 or higher holds
one dark focus whose zone, side, level and size are what its report says.
"""

from __future__ import annotations

import csv
import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ccella_fast.data.phantom.report_text import Findings, write_report
from ccella_fast.errors import ConfigError
from ccella_fast.storage import atomic_path, check_writable

SIZE = (192, 192, 20)  # voxels to the left, to the back, to the head
DESCRIPTION = b"ccella_fast phantom (synthetic)"
COLUMNS = [
    "case", "split", "pirads", "report", "synthetic", "prostate_ml", "psa",
    "lesion_x_mm", "lesion_y_mm", "lesion_z_mm", "lesion_size_mm", "zone", "side", "level",
]  # fmt: skip
_README = """SYNTHETIC DATA: drawn by `ccella-fast phantom`, not measured. No patient stands behind any of it.

<case>/t2w.nii.gz   axial T2-weighted-like volume, arbitrary units
studies.csv         one line a case: split, PI-RADS score (empty: unknown), report (empty: none) and what was drawn
                    (centre of the lesion in scanner RAS mm, its size, zone, the patient's side, level)
"""


class Patient(NamedTuple):
    """What varies between patients. Lengths in mm."""

    prostate: np.ndarray  # half axes (left, back, head)
    bladder: float  # filling, 0 to 1
    rectum: float  # radius
    gas: bool  # rectum holds gas rather than stool
    habitus: float  # scale of everything around the prostate
    nodularity: float  # of the transition zone
    findings: Findings
    centre: np.ndarray | None  # of the lesion
    radii: np.ndarray | None


def write_phantoms(out: str | Path, num_studies: int = 24, seed: int = 0) -> None:
    """Write `num_studies` studies below `out`: `<case>/t2w.nii.gz`, `studies.csv`, `README`. About 0.3 s a study.

    The same seed gives the same bytes, and the first studies do not depend on `num_studies`. About half are positive
    (PI-RADS 3 to 5), 1 in 8 is of the test split, 1 in 12 has no report and 1 in 12 no class. Raises DiskError, and ConfigError
    where `out` holds anything but these studies."""
    out = Path(out)
    _check(out, num_studies, seed)
    rows = []
    for index in tqdm(range(num_studies), desc="phantom", unit="study", mininterval=1):
        rng = np.random.default_rng([seed, index])
        patient = _draw_patient(rng, positive=(index + index // 8) % 2 == 1)
        volume, affine, lesion_ras = _scan(rng, patient)
        case = f"phantom-{index:04d}"
        _write_nifti(out / case / "t2w.nii.gz", volume, affine)
        rows.append(_row(case, index, rng, patient, lesion_ras))
    with atomic_path(out / "studies.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with atomic_path(out / "README") as temporary:
        temporary.write_text(_README, encoding="utf-8")


def _check(out: Path, num_studies: int, seed: int) -> None:
    if num_studies < 1 or seed < 0:
        raise ConfigError("--num_studies is 1 or more, --seed is 0 or more", fix="change the value")
    check_writable(out, "--out")
    ours = {"studies.csv", "README", *(f"phantom-{index:04d}" for index in range(num_studies))}
    others = sorted(entry.name for entry in out.iterdir() if entry.name[0] != ".") if out.is_dir() else []
    foreign = [name for name in others if name not in ours]
    table = out / "studies.csv"
    if table.is_file() and not table.read_bytes().startswith(",".join(COLUMNS).encode()):
        foreign.append(table.name)
    if foreign:  # a list of real studies must not be overwritten, nor phantoms be mixed with them
        raise ConfigError(
            "this folder holds other files", path=out / foreign[0], field="--out", fix="choose another folder"
        )


def _row(case: str, index: int, rng: np.random.Generator, patient: Patient, lesion: np.ndarray | None) -> dict:
    found = patient.findings
    without_report, without_class = index % 12 == 5, index % 12 == 10
    row = {
        "case": case,
        "split": "test" if index % 8 == 7 else "train",
        "pirads": "" if without_class else found.pirads,
        "report": "" if without_report else write_report(rng, found, with_score=not without_class),
        "synthetic": "yes",
        "prostate_ml": found.volume_ml,
        "psa": found.psa,
    }
    if lesion is not None:
        row |= {f"lesion_{axis}_mm": f"{value:.2f}" for axis, value in zip("xyz", lesion, strict=True)}
        row |= {"lesion_size_mm": found.size_mm, "zone": found.zone, "side": found.side, "level": found.level}
    return row


def _draw_patient(rng: np.random.Generator, *, positive: bool) -> Patient:
    prostate = np.array([rng.uniform(22, 28), rng.uniform(15, 20), rng.uniform(18, 24)])
    volume_ml = round(float(np.prod(prostate)) * 4 / 3 * math.pi / 1000)
    pirads = int(rng.choice([3, 4, 5] if positive else [1, 2]))
    size = {3: rng.uniform(11, 14), 4: rng.uniform(12.5, 14.4), 5: rng.uniform(18, 26)}.get(pirads, 0.0)
    zone = str(rng.choice(["PZ", "TZ"], p=[0.7, 0.3])) if positive else ""
    side = str(rng.choice(["left", "right"])) if positive else ""
    level = str(rng.choice(["apex", "mid", "base"])) if positive else ""
    psa = round(float(rng.lognormal(1.6, 0.4) + max(0, pirads - 2) * rng.uniform(0.8, 3)), 1)
    centre = radii = None
    if positive:
        height = {"apex": -0.48, "mid": 0.0, "base": 0.45}[level]
        lateral, back = (0.62, 0.52) if zone == "PZ" else (0.34, -0.22)
        shrink = math.sqrt(1 - height**2)
        sign = 1 if side == "left" else -1
        centre = prostate * np.array([sign * lateral * shrink, back * shrink, height])
        radii = size / 2 * np.array([1.0, rng.uniform(0.72, 0.9), rng.uniform(0.8, 0.95)])
    return Patient(
        prostate,
        bladder=rng.uniform(0.1, 1),
        rectum=rng.uniform(11, 17),
        gas=rng.random() < 0.35,
        habitus=rng.uniform(0.95, 1.06),
        nodularity=rng.uniform(0.4, 1),
        findings=Findings(volume_ml, psa, pirads, zone, side, level, round(size)),
        centre=centre,
        radii=radii,
    )


def _scan(rng: np.random.Generator, patient: Patient) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Place an oblique grid over the patient, draw, add coil shading and noise. Voxels, RAS affine, lesion in RAS mm."""
    spacing = np.array([rng.uniform(0.755, 0.8)] * 2 + [rng.uniform(2.9, 3.1)])
    tilt, twist, misfit = np.deg2rad([rng.uniform(5, 18), rng.uniform(-2, 2), rng.uniform(-3, 3)])
    shift = np.array([rng.uniform(-3, 3), rng.uniform(-4, 2), rng.uniform(-3, 3)])  # grid centre in the patient frame
    left, back, head = ((np.arange(n) - (n - 1) / 2) * step for n, step in zip(SIZE, spacing, strict=True))
    to_patient = _rotation_x(misfit)  # the slices follow the prostate's axis within a few degrees
    x = (left + shift[0])[:, None, None]
    y = (to_patient[1, 1] * back[:, None] + to_patient[1, 2] * head + shift[1])[None]
    z = (to_patient[2, 1] * back[:, None] + to_patient[2, 2] * head + shift[2])[None]
    canvas = Canvas(rng, x.astype(np.float32), y.astype(np.float32), z.astype(np.float32))
    draw_phantom(canvas, patient)

    shading = np.exp(0.08 * _smooth(rng, 60) - 0.18 * (z / 60 + (x / 90) ** 2 + ((y - 5) / 110) ** 2))
    gain, sigma = rng.uniform(700, 1000), rng.uniform(9, 16)
    signal = (canvas.image * shading * gain).astype(np.float32)
    real = signal + sigma * rng.standard_normal(SIZE, dtype=np.float32)
    magnitude = np.hypot(real, sigma * rng.standard_normal(SIZE, dtype=np.float32))  # Rician
    voxels = np.clip(np.rint(magnitude), 0, 4095).astype(np.uint16)

    direction = _rotation_z(twist) @ _rotation_x(tilt)  # columns: the grid's axes in scanner LPS
    middle = np.array([rng.uniform(-8, 8), rng.uniform(-10, 30), rng.uniform(-60, 40)])
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(SIZE) - 1) / 2)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if patient.centre is None:
        return voxels, affine, None
    index = (to_patient.T @ (patient.centre - shift)) / spacing + (np.array(SIZE) - 1) / 2
    return voxels, affine, affine[:3, :3] @ index + affine[:3, 3]


class Canvas:
    """An image and the patient coordinates of its voxels (three broadcastable arrays, mm)."""

    def __init__(self, rng: np.random.Generator, x: np.ndarray, y: np.ndarray, z: np.ndarray):
        self.x, self.y, self.z = x, y, z
        self.image = np.zeros(SIZE, np.float32)
        self._grain = {scale: _smooth(rng, scale) for scale in (2, 3, 5, 9)}

    def paint(self, distance: np.ndarray, value: float | np.ndarray, *, soft: float = 1.2, opacity: float = 1) -> None:
        """Fill where `distance` (mm, negative inside) is below zero, with an edge `soft` mm wide."""
        near = np.flatnonzero(distance < soft / 2)
        cover = np.clip(0.5 - distance.take(near) / soft, 0, 1) * opacity
        here = self.image.take(near)
        self.image.put(near, here + cover * ((value.take(near) if isinstance(value, np.ndarray) else value) - here))

    def ellipsoid(self, centre, radii, power: float = 2) -> np.ndarray:
        """About the signed distance to the surface."""
        axes = zip((self.x, self.y, self.z), centre, radii, strict=True)
        x, y, z = (np.abs((axis - float(c)) / float(r)) ** power for axis, c, r in axes)
        total = x + (y + z)
        return ((np.sqrt(total) if power == 2 else total ** (1 / power)) - 1) * float(min(radii))

    def tube(self, start, end, radius: float) -> np.ndarray:
        """Signed distance to a capsule from `start` to `end`."""
        start, step = np.asarray(start, np.float32), np.subtract(end, start, dtype=np.float32)
        x, y, z = (axis - s for axis, s in zip((self.x, self.y, self.z), start, strict=True))
        along = np.clip((x * step[0] + (y * step[1] + z * step[2])) / (step @ step), 0, 1)
        return np.sqrt((x - along * step[0]) ** 2 + (y - along * step[1]) ** 2 + (z - along * step[2]) ** 2) - radius

    def texture(self, value: float, depth: float, scale: int) -> np.ndarray:
        """`value` with smooth variation of standard deviation `depth` and a grain of `scale` mm."""
        return value + np.float32(depth) * self._grain[scale]


def draw_phantom(canvas: Canvas, patient: Patient) -> None:
    """The pelvis from the outside in; what comes later lies on top."""
    _draw_wall_and_fat(canvas, patient.habitus)
    for side in (-1, 1):
        _draw_muscle_and_bone(canvas, side, patient.habitus)
    _draw_midline(canvas, patient)
    _draw_rectum(canvas, patient)
    _draw_bladder_and_vesicles(canvas, patient)
    _draw_prostate(canvas, patient)
    if patient.centre is not None and patient.radii is not None:
        _draw_lesion(canvas, patient)
    np.maximum(canvas.image, 0, out=canvas.image)


def _draw_wall_and_fat(c: Canvas, habitus: float) -> None:
    skin = c.ellipsoid((0, 24 * habitus, 0), (165, 92 * habitus, 400))
    c.paint(skin, c.texture(0.74, 0.03, 9))
    c.paint(skin + 9 + 3 * np.cos(c.x / 25), 0.14)  # rectus sheath
    c.paint(skin + 15 + 3 * np.cos(c.x / 25), c.texture(0.60, 0.05, 5))  # fat of the pelvis
    strands = np.abs(c.texture(0, 1, 9)) * 3 + 0.9 + 0.6 * np.abs(c.texture(0, 1, 3))  # vessels and septa
    c.paint(np.maximum(strands - 1.2, skin + 20), 0.42, soft=0.8, opacity=0.8)


def _draw_muscle_and_bone(c: Canvas, side: int, h: float) -> None:
    muscle = c.texture(0.13, 0.02, 3)
    marrow = c.texture(0.36, 0.05, 3)

    def bone(distance: np.ndarray) -> None:
        c.paint(distance, 0.04)
        c.paint(distance + 2, marrow, soft=2)

    gluteus = c.ellipsoid((side * 66 * h, 74 * h, 4), (58, 26, 90))
    c.paint(gluteus, muscle + np.clip(0.25 * np.abs(c.texture(-0.2, 1, 5)) - 0.2, 0, 0.3))
    # Obturator externus and pectineus below, in front of and beside the ischium.
    c.paint(c.tube((side * 24 * h, -30 * h, -30), (side * 86 * h, 6, -26), 17), muscle, soft=3)
    c.paint(c.tube((side * 40 * h, -60 * h, -26), (side * 84 * h, -38 * h, -24), 10), muscle, soft=3)
    bone(c.tube((side * 62 * h, 26 * h, -60), (side * 59 * h, 22 * h, -6), 15))  # ischium
    bone(c.tube((side * 15 * h, -44 * h, -4), (side * 66 * h, -16 * h, 16), 8))  # upper ramus of the pubis
    bone(c.ellipsoid((side * 63 * h, 12 * h, 18), (14, 27, 24)))  # acetabulum
    head = c.ellipsoid((side * 78 * h, -3 * h, 20), (24, 24, 22.5))
    c.paint(head - 2.5, 0.05)  # joint
    c.paint(head, c.texture(0.44, 0.04, 3))  # head of the femur
    # Obturator internus lines the side wall: a band that leans outwards towards the head.
    lean = side * (43 + 0.10 * c.z - 0.0035 * (c.y - 4) ** 2) * h
    thick = 7.5 * np.sqrt(np.clip(1 - ((c.y - 6 * h) / (40 * h)) ** 4, 0, 1))
    c.paint(np.abs(c.x - lean) - thick + 0.4, muscle, soft=1.6)
    c.paint(c.tube((side * 48 * h, -42 * h, -40), (side * 54 * h, -48 * h, 40), 5.5), 0.05)  # femoral artery
    c.paint(c.tube((side * 39 * h, -38 * h, 10), (side * 44 * h, -46 * h, 40), 5), 0.10)  # iliac vein


def _draw_midline(c: Canvas, patient: Patient) -> None:
    h = patient.habitus
    for side in (-1, 1):  # pubic bodies, with the symphysis between them
        body = c.ellipsoid((side * 17 * h, -43 * h, -16), (15.5, 12, 22), 2.5)
        c.paint(body, 0.04)
        c.paint(body + 2, c.texture(0.34, 0.05, 3), soft=2)
    c.paint(c.ellipsoid((0, -43 * h, -16), (2.2, 12, 20)), 0.09)
    sling = c.ellipsoid((0, 15, -34), (25, 40, 46))  # levator: the funnel that closes the floor
    floor = np.clip((-14 - c.z) / 10, 0, 1)
    c.paint(sling, c.texture(0.46, 0.06, 3) - 0.2 * floor, soft=3)
    c.paint(np.abs(sling + 2.5) - 2.6, c.texture(0.14, 0.02, 3))
    c.paint(c.tube((0, 2, -60), (0, 0, -10), 6), 0.22, soft=3)  # urethral sphincter
    c.paint(c.ellipsoid((0, 62 * h, 22), (11, 6, 14)), c.texture(0.30, 0.05, 3))  # coccyx


def _draw_rectum(c: Canvas, patient: Patient) -> None:
    radius = patient.rectum
    y0 = float(patient.prostate[1]) + radius + 2.5
    narrow = 1 - 0.42 / (1 + np.exp((c.z + 16) / 4))  # the anal canal is narrower and more muscular
    rectum = (np.sqrt(((c.x - 1.5) / 1.08) ** 2 + (c.y - y0 + 0.12 * (c.z + 10)) ** 2) / narrow - radius) * narrow
    c.paint(rectum - 4, c.texture(0.56, 0.08, 3), soft=3, opacity=0.7)  # mesorectal fat
    c.paint(rectum, 0.19)
    stool = np.clip(c.texture(0.16, 0.10, 5) + np.clip(c.texture(-0.35, 0.3, 3), 0, 0.6), 0.05, 0.8)
    content = 0.02 if patient.gas else stool
    c.paint(rectum + 3.2, content + 0.15 / (1 + np.exp((c.z + 14) / 3)) + np.zeros_like(rectum))


def _draw_bladder_and_vesicles(c: Canvas, patient: Patient) -> None:
    half = patient.prostate
    fill = patient.bladder
    for side in (-1, 1):  # seminal vesicles: bright convoluted lobes behind the base
        start, end = (side * 4, half[1] * 0.6, half[2] * 0.95), (side * 27, half[1] * 0.6 + 5, half[2] * 0.95 + 7)
        lobe = c.tube(start, end, 6.5)
        c.paint(lobe, 0.3, soft=2)
        c.paint(lobe + 1.2, np.clip(0.85 - 0.5 * np.abs(c.texture(0, 1, 3)), 0.2, 1), soft=2)
    radii = np.array([24 + 14 * fill, 13 + 9 * fill, 20 + 6 * fill])
    centre = np.array([0, -half[1] * 0.55 - 6 - 5 * fill, half[2] * 0.72 + radii[2] * 0.72])
    wall = 5.5 - 2.5 * fill
    outline = c.ellipsoid(centre, radii + wall, 2.6)
    c.paint(outline, c.texture(0.16, 0.02, 3))
    c.paint(outline + wall, 0.95)


def _draw_prostate(c: Canvas, patient: Patient) -> None:
    half = patient.prostate
    whole = c.ellipsoid((0, 0, 0), half, 2.2)
    c.paint(whole - 3.5, c.texture(0.52, 0.12, 3), soft=3, opacity=0.8)  # veins and fat around it
    c.paint(whole, 0.12)  # capsule
    c.paint(whole + 1.3, c.texture(0.72, 0.05, 5))  # peripheral zone
    inner = half * np.array([0.70, 0.68, 0.78])
    transition = c.ellipsoid((0, -0.24 * half[1], 0.12 * half[2]), inner, 2.4)
    c.paint(transition, 0.14)  # its pseudocapsule
    nodules = c.texture(0.34, 0.10 * patient.nodularity, 5) + c.texture(0, 0.05, 2)
    c.paint(transition + 1.4, np.clip(nodules, 0.18, 0.64))
    c.paint(c.ellipsoid((0, -0.92 * half[1], 0), (9, 4.5, half[2] * 0.7)), 0.10, soft=4)  # anterior stroma
    c.paint(c.tube((0, 1, -half[2]), (0, -0.3 * half[1], half[2]), 1.6), 0.5, soft=2)  # urethra


def _draw_lesion(c: Canvas, patient: Patient) -> None:
    value = {3: 0.18, 4: 0.12, 5: 0.09}[patient.findings.pirads]
    inside = c.ellipsoid((0, 0, 0), patient.prostate - 1, 2.2)  # the capsule holds it
    focus = np.maximum(c.ellipsoid(patient.centre, patient.radii), inside)
    c.paint(focus, c.texture(value, 0.012, 3), soft=2)


def _smooth(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Noise (float32, SIZE) of about unit variance and a grain of `scale` mm: a random lattice under cubic B-splines."""
    cells = [max(2, round(n * step / scale)) for n, step in zip(SIZE, (0.75, 0.75, 3.0), strict=True)]
    values = rng.standard_normal([n + 3 for n in cells], dtype=np.float32)
    for axis, (count, length) in enumerate(zip(cells, SIZE, strict=True)):
        position = np.linspace(0, count, length, endpoint=False)
        low = position.astype(int)
        t = (position - low).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(3)])
        weights = ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6)
        values = np.add.reduce([values.take(low + k, axis) * weight for k, weight in enumerate(weights)])
    return values * np.float32(3)  # the splines shrink the standard deviation to about a third


def _rotation_x(angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])


def _rotation_z(angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    import nibabel

    image = nibabel.Nifti1Image(voxels, affine)
    image.set_qform(affine, code=1)
    image.set_sform(image.get_qform(), code=1)  # a qform cannot hold every rotation to the last bit
    image.header["descrip"] = DESCRIPTION
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
