"""`evaluate`: synthetic volumes against real ones, in every feature space, with floors, intervals and guards."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccella_fast.errors import ConfigError, DataError, did_you_mean
from ccella_fast.evaluation import metrics as rows_of
from ccella_fast.evaluation.anatomy import GlandFeatures, glands, is_applicable
from ccella_fast.evaluation.collecting import CommonGrid, FeatureTable, collect
from ccella_fast.evaluation.diversity import diversity_row
from ccella_fast.evaluation.features.cache import FeatureCache
from ccella_fast.evaluation.features.extractor import SliceExtractor, load_extractor, serves
from ccella_fast.evaluation.findings import CaseFindings
from ccella_fast.evaluation.foci import FociFeatures
from ccella_fast.evaluation.images import ImageFeatures
from ccella_fast.evaluation.metrics import (
    FEATURE_METRICS,
    IMAGE_METRICS,
    SMALL_IMAGES,
    Draws,
    Sets,
    case_name,
)
from ccella_fast.evaluation.prompted import (
    condition_rows,
    counterfactual_rows,
    gland_volume_row,
    own_study_row,
    retrieval_rows,
)
from ccella_fast.evaluation.reconstruction import LATENT
from ccella_fast.evaluation.results import FORMAT, Evaluation, Row
from ccella_fast.evaluation.retrieval import Embeddings
from ccella_fast.evaluation.slices import slice_rows
from ccella_fast.evaluation.volumes import Volume, VolumeSet
from ccella_fast.processes import DistributedContext
from ccella_fast.quantities import counted

if TYPE_CHECKING:
    from ccella_fast.evaluation.features.extractor import Extractor

logger = logging.getLogger("ccella_fast")
METRICS = (*FEATURE_METRICS, *IMAGE_METRICS, "msssim", "memorisation", "anatomy", "condition")
# Of a volume that is not a copy, the nearest cases are named in these spaces if they exist, else in the first one.
_HEADLINES = ("taps-l3", "taps-l4")
_FEWEST_FOR_COPIES = 3
_N_RULE = "m = min(n_real // 2, n_synthetic), halves by patient, without replacement"


def evaluate(
    *,
    real: Iterable[Volume],
    synthetic: Iterable[Volume],
    train: Iterable[Volume] | None = None,
    reconstructed: Iterable[Volume] | None = None,
    latents: Extractor | None = None,
    findings: CaseFindings | None = None,
    counterfactual: Iterable[Volume] | None = None,
    embeddings: Embeddings | None = None,
    features: Sequence[str | Extractor] | None = None,
    metrics: Sequence[str] | None = None,
    draws: int = 100,
    seed: int = 0,
    device: str = "cpu",
    cache: str | Path | None = None,
    processes: DistributedContext | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compare synthetic volumes with real ones. Nothing is written but the features, if `cache` is given.

    Every set may be any iterable of `Volume`, which is read once, one volume at a time. The diversity (MS-SSIM) looks at pairs,
    and is left out for sets that are not sequences.

    Args:
        real: volumes that the generator was not trained on.
        synthetic: generated volumes.
        train: the volumes that the generator was trained on: for memorisation, and to standardise features.
        reconstructed: `real`, in the same order, after the generator's autoencoder: the limit of a latent model.
        latents: features in which copies are looked for, and nothing else, such as `LatentFeatures` of that autoencoder.
        findings: what is known of the real volumes and of the reports that were prompts, see `read_findings`.
        counterfactual: volumes with the ids and the noise of synthetic ones that were asked for another class or report.
        embeddings: of reports and volumes by a text-image model, see `read_embeddings`.
        features: names as for `load_extractor`, or extractors. Default: `taps` if its package is installed, `radiomics` and
            `random`.
        metrics: of METRICS; default: all for which everything is there.
        draws: random splits for floors and intervals.
        seed: of the splits.
        device: of the networks that are loaded by name.
        cache: folder in which features are kept by content, so that an interrupted evaluation continues. Without it the
            Fréchet distance of slices, which reads those of the slices there, is left out.
        processes: that share the volumes of a `VolumeSet`.
        progress: whether progress bars are shown.

    Raises:
        ConfigError: a feature or metric is unknown, or its package, its file or the training set is missing.
        DataError: a volume is constant, not finite or of another grid; a set has one volume; a real volume or its patient is in
            the training set; the sets have different sequences.
        CheckpointError: a weight file is damaged or of another architecture.
    """
    asked = counterfactual is not None or embeddings is not None
    wanted = check_metrics(metrics, has_train=train is not None, for_condition=asked)
    if draws < 2:
        raise ConfigError(f"draws must be at least 2, got {draws}", field="draws", fix="use 100")
    extractors = load_extractors(features, device=device)
    everywhere = [*extractors, ImageFeatures(), *([FociFeatures()] if "condition" in wanted else [])]
    everywhere += [latents] if latents is not None and "memorisation" in wanted else []
    segmenters = _segmenters(wanted, device, required=metrics is not None)
    collected = [*everywhere, *segmenters]
    processes = processes or DistributedContext.alone()
    store = None if cache is None else FeatureCache(cache)
    tables: dict[str, dict[str, FeatureTable]] = {}
    grid = None
    sets = {
        "real": real, "synthetic": synthetic, "train": train, "reconstructed": reconstructed, "counterfactual": counterfactual,
    }  # fmt: skip
    for kind, volumes in sets.items():
        if volumes is not None:
            needed = everywhere if kind in ("train", "counterfactual") else [*everywhere, *segmenters]
            tables[kind], grid = collect(
                volumes, needed, name=_name(volumes, kind), grid=grid, cache=store, processes=processes, progress=progress
            )  # fmt: skip
            if kind == "real" and not _segmenters_apply(tables[kind]):
                logger.warning("the segmenter fails on the real volumes: the anatomy of the others is not looked at")
                segmenters = []
    _check_tables(tables)
    assert grid is not None
    smallest = min(len(table) for kind in ("real", "train") for table in tables.get(kind, {}).values())
    if "memorisation" in wanted and metrics is None and smallest < _FEWEST_FOR_COPIES:
        logger.warning("copies are not looked for: that needs %d real and training volumes", _FEWEST_FOR_COPIES)
        wanted.discard("memorisation")
    protocol = make_protocol(collected, grid, wanted, draws, seed, {kind: sets[kind] for kind in tables})
    about = {
        space: {name: each.identity.get(name) for name in ("weights_sha256", "preprocessing")}
        for each in collected
        for space in each.spaces
    }
    rows: list[Row] = []
    per_case: list[dict[str, Any]] = []
    for sequence in tables["real"]:
        of_sequence = Sets(*(tables[kind].get(sequence) if kind in tables else None for kind in sets))  # type: ignore[arg-type]
        judging = [space for each in extractors for space in each.spaces if space in of_sequence.real.spaces]
        found, cases = _evaluate_sequence(of_sequence, judging, about, wanted, findings, Draws(draws, seed))
        if "condition" in wanted and sequence == next(iter(tables["real"])):
            found += retrieval_rows(of_sequence, embeddings)
        rows += found
        per_case += cases
        for each in extractors:
            if "fd" in wanted and store is not None and isinstance(each, SliceExtractor) and serves(each, sequence):
                rows += slice_rows(of_sequence, each, store, Draws(draws, seed), about[next(iter(each.spaces))])
        digests = of_sequence.real.digests
        words = ["shared_volumes"] if set(digests) & set(of_sequence.synthetic.digests) else []
        words += ["repeated_volumes"] if len(set(digests)) < len(digests) else []
        if "msssim" in wanted and isinstance(real, Sequence) and isinstance(synthetic, Sequence):
            pair = (_of_sequence(real, sequence), _of_sequence(synthetic, sequence))
            rows += diversity_row(
                *pair, of_sequence, shape=grid.shape, seed=seed, cache=cache, processes=processes, progress=progress
            )
        rows = [replace(row, guards=(*row.guards, *words)) if row.sequence == sequence else row for row in rows]
    from ccella_fast.environment import describe_environment

    return Evaluation(rows, per_case, protocol, describe_environment(), getattr(synthetic, "generator", None) or {})


