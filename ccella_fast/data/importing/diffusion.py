"""b-values in DICOM headers: the standard's attribute, and those of vendors from before there was one.

all       (0018,9087) Diffusion b-value; in multi-frame files in each frame's MR Diffusion Sequence
Siemens   (0019,xx0C) of "SIEMENS MR HEADER", and the sequence's name, such as `*ep_b1400t`
GE        (0043,xx39) of "GEMS_PARM_01", first value, to which 1,000,000,000 may be added
Philips   (2001,xx03) of "Philips Imaging DD 001"
UIH       (0065,xx09) of "Image Private Header"
"""

from __future__ import annotations

import re
import struct
from typing import Any

MAX_B_VALUE = 10_000  # s/mm2; above, the number is no b-value
_PRIVATE = (
    (0x0019, 0x0C, "SIEMENS MR HEADER"),
    (0x0043, 0x39, "GEMS_PARM_01"),
    (0x2001, 0x03, "Philips Imaging DD 001"),
    (0x0065, 0x09, "Image Private Header"),
)
_SEQUENCE_NAME = re.compile(r"ep_?(?:calc_?)?b(\d+)", re.IGNORECASE)


def b_value_of(dataset: Any) -> float | None:
    """The b-value of a single image or of a frame's functional groups, in s/mm2; None if the header states none."""
    values = [dataset.get("DiffusionBValue")]
    values += [item.get("DiffusionBValue") for item in dataset.get("MRDiffusionSequence") or []]
    values += [_private(dataset, *place) for place in _PRIVATE]
    name = _SEQUENCE_NAME.search(str(dataset.get("SequenceName") or dataset.get("PulseSequenceName") or ""))
    values += [name[1]] if name else []
    for value in values:
        number = _number(value)
        if number is not None:
            return number
    return None


def is_trace(dataset: Any, image_type: tuple[str, ...]) -> bool:
    """Whether an image is a mean over directions and not of one direction."""
    places = [dataset, *(dataset.get("MRDiffusionSequence") or [])]
    directions = {str(place.get("DiffusionDirectionality") or "").upper() for place in places}
    return "ISOTROPIC" in directions or bool({"TRACEW", "TRACE", "CALC_BVAL", "ISOTROPIC"} & set(image_type))


def _private(dataset: Any, group: int, element: int, creator: str) -> Any:
    try:
        return dataset.private_block(group, creator)[element].value
    except KeyError:
        pass
    if any(tag.group == group and 0x10 <= tag.element <= 0xFF for tag in dataset.keys()):  # noqa: SIM118  (tags, not elements)
        return None
    tag = (group, 0x1000 | element)  # the creator's name was removed with other texts
    return dataset[tag].value if tag in dataset else None


def _number(value: Any) -> float | None:
    """A b-value from what a header holds: a number, several, text, or bytes of unknown type."""
    if isinstance(value, bytes):
        if re.fullmatch(rb"[\d\\. -]+\0?", value):
            value = value.decode("ascii").strip("\0 ").split("\\")
        elif len(value) in (4, 8):
            value = struct.unpack("<f" if len(value) == 4 else "<d", value)[0]
        else:
            return None
    if not isinstance(value, str | int | float | None) and hasattr(value, "__getitem__"):
        value = value[0] if len(value) else None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    if number >= 1e9:
        number %= 1e5
    return number if 0 <= number <= MAX_B_VALUE else None
