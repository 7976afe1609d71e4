"""`ccella-fast sample`: generates a folder of volumes on one or several processes, and can be interrupted and continued."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ccella_fast.data.readers.nifti import read_nifti_array
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.run_record import write_run_record
from ccella_fast.sampling.output import OutputVolume, OutputWriter
from ccella_fast.sampling.request import CLASSES, Request
from ccella_fast.sampling.sampler import FastSampler
from ccella_fast.storage import atomic_path, check_writable, read_json

logger = logging.getLogger("ccella_fast")
_MONTAGE_VOLUMES = 12


class DistributedContext:
    """The processes started by torchrun, each with one GPU; a single process without torchrun.

    Attributes:
        rank: of this process.
        world_size: the number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1 and not dist.is_initialized():
            # Long, because a rank waits for the last volumes of the others; torchrun stops all ranks if one fails.
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def select_device(self, requested: str | torch.device | None) -> torch.device:
        """The requested device; by default the GPU of this process, or the CPU if there is no GPU."""
        if requested is not None:
            return torch.device(requested)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def shard(self, items: Sequence[Any]) -> list[Any]:
        """The items of this process: item i belongs to rank i modulo the number of processes."""
        return list(items[self.rank :: self.world_size])


def sample_to_folder(
    checkpoint: str | Path,
    out: str | Path,
    *,
    reports: Sequence[str] | None,
    num_samples: int,
    seed: int,
    vae: str | Path | None = None,
    text_encoder: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> None:
    """Write `sample-000_seed0.nii.gz` with its `.json`, and so on, then montage.png and run_record.json.

    Volumes that an equal request has already written are kept. Under torchrun the processes share the volumes, which do not
    depend on the number of processes.

    Args:
        checkpoint: as for `FastSampler.from_checkpoint`.
        out: the folder, created if it does not exist.
        reports: the reports; None for the null report, or for variants without a report.
        num_samples: volumes per report.
        seed: of the first volume of each report; the next ones have `seed` + 1, `seed` + 2, ...
        vae: the autoencoder, if the checkpoint does not contain one.
        text_encoder: as for `FastSampler`.
        device: default: the GPU of this process, or the CPU if there is no GPU.
        dtype: as for `FastSampler`.
        overwrite: delete samples that the folder contains.
        settings: other fields of `Request`.

    Raises:
        ConfigError: an argument is invalid, or the folder contains samples of another request.
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
    processes = DistributedContext()
    device = processes.select_device(device)
    sampler = FastSampler.from_checkpoint(
        checkpoint, device=device, dtype=dtype or "auto", vae=vae, text_encoder=text_encoder
    )
    if sampler.autoencoder is None:
        fix = "add --vae with a VAE folder or MAISI's weight file"
        raise CheckpointError("this checkpoint does not contain an autoencoder", path=sampler.origin.path, fix=fix)
    checked = sampler.check(_make_request(sampler, reports, num_samples, seed, settings))
    writer, outputs = checked.writer, checked.outputs
    missing = _find_missing(out, writer, outputs, processes, overwrite)
    if not missing and (out / "montage.png").is_file() and (out / "run_record.json").is_file():
        logger.info("the samples in %s are complete, nothing to do", out)
        return
    indices = processes.shard([index for index, output in enumerate(outputs) if output in missing])
    recorded = {"volumes": len(outputs), "generated": len(missing), "device": str(device)}
    recorded |= {key: writer.request_metadata[key] for key in ("solver", "num_inference_steps", "dtype")}
    with _run_record(out, processes, recorded):
        for volume in sampler.generate(checked, indices):
            writer.write(out, outputs[volume.index], volume)
        processes.barrier()
        if processes.rank == 0:
            _write_montage(out, outputs, writer)
    processes.barrier()


def _make_request(
    sampler: FastSampler, reports: Sequence[str] | None, num_samples: int, seed: int, settings: dict[str, Any]
) -> Request:
    if sampler.config.model.traits.text and not reports:
        logger.info("no report is given: the null report is used")
        reports = [""]
    repeated = [report for report in reports or () for _ in range(num_samples)]
    seeds = [seed + number for number in range(num_samples)] * len(reports or [None])
    return Request(reports=repeated or None, seeds=seeds, **settings)


def _find_missing(
    out: Path, writer: OutputWriter, outputs: list[OutputVolume], processes: DistributedContext, overwrite: bool
) -> list[OutputVolume]:
    """The volumes to generate, equal on all ranks.

    No rank writes before every rank has looked at the folder, and none looks before rank 0 has deleted old files.
    """
    if processes.rank == 0:
        missing = writer.missing(out, outputs, overwrite=overwrite)
    processes.barrier()
    if processes.rank != 0:
        missing = writer.missing(out, outputs)
    processes.barrier()
    return missing


def _run_record(out: Path, processes: DistributedContext, entries: dict[str, Any]):
    if processes.rank != 0:
        return nullcontext()
    return write_run_record(out, "sample", **entries, processes=processes.world_size)


def _write_montage(out: Path, outputs: list[OutputVolume], writer: OutputWriter) -> None:
    from ccella_fast.report.figures import Panel, montage

    panels, scale = [], writer.intensity_scale
    for output in outputs[:_MONTAGE_VOLUMES]:
        sidecar = read_json(out / f"{output.name}.json")
        for sequence, path in writer.files(out, output).items():
            volume = read_nifti_array(path)[0] / scale[sequence]
            title = f"report {output.report + 1}, seed {output.seed}" + (f", {sequence}" if len(scale) > 1 else "")
            if sidecar["class_probabilities"]:
                title += f", P({CLASSES[1]}) {sidecar['class_probabilities'][CLASSES[1]]:.2f}"
            panels.append(Panel(volume, sidecar["spacing"], title))
    windows = " / ".join(f"{name} 0 to {value:g}" for name, value in scale.items())
    caption = f"Synthetic images generated by ccella_fast. Not for diagnosis. Window: {windows}"
    with atomic_path(out / "montage.png") as temporary:
        temporary.write_bytes(montage(panels[:_MONTAGE_VOLUMES], window=(0.0, 1.0), caption=caption))
