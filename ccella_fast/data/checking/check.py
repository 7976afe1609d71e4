"""`ccella-fast check`: everything that can be wrong with a data set, in one pass, before hours are spent on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ccella_fast.config import Config
from ccella_fast.data.checking.classes import without_classes
from ccella_fast.data.checking.findings import (
    MEANING,
    Finding,
    check_allowed_names,
    format_findings,
    in_order,
    stopping,
)
from ccella_fast.data.checking.overview import check_facts
from ccella_fast.data.checking.page import render_page
from ccella_fast.data.checking.series import SeriesResult, SeriesTask, examine_series
from ccella_fast.data.checking.signature import decode_signature
from ccella_fast.data.checking.study_facts import StudyFacts, facts_of_manifest, facts_of_studies
from ccella_fast.data.checking.tables import check_table
from ccella_fast.data.checking.text import check_reports
from ccella_fast.data.manifest import NAME, Manifest, load_manifest
from ccella_fast.data.preparation.images import ImageTask, bytes_needed
from ccella_fast.data.preparation.prepare import bytes_to_prepare, check_one_form, missing_series
from ccella_fast.data.preparation.stage_cache import StageCache
from ccella_fast.data.preparation.stages import ImportedLatentStage, ImportedTextStage
from ccella_fast.data.preparation.worker_pool import WorkerPool, count_workers
from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.data.readers.study import Defects, Study
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.hardware import free_memory
from ccella_fast.quantities import counted, format_bytes
from ccella_fast.storage import atomic_path, check_writable, existing_parent, write_json
from ccella_fast.training.dry_run import checkpoint_bytes, state_bytes


class Checked(NamedTuple):
    """The result of a check.

    Attributes:
        findings: The worst first.
        facts: What is known of the studies.
        needs: What preparing and training take, as (name, text).
    """

    findings: list[Finding]
    facts: list[StudyFacts]
    needs: list[tuple[str, str]]


def check(
    data: str | Path,
    config: Config,
    *,
    csv: str | Path | None = None,
    test_data: str | Path | None = None,
    data_base_dir: str | Path | None = None,
    embedding_base_dir: str | Path | None = None,
    follow_links: bool = False,
    b_value: float | None = None,
    out: str | Path | None = None,
    allow: Sequence[str] = (),
    headers_only: bool = False,
    workers: int | None = None,
) -> int:
    """Check a data set, print what was found and, with `out`, write it to `check.json` and `check.html` there.

    Args:
        data: Folder of studies, JSON list of studies, or prepared folder.
        config: The configuration that the data is to be prepared and trained with.
        csv: Splits, classes and reports of the studies of a folder.
        test_data: JSON list of the test split.
        data_base_dir: Folder that the image paths of a list are relative to.
        embedding_base_dir: Folder of the latents and text features that the reference implementation prepared.
        follow_links: Whether series may be links to files or folders outside the data folder.
        b_value: Which image to read of a diffusion series that holds several, in s/mm2; None reads that of the highest.
        out: Folder for check.json and check.html; None writes nothing.
        allow: Names of findings that do not count.
        headers_only: Whether only the headers of images are read. Damaged voxels and copies are not found then.
        workers: Number of processes that read images; None chooses it.

    Returns:
        The exit code: 0, or that of a DataError if something has to be corrected or allowed.

    Raises:
        ConfigError: If `allow` has an unknown name.
        DataError: If `data` does not exist.
        DiskError: If `out` cannot be written.
    """
    check_allowed_names(allow)
    data = Path(data)
    if not data.exists():
        raise DataError("there is no such file or folder", path=data, fix="check --data")
    if out is not None:
        check_writable(out, "--out")
    if (data / NAME).is_file():
        checked = check_prepared(data, config)
    else:
        lists = {
            "csv_file": csv,
            "test_data": test_data,
            "data_base_dir": data_base_dir,
            "embedding_base_dir": embedding_base_dir,
            "follow_links": follow_links,
        }
        checked = check_studies(data, config, lists, b_value=b_value, headers_only=headers_only, workers=workers)
    failed = [finding for finding in checked.findings if finding.severity == "error"]
    failed += stopping(checked.findings, allow)
    _print(checked, len(failed))
    if out is not None:
        _write(Path(out), data, checked, allow)
    return DataError.exit_code if failed else 0


def check_studies(
    data: Path,
    config: Config,
    lists: dict[str, Any],
    *,
    b_value: float | None = None,
    headers_only: bool,
    workers: int | None,
) -> Checked:
    """Check a folder or list of studies.

    Args:
        data: The folder or list.
        config: The configuration.
        lists: Further arguments of `find_studies`.
        b_value: Which image to read of a diffusion series that holds several.
        headers_only: Whether voxels are left alone.
        workers: Number of processes.
    """
    defects = Defects()
    findings = list(_config_defects(config))
    try:
        studies = find_studies(data, **lists, defects=defects)
    except DataError as defect:  # there is nothing to read
        defects.found += [defect] if defect not in defects.found else []
        studies = []
    findings += [Finding.of_error(defect) for defect in defects.found]
    if not defects.found:
        findings += check_table(studies, data, lists["csv_file"] and Path(lists["csv_file"]))
    facts = facts_of_studies(studies)
    with_latents = [study for study in studies if all(name in study.latent_files for name in config.data.sequences)]
    with_features = [study for study in studies if study.text_file is not None]
    try:
        check_one_form(studies, with_latents, with_features, None)
    except DataError as defect:
        findings.append(Finding.of_error(defect))
    findings += _imported_defects(with_latents, with_features, config)
    if len(with_latents) < len(studies):
        tasks = _series_tasks(studies, config, b_value=b_value, headers_only=headers_only)
        facts, found = _examine_images(studies, facts, tasks, config, workers=workers)
        findings += found
    about_facts = check_facts(facts, config) if facts else []
    in_table = any(
        Path(defect.path).suffix.lower() in (".csv", ".tsv", ".json") for defect in defects.found if defect.path
    )
    findings += without_classes(about_facts) if in_table else about_facts
    findings += check_reports(studies, config)
    needs, found = estimate_needs(config, data, len(studies), prepared=False)
    return Checked(in_order([*findings, *found]), facts, needs)


def check_prepared(data: Path, config: Config) -> Checked:
    """Check a prepared folder: the hash of every file that the manifest lists, and what training would stop at."""
    findings = list(_config_defects(config))
    try:
        manifest = load_manifest(data)
    except DataError as defect:
        return Checked([*findings, Finding.of_error(defect)], [], [])
    for case in tqdm(manifest.cases, desc="checking files", unit="study", mininterval=1):
        for key in case.files:
            try:
                manifest.array(case, key, verify=True)
            except DataError as defect:
                findings.append(Finding.of_error(defect, case.id))
    findings += _other_settings(manifest, config)
    if manifest.truncated_reports:
        why = f"reports that lose their beginning, because the encoder reads fewer tokens: {len(manifest.truncated_reports)}"
        fix = "raise text.max_length, or shorten them"
        findings.append(Finding("truncated_reports", "warning", why, fix, tuple(manifest.truncated_reports)))
    facts = facts_of_manifest(manifest)
    needs, found = estimate_needs(config, data, len(manifest.cases), prepared=True)
    return Checked(in_order([*findings, *check_facts(facts, config), *found]), facts, needs)


def _config_defects(config: Config) -> Iterator[Finding]:
    try:
        config.check_grid()
    except ConfigError as error:
        yield Finding.of_error(error)


def _other_settings(manifest: Manifest, config: Config) -> Iterator[Finding]:
    for field in ("sequences", "spacing", "dim"):
        prepared, configured = getattr(manifest.data, field), getattr(config.data, field)
        if prepared != configured:
            why = f"this folder was prepared with data.{field} {prepared}, but {configured} is configured"
            fix = "give the configuration that it was prepared with"
            yield Finding("other_settings", "warning", why, fix, (), str(manifest.folder), f"data.{field}")


def _imported_defects(with_latents: list[Study], with_features: list[Study], config: Config) -> list[Finding]:
    """Defects of the latents and text features that the reference implementation prepared."""
    nowhere = StageCache(Path())  # stages only read here
    found = ImportedTextStage(nowhere, with_features, config).check(with_features)
    found += ImportedLatentStage(nowhere, with_latents, config).check(with_latents)
    return [Finding.of_error(defect) for defect in found]


def _series_tasks(
    studies: list[Study], config: Config, *, b_value: float | None, headers_only: bool
) -> list[SeriesTask]:
    """The files to read; those that are missing are findings of `missing_series`."""
    tasks = []
    for study in studies:
        files: dict[str, Path] = {
            name: study.files[name]
            for name in config.data.sequences
            if name in study.files and study.files[name].exists()
        }
        tasks.append(SeriesTask(study.id, files, config.data, headers_only, b_value))
    return tasks


def _examine_images(
    studies: list[Study], facts: list[StudyFacts], tasks: list[SeriesTask], config: Config, *, workers: int | None
) -> tuple[list[StudyFacts], list[Finding]]:
    """The facts with those of the series, and what is wrong with the series."""
    findings = [Finding.of_error(defect) for defect in missing_series(studies, config.data.sequences).found]
    bytes_each = bytes_needed(ImageTask("", {}, config.data, Path()))
    complete, notes = list(facts), list[Finding]()
    with (
        WorkerPool(workers) as pool,
        tqdm(total=len(tasks), desc="checking images", unit="study", mininterval=1) as bar,
    ):
        for done in pool.run(examine_series, tasks, [task.id for task in tasks], bytes_each=bytes_each):
            bar.update()
            study = studies[done.task].id
            if isinstance(done.result, DataError):
                findings.append(Finding.of_error(done.result, study))
                continue
            complete[done.task] = _with_series(facts[done.task], done.result)
            findings += [Finding.of_error(defect, study) for defect in done.result.defects]
            notes += [Finding("note", "warning", note, "", (study,), path) for path, note in done.result.notes]
    order = {study.id: number for number, study in enumerate(studies)}  # whichever process was first
    by_study = sorted(
        [*findings, *notes], key=lambda finding: order.get(finding.studies[0], -1) if finding.studies else -1
    )
    return complete, by_study


def _with_series(facts: StudyFacts, result: SeriesResult) -> StudyFacts:
    images = {name: each.voxels_sha256 for name, each in result.series.items() if each.voxels_sha256}
    signature = None if result.signature is None else decode_signature(result.signature)
    return facts._replace(series=result.series, images=images, signature=signature)


def estimate_needs(
    config: Config, data: Path, studies: int, *, prepared: bool
) -> tuple[list[tuple[str, str]], list[Finding]]:
    """Memory and disk space that preparing and training take, and what this machine does not have.

    Args:
        config: The configuration.
        data: The data set; free space is that of its disk.
        studies: Number of studies.
        prepared: Whether the studies are prepared already.
    """
    import torch

    from ccella_fast.models import build_model
    from ccella_fast.models.parts import select_trained

    with torch.device("meta"):
        model = build_model(config)
    select_trained(model, config)
    parameters, states = sum(p.numel() for p in model.parameters()), sum(state_bytes(config, 1, model).values())
    one, memory = bytes_needed(ImageTask("", {}, config.data, Path())), free_memory()
    disk = shutil.disk_usage(existing_parent(data)).free
    checkpoints = config.training.checkpoints_total_limit + 1
    space = 0 if prepared else bytes_to_prepare(config, studies)
    run = checkpoint_bytes(config, model)
    processes = counted(count_workers(max(1, studies), one), "process", "processes")
    needs = [
        ("preparing: disk", "done" if prepared else f"{format_bytes(space)} for images and text features"),
        ("preparing: memory", f"{format_bytes(one)} per process, {processes} here"),
        ("training: memory",
         f"{format_bytes(states)} for weights, gradients and optimizer; {parameters:,} parameters, and activations"),
        ("training: disk",
         f"{format_bytes(run)} per checkpoint, at most {checkpoints} checkpoints, and the autoencoder in each"),
        ("this machine", f"{format_bytes(memory)} of memory and {format_bytes(disk)} of disk space are free"),
    ]  # fmt: skip
    found = []
    if space + checkpoints * run > disk:
        needed = format_bytes(space + checkpoints * run)
        why = f"about {needed} of disk space are needed, but {format_bytes(disk)} are free next to the data"
        found.append(Finding("disk_space", "warning", why, "free space, or write to another disk"))
    if max(one, states) > memory and not torch.cuda.is_available():
        why = f"about {format_bytes(max(one, states))} of memory are needed, but {format_bytes(memory)} are free"
        found.append(Finding("memory", "warning", why, "train on a GPU, with ZeRO or a smaller model"))
    return needs, found


def _print(checked: Checked, failed: int) -> None:
    if checked.findings:
        print(format_findings(checked.findings))
    for name, text in checked.needs:
        print(f"{'needs':<8} {name}: {text}")
    count = len(checked.facts)
    ending = "nothing has to be corrected" if not failed else f"findings that have to be corrected or allowed: {failed}"
    print(f"studies checked: {count}; {ending}")


def _write(out: Path, data: Path, checked: Checked, allow: Sequence[str]) -> None:
    counts = {severity: sum(each.severity == severity for each in checked.findings) for severity in MEANING}
    facts = {
        "format": "ccella_fast.check",
        "version": 1,
        "data": str(data),
        "studies": len(checked.facts),
        "allowed": list(allow),
        "counts": counts,
        "needs": dict(checked.needs),
        "findings": [finding.as_json() for finding in checked.findings],
    }
    write_json(out / "check.json", facts)
    with atomic_path(out / "check.html") as temporary:
        temporary.write_text(render_page(data, len(checked.facts), checked.findings, checked.needs, allow), "utf-8")
    print(f"written: {out / 'check.json'} and {out / 'check.html'}")
