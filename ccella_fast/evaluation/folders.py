"""`ccella-fast evaluate` and `ccella-fast sensitivity`: folders in, a folder out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ccella_fast.errors import ConfigError, DataError
from ccella_fast.evaluation.collecting import CommonGrid
from ccella_fast.evaluation.counterfactuals import pair_samples
from ccella_fast.evaluation.examples import keep_examples
from ccella_fast.evaluation.features.cache import FeatureCache
from ccella_fast.evaluation.features.extractor import serves
from ccella_fast.evaluation.findings import read_findings
from ccella_fast.evaluation.reconstruction import LatentFeatures, reconstructions
from ccella_fast.evaluation.results import FORMAT, SENSITIVITY, Evaluation, plain_values
from ccella_fast.evaluation.retrieval import read_embeddings
from ccella_fast.evaluation.run import check_metrics, check_sequences, check_size, evaluate, load_extractors
from ccella_fast.evaluation.sensitivity import Gate, sensitivity_gate
from ccella_fast.evaluation.volumes import Volume, VolumeSet, open_volumes
from ccella_fast.folder_kinds import check_output, folder_kind
from ccella_fast.folder_lock import lock_folder
from ccella_fast.processes import DistributedContext, resolve_device
from ccella_fast.progress import refresh_interval
from ccella_fast.storage import check_writable, remove_partial_files, write_json

if TYPE_CHECKING:
    from ccella_fast.evaluation.features.extractor import Extractor

logger = logging.getLogger("ccella_fast")


def evaluate_to_folder(
    real: str | Path,
    synthetic: str | Path,
    out: str | Path,
    *,
    train: str | Path | None = None,
    vae: str | Path | None = None,
    findings: str | Path | None = None,
    counterfactual: str | Path | None = None,
    embeddings: str | Path | None = None,
    features: Sequence[str] | None = None,
    allow_unknown_weights: bool = False,
    metrics: Sequence[str] | None = None,
    sequences: Sequence[str] | None = None,
    draws: int = 100,
    seed: int = 0,
    cache: str | Path | None = None,
    device: str | None = None,
) -> Evaluation:
    """`evaluate` for folders. Writes metrics.json, protocol.json and some volumes to `out`.

    Under torchrun the processes share the volumes, and the numbers do not depend on how many they are.

    Args:
        real: a folder as for `open_volumes`, of volumes that the generator was not trained on.
        synthetic: a folder of generated volumes.
        out: the folder for the results, created if it does not exist.
        train: a folder of the volumes that the generator was trained on.
        vae: the generator's autoencoder, for the limit that it sets; `real` must be a prepared folder with its latents.
        findings: a table of the real cases and of the prompts, as for `read_findings`; prompts have the names in samples.csv.
        counterfactual: a folder of samples with the seeds and settings of `synthetic` and another class or report.
        embeddings: a file as for `read_embeddings`, of the reports and samples that samples.csv names.
        features: names as for `load_extractor`; default: those that need no file.
        allow_unknown_weights: as for `load_extractor`.
        metrics: of METRICS; default: all for which everything is there.
        sequences: those that are compared; default: all, which all sets must have.
        draws: random splits for floors and intervals.
        seed: of the splits.
        cache: folder in which features are kept by content, and which several evaluations may share; default: `out`/features.
        device: of the networks; default: the GPU of this process, or the CPU if there is no GPU.

    Raises:
        ConfigError: as for `evaluate`; another command writes to `out`, or it is the folder of something else.
        DataError: as for `evaluate`; a folder is empty or of the wrong kind.
        CheckpointError: as for `evaluate`; the autoencoder is missing, damaged, or not that of the latents.
        DiskError: `out` or `cache` cannot be written.
    """
    out = Path(out)
    cache = out / "features" if cache is None else Path(cache)
    asked = counterfactual is not None or embeddings is not None
    check_metrics(metrics, has_train=train is not None, for_condition=asked)
    check_writable(out, "--out")
    check_writable(cache, "--cache")
    check_output(out, "an evaluation", field="--out")
    given = {"real": real, "synthetic": synthetic} | ({} if train is None else {"train": train})
    sets = {kind: _choose(open_volumes(path, field=f"--{kind}"), sequences) for kind, path in given.items()}
    if counterfactual is not None:
        others = _choose(open_volumes(counterfactual, field="--counterfactual"), sequences)
        sets["counterfactual"] = pair_samples(sets["synthetic"], others, field="--counterfactual")
    for volumes in sets.values():
        _check_outside(out, volumes)
    _check_first(sets)
    vectors = None if embeddings is None else read_embeddings(embeddings)
    if vectors is not None:  # before long work
        vectors.of_pairs({source.id: source.prompt for source in sets["synthetic"].sources}, "synthetic")
    known = None if findings is None else read_findings(findings)
    if known is not None and not any(known.describes(source.id) for source in sets["real"].sources):
        logger.warning("%s states nothing of any real case: its column case needs their ids", findings)
    latents = None
    processes = DistributedContext()
    on = str(processes.select_device(device))
    if vae is not None:
        sets["reconstructed"] = reconstructions(sets["real"], vae, device=on)
        latents = LatentFeatures(vae, device=on)
    extractors = load_extractors(features, device=on, allow_unknown_weights=allow_unknown_weights)
    with processes.lock_folder(out, "ccella-fast evaluate"):
        if processes.rank == 0:
            remove_partial_files(out)
        processes.barrier()
        result = evaluate(
            **sets, latents=latents, findings=known, embeddings=vectors, features=extractors, metrics=metrics, draws=draws,
            seed=seed, device=on, cache=cache, processes=processes, progress=True,
        )  # fmt: skip
        if processes.rank == 0:
            result.write_protocol(out)
            keep_examples(out, sets, result.per_case)
            result.write(out)
        processes.barrier()
    return result


def sensitivity_to_folder(
    real: str | Path,
    out: str | Path,
    *,
    features: Sequence[str | Extractor] | None = None,
    allow_unknown_weights: bool = False,
    num_volumes: int = 8,
    seed: int = 0,
    device: str | None = None,
) -> list[Gate]:
    """Degrade real volumes in known ways and write to `out`/sensitivity.json which feature spaces order them.

    It belongs before an evaluation, into the same folder: a space that does not order blur, noise and size cannot judge.

    Args:
        real: a folder as for `open_volumes`. T2 volumes are used, or those of the first sequence if there are none.
        out: the folder for the results; features are kept in `out`/features.
        features: as for `evaluate`.
        allow_unknown_weights: as for `load_extractor`.
        num_volumes: how many, from all over the set. Each is degraded in eight ways.
        seed: of the random halves.
        device: of the networks; default: the GPU, or the CPU if there is no GPU.

    Raises:
        ConfigError: a feature is unknown, or `out` is the folder of something else or locked.
        DataError: there are fewer than three volumes or two patients, or a folder or volume cannot be used.
        DiskError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out, "--out")
    check_output(out, "an evaluation", field="--out")
    volumes = open_volumes(real, field="--real")
    _check_outside(out, volumes)
    volumes = volumes.of_sequence(volumes.sequences[0])
    grid = CommonGrid.of(volumes[0], volumes.name)
    places = np.unique(np.linspace(0, len(volumes) - 1, min(num_volumes, len(volumes))).astype(int))
    on = str(resolve_device(device))
    extractors = load_extractors(features, device=on, allow_unknown_weights=allow_unknown_weights)
    with lock_folder(out, "ccella-fast sensitivity"):
        remove_partial_files(out)
        store = FeatureCache(out / "features")
        gates = []
        for extractor in extractors:
            if serves(extractor, volumes.sequences[0]):
                names = ", ".join(extractor.spaces)
                bar = tqdm(places, desc=f"degrading for {names}", unit="volume", mininterval=refresh_interval())
                chosen = (_on_grid(volumes, int(place), grid) for place in bar)
                gates += sensitivity_gate(chosen, _Cached(extractor, store), seed=seed)
        write_json(out / SENSITIVITY, {**FORMAT, "gates": plain_values(gates)})
    return gates


