"""What `ccella-fast evaluate` has written, read for the page: rows of metrics, facts about volumes, the sensitivity gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ccella_fast.data.example_volumes import StoredExample, read_examples
from ccella_fast.errors import DataError
from ccella_fast.storage import read_json

METRICS, PROTOCOL, SENSITIVITY, EXAMPLES = "metrics.json", "protocol.json", "sensitivity.json", "examples"

# Spaces by how far they are trusted to rank generators; radiomics explains, and does not rank.
_TRUST = ("taps-l3", "taps-l4", "medicalnet", "radimagenet", "random")
EXPLAINING = "radiomics"

_GUARDS = {
    "n<d": "There are no more volumes than features: the value is mostly bias. Read its ratio to the floor, never the value.",
    "biased": "There are fewer than three volumes per feature, so the value is biased upwards, as is its floor.",
    "no_floor": "There are too few real volumes to compare them with one another, so nothing says what a good value is.",
    "standardised_by_itself": "Features are standardised by the compared real volumes, because no training set was given.",
    "one_volume": "A set has one volume only: nothing can be computed from it.",
    "few": "A set has fewer than 20 volumes: the interval is rough.",
    "few_held_out": "There are fewer than 99 held-out volumes, so the 1st percentile is their smallest distance.",
    "gate": "This feature space does not order known degradations of real volumes: it decides nothing here.",
    "not_applicable": "The segmenter does not work on these real volumes, so nothing follows for the generated ones.",
}


class MetricRow(NamedTuple):
    """A row of metrics.json; the attributes are explained there, by `ccella_fast.evaluation.results.Row`."""

    metric: str
    features: str | None
    sequence: str
    value: float | None
    value_equal_n: float | None
    ci95: tuple[float, float] | None
    floor: float | None
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    limit_autoencoder: float | None
    n_real: int
    n_synthetic: int
    dim: int | None
    better: str
    guards: tuple[str, ...]
    details: dict[str, Any]
    reference: str
    set: str
    weights_sha256: str | None
    seconds: float


class Findings(NamedTuple):
    """An evaluation.

    Attributes:
        rows: the metrics.
        per_case: facts about volumes, by their number.
        protocol: what the numbers depend on.
        protocol_sha256: of protocol.json.
        gates: of the sensitivity gate, one a feature space.
        examples: volumes that were kept.
        phantom: whether the real volumes are phantoms.
        environment: the machine.
    """

    rows: list[MetricRow]
    per_case: list[dict[str, Any]]
    protocol: dict[str, Any]
    protocol_sha256: str
    gates: list[dict[str, Any]]
    examples: list[StoredExample]
    phantom: bool
    environment: dict[str, Any]

    def named(self, *metrics: str) -> list[MetricRow]:
        """The rows of these metrics, the most trusted feature space first."""
        return sorted((row for row in self.rows if row.metric in metrics), key=_trust)


def read_findings(folder: Path) -> Findings:
    """Read the folder of an evaluation.

    Raises:
        DataError: metrics.json is missing, or a file is damaged.
    """
    content = read_json(folder / METRICS)
    protocol = read_json(folder / PROTOCOL) if (folder / PROTOCOL).is_file() else {}
    sensitivity = read_json(folder / SENSITIVITY) if (folder / SENSITIVITY).is_file() else {"gates": []}
    path = folder / METRICS
    try:
        rows = [_row(entry) for entry in content["rows"]]
        per_case, digest, environment = content["per_case"], content["protocol_sha256"], content.get("environment", {})
        path = folder / SENSITIVITY
        gates = [
            {**gate, "rows": list(gate["rows"]), "in_order": dict(gate["in_order"])} for gate in sensitivity["gates"]
        ]
        failed = {gate["space"] for gate in gates if not gate["passed"]}
        path = folder / PROTOCOL
        phantom = bool(protocol.get("real", {}).get("phantom"))
    except (LookupError, TypeError, ValueError, AttributeError):
        why = "a value that `ccella-fast evaluate` writes into this file is missing or of another kind"
        raise DataError(why, path=path, fix="run `ccella-fast evaluate` again") from None
    rows = [row._replace(guards=(*row.guards, "gate")) if row.features in failed else row for row in rows]
    return Findings(
        rows, per_case, protocol, digest, gates, read_examples(folder / EXAMPLES), phantom, environment
    )  # fmt: skip


def guard_sentence(guard: str) -> str:
    """What a guard means."""
    return _GUARDS.get(guard, guard)


def _trust(row: MetricRow) -> tuple[int, str]:
    name = row.features or ""
    place = next((place for place, prefix in enumerate(_TRUST) if name.startswith(prefix)), len(_TRUST))
    return place + (name == EXPLAINING) + 10 * ("gate" in row.guards), row.sequence


def _row(entry: dict[str, Any]) -> MetricRow:
    def number(name: str) -> float | None:
        value = entry.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError
        return value

    def pair(name: str) -> tuple[float, float] | None:
        if entry.get(name) is None:
            return None
        low, high = map(float, entry[name])
        return low, high

    for name in ("metric", "sequence", "set", "reference"):
        if not isinstance(entry[name], str):
            raise TypeError
    n_real, n_synthetic = int(entry["n_real"]), int(entry["n_synthetic"])
    return MetricRow(
        entry["metric"], entry["features"], entry["sequence"], number("value"), number("value_equal_n"), pair("ci95"),
        number("floor"), number("ratio"), pair("ratio_ci95"), number("limit_autoencoder"), n_real, n_synthetic,
        entry.get("dim"), str(entry.get("better", "")), tuple(map(str, entry["guards"])), dict(entry.get("details") or {}), entry["reference"],
        entry["set"], entry.get("weights_sha256"), float(entry.get("seconds") or 0),
    )  # fmt: skip
