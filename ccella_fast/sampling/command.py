"""`ccella-fast sample`: a folder of volumes, on one process or shared by several, that can be interrupted and gone on with."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ccella_fast.data.readers.volume_file import read_nifti_array
from ccella_fast.environment import write_run_record
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.sampling.output import OutputVolume, OutputWriter
from ccella_fast.sampling.request import CLASSES, Request
from ccella_fast.sampling.sampler import FastSampler
from ccella_fast.storage import atomic_path, check_writable, read_json

logger = logging.getLogger("ccella_fast")
_SHOWN = 12  # volumes in a montage


class Ranks:
    """The processes that share a list of jobs, as torchrun starts them: job i is rank i mod world's. One GPU each."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not dist.is_initialized():
            # A rank waits for the others' last volumes; torchrun ends all of them when one fails.
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def device(self, wanted: str | torch.device | None) -> torch.device:
        if wanted is not None:
            return torch.device(wanted)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def share(self, jobs: Sequence[Any]) -> list[Any]:
        return list(jobs[self.rank :: self.world])


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
    """Write `num_samples` volumes for each report, with seeds `seed`, `seed` + 1, ...: `sample-000_seed0.nii.gz` and its
    `.json`, then montage.png and run_record.json. settings: fields of `Request`.

    A volume that an equal request has already written is kept. Under torchrun the volumes are shared out; none depends on how
    many processes there are. Raises ConfigError (inputs; the folder holds other samples), CheckpointError, DiskError and
    NonFiniteError (nothing of such a volume is written)."""
    out = Path(out)
    if num_samples < 1 or seed < 0:
        raise ConfigError("--num_samples is 1 or more, --seed is 0 or more", fix="change the value")
    check_writable(out, "--out")
    ranks = Ranks()
    device = ranks.device(device)
    sampler = FastSampler.from_checkpoint(
        checkpoint, device=device, dtype=dtype or "auto", vae=vae, text_encoder=text_encoder
    )
    if sampler.autoencoder is None:
        fix = "add --vae with a VAE folder or MAISI's weight file"
        raise CheckpointError("this checkpoint holds no autoencoder", path=sampler.origin.path, fix=fix)
    run = sampler.check(_request(sampler, reports, num_samples, seed, settings))
    todo = _missing(out, run.writing, run.jobs, ranks, overwrite)
    if not todo and (out / "montage.png").is_file() and (out / "run_record.json").is_file():
        logger.info("the samples in %s are complete, nothing to do", out)
        return
    numbers = ranks.share([number for number, job in enumerate(run.jobs) if job in todo])
    facts = run.writing.facts
    about = {key: facts[key] for key in ("solver", "num_inference_steps", "dtype")}
    with _recorded(out, ranks, volumes=len(run.jobs), generated=len(todo), device=str(device), **about):
        for result in sampler.generate(run, numbers):
            run.writing.write(out, run.jobs[result.index], result)
        ranks.wait()
        if ranks.rank == 0:
            _montage(out, run.jobs, run.writing)
    ranks.wait()


def _request(
    sampler: FastSampler, reports: Sequence[str] | None, num_samples: int, seed: int, settings: dict[str, Any]
) -> Request:
    if sampler.config.model.traits.text and not reports:
        logger.info("no report is given: the null report is used")
        reports = [""]
    each = [report for report in reports or () for _ in range(num_samples)]
    seeds = [seed + number for number in range(num_samples)] * len(reports or [None])
    return Request(reports=each or None, seeds=seeds, **settings)


def _missing(
    out: Path, writing: OutputWriter, jobs: list[OutputVolume], ranks: Ranks, overwrite: bool
) -> list[OutputVolume]:
    """Alike on all ranks: none writes before every one has looked, and none looks before old files are gone."""
    if ranks.rank == 0:
        todo = writing.missing(out, jobs, overwrite=overwrite)
    ranks.wait()
    if ranks.rank != 0:
        todo = writing.missing(out, jobs)
    ranks.wait()
    return todo


def _recorded(out: Path, ranks: Ranks, **facts: Any):
    from contextlib import nullcontext

    return write_run_record(out, "sample", **facts, processes=ranks.world) if ranks.rank == 0 else nullcontext()


def _montage(out: Path, jobs: list[OutputVolume], writing: OutputWriter) -> None:
    from ccella_fast.report.figures import Panel, montage

    panels, scale = [], writing.intensity
    for job in jobs[:_SHOWN]:
        sidecar = read_json(out / f"{job.name}.json")
        for sequence, path in writing.files(out, job).items():
            volume = read_nifti_array(path)[0] / scale[sequence]
            title = f"report {job.report + 1}, seed {job.seed}" + (f", {sequence}" if len(scale) > 1 else "")
            if sidecar["class_probabilities"]:
                title += f", P({CLASSES[1]}) {sidecar['class_probabilities'][CLASSES[1]]:.2f}"
            panels.append(Panel(volume, sidecar["spacing"], title))
    top = " / ".join(f"{name} 0 to {value:g}" for name, value in scale.items())
    caption = f"Synthetic images generated by ccella_fast. Not for diagnosis. Window: {top}"
    with atomic_path(out / "montage.png") as temporary:
        temporary.write_bytes(montage(panels[:_SHOWN], window=(0.0, 1.0), caption=caption))