def _on_grid(volumes: VolumeSet, place: int, grid: CommonGrid) -> Volume:
    volume = volumes[place]
    grid.check(volume, volumes.name, volumes.sources[place].path)
    return volume


class _Cached:
    """An extractor whose features are kept."""

    def __init__(self, extractor: Extractor, store: FeatureCache):
        self.spaces, self.sequences, self.identity = extractor.spaces, extractor.sequences, extractor.identity
        self._features = partial(store.features, extractor)

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        return self._features(volume)


def _choose(volumes: VolumeSet, sequences: Sequence[str] | None) -> VolumeSet:
    """The volumes of the sequences that are wanted."""
    for sequence in sequences or ():
        if sequence not in volumes.sequences:
            why = f"there are no {sequence} volumes in this folder, only {', '.join(volumes.sequences)}"
            raise DataError(why, path=volumes.path, field="--sequences", fix="choose others, or give another folder")
    return volumes if sequences is None else volumes.of_sequences(sequences)


def _check_outside(out: Path, volumes: VolumeSet) -> None:
    """Raise ConfigError if `out` is in a folder of files, whose next reading would take the kept examples for volumes."""
    is_inside = out.resolve().is_relative_to(volumes.path.resolve())
    if is_inside and folder_kind(volumes.path) not in ("prepared", "samples"):
        why = f"this folder is in '{volumes.path}', whose NIfTI files are all taken for volumes"
        raise ConfigError(why, path=out, field="--out", fix="choose a folder elsewhere")


def _check_first(sets: dict[str, VolumeSet]) -> None:
    """Check before long work what the lists and the first volumes show: sequences, sizes and grids."""
    real = sets["real"]
    grid = None
    for kind, volumes in sets.items():
        check_sequences(set(real.sequences), set(volumes.sequences), kind)
        for sequence in real.sequences:
            check_size(len(volumes.of_sequence(sequence)), sequence, kind, volumes.name)
        first = volumes[0]
        grid = grid or CommonGrid.of(first, volumes.name)
        grid.check(first, volumes.name, volumes.sources[0].path)
