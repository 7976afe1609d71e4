"""The results of an evaluation: rows of metrics, facts about single volumes, and their files."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ccella_fast.storage import json_text, write_json

SCHEMA = 1
FORMAT = {"format": "ccella_fast.evaluation", "version": 1}
METRICS, PROTOCOL, SENSITIVITY = "metrics.json", "protocol.json", "sensitivity.json"
COLUMNS = (
    "metric", "features", "sequence", "value", "at equal n", "95 % interval", "floor", "ratio", "limit", "n", "guards",
)  # fmt: skip
Better = Literal["lower", "higher", "floor"]  # "floor": as near as possible to the value of real volumes


@dataclass(frozen=True)
class Row:
    """One metric in one feature space for one sequence.

    Attributes:
        metric: its name, such as "fd".
        features: the feature space; None for a metric of the images themselves.
        sequence: "t2w", "hbv" or "adc".
        set: the name of the set of synthetic volumes.
        reference: the name of the set of real volumes.
        value: of all real and all synthetic volumes; None if it is not defined.
        value_equal_n: the mean over the draws, of samples as large as those of the floor.
        ci95: interval of 95 % for `value_equal_n`.
        floor: the mean of the same metric between two halves of the real volumes.
        ratio: `value_equal_n` / `floor`.
        limit_autoencoder: as `floor`, with the second half reconstructed by the autoencoder.
        n_real: the number of real volumes.
        n_synthetic: the number of synthetic volumes.
        dim: the number of features that are used.
        better: "lower", "higher", or "floor" if the value should be that of real volumes.
        guards: words that say why a number has to be read with care, explained in docs/how-to/evaluate.md.
        weights_sha256: of the extractor's weights; None without weights.
        preprocessing: what the extractor does to a volume first.
        details: further numbers of this metric.
        seconds: that it took, without the features.
    """

    metric: str
    features: str | None
    sequence: str
    set: str
    reference: str
    value: float | None
    n_real: int
    n_synthetic: int
    better: Better
    value_equal_n: float | None = None
    ci95: tuple[float, float] | None = None
    floor: float | None = None
    ratio: float | None = None
    limit_autoencoder: float | None = None
    dim: int | None = None
    guards: tuple[str, ...] = ()
    weights_sha256: str | None = None
    preprocessing: Any = None
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` has found.

    Attributes:
        rows: the metrics.
        per_case: facts about single volumes, which are numbered by their position in their set.
        protocol: everything that the numbers depend on besides the volumes.
        environment: the machine and the versions.
        generator: which weights generated the synthetic volumes, and with which settings, as far as their folder says it.
    """

    rows: list[Row]
    per_case: list[dict[str, Any]]
    protocol: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)

    @property
    def protocol_sha256(self) -> str:
        """The SHA-256 of protocol.json. Numbers of different protocols are not comparable."""
        return hashlib.sha256(json_text(self.protocol).encode()).hexdigest()

    def __getitem__(self, key: tuple[str, str | None] | str) -> Row:
        """The first row of a metric, or of a metric and a feature space: `result["fd", "taps-l3"]`."""
        metric, features = key if isinstance(key, tuple) else (key, None)
        for row in self.rows:
            if row.metric == metric and (not isinstance(key, tuple) or row.features == features):
                return row
        raise KeyError(key)

    def as_json(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return {
            "schema": SCHEMA,
            "protocol_sha256": self.protocol_sha256,
            "rows": [plain_values(asdict(row)) for row in self.rows],
            "per_case": plain_values(self.per_case),
            "generator": self.generator,
            "environment": self.environment,
        }

    def write(self, folder: str | Path) -> None:
        """Write metrics.json."""
        write_json(Path(folder) / METRICS, self.as_json())

    def write_protocol(self, folder: str | Path) -> None:
        """Write protocol.json, by which the folder is recognized."""
        write_json(Path(folder) / PROTOCOL, self.protocol)

    def table(self) -> str:
        """The rows as text, aligned in columns."""
        lines = [list(COLUMNS), *(cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def cells(row: Any) -> list[str]:
    """A `Row`, or a stored row with the same attributes, as text for each of COLUMNS."""
    interval = "" if row.ci95 is None else f"{_shown(row.ci95[0])} to {_shown(row.ci95[1])}"
    counts = f"{row.n_real} + {row.n_synthetic}"
    numbers = [_shown(value) for value in (row.value, row.value_equal_n)]
    more = [_shown(value) for value in (row.floor, row.ratio, row.limit_autoencoder)]
    return [row.metric, row.features or "", row.sequence, *numbers, interval, *more, counts, ", ".join(row.guards)]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def plain_values(value: Any) -> Any:
    """Values for JSON: numbers that are not finite become null, named tuples objects, numpy's numbers plain ones."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(each) for each in value]
    if hasattr(value, "item"):  # a number of numpy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