def default_features() -> list[str]:
    """The features that need no file of the user's."""
    from ccella_fast.evaluation.features.taps import is_installed

    return [*(["taps"] if is_installed() else []), "radiomics", "random"]


def check_metrics(names: Sequence[str] | None, *, has_train: bool, for_condition: bool = False) -> set[str]:
    """The metrics that are wanted.

    Args:
        names: of METRICS; None for all.
        has_train: whether there is a training set.
        for_condition: whether something is given that only the metric `condition` reads.

    Raises:
        ConfigError: a name is unknown, memorisation lacks the training set, or what is given for a metric is not read.
    """
    for name in names or ():
        if name not in METRICS:
            raise ConfigError(
                f"there is no metric '{name!s:.40}'", field="metrics", fix=did_you_mean(str(name), METRICS)
            )
    if names and "memorisation" in names and not has_train:
        why = "memorisation is the distance to the training set, and none was given"
        raise ConfigError(why, field="train", fix="add --train with the volumes that the generator was trained on")
    if names and for_condition and "condition" not in names:
        why = "pairs of the same noise and embeddings are judged with the metric 'condition', which is not wanted"
        raise ConfigError(why, field="metrics", fix="add condition to --metrics")
    return set(names or METRICS) - (set() if has_train else {"memorisation"})


