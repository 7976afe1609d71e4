"""From sets of volumes to arrays of features: one pass over each set, one volume in memory after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ccella_fast.errors import DataError
from ccella_fast.evaluation.features.cache import voxel_digest
from ccella_fast.evaluation.features.extractor import serves
from ccella_fast.evaluation.volumes import Volume, VolumeSet, check_array
from ccella_fast.processes import DistributedContext
from ccella_fast.progress import refresh_interval

if TYPE_CHECKING:
    from ccella_fast.evaluation.features.cache import FeatureCache
    from ccella_fast.evaluation.features.extractor import Extractor

_SAME_SPACING = 1e-3  # relative
_DIGEST = 32  # bytes of a SHA-256


class CommonGrid(NamedTuple):
    """The grid that all volumes of an evaluation share.

    Attributes:
        shape: voxels along R, A, S.
        spacing: voxel size in mm.
        whose: the set that it is of, for messages.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    whose: str

    @classmethod
    def of(cls, volume: Volume, whose: str) -> CommonGrid:
        """The grid of a volume."""
        return cls(volume.array.shape, volume.spacing, whose)

    def check(self, volume: Volume, whose: str, path: object = None) -> None:
        """Raise DataError if a volume has another grid."""
        same = volume.array.shape == self.shape
        if same and np.allclose(volume.spacing, self.spacing, rtol=_SAME_SPACING, atol=0):
            return
        theirs = _describe(volume.array.shape, volume.spacing)
        why = f"no common grid: {self.whose} has {_describe(self.shape, self.spacing)}, but a volume of {whose} has {theirs}"
        dim, spacing = _values(self.shape), _values(self.spacing)
        fix = f"prepare both alike: ccella-fast prepare ... --set data.dim={dim} --set data.spacing={spacing}"
        raise DataError(why, path=path or volume.id, fix=fix)


@dataclass(frozen=True)
class FeatureTable:
    """The features of the volumes of a set that have the same sequence; a row per volume.

    Attributes:
        name: of the set.
        sequence: of the volumes.
        ids: of the volumes.
        patients: of the volumes, None where a volume has a patient of its own.
        classes: "neg", "pos" or None.
        prompts: names of the reports that the volumes were generated from, or None.
        digests: the SHA-256 of the voxels, from `voxel_digest`.
        spacings: (n, 3) float64, mm.
        spaces: name -> (n, d) float32.
    """

    name: str
    sequence: str
    ids: list[str]
    patients: list[str | None]
    classes: list[str | None]
    prompts: list[str | None]
    digests: list[bytes]
    spacings: np.ndarray
    spaces: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)


class _Facts(NamedTuple):
    id: str
    sequence: str
    patient: str | None
    pirads: str | None
    prompt: str | None


