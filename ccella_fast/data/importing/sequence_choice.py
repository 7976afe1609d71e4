"""Choose the axial T2, the high-b and the ADC volume of a study by their attributes. The rule is in docs/how-to/import.md.

Each volume is first excluded with a reason, or recognized as one of the three; of several that are recognized the first by rank
is proposed. Words of the description decide last, except for what no attribute states.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ccella_fast.data.importing.series import Volume3D
from ccella_fast.quantities import counted

MIN_SLICES = 4
MAX_TILT = 45.0  # degrees between the normal of an axial slice and the body's long axis
MIN_T2_ECHO_TIME, MIN_T2_REPETITION_TIME = 60.0, 1000.0  # ms
SMALL_FIELD = 260.0  # mm; above, T2 shows the whole pelvis
MIN_HIGH_B, GOOD_HIGH_B = 800.0, 1000.0  # s/mm2
MAX_ECHO_TRAIN_2D = 60  # more echoes per excitation are single-shot sequences
SEQUENCES = ("t2w", "hbv", "adc")
_PLANES = ("sagittal", "coronal", "axial")
_NO_ANATOMY = {
    "LOCALIZER": "a localizer",
    "SUBTRACTION": "a subtraction",
    "SUBTRACT": "a subtraction",
    "SUB": "a subtraction",
    "MIP": "a projection",
    "PROJECTION IMAGE": "a projection",
    "MIN IP": "a projection",
    "PERFUSION": "perfusion",
    "T1 MAP": "a map of relaxation times",
    "T2 MAP": "a map of relaxation times",
    "T2_STAR MAP": "a map of relaxation times",
    "T1": "T1-weighted",
    "PHASE MAP": "a map of phases",
    "P": "a map of phases",
    "FA": "a map of anisotropy",
    "EADC": "exponential ADC",
    "EXPONENTIAL": "exponential ADC",
}
_NO_WORDS = {
    "localizer": "a localizer, by its description",
    "subtraction": "a subtraction, by its description",
    "map": "a map, by its description",
    "exponential": "exponential ADC, by its description",
    "dynamic": "dynamic, by its description",
}
_INCOMPLETE = _NO_GEOMETRY, _NO_POSITION = "no orientation or voxel size in the header", "no position in the header"


class Judgement(NamedTuple):
    """What a volume is.

    Attributes:
        volume: The volume.
        sequence: "t2w", "hbv", "adc", or "" if it is none of them.
        reason: Why, without any text of the header.
        rank: Of the attributes, smaller is better; compared among volumes of one sequence.
        tie: What decides among equal ranks: words of the description, then the latest series.
        doubt: Why a person should look at it; "" for none.
        use: The sequence that it is proposed for; "" if it is not proposed.
    """

    volume: Volume3D
    sequence: str
    reason: str
    rank: tuple[float, ...] = ()
    tie: tuple[float, ...] = ()
    doubt: str = ""
    use: str = ""


def choose_sequences(volumes: Sequence[Volume3D]) -> list[Judgement]:
    """The judgement of every volume of a study, in the same order; at most one is proposed per sequence."""
    judged = [_judge(volume) for volume in volumes]
    for sequence in SEQUENCES:
        found = [number for number, each in enumerate(judged) if each.sequence == sequence]
        if not found:
            continue
        found.sort(key=lambda number: (judged[number].rank, judged[number].tie))
        best = judged[found[0]]
        rivals = [judged[number] for number in found[1:] if judged[number].rank == best.rank]
        incomplete = [each.volume for each in judged if each.reason in _INCOMPLETE and _kind(each.volume) == sequence]
        doubt = best.doubt
        if incomplete:
            names = ", ".join(volume.name for volume in incomplete)
            doubt = f"series whose headers are incomplete, which may be part of it or better: {names}"
        elif rivals:
            names = ", ".join(each.volume.name for each in rivals)
            doubt = f"equal in all attributes to {names}"
        judged[found[0]] = best._replace(use=sequence, doubt=doubt)
        for number in found[1:]:
            other = judged[number]
            judged[number] = other._replace(reason=f"{other.reason}; {best.volume.name} was preferred", doubt="")
    return judged


def _judge(volume: Volume3D) -> Judgement:
    excluded = _exclusion(volume)
    if excluded:
        return Judgement(volume, "", excluded)
    return {"adc": _adc, "hbv": _diffusion, "t2w": _anatomy}[_kind(volume)](volume)


def _kind(volume: Volume3D) -> str:
    """The sequence that a volume can at most be."""
    return "adc" if _is_adc(volume) else "hbv" if _is_diffusion(volume) else "t2w"


def _exclusion(volume: Volume3D) -> str:
    """Why a volume is none of the three sequences, whatever its contrast; "" if it may be one."""
    first = volume.headers[0]
    if first.modality not in ("MR", ""):
        return "no MR image"
    if not first.storage:
        return "no MR image (another kind of DICOM object)"
    if first.samples != 1:
        return "a color image"
    for code in first.image_type:
        if code in _NO_ANATOMY:
            return _NO_ANATOMY[code]
    for word, reason in _NO_WORDS.items():
        if word in first.words and not (word == "map" and _is_adc(volume)):
            return reason
    normal = volume.normal
    if normal is None or first.pixel_spacing is None:
        return _NO_GEOMETRY
    plane = int(np.abs(normal).argmax())
    tilt = float(np.degrees(np.arccos(min(1.0, abs(normal[2])))))
    if plane != 2 or tilt > MAX_TILT:
        return _PLANES[plane] if plane != 2 else f"oblique by {tilt:.0f} degrees"
    if any(frame.position is None for header in volume.headers for frame in header.frames):
        return _NO_POSITION
    if volume.slices < MIN_SLICES:
        return f"only {counted(volume.slices, 'slice')}"
    return ""


def _is_adc(volume: Volume3D) -> bool:
    first = volume.headers[0]
    if any(
        re.fullmatch(r"(DIFFUSION_)?ADC(_UNSPECIFIED|_MAP)?|APPARENT DIFFUSION COEFFICIENT", code)
        for code in first.image_type
    ):
        return True
    # GE and some reconstruction software state it only in the description of a derived image.
    return "adc" in first.words and "DERIVED" in first.image_type and not volume.trace and "trace" not in first.words


def _is_diffusion(volume: Volume3D) -> bool:
    first = volume.headers[0]
    if volume.diffusion or (volume.b_value is not None and "EP" in first.scanning_sequence):
        return True
    return bool({"DIFFUSION", "TRACEW", "TRACE", "CALC_BVAL"} & set(first.image_type)) or (
        "EP" in first.scanning_sequence and bool({"dwi", "trace", "calculated"} & first.words)
    )


def _adc(volume: Volume3D) -> Judgement:
    first = volume.headers[0]
    if volume.images_per_position > 1:
        return Judgement(volume, "", f"ADC, but {volume.images_per_position} images at a position")
    by_type = any("ADC" in code or code.startswith("APPARENT") for code in first.image_type)
    reason = "ADC by its image type" if by_type else "ADC by its description"
    rank = (not by_type, _distortion(volume), -volume.slices)
    doubt = "" if by_type else "no attribute but the description says ADC"
    return Judgement(volume, "adc", reason, rank, (_latest(volume),), doubt)


def _diffusion(volume: Volume3D) -> Judgement:
    first = volume.headers[0]
    b_value, stated = volume.b_value, "b-value {:g}"
    if b_value is None:
        words = [int(word[1:]) for word in first.words if re.fullmatch(r"b\d+", word)]
        if len(words) != 1:
            return Judgement(volume, "", "diffusion without a b-value in the header")
        b_value, stated = float(words[0]), "b-value {:g}, by its description only"
    name = stated.format(b_value)
    if b_value < MIN_HIGH_B:
        return Judgement(volume, "", f"{name}, below {MIN_HIGH_B:g}")
    if volume.images_per_position > 1:
        return Judgement(volume, "", f"{name}, but {volume.images_per_position} images at a position (directions?)")
    doubt = "" if b_value >= GOOD_HIGH_B else f"b-value {b_value:g} is below {GOOD_HIGH_B:g}"
    doubt = doubt if volume.b_value is not None else "no attribute but the description states the b-value"
    rank = (volume.b_value is None, -b_value, not volume.trace, _distortion(volume), -volume.slices)
    reason = name + (", trace" if volume.trace else "")
    return Judgement(volume, "hbv", reason, rank, (_latest(volume),), doubt)


def _anatomy(volume: Volume3D) -> Judgement:
    first = volume.headers[0]
    if volume.images_per_position > 1:
        return Judgement(volume, "", f"{volume.images_per_position} images at a position: dynamic or repeated")
    if volume.echoes > 2:
        return Judgement(volume, "", f"{volume.echoes} echo times: made for a map of relaxation times")
    if "EP" in first.scanning_sequence:
        return Judgement(volume, "", "echo-planar without a b-value")
    if "GR" in first.scanning_sequence and "SE" not in first.scanning_sequence:
        return Judgement(volume, "", "a gradient echo")
    echo, repetition = first.echo_time, first.repetition_time
    if echo is not None and echo < MIN_T2_ECHO_TIME:
        return Judgement(volume, "", f"echo time of {echo:g} ms, below {MIN_T2_ECHO_TIME:g}: not T2-weighted")
    if repetition is not None and repetition < MIN_T2_REPETITION_TIME:
        return Judgement(
            volume, "", f"repetition time of {repetition:g} ms, below {MIN_T2_REPETITION_TIME:g}: not T2-weighted"
        )
    if "t1" in first.words and "t2" not in first.words:
        return Judgement(volume, "", "T1-weighted, by its description")
    doubt = ""
    if echo is None or repetition is None:
        if "t2" not in first.words:
            return Judgement(volume, "", "no echo or repetition time in the header")
        doubt = "no echo or repetition time in the header, but the description says T2"
    return _t2(volume, doubt)


def _t2(volume: Volume3D, doubt: str) -> Judgement:
    first, field = volume.headers[0], volume.field_of_view
    assert field is not None and first.pixel_spacing is not None
    is_3d = first.acquisition_type == "3D"
    suppressed = _is_fat_suppressed(volume)
    single_shot = _is_single_shot(volume)
    reformatted = bool({"MPR", "REFORMATTED", "RESAMPLED", "CSAMPR", "CSA MPR"} & set(first.image_type))
    large = field > SMALL_FIELD
    traits = ["3D" if is_3d else "2D", f"field of view of {field:.0f} mm"]
    traits += ["fat suppressed"] * suppressed + ["single shot"] * single_shot + ["reformatted"] * reformatted
    echo = "no echo time" if first.echo_time is None else f"echo time {first.echo_time:g} ms"
    if not doubt and (suppressed or single_shot or reformatted or large):
        doubt = f"unusual for the axial T2 series of a prostate: {', '.join(traits)}"
    rank = (
        bool(doubt) and first.echo_time is None, single_shot, suppressed, large, reformatted, is_3d,
        "DERIVED" in first.image_type, _distortion(volume), "NORM" not in first.image_type,
        round(max(first.pixel_spacing), 1),
    )  # fmt: skip
    tie = ("large field" in first.words, "t2" not in first.words, _latest(volume))
    return Judgement(volume, "t2w", f"axial T2: {echo}, {', '.join(traits)}", rank, tie, doubt)


def _latest(volume: Volume3D) -> int:
    return -(volume.headers[0].series_number or 0)


def _is_fat_suppressed(volume: Volume3D) -> bool:
    first = volume.headers[0]
    codes = {
        "FS",
        "FATSAT",
        "FAT_SAT",
        "SPIR",
        "SPAIR",
        "STIR",
        "FAT_GEMS",
        "FSA_GEMS",
        "FSS_GEMS",
        "DIXON",
        "WATER_EXCITATION",
    }
    inverted = "IR" in first.scanning_sequence and (first.inversion_time or 0) < 400
    return bool(codes & first.options) or inverted or "fat suppressed" in first.words


def _is_single_shot(volume: Volume3D) -> bool:
    first = volume.headers[0]
    long_train = first.acquisition_type != "3D" and (first.echo_train or 0) > MAX_ECHO_TRAIN_2D
    return (
        long_train
        or bool(re.search(r"(^\*?h(fi)?2d|haste|ssfse)", first.sequence_name))
        or "single shot" in first.words
    )


def _distortion(volume: Volume3D) -> bool:
    """Whether the distortion of the gradients was left uncorrected, as the scanner's second copy of a series states."""
    return "ND" in volume.headers[0].image_type
