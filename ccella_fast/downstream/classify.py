"""`ccella-fast classify`: trains the classifiers of all arms and seeds, and compares the arms."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ccella_fast.downstream.arms import (
    ARMS,
    CONTRASTS,
    GENERATED,
    DrawnCase,
    Source,
    TrainingArm,
    epoch_batches,
    matched_batches,
)
from ccella_fast.downstream.data import (
    GeneratedStudies,
    LabelledCase,
    MeasuredStudies,
    check_labels,
    data_digest,
    read_generated,
    read_real,
    reconstructed,
)
from ccella_fast.downstream.inputs import REFERENCE_SHAPE, Inputs, as_the_reference, on_prepared_grid
from ccella_fast.downstream.networks import Backbone, check_grid
from ccella_fast.downstream.results import RESULTS, Job, JobResult, read_job, write_job, write_results
from ccella_fast.downstream.train import LearningRates, cosine, polynomial, train_classifier
from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.folder_kinds import check_output
from ccella_fast.processes import DistributedContext, HostCollectives
from ccella_fast.run_record import write_run_record
from ccella_fast.storage import check_writable, json_text, read_json, remove_partial_files, write_json

logger = logging.getLogger("ccella_fast")
Protocol = Literal["matched", "reference"]
SETTINGS = "settings.json"
FORMAT = {"format": "ccella_fast.classification", "version": 1}
_EPOCHS = 200  # of the reference
_UPDATES, _BATCH_SIZE = 2000, 16
_LR: dict[Backbone, float] = {"efficientnet-b0": 1e-4, "small": 3e-3}


@dataclass(frozen=True)
class ClassifySettings:
    """What all classifiers of a folder share. Another value of any of these needs another folder.

    Attributes:
        protocol: "matched" or "reference".
        backbone: the network.
        updates: of the protocol matched, else None.
        epochs: of the protocol reference, else None.
        batch_size: studies in a batch.
        lr: of AdamW.
        num_real: how many real training studies are used; None for all.
        validation_fraction: share of the training patients that validate if there is no split val.
        margin: of equivalence, in points of accuracy.
        primary: the contrasts that the experiment is made for, such as rs-rr; the others are exploratory.
        sequence: that is classified.
        real: identity of the real studies.
    """

    protocol: Protocol
    backbone: Backbone
    updates: int | None
    epochs: int | None
    batch_size: int
    lr: float
    num_real: int | None
    validation_fraction: float
    margin: float
    primary: list[str]
    sequence: str
    real: str


@dataclass(frozen=True)
class _Experiment:
    """The settings and the studies."""

    settings: ClassifySettings
    real: MeasuredStudies
    generated: dict[str, list[GeneratedStudies]]  # by option
    reconstructed: list[LabelledCase]

    def jobs(self, arms: Sequence[str], seeds: int) -> list[Job]:
        """A job for each arm, generator and seed."""
        return [
            Job(arm, generator, seed) for seed in range(seeds) for arm in arms for generator in self._generators(arm)
        ]

    def _generators(self, arm: str) -> Sequence[int | None]:
        option = _option(ARMS[arm])
        return [None] if option is None else range(len(self.generated[option]))

    def training_cases(self, job: Job) -> list[list[LabelledCase]]:
        """The studies of each source of the job's arm."""
        return [self._of_source(source, job.generator) for source in ARMS[job.arm].sources]

    def _of_source(self, source: Source, generator: int | None) -> list[LabelledCase]:
        if source not in GENERATED:
            return self.real.train if source == "real" else self.reconstructed
        assert generator is not None
        made = self.generated[GENERATED[source]][generator]
        return made.predicted if source == "predicted" else made.asked

    def identity(self, job: Job) -> str:
        """SHA-256 of all that the predictions of a job depend on."""
        values = [FORMAT, asdict(self.settings), job.arm, job.seed, data_digest(*self.training_cases(job))]
        return hashlib.sha256(json_text(values).encode()).hexdigest()

    def batches(self, job: Job) -> tuple[Iterator[list[DrawnCase]], LearningRates]:
        """The batches of a job and the learning rates."""
        settings, cases = self.settings, self.training_cases(job)
        if settings.updates is not None:
            size, updates = settings.batch_size, settings.updates
            sources = ARMS[job.arm].sources
            batches = matched_batches(sources, cases, batch_size=size, updates=updates, seed=job.seed)
            return batches, cosine(updates)
        assert settings.epochs is not None
        size, epochs = settings.batch_size, settings.epochs
        batches = epoch_batches(cases, batch_size=size, epochs=epochs, seed=job.seed)
        return batches, polynomial(sum(map(len, cases)), size, epochs)

    def counts(self) -> dict[str, Any]:
        """How many studies there are, and how many were left out."""
        splits = {"train": self.real.train, "val": self.real.val, "test": self.real.test}
        counts: dict[str, Any] = {"real": {split: _by_class(cases) for split, cases in splits.items()}}
        counts["real"]["without_class"] = self.real.without_class
        for option, folders in self.generated.items():
            counts[option.removeprefix("--")] = [
                {"name": each.name, **_by_class(each.asked), **each.counts} for each in folders
            ]
        return counts


