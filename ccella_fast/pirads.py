"""PI-RADS scores and the two classes that are made of them (docs/explanation/method.md, section 1.1)."""

from __future__ import annotations

CLASS_NAMES = ["neg", "pos"]  # PI-RADS 1 and 2, PI-RADS 3 to 5
NEGATIVE, POSITIVE = [1, 0], [0, 1]  # one-hot
#: A PI-RADS score, or the name of a class, -> one-hot class.
CLASSES: dict[str, list[int]] = {
    **dict.fromkeys(("1", "2", "neg"), NEGATIVE),
    **dict.fromkeys(("3", "4", "5", "pos"), POSITIVE),
}
