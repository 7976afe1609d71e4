"""b-values in DICOM headers of an export.

The readers refuse what is not stated plainly. Here a series is only to be recognized, so that two more places are looked at:
the private attribute whose creator's name was removed with other texts, and the sequence's name, such as `*ep_b1400t`.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from ccella_fast.data.readers.dicom_files import PRIVATE_B_VALUES

MAX_B_VALUE = 10_000  # s/mm2; a larger number is not a b-value
_SEQUENCE_NAME = re.compile(r"ep_?(?:calc_?)?b(\d+)", re.IGNORECASE)


def b_value_of(dataset: Any) -> float | None:
    """The b-value of a single image or of a frame's functional groups, in s/mm2; None if the header states none."""
    values = [dataset.get("DiffusionBValue")]
    values += [item.get("DiffusionBValue") for item in dataset.get("MRDiffusionSequence") or []]
    values += [_private(dataset, group, *place) for group, place in PRIVATE_B_VALUES.items()]
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


def _private(dataset: Any, group: int, creator: str, element: int) -> Any:
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
        number = float(value)
    except (TypeError, ValueError):
        return None
    number %= 1e9  # which GE adds to the b-values of a series of several
    return number if 0 <= number <= MAX_B_VALUE else None