def classify_to_folder(
    real: str | Path,
    out: str | Path,
    *,
    synthetic: Sequence[str | Path] = (),
    baseline: Sequence[str | Path] = (),
    vae: str | Path | None = None,
    arms: Sequence[str] | None = None,
    seeds: int = 5,
    protocol: Protocol = "matched",
    backbone: Backbone | None = None,
    updates: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    num_real: int | None = None,
    validation_fraction: float = 0.2,
    margin: float = 5.0,
    primary: Sequence[str] = ("rs-rr",),
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Train a classifier for each arm, generator and seed, and compare them on the real test studies.

    Classifiers that an equal command has already trained are kept. Under torchrun the processes share the classifiers, each of
    which trains in one process.

    Args:
        real: prepared folder of measured studies with classes, with the splits train and test and, if wanted, val.
        out: folder for classify.json, table.md and the predictions, created if it does not exist.
        synthetic: prepared folders of generated studies, one for each training seed of the generator.
        baseline: the same for another generator, for the arm rb.
        vae: the generator's autoencoder, for the arm v; `real` must have its latents.
        arms: of ARMS; default: all for which everything is there.
        seeds: number of classifiers for each arm and generator; their seeds are 0, 1, ...
        protocol: "matched", equal updates and equal parts of each source in every batch; or "reference", equal epochs of the
            union, with the settings of the reference implementation.
        backbone: the network; default efficientnet-b0.
        updates: of the weights; default 2000.
        batch_size: default 16.
        lr: of AdamW; default 1e-4, for the small network 3e-3.
        num_real: use only so many of the real training studies.
        validation_fraction: share of the training patients that validate if there is no split val; 0 for none.
        margin: of equivalence, in points of accuracy.
        primary: contrasts that the experiment is made for; their p-values are adjusted for their number.
        device: that trains; default: the GPU of this process, or the CPU if there is no GPU.

    Returns:
        The content of classify.json.

    Raises:
        ConfigError: an argument is invalid or does not fit the protocol; `out` contains something else or classifiers with
            other settings, or another command writes to it.
        DataError: a folder or study cannot be used, see `read_real` and `read_generated`; the classifiers in `out` were trained
            on other studies.
        CheckpointError: the autoencoder is missing or is not that of the latents.
        NonFiniteError: the loss of a training is not finite.
    """
    out = Path(out)
    check_writable(out, "--out")
    check_output(out, "a downstream experiment", field="--out")
    given = {"--synthetic": list(synthetic), "--baseline": list(baseline), "--vae": [] if vae is None else [vae]}
    _check_numbers(seeds, validation_fraction, margin)
    _check_arms(arms, given)
    _check_primary(primary)
    fixed = {"--backbone": backbone, "--updates": updates, "--batch_size": batch_size, "--lr": lr}
    _check_protocol(protocol, fixed)
    studies = read_real(real, validation_fraction=validation_fraction, num_real=num_real)
    generated = {
        option: [read_generated(folder, studies, field=option) for folder in given[option]]
        for option in ("--synthetic", "--baseline")
    }
    arms = _default_arms(given, generated) if arms is None else list(dict.fromkeys(arms))
    _check_generated(arms, generated, given)
    backbone = backbone or "efficientnet-b0"
    settings = ClassifySettings(
        protocol=protocol,
        backbone=backbone,
        updates=(updates or _UPDATES) if protocol == "matched" else None,
        epochs=_EPOCHS if protocol == "reference" else None,
        batch_size=batch_size or _BATCH_SIZE,
        lr=lr or _LR[backbone],
        num_real=num_real,
        validation_fraction=validation_fraction,
        margin=margin,
        primary=list(primary),
        sequence=studies.sequence,
        real=data_digest(studies.train, studies.val, studies.test),
    )
    parts = max(len(ARMS[arm].sources) for arm in arms)
    if protocol == "matched" and settings.batch_size % parts:
        why = f"a batch of {settings.batch_size} cannot have equal parts of two sources"
        raise ConfigError(why, field="--batch_size", fix=f"use {settings.batch_size + 1}")
    check_grid(backbone, studies.manifest.data.dim if protocol == "matched" else REFERENCE_SHAPE)
    processes = DistributedContext()
    device = processes.select_device(device)
    decoded = reconstructed(studies, vae, str(device)) if vae is not None and "v" in arms else []
    experiment = _Experiment(settings, studies, generated, decoded)
    with processes.lock_folder(out, "ccella-fast classify"):
        HostCollectives().together(lambda: _claim(out, settings, first=processes.rank == 0))
        return _run(out, experiment, experiment.jobs(arms, seeds), processes, device)


def _run(
    out: Path, experiment: _Experiment, jobs: list[Job], processes: DistributedContext, device: torch.device
) -> dict[str, Any]:
    """Train what is missing, then write the results."""
    identities = {job: experiment.identity(job) for job in jobs}
    missing = [job for job in jobs if read_job(out, job, identities[job]) is None]
    processes.barrier()  # no process writes before all have looked
    if not missing and (out / RESULTS).is_file():
        content = read_json(out / RESULTS)
        if [row["job"] for row in content["jobs"]] == [job.name for job in jobs]:
            logger.info("the classifiers in %s are complete, nothing to do", out)
            return content
    real, settings = experiment.real, experiment.settings
    evaluated = [*(("val", case) for case in real.val), *(("test", case) for case in real.test)]
    inputs = Inputs(on_prepared_grid if settings.protocol == "matched" else as_the_reference)
    facts = {
        "classifiers": len(jobs),
        "trained": len(missing),
        "device": str(device),
        "processes": processes.world_size,
    }
    with write_run_record(out, "classify", **facts) if processes.rank == 0 else nullcontext():
        own = processes.shard(missing)
        for number, job in enumerate(own, start=1):
            batches, schedule = experiment.batches(job)
            classified = train_classifier(
                batches, schedule, [case for _, case in evaluated], inputs, backbone=settings.backbone, lr=settings.lr,
                seed=job.seed, device=device, name=f"{job.name} ({number} of {len(own)})",
            )  # fmt: skip
            sources = zip(ARMS[job.arm].sources, experiment.training_cases(job), strict=True)
            n_train = [{"source": source, **_by_class(cases)} for source, cases in sources]
            write_job(
                out, job, identities[job], n_train, schedule.updates, classified.loss, evaluated, classified.p_positive
            )  # fmt: skip
            logger.info("%s: loss %.4f (%d of %d)", job.name, classified.loss, number, len(own))
        processes.barrier()
        results: dict[Job, JobResult] = {}
        for job in jobs:
            result = read_job(out, job, identities[job])
            assert result is not None, job.name
            results[job] = result
        content = {}
        if processes.rank == 0:
            content = write_results(out, asdict(settings), experiment.counts(), results, real.val, real.test)
    return HostCollectives().from_rank_zero(content)


def _claim(out: Path, settings: ClassifySettings, *, first: bool) -> None:
    """Write the settings into a new folder, or raise ConfigError if an earlier command had others."""
    if not first:
        return
    remove_partial_files(out)
    path, wanted = out / SETTINGS, asdict(settings)
    if not path.exists():
        write_json(path, {**FORMAT, "settings": wanted}, sealed=True)
        return
    earlier = read_json(path).get("settings", {})
    for name, value in wanted.items():
        if earlier.get(name) != value:
            what = "other real studies" if name == "real" else f"{name} {earlier.get(name)!s:.40}, not {value!s:.40}"
            why = f"the classifiers in this folder were trained with {what}"
            raise ConfigError(why, path=path, field=f"--{name}", fix="give the same value, or choose another --out")


def _option(arm: TrainingArm) -> str | None:
    """The option that gives the generated studies of an arm; None for an arm without them."""
    return next((GENERATED[source] for source in arm.sources if source in GENERATED), None)


def _needed(arm: str) -> str | None:
    """The option that an arm needs besides --real."""
    return "--vae" if "reconstructed" in ARMS[arm].sources else _option(ARMS[arm])


def _default_arms(given: dict[str, list[str | Path]], generated: dict[str, list[GeneratedStudies]]) -> list[str]:
    predicted = all(not each.counts["without_predicted"] for each in generated["--synthetic"])
    possible = [arm for arm in ARMS if (needed := _needed(arm)) is None or given[needed]]
    return [arm for arm in possible if predicted or "predicted" not in ARMS[arm].sources]


def _check_numbers(seeds: int, validation_fraction: float, margin: float) -> None:
    bounds = {
        "--seeds": (seeds, seeds >= 1, "at least 1"),
        "--validation_fraction": (validation_fraction, 0 <= validation_fraction < 1, "from 0 to below 1"),
        "--margin": (margin, 0 < margin < 100, "above 0 and below 100 points of accuracy"),
    }
    for field, (value, is_valid, bound) in bounds.items():
        if not is_valid:
            raise ConfigError(f"{field} must be {bound}, got {value:g}", field=field, fix="change the value")


def _check_arms(arms: Sequence[str] | None, given: dict[str, list[str | Path]]) -> None:
    for arm in arms or ():
        if arm not in ARMS:
            raise ConfigError(f"there is no arm '{arm!s:.40}'", field="--arms", fix=did_you_mean(str(arm), ARMS))
        if (needed := _needed(arm)) is not None and not given[needed]:
            why = f"the arm {arm} ({ARMS[arm].about}) needs {needed}"
            raise ConfigError(why, field="--arms", fix=f"add {needed}, or leave out the arm {arm}")


def _check_primary(primary: Sequence[str]) -> None:
    known = [f"{first}-{second}" for first, second in CONTRASTS]
    for name in primary:
        if name not in known:
            raise ConfigError(
                f"there is no contrast '{name!s:.40}'", field="--primary", fix=did_you_mean(str(name), known)
            )


def _check_protocol(protocol: str, fixed: dict[str, Any]) -> None:
    for field, value in fixed.items():
        if protocol == "reference" and value is not None:
            why = f"the protocol reference has fixed settings: {field} cannot be chosen"
            raise ConfigError(why, field=field, fix=f"leave out {field}, or use --protocol matched")


def _check_generated(
    arms: Sequence[str], generated: dict[str, list[GeneratedStudies]], given: dict[str, list[str | Path]]
) -> None:
    """Raise DataError if the classes of an arm are not there, and ConfigError if a generator is given twice."""
    for arm in arms:
        if (option := _option(ARMS[arm])) is None:
            continue
        predicted = "predicted" in ARMS[arm].sources
        what, field = ("the predicted class", "class_predicted") if predicted else ("the class", "pirads")
        for folder, each in zip(given[option], generated[option], strict=True):
            cases = each.predicted if predicted else each.asked
            missing = each.counts["without_predicted" if predicted else "without_asked"]
            check_labels(cases, missing, arm, what, path=folder, field=field, partly=not predicted)
    for option, folders in generated.items():
        if len({data_digest(each.asked, each.predicted) for each in folders}) < len(folders):
            why = "two of these folders hold the same studies, and would count as two generators"
            raise ConfigError(why, field=option, fix="give each folder once")


def _by_class(cases: Sequence[LabelledCase]) -> dict[str, int]:
    positive = sum(case.label for case in cases)
    return {"neg": len(cases) - positive, "pos": positive}
