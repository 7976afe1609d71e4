"""The text headers of MetaImage and NRRD: each value is checked against a pattern before it is used."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ccella_fast.data.readers.text_checks import quote
from ccella_fast.errors import DataError

MAX_HEADER = 2**20  # bytes; copied DICOM attributes take up to some 10 KiB
NUMBER = r"[-+]?(?:\d{1,20}(?:\.\d{0,60})?|\.\d{1,60})(?:[eE][-+]?\d{1,2})?"  # not nan, not inf
_LARGEST = 1e6  # mm or mm per voxel; larger numbers are damage


class TextHeader:
    """The fields of a header. Names are the same in upper and lower case.

    Args:
        path: The file, for messages.
        pairs: Names and values as they are written. Names outside `known` are a user's own and are left out.
        known: The names, in lower case, and the name of the field that they stand for.

    Raises:
        DataError: If a field is given twice.
    """

    def __init__(self, path: Path, pairs: Iterable[tuple[str, str]], known: dict[str, str]):
        self.path = path
        self._values: dict[str, str] = {}
        for name, value in pairs:
            field = known.get(name.strip().lower())
            if field in self._values:
                raise self.defect(f"the header gives {field} twice", field)
            if field is not None:
                self._values[field] = value.strip()

    def __contains__(self, field: str) -> bool:
        return field in self._values

    def defect(self, why: str, field: str | None, fix: str = "export the series again") -> DataError:
        """The error that names this file and the field."""
        return DataError(why, path=self.path, field=field, fix=fix)

    def text(self, field: str, pattern: str, expected: str, default: str | None = None) -> str:
        """The value of `field` if all of it matches `pattern`; `expected` describes the values that do."""
        value = self._values.get(field, default)
        if value is None:
            fix = f"export the series again with its {field}, or add the line if you know it"
            raise self.defect(f"the header does not state {field} ({expected})", field, fix)
        if not re.fullmatch(pattern, value, re.IGNORECASE | re.ASCII):
            raise self.defect(f"{field} is {quote(value)}, but {expected} is expected", field)
        return value

    def numbers(self, field: str, count: int) -> np.ndarray:
        """The `count` numbers of `field`, separated by blanks."""
        text = self.text(field, rf"{NUMBER}(?:\s+{NUMBER}){{{count - 1}}}", f"{count} numbers")
        return self.finite([float(word) for word in text.split()], field)

    def integers(self, field: str, count: int) -> tuple[int, ...]:
        """The `count` numbers without sign of `field`, each of at most nine digits."""
        text = self.text(field, rf"\d{{1,9}}(?:\s+\d{{1,9}}){{{count - 1}}}", f"{count} whole numbers")
        return tuple(map(int, text.split()))

    def finite(self, values: list[float], field: str) -> np.ndarray:
        """The numbers as an array; DataError for those that no volume of a patient has."""
        array = np.array(values)
        if np.abs(array).max() > _LARGEST:
            raise self.defect(f"{field} has a number above {_LARGEST:g}", field)
        return array
