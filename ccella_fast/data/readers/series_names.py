"""What the name of a file or folder says about the series in it: its sequence, and the id of the study if that is part of it.

Names are compared in lower case, with - . and space as _. The words of a sequence may have the axial plane and the technique
around them, as in `ax_t2_tse`. A name of another plane or of a mask, such as `t2_cor` or `mask_t2w`, is not read as a series.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_AXIAL = "ax|axi|axial|tra|trans|transverse|transversal"
_SPIN_ECHO, _ECHO_PLANAR = "tse|fse|frfse|2d", "dwi|diff|ep2d"


def _pattern(core: str, around: str) -> re.Pattern[str]:
    """The words of `core`, which may have those of `around` and of the axial plane before and after them, end the name."""
    around = f"{_AXIAL}|{around}"
    return re.compile(rf"(?:^|_)(?:(?:{around})_)*(?:{core})(?:_(?:{around}))*$")


_B_VALUE = r"b_?(?:1[0-9]{3}|[2-9][0-9]{3})"  # at least 1000 s/mm2
_PATTERNS = {
    "t2w": _pattern(rf"(?:(?:{_AXIAL}|tse)_?)?t2w?(?:_?(?:{_AXIAL}|tse))?", _SPIN_ECHO),
    "hbv": _pattern(rf"hbv|dwi_high|high_?b(?:_?val(?:ue)?s?)?|(?:dwi)?{_B_VALUE}", f"{_ECHO_PLANAR}|calc"),
    "adc": _pattern("adc", f"{_ECHO_PLANAR}|map"),
}
_DIFFUSION = _pattern("dwi", "ep2d")  # of any b-value; in Prostate158 it is a high one
_OTHERS = re.compile(r"(?:^|_)(?:cor|coronal|sag|sagittal|mask|seg|label)$")
SEQUENCES = tuple(_PATTERNS)


class SeriesName(NamedTuple):
    """What a name says.

    Attributes:
        prefix: Id of the study, or "".
        sequence: One of SEQUENCES.
        is_generic: Whether it is plain `dwi`, which a more precise name in the same folder takes precedence over.
    """

    prefix: str
    sequence: str
    is_generic: bool


def parse_series_name(stem: str) -> SeriesName | None:
    """What the name without its suffix says, or None if it is not that of a series that is read."""
    plain = re.sub(r"[-. ]", "_", stem.lower())
    for sequence, pattern in [*_PATTERNS.items(), ("hbv", _DIFFUSION)]:
        match = pattern.search(plain)
        if match and not _OTHERS.search(plain[: match.start()]):
            return SeriesName(stem[: match.start()], sequence, pattern is _DIFFUSION)
    return None
