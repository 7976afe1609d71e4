"""Licenses of shared weights: identifiers that the Hugging Face hub knows, or the text of any other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ccella_fast.data.readers.text_checks import read_text
from ccella_fast.errors import ConfigError, did_you_mean

# https://huggingface.co/docs/hub/repositories-licenses, without families, single models' licenses, `unknown` and `other`.
IDENTIFIERS = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "gpl-2.0", "gpl-3.0", "isc", "lgpl-2.1", "lgpl-3.0", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl",
    "ncsa", "odc-by", "ofl-1.1", "openrail++", "osl-3.0", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
)  # fmt: skip
NOT_STATED = "not stated"
_MOST_BYTES = 2**20  # of a license's text


class License(NamedTuple):
    """The license of a weight file.

    Attributes:
        name: one of IDENTIFIERS, or the name of the file with the text.
        text: None for one of IDENTIFIERS.
    """

    name: str
    text: str | None = None


def read_license(given: str | Path | None, *, field: str) -> License | None:
    """The license that a user has named, by its identifier or by a file with its text; None if none is given.

    Raises:
        ConfigError: it is neither.
        DataError: the file is not text.
    """
    if given is None:
        return None
    path = Path(given)
    if path.is_file():
        name = re.sub(r"[^a-z0-9.]+", "-", path.stem.lower()).strip("-.")
        return License(name or "license", read_text(path, limit=_MOST_BYTES))
    name = str(given).lower()
    if name not in IDENTIFIERS:
        fix = did_you_mean(name, IDENTIFIERS) + " For any other license, give the file with its text."
        raise ConfigError(f"{str(given)!r:.80} is neither a license of the hub nor a file", field=field, fix=fix)
    return License(name)


def card_license(model: License | None, autoencoder: License | None, *, page: str) -> dict[str, str]:
    """The entries `license`, `license_name` and `license_link` of a card; none if a license is missing.

    page: the address of the card, where the license of each file is listed. The hub has room for one license.
    """
    if model is None or autoencoder is None:
        return {}
    if model != autoencoder:
        return {"license": "other", "license_name": "one-for-each-file", "license_link": f"{page}#licenses"}
    if model.text is None:
        return {"license": model.name}
    return {"license": "other", "license_name": model.name, "license_link": "LICENSE.md"}