def make_protocol(
    extractors: Sequence[Extractor],
    grid: CommonGrid,
    wanted: set[str],
    draws: int,
    seed: int,
    sets: dict[str, Iterable[Volume] | None],
) -> dict[str, Any]:
    """Everything that the numbers depend on besides the volumes: weights, inputs, grid, rule of n, draws, scaling."""
    return {
        **FORMAT,
        "metrics": sorted(wanted),
        "features": [{"spaces": each.spaces, "identity": each.identity} for each in extractors],
        "grid": {"shape": list(grid.shape), "spacing_mm": [float(f"{length:.6g}") for length in grid.spacing]},
        "intensities": {kind: getattr(volumes, "scaling", "as given") for kind, volumes in sets.items()},
        "n": _N_RULE,
        "draws": draws,
        "seed": seed,
        "standardised_by": "train" if "train" in sets else "real",
    }


def _evaluate_sequence(
    sets: Sets,
    judging: list[str],
    about: dict[str, dict[str, Any]],
    wanted: set[str],
    findings: CaseFindings | None,
    draws: Draws,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of one sequence and the records of its volumes. judging: the feature spaces in which distances are measured."""
    rows: list[Row] = []
    cases = _cases(sets)
    headline = next((space for space in (*_HEADLINES, *judging) if space in judging), None)
    for space in judging:
        rows += rows_of.feature_rows(sets, space, wanted, draws, about[space])
    nearest: dict[str, list[dict[str, Any]]] = {}
    for space in (*judging, SMALL_IMAGES, LATENT) if "memorisation" in wanted else ():
        if space in sets.real.spaces:
            found, nearest[space] = rows_of.memorisation_rows(sets, space, draws, about[space])
            rows += found
            rows += own_study_row(sets, space, about[space]) if space in judging else []
    if nearest:
        _add(
            cases,
            "synthetic",
            _first_copies([nearest[space] for space in sorted(nearest, key=lambda s: s != headline)]),
        )
    if "condition" in wanted:
        read = {space: about[space] for space in (*judging, *FociFeatures.spaces)}
        rows += condition_rows(sets, read, findings, draws)
        rows += counterfactual_rows(sets, read, findings, draws)
    rows += rows_of.image_rows(sets, wanted, draws)
    if "anatomy" in wanted and "gland" in sets.real.spaces:
        rows += rows_of.anatomy_rows(sets)
        segmented = {
            kind: table
            for kind, table in (("real", sets.real), ("synthetic", sets.synthetic))
            if "gland" in table.spaces
        }
        rows += gland_volume_row(sets, findings, draws) if "condition" in wanted and "synthetic" in segmented else []
        for kind, table in segmented.items():
            _add(cases, kind, [{"volume_cc": float(row[0])} for row in table.spaces["gland"]])
    return rows, cases


def _cases(sets: Sets) -> list[dict[str, Any]]:
    """A record of each real and each synthetic volume."""
    return [
        {"id": case_name(kind, row), "set": kind, "sequence": table.sequence, "pirads": table.classes[row]}
        for kind, table in (("real", sets.real), ("synthetic", sets.synthetic))
        for row in range(len(table))
    ]


def _add(cases: list[dict[str, Any]], kind: str, found: Sequence[dict[str, Any]]) -> None:
    """Add facts to the records of a set, which are in the same order."""
    for case, facts in zip((case for case in cases if case["set"] == kind), found, strict=True):
        case.update(facts)


def _first_copies(nearest: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each synthetic volume its record of the first space in which it is a copy, or else of the first space."""
    return [
        next((each for each in of_spaces if each["copy"]), of_spaces[0]) for of_spaces in zip(*nearest, strict=True)
    ]


def _segmenters(wanted: set[str], device: str, *, required: bool) -> list[GlandFeatures]:
    """The segmenter as an extractor, if anatomy is wanted and its package is installed."""
    from ccella_fast.evaluation.features.taps import GlandSegmenter, is_installed

    if "anatomy" not in wanted or not (required or is_installed()):
        return []
    segmenter = GlandSegmenter(device=device)
    return [GlandFeatures(segmenter.segment, segmenter.identity, segmenter.sequences)]


def _segmenters_apply(real: dict[str, FeatureTable]) -> bool:
    """Whether the glands of the real volumes are found, so that those of other volumes can be compared with them."""
    return all(is_applicable(glands(table.spaces["gland"])) for table in real.values() if "gland" in table.spaces)


def load_extractors(
    features: Sequence[str | Extractor] | None, *, device: str = "cpu", allow_unknown_weights: bool = False
) -> list[Extractor]:
    """The extractors, by name or as they are."""
    extractors = [
        load_extractor(each, device=device, allow_unknown_weights=allow_unknown_weights)
        if isinstance(each, str)
        else each
        for each in features or default_features()
    ]
    names = [space for each in extractors for space in each.spaces]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        why = f"the features '{twice[0]}' are given twice"
        raise ConfigError(why, field="features", fix="give each once")
    return extractors


def _check_tables(tables: dict[str, dict[str, FeatureTable]]) -> None:
    """Check what only all sets together show: their sequences, sizes, and that no test case was trained on."""
    real = tables["real"]
    for kind, of_sequence in tables.items():
        if not of_sequence:
            why = f"the {kind} set has no volumes; at least 2 are needed"
            raise DataError(why, field=kind, fix="give volumes")
        check_sequences(set(real), set(of_sequence), kind)
        for sequence, table in of_sequence.items():
            check_size(len(table), sequence, kind, table.name)
    for sequence, table in real.items():
        if "reconstructed" in tables and tables["reconstructed"][sequence].ids != table.ids:
            why = "the reconstructed volumes are not those of the real set, in its order"
            raise DataError(why, field="reconstructed", fix="reconstruct every real volume")
        if "train" in tables:
            _check_leakage(table, tables["train"][sequence])


def check_sequences(real: set[str], other: set[str], kind: str) -> None:
    """Raise DataError unless the set `kind` has the sequences of the real set."""
    if other != real:
        names = [" and ".join(sorted(each)) or "none" for each in (real, other)]
        why = f"the sequences do not match: the real set has {names[0]}, the {kind} set {names[1]}"
        raise DataError(why, field=kind, fix="give sets of the same sequences, or choose those of all with --sequences")


def check_size(count: int, sequence: str, kind: str, name: str) -> None:
    """Raise DataError for a set of one volume, of which nothing can be computed."""
    if count < 2:
        why = f"the {kind} set '{name}' has {counted(count, 'volume')} of {sequence}; at least 2 are needed"
        raise DataError(why, field=kind, fix="give more volumes, or leave this sequence out with --sequences")


def _check_leakage(real: FeatureTable, train: FeatureTable) -> None:
    """Raise DataError if a real volume, or another one of its patient, is in the training set."""
    known = dict(zip(train.digests, train.ids, strict=True))
    copies = [(case, known[digest]) for case, digest in zip(real.ids, real.digests, strict=True) if digest in known]
    trained = dict(zip(train.patients, train.ids, strict=True))
    shared = [
        (case, trained[patient])
        for case, patient in zip(real.ids, real.patients, strict=True)
        if patient is not None and patient in trained
    ]
    for pairs, what in ((copies, "has the same voxels as"), (shared, "is of the same patient as")):
        if pairs:
            (case, other), more = pairs[0], len(pairs) - 1
            others = f" ({counted(more, 'further case', 'further cases')} likewise)" if more else ""
            why = f"the test case '{case}' {what} the training case '{other}'{others}"
            raise DataError(
                why, field="real", fix="compare with cases that the generator has not seen, such as prepared:test"
            )


def _name(volumes: Iterable[Volume], kind: str) -> str:
    return volumes.name if isinstance(volumes, VolumeSet) else kind


def _of_sequence(volumes: Sequence[Volume], sequence: str) -> Sequence[Volume]:
    if isinstance(volumes, VolumeSet):
        return volumes.of_sequence(sequence)
    return [volume for volume in volumes if volume.sequence == sequence]
