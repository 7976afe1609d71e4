"""`ccella-fast sample`: generates a folder of volumes on one or several processes, and can be interrupted and continued."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ccella_fast.config import Config
from ccella_fast.data.readers.sample_files import read_sample
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.folder_kinds import check_output
from ccella_fast.models.autoencoder import check_autoencoder
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.processes import DistributedContext
from ccella_fast.quantities import counted
from ccella_fast.run_record import write_run_record
from ccella_fast.sampling import pretrained
from ccella_fast.sampling.autoguidance import check_scale, check_weak_config, check_weak_weights
from ccella_fast.sampling.earlier_samples import check_earlier_samples
from ccella_fast.sampling.output import Format, OutputVolume, OutputWriter, check_format
from ccella_fast.sampling.plan import plan_request
from ccella_fast.sampling.request import Request
from ccella_fast.sampling.sampler import FastSampler
from ccella_fast.storage import atomic_path, check_writable, read_json, remove_partial_files, write_csv

logger = logging.getLogger("ccella_fast")
_MONTAGE_VOLUMES = 12
_LOGGED_REPORTS = 10


def sample_to_folder(
    checkpoint: str | Path,
    out: str | Path,
    *,
    reports: Sequence[str] | None,
    num_samples: int,
    seed: int,
    distinct_seeds: bool = False,
    report_ids: Sequence[str] | None = None,
    vae: str | Path | None = None,
    text_encoder: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    format: Format = "nifti",
    autoguidance: str | Path | None = None,
    **settings: Any,
) -> None:
    """Write `sample-000_seed0.nii.gz` with its `.json`, and so on, then samples.csv, montage.png and run_record.json.

    Volumes that an equal request has already written are kept. Under torchrun the processes share the volumes, which do not
    depend on the number of processes.

    Args:
        checkpoint: as for `FastSampler.from_checkpoint`.
        out: the folder, created if it does not exist.
        reports: the reports; None for the null report, or for variants without a report.
        num_samples: volumes per report.
        seed: of the first volume of each report; the next ones have `seed` + 1, `seed` + 2, ...
        distinct_seeds: whether the next report goes on where the one before it ended, in place of beginning with `seed` too.
        report_ids: a name of each report, all different, which is written to the sidecars of its volumes.
        vae: the autoencoder, if the checkpoint does not contain one.
        text_encoder: as for `FastSampler`.
        device: default: the GPU of this process, or the CPU if there is no GPU.
        dtype: as for `FastSampler`.
        overwrite: delete samples that the folder contains.
        format: "nifti", or "dicom" for a folder with a series per volume and sequence, which needs pydicom.
        autoguidance: the weak model, as for `FastSampler.from_checkpoint`.
        settings: other fields of `Request`.

    Raises:
        ConfigError: an argument is invalid, which is found before weights are loaded, the folder contains results of
            another kind or samples of another request, or another command writes to it.
        CheckpointError: a file is missing, damaged or not a checkpoint, or there is no autoencoder.
        DiskError: the folder is not writable.
        NonFiniteError: a volume is not finite; it is not written.
    """
    out = Path(out)
    if num_samples < 1:
        why = f"--num_samples must be at least 1, got {num_samples}"
        raise ConfigError(why, field="--num_samples", fix="use 1 or more")
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, got {seed}", field="--seed", fix="use 0 or more")
    check_writable(out, "--out")
    check_output(out, "samples", field="--out")
    check_format(format)
    if vae is not None:
        check_autoencoder(Path(vae))
    _check_report_ids(report_ids)
    processes = DistributedContext()
    with processes.lock_folder(out, "ccella-fast sample"):
        device = processes.select_device(device)

        def make_request(config: Config) -> Request:
            return _make_request(config, reports, report_ids, num_samples, seed, distinct_seeds, settings)

        config = pretrained.peek_config(checkpoint)
        if config is not None:
            request = make_request(config)
            plan = plan_request(request, config)
            if autoguidance is not None:
                check_scale(plan.loop_settings.guidance)
                weak = pretrained.peek_config(autoguidance)
                if weak is not None:
                    check_weak_config(config, weak, autoguidance)
                check_weak_weights(
                    pretrained.peek_weights(checkpoint), pretrained.peek_weights(autoguidance), autoguidance
                )
            if not overwrite:
                known = {"config_sha256": pretrained.config_digest(config)}
                weights = known | pretrained.peek_weights(checkpoint)
                weak_weights = None if autoguidance is None else pretrained.peek_weights(autoguidance)
                check_earlier_samples(out, request, plan, weights, weak_weights, format)
        if vae is None and Path(checkpoint).is_file():
            raise _no_autoencoder(checkpoint)
        sampler = FastSampler.from_checkpoint(
            checkpoint, device=device, dtype=dtype or "auto", vae=vae, text_encoder=text_encoder, autoguidance=autoguidance,
        )  # fmt: skip
        if sampler.autoencoder is None:
            raise _no_autoencoder(sampler.origin.path)
        checked = sampler.check(make_request(sampler.config))
        writer, outputs = replace(checked.writer, format=format), checked.outputs
        missing = _find_missing(out, writer, outputs, processes, overwrite)
        if not missing and all((out / name).is_file() for name in ("samples.csv", "montage.png", "run_record.json")):
            logger.info("the samples in %s are complete, nothing to do", out)
            return
        batches = _missing_batches(outputs, missing, checked.batch_size, processes)
        recorded = {"volumes": len(outputs), "generated": len(missing), "device": str(device)}
        recorded |= {key: writer.request_metadata[key] for key in ("solver", "num_inference_steps", "dtype")}
        with _run_record(out, processes, recorded):
            for volume in sampler.generate_batches(checked, batches):
                if outputs[volume.index] in missing:
                    writer.write(out, outputs[volume.index], volume)
            processes.barrier()
            if processes.rank == 0:
                _write_table(out, outputs, writer)
                _write_montage(out, outputs, writer)
        processes.barrier()
        _log_results(out, outputs, len(missing))


def _check_report_ids(report_ids: Sequence[str] | None) -> None:
    twice = [name for name, count in Counter(report_ids or ()).items() if count > 1]
    if twice:
        why = f"{len(twice)} of the report ids are used more than once, so that their volumes could not be told apart"
        fix = "give each file once, and files and cases different names; report-1, report-2, ... are those of --report"
        raise ConfigError(why, field="--report_file, --report_table", fix=fix)


def _no_autoencoder(path: object) -> CheckpointError:
    fix = "add --vae with a VAE folder or MAISI's weight file"
    return CheckpointError("this checkpoint does not contain an autoencoder", path=path, fix=fix)


def _make_request(
    config: Config,
    reports: Sequence[str] | None,
    report_ids: Sequence[str] | None,
    num_samples: int,
    seed: int,
    distinct_seeds: bool,
    settings: dict[str, Any],
) -> Request:
    """A request of `num_samples` volumes per report; the null report is used if the variant needs one and none is given."""
    if config.model.traits.text and not reports:
        reports, report_ids = [""], None
    repeated, ids = (
        [each for each in values for _ in range(num_samples)] if values else None for values in (reports, report_ids)
    )
    count = num_samples * len(reports or [None])
    seeds = [seed + (number if distinct_seeds else number % num_samples) for number in range(count)]
    return Request(reports=repeated, report_ids=ids, seeds=seeds, **settings)


def _find_missing(
    out: Path, writer: OutputWriter, outputs: list[OutputVolume], processes: DistributedContext, overwrite: bool
) -> list[OutputVolume]:
    """The volumes to generate, equal on all ranks.

    No rank writes before every rank has looked at the folder, and none looks before rank 0 has deleted old files.
    """
    if processes.rank == 0:
        remove_partial_files(out, nested=False)  # other commands may be writing to folders in it
        missing = writer.missing(out, outputs, overwrite=overwrite)
    processes.barrier()
    if processes.rank != 0:
        missing = writer.missing(out, outputs)
    processes.barrier()
    return missing


def _missing_batches(
    outputs: list[OutputVolume], missing: list[OutputVolume], size: int, processes: DistributedContext
) -> list[list[int]]:
    """The batches of this process: those of an unbroken run that contain a missing volume.

    The bits of a volume may depend on the others of its batch, so a continued run repeats whole batches.
    """
    needed = []
    for rank in range(processes.world_size):
        own = range(rank, len(outputs), processes.world_size)
        needed += [list(own[k : k + size]) for k in range(0, len(own), size)]
    return processes.shard([batch for batch in needed if any(outputs[index] in missing for index in batch)])


def _run_record(out: Path, processes: DistributedContext, entries: dict[str, Any]):
    if processes.rank != 0:
        return nullcontext()
    return write_run_record(out, "sample", **entries, processes=processes.world_size)


def _write_table(out: Path, outputs: list[OutputVolume], writer: OutputWriter) -> None:
    """Write samples.csv, a row per volume; the columns that studies.csv has too have the same names and values."""
    columns = ["case", "synthetic", "pirads", "report_id", "report_sha256", "seed", "p_pos", "spacing"]
    rows = []
    for output in outputs:
        sidecar = read_json(out / f"{output.name}.json")
        given = sidecar["class_given"] or sidecar["class_override"]
        probabilities = sidecar["class_probabilities"] or {}
        values = [
            output.name, "yes", given, sidecar.get("report_id"), sidecar.get("report_sha256"), output.seed,
            probabilities.get(CLASS_NAMES[1]), " ".join(f"{length:g}" for length in sidecar["spacing"]),
        ]  # fmt: skip
        rows.append(values + [sidecar["files"][sequence] for sequence in writer.sequences])
    write_csv(out / "samples.csv", [*columns, *writer.sequences], rows, line_end="\n")


def _log_results(out: Path, outputs: list[OutputVolume], generated: int) -> None:
    """Say what was written, the predicted class of each report, and what to do next."""
    kept = len(outputs) - generated
    existing = f" (there already: {kept})" if kept else ""
    volumes = counted(len(outputs), "synthetic volume")
    logger.info("%s contains %s%s, listed in samples.csv", out, volumes, existing)
    sidecars = [read_json(out / f"{output.name}.json") for output in outputs]
    head = sidecars[0].get("class_head")
    if head == "untrained":
        logger.info("the predicted class is not shown: the model was not trained to predict it")
    predicted: dict[str, float] = {}  # by report: its volumes share the prediction but for rounding
    for sidecar in sidecars:
        if sidecar["class_probabilities"]:  # named by number: a file name may name a patient
            predicted.setdefault(f"report {sidecar['report'] + 1}", sidecar["class_probabilities"][CLASS_NAMES[1]])
    for name, probability in list(predicted.items())[:_LOGGED_REPORTS]:
        logger.info("  %s: P(PI-RADS 3 to 5) %.2f", name, probability)
    if len(predicted) > _LOGGED_REPORTS:
        logger.info("  %s: see samples.csv", counted(len(predicted) - _LOGGED_REPORTS, "more report"))
    if predicted and head == "unknown":
        logger.info("  (this checkpoint does not say whether it was trained to predict classes)")
    logger.info("next: look at %s, or open the volumes in a viewer such as 3D Slicer", out / "montage.png")


def _write_montage(out: Path, outputs: list[OutputVolume], writer: OutputWriter) -> None:
    from ccella_fast.report.figures import Panel, montage, spread

    panels, scale = [], writer.intensity_scale
    for output in spread(outputs, max(1, _MONTAGE_VOLUMES // len(scale))):
        sidecar = read_json(out / f"{output.name}.json")
        for sequence, path in writer.files(out, output).items():
            volume = read_sample(path) / scale[sequence]
            title = f"report {output.report + 1}, seed {output.seed}" + (f", {sequence}" if len(scale) > 1 else "")
            if sidecar["class_probabilities"]:
                title += f", P({CLASS_NAMES[1]}) {sidecar['class_probabilities'][CLASS_NAMES[1]]:.2f}"
            panels.append(Panel(volume, sidecar["spacing"], title))
    windows = " / ".join(f"{name} 0 to {value:g}" for name, value in scale.items())
    caption = f"Synthetic images generated by ccella_fast. Not for diagnosis. Window: {windows}"
    with atomic_path(out / "montage.png") as temporary:
        temporary.write_bytes(montage(panels, window=(0.0, 1.0), caption=caption))
