"""What `ccella-fast evaluate` has written, read for the page: rows of metrics, facts about volumes, the sensitivity gate."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ccella_fast.data.example_volumes import StoredExample, read_examples
from ccella_fast.errors import DataError
from ccella_fast.storage import damage_named, read_json

METRICS, PROTOCOL, SENSITIVITY, EXAMPLES = "metrics.json", "protocol.json", "sensitivity.json", "examples"
WRITTEN_BY = {"writer": "`ccella-fast evaluate`", "fix": "run `ccella-fast evaluate` again"}  # for `damage_named`
_SCHEMA = 1  # of metrics.json
GLAND = "gland_"  # rows of a rule for glands

# Spaces by how far they are trusted to rank generators; radiomics explains, and does not rank.
_TRUST = ("taps-l3", "taps-l4", "medicalnet", "radimagenet", "random")
EXPLAINING = "radiomics"

_GUARDS = {
    "n<d": "There are no more volumes than features: the value is mostly bias. Read its ratio to the floor, never the value.",
    "biased": "There are fewer than three volumes per feature, so the value is biased upwards, as is its floor.",
    "dependent": "Slices are rows here, and those of a volume are alike: read the ratio to the floor, never the value.",
    "no_floor": "There are too few real volumes to compare them with one another, so nothing says what a good value is.",
    "standardised_by_itself": "Features are standardised by the compared real volumes, because no training set was given.",
    "shared_volumes": "Some generated volumes are equal to real ones, voxel for voxel, so distances are too small.",
    "repeated_volumes": "Some real volumes are equal to each other, voxel for voxel, so floors are too low.",
    "one_volume": "A set has one volume only: nothing can be computed from it.",
    "few": "A set has fewer than 20 volumes: the interval is rough.",
    "few_held_out": "There are fewer than 99 held-out volumes, so the 1st percentile is their smallest distance.",
    "few_candidates": "There are fewer than 10 K volumes to choose from, so only reports were chosen, by volumes.",
    "one_class": "The property is the same in all volumes of a set, so nothing can be told apart.",
    "unreadable": "The property cannot be read from real volumes either, so nothing follows for generated ones.",
    "segmenter_fails_on_real": "The segmenter does not work on these real volumes, so nothing follows for generated ones.",
    "gate": "This feature space does not order known degradations of real volumes: it decides nothing here.",
}


class MetricRow(NamedTuple):
    """A row of metrics.json; the attributes are explained there, by `ccella_fast.evaluation.results.Row`."""

    metric: str
    features: str | None
    sequence: str
    set: str
    reference: str
    value: float | None
    value_equal_n: float | None
    ci95: tuple[float, float] | None
    floor: float | None
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    limit_autoencoder: float | None
    n_real: int
    n_synthetic: int
    better: str
    guards: tuple[str, ...]
    details: dict[str, Any]
    weights_sha256: str | None
    seconds: float

    def has(self, *guards: str) -> bool:
        """Whether a guard is among these."""
        return not set(guards).isdisjoint(self.guards)

    def number(self, name: str) -> float | None:
        """A number of the details."""
        return _number(self.details.get(name))

    def pair(self, name: str) -> tuple[float, float] | None:
        """An interval of the details."""
        return _pair(self.details.get(name))


class ListedCase(NamedTuple):
    """What is known of a real or generated volume.

    Attributes:
        kind: its set.
        number: its position in the set, from 1.
        sequence: "t2w", "hbv" or "adc".
        nearest_train: number of the nearest training volume.
        distance: to it.
        null_percentile: percent of the held-out volumes that are at most as far from theirs.
        volume_cc: of the segmented gland.
        is_copy: whether it is a copy of the nearest training volume.
        features: the space of the distance.
    """

    kind: Literal["real", "synthetic"]
    number: int
    sequence: str
    nearest_train: int | None
    distance: float | None
    null_percentile: float | None
    volume_cc: float | None
    is_copy: bool
    features: str | None = None


class StoredEvaluation(NamedTuple):
    """An evaluation.

    Attributes:
        rows: the metrics.
        cases: the volumes.
        protocol: what the numbers depend on.
        protocol_sha256: of protocol.json.
        gates: of the sensitivity gate, one a feature space.
        examples: volumes that were kept.
        phantom: whether the real volumes are phantoms.
        environment: the machine.
        generator: which weights generated the volumes, and with which settings; empty if it is not known.
    """

    rows: list[MetricRow]
    cases: list[ListedCase]
    protocol: dict[str, Any]
    protocol_sha256: str
    gates: list[dict[str, Any]]
    examples: list[StoredExample]
    phantom: bool
    environment: dict[str, Any]
    generator: Mapping[str, Any] = MappingProxyType({})

    def named(self, *metrics: str) -> list[MetricRow]:
        """The rows of these metrics, the most trusted feature space first."""
        return sorted((row for row in self.rows if row.metric in metrics), key=_trust)

    @property
    def word(self) -> str:
        """What a volume of the real set is called."""
        return "phantom" if self.phantom else "real volume"


def read_evaluation(folder: Path) -> StoredEvaluation:
    """Read the folder of an evaluation.

    Raises:
        DataError: metrics.json is missing, or a file is damaged.
    """
    content, protocol = read_json(folder / METRICS), _optional(folder / PROTOCOL, {})
    with damage_named(folder / METRICS, **WRITTEN_BY):
        schema = content.get("schema", _SCHEMA)
        if schema != _SCHEMA:
            why = f"this evaluation has the format {schema!r:.40}, and this release reads {_SCHEMA}"
            raise DataError(
                why, path=folder / METRICS, field="schema", fix="use the release that wrote it, or evaluate again"
            )
        if not isinstance(content["rows"], list):
            raise TypeError
        rows = [_row(entry) for entry in content["rows"]]
        cases = [_case(entry) for entry in content["per_case"]]
        digest, environment = _word(content["protocol_sha256"]), dict(content.get("environment", {}))
        generator = _generator(content.get("generator", {}))  # earlier releases did not write it
    gates = read_gates(folder)
    with damage_named(folder / PROTOCOL, **WRITTEN_BY):
        protocol = dict(protocol)
    failed = {gate["space"] for gate in gates if not gate["passed"]}
    rows = [row._replace(guards=(*row.guards, "gate")) if row.features in failed else row for row in rows]
    examples = read_examples(folder / EXAMPLES)
    return StoredEvaluation(
        rows, cases, protocol, digest, gates, examples.volumes, examples.phantom, environment, generator
    )


def read_gates(folder: Path) -> list[dict[str, Any]]:
    """The gates in the sensitivity.json of a folder, none if it has none.

    Raises:
        DataError: the file is damaged.
    """
    content = _optional(folder / SENSITIVITY, {"gates": []})
    with damage_named(folder / SENSITIVITY, **WRITTEN_BY):
        return [_gate(entry) for entry in content["gates"]]


def _optional(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.is_file() else otherwise


def _row(entry: dict[str, Any]) -> MetricRow:
    if not all(isinstance(entry[name], str) for name in ("set", "reference", "better")):
        raise TypeError
    if entry["value"] is not None and entry["n_synthetic"] == 0:
        raise ValueError
    details = dict(entry["details"])
    features = None if entry["features"] is None else _word(entry["features"])
    return MetricRow(
        _word(entry["metric"]), features, _word(entry["sequence"]), entry["set"],
        entry["reference"], _number(entry["value"]), _number(entry["value_equal_n"]), _pair(entry["ci95"]),
        _number(entry["floor"]), _number(entry["ratio"]), _pair(details.get("ratio_ci95")),
        _number(entry["limit_autoencoder"]), _count(entry["n_real"]), _count(entry["n_synthetic"]), entry["better"],
        tuple(map(_word, entry["guards"])), details, entry["weights_sha256"], float(entry["seconds"]),
    )  # fmt: skip


def _case(entry: dict[str, Any]) -> ListedCase:
    if entry["set"] not in ("real", "synthetic"):
        raise ValueError
    nearest = entry.get("nearest_train")
    distance, percentile, volume = (_number(entry.get(name)) for name in ("distance", "null_percentile", "volume_cc"))
    place = None if nearest is None else _place(nearest)
    kind, number, sequence = entry["set"], _place(entry["id"]), str(entry["sequence"])
    features = None if entry.get("features") is None else _word(entry["features"])
    return ListedCase(kind, number, sequence, place, distance, percentile, volume, entry.get("copy") is True, features)


def _place(name: str) -> int:
    """The number in a name such as "synthetic-012"."""
    found = re.fullmatch(r"[a-z]+-(\d+)", name)
    if found is None:
        raise ValueError
    return int(found[1])


def _gate(entry: dict[str, Any]) -> dict[str, Any]:
    for row in entry["rows"]:
        if not isinstance(row["family"], str) or not isinstance(row["unit"], str):
            raise TypeError
        float(row["strength"]), float(row["paired"])
    in_order = {str(family): float(share) for family, share in entry["in_order"].items()}
    return {**entry, "space": str(entry["space"]), "passed": entry["passed"] is True, "in_order": in_order}


def _generator(entry: Any) -> dict[str, Any]:
    generator = dict(entry)
    for name in ("weights_sha256", "vae_sha256", "solver"):
        if generator.get(name) is not None:
            _word(generator[name])
    if "solver" in generator:
        _count(generator["num_inference_steps"], least=1)
    return generator


def _word(value: Any) -> str:
    """A name of one line, which pages and model cards show."""
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError
    return value


def _count(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not abs(value) <= sys.float_info.max:  # nor NaN, infinity, and integers that are too large
        raise ValueError
    return value


def _pair(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = map(_number, value)
    if low is None or high is None:
        raise TypeError
    return float(low), float(high)


def guard_sentence(guard: str) -> str:
    """What a guard means."""
    return _GUARDS.get(guard, guard)


def _trust(row: MetricRow) -> tuple[int, str]:
    name = row.features or ""
    place = next((place for place, prefix in enumerate(_TRUST) if name.startswith(prefix)), len(_TRUST))
    return place + (name == EXPLAINING), row.sequence