def collect(
    volumes: Iterable[Volume],
    extractors: Sequence[Extractor],
    *,
    name: str,
    grid: CommonGrid | None = None,
    cache: FeatureCache | None = None,
    processes: DistributedContext | None = None,
    progress: bool = False,
) -> tuple[dict[str, FeatureTable], CommonGrid | None]:
    """The features of a set by sequence, and its grid.

    Args:
        volumes: the set. The processes share a `VolumeSet`; anything else is read by each of them.
        extractors: those that serve a volume's sequence are applied to it.
        name: of the set.
        grid: that all volumes must have; None: that of the first.
        cache: where features are kept.
        processes: that share the volumes.
        progress: whether a bar is shown.

    Raises:
        DataError: a volume has another grid, is constant or not finite, or an id occurs twice.
    """
    processes = processes or DistributedContext.alone()
    facts, places = _known(volumes, processes)
    rows: dict[int, dict[str, np.ndarray]] = {}
    digests: dict[int, np.ndarray] = {}
    spacings: dict[int, np.ndarray] = {}
    bar = tqdm(
        total=len(places) if places is not None else None, desc=f"features of {name}", unit="volume",
        mininterval=refresh_interval(), disable=not progress or processes.rank != 0,
    )  # fmt: skip
    with bar:
        for place, volume in _read(volumes, places):
            path = volumes.sources[place].path if isinstance(volumes, VolumeSet) else None
            check_array(volume.array, path=path or f"{name}, {volume.id}")
            grid = grid or CommonGrid.of(volume, name)
            grid.check(volume, name, path)
            if places is None:
                facts.append(_Facts(volume.id, volume.sequence, volume.patient, volume.pirads, volume.prompt))
            digest = voxel_digest(volume)
            digests[place] = np.frombuffer(digest, np.uint8)
            spacings[place] = np.array(volume.spacing, np.float64)
            rows[place] = _features(volume, extractors, cache, digest)
            bar.update()
            del volume  # so that the next one is not read next to it
    tables = {}
    for sequence in dict.fromkeys(fact.sequence for fact in facts):
        chosen = [place for place, fact in enumerate(facts) if fact.sequence == sequence]
        serving = [each for each in extractors if serves(each, sequence)]
        spaces = {space: size for each in serving for space, size in each.spaces.items()}
        arrays = {
            space: _gathered(
                {place: found[space] for place, found in rows.items() if space in found},
                chosen,
                size,
                np.float32,
                processes,
            )
            for space, size in spaces.items()
        }
        of_all = [bytes(row) for row in _gathered(digests, chosen, _DIGEST, np.uint8, processes)]
        lengths = _gathered(spacings, chosen, 3, np.float64, processes)
        known = [facts[place] for place in chosen]
        _check_ids(known, name)
        tables[sequence] = FeatureTable(
            name, sequence, [fact.id for fact in known], [fact.patient for fact in known], [fact.pirads for fact in known],
            [fact.prompt for fact in known], of_all, lengths, arrays,
        )  # fmt: skip
    return tables, grid


def _gathered(
    rows: dict[int, np.ndarray], places: Sequence[int], width: int, dtype: Any, processes: DistributedContext
) -> np.ndarray:
    """The rows at these places, of which each process has some: (places, width). Exact: all processes but one add zeros."""
    array: np.ndarray = np.zeros((len(places), width), dtype)
    for row, place in enumerate(places):
        if place in rows:
            array[row] = rows[place]
    return processes.sum(array)


def _known(volumes: Iterable[Volume], processes: DistributedContext) -> tuple[list[_Facts], list[int] | None]:
    """What is known of the volumes before they are read, and the places of those that this process reads."""
    if not isinstance(volumes, VolumeSet):
        return [], None
    facts = [_Facts(each.id, each.sequence, each.patient, each.pirads, each.prompt) for each in volumes.sources]
    return facts, processes.shard(range(len(volumes)))


def _read(volumes: Iterable[Volume], places: list[int] | None):
    if places is None:
        yield from enumerate(volumes)
    else:
        assert isinstance(volumes, VolumeSet)
        for place in places:
            yield place, volumes[place]


def _features(
    volume: Volume, extractors: Sequence[Extractor], cache: FeatureCache | None, digest: bytes
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for extractor in extractors:
        if not serves(extractor, volume.sequence):
            continue
        vectors = extractor(volume) if cache is None else cache.features(extractor, volume, digest)
        for space, vector in vectors.items():
            if not np.isfinite(vector).all():
                why = f"the features '{space}' of this volume are not finite"
                raise DataError(why, path=volume.id, fix="look at the volume, or leave these --features out")
        found |= vectors
    return found


def _check_ids(known: Sequence[_Facts], name: str) -> None:
    if len({fact.id for fact in known}) < len(known):
        seen: set[str] = set()
        twice = next(fact.id for fact in known if fact.id in seen or seen.add(fact.id))  # type: ignore[func-returns-value]
        why = f"two {known[0].sequence} volumes of {name} have the id '{twice:.80}'"
        raise DataError(why, fix="give each volume an id of its own")


def _describe(shape: Sequence[int], spacing: Sequence[float]) -> str:
    sizes, lengths = (" x ".join(f"{value:.4g}" for value in values) for values in (shape, spacing))
    return f"{sizes} voxels of {lengths} mm"


def _values(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"
