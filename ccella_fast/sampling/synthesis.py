"""`ccella-fast synthesize`: a labelled set of synthetic studies, in the layout of a folder of real ones.

Each study is generated from a case of a prepared folder, or from a row of a table, and belongs to the split of that case: what
was generated from a test case cannot become training data. `prepare` and `check` read the folder as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from ccella_fast.config import Config
from ccella_fast.data.manifest import Split
from ccella_fast.errors import CheckpointError, ConfigError, did_you_mean
from ccella_fast.folder_kinds import check_output
from ccella_fast.models.autoencoder import check_autoencoder
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.processes import DistributedContext
from ccella_fast.quantities import counted
from ccella_fast.run_record import write_run_record
from ccella_fast.sampling import pretrained
from ccella_fast.sampling.case_prompts import (
    Draw,
    Label,
    choose_draws,
    null_text_of,
    prompts_of_prepared,
    prompts_of_table,
)
from ccella_fast.sampling.output import GeneratedVolume, nifti_bytes
from ccella_fast.sampling.plan import plan_request
from ccella_fast.sampling.request import Request
from ccella_fast.sampling.sampler import CheckedRequest, FastSampler
from ccella_fast.storage import atomic_folder, check_writable, json_text, read_json, remove_partial_files, write_csv

logger = logging.getLogger("ccella_fast")
SIDECAR = "generated.json"  # in the folder of a study: how it was generated
COLUMNS = [
    "case", "split", "pirads", "report", "synthetic", "source_case", "class_prompt", "class_predicted", "p_pos", "seed",
]  # fmt: skip
_OTHER_FILES = {"studies.csv", "run_record.json"}


def synthesize(
    checkpoint: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    split: Split = "train",
    report_table: str | Path | None = None,
    per_case: int = 1,
    per_class: int | None = None,
    label: Label = "report",
    seed: int = 0,
    vae: str | Path | None = None,
    text_encoder: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    autoguidance: str | Path | None = None,
    **settings: Any,
) -> None:
    """Write `CASE-synth-K/t2w.nii.gz` with `generated.json` for each study, studies.csv and run_record.json.

    A study is written when all of it is complete. The same command continues an interrupted set. Under torchrun the processes
    share the studies, which do not depend on the number of processes, and there is one table.

    Args:
        checkpoint: as for `FastSampler.from_checkpoint`.
        out: the folder, which is new or holds an equal set.
        data: a prepared folder, whose cases give text features, class, voxel size and position.
        split: of the cases in `data`.
        report_table: in place of `data`, a table like studies.csv, whose reports are encoded.
        per_case: studies from each case.
        per_class: studies of each class, in place of `per_case`: as many of either, from all of its cases in turn.
        label: the class that studies.csv gives to a study as `pirads`: that of its case ("report"), or the one that the model
            predicts from the report ("predicted").
        seed: of the set. The noise of a study depends on it, on the case and on K alone.
        vae: the autoencoder, if the checkpoint does not contain one.
        text_encoder: as for `FastSampler`.
        device: default: the GPU of this process, or the CPU if there is no GPU.
        dtype: as for `FastSampler`.
        autoguidance: the weak model, as for `FastSampler.from_checkpoint`.
        settings: other fields of `Request`.

    Raises:
        ConfigError: an argument is invalid, `out` holds other files or another set, or another command writes to it.
        CheckpointError: a file is missing, damaged or not a checkpoint, or there is no autoencoder.
        DataError: the cases cannot be read, or do not fit the model.
        DiskError: the folder is not writable.
        NonFiniteError: a volume is not finite; it is not written.
    """
    out = Path(out)
    if (data is None) == (report_table is None):
        why = "the cases are given by exactly one of --data and --report_table"
        raise ConfigError(why, field="--data", fix="give a prepared folder, or a table like studies.csv")
    if label not in get_args(Label):
        fix = did_you_mean(str(label), get_args(Label))
        raise ConfigError(f"there is no label '{label!s:.40}'", field="--label", fix=fix)
    check_writable(out, "--out")
    check_output(out, "studies", field="--out")
    if vae is not None:
        check_autoencoder(Path(vae))
    processes = DistributedContext()
    with processes.lock_folder(out, "ccella-fast synthesize"):
        device = processes.select_device(device)

        def make_draws(config: Config) -> list[Draw]:
            if data is None:
                prompts = prompts_of_table(str(report_table), config, text_encoder)
            else:
                prompts = prompts_of_prepared(data, split, config)
            draws = choose_draws(prompts, config.model.traits, per_case=per_case, per_class=per_class)
            plan_request(_request(draws[:1], config, seed, settings), config)
            return draws

        config = pretrained.peek_config(checkpoint)
        draws = None if config is None else make_draws(config)  # before weights are loaded
        sampler = FastSampler.from_checkpoint(
            checkpoint, device=device, dtype=dtype or "auto", vae=vae, text_encoder=text_encoder, autoguidance=autoguidance,
        )  # fmt: skip
        if sampler.autoencoder is None:
            fix = "add --vae with a VAE folder or MAISI's weight file"
            raise CheckpointError("this checkpoint does not contain an autoencoder", path=sampler.origin.path, fix=fix)
        if label == "predicted" and sampler.class_head != "trained":
            why = f"this {sampler.config.model.variant} model was not trained to predict a class"
            raise ConfigError(why, field="--label", fix="use --label report")
        if data is not None and (null_text := null_text_of(data)) is not None:
            settings["null_text"] = null_text
        draws = make_draws(sampler.config) if draws is None else draws
        _SyntheticSet(out, sampler, draws, seed, label, settings).write(processes)


class _SyntheticSet:
    """The studies of a folder.

    Args:
        out: the folder.
        sampler: generates the volumes.
        draws: the volumes.
        seed: of the set.
        label: as for `synthesize`.
        settings: fields of `Request`.
    """

    def __init__(
        self, out: Path, sampler: FastSampler, draws: Sequence[Draw], seed: int, label: Label, settings: dict[str, Any]
    ):
        self.out, self.sampler, self.draws, self.label = out, sampler, list(draws), label
        self._seed, self._settings = seed, settings
        size = self._check(draws[:1]).batch_size
        self.batches = [self.draws[k : k + size] for k in range(0, len(draws), size)]

    def write(self, processes: DistributedContext) -> None:
        """Generate what is missing, and write the table."""
        missing = self._find_missing(processes)
        # The bits of a volume may depend on the others of its batch, so a continued set repeats whole batches.
        own = processes.shard([batch for batch in self.batches if any(draw.name in missing for draw in batch)])
        with self._run_record(processes, generated=len(missing)):
            bar = tqdm(total=sum(map(len, own)), desc="synthesizing", unit="study", disable=processes.rank != 0)
            for batch in own:
                checked = self._check(batch)
                for volume in self.sampler.generate(checked):
                    if batch[volume.index].name in missing:
                        self._write_study(batch[volume.index], checked, volume)
                    bar.update()
            bar.close()
            processes.barrier()
            if processes.rank == 0:
                table = [self._row(draw, read_json(self.out / draw.name / SIDECAR)) for draw in self.draws]
                write_csv(self.out / "studies.csv", COLUMNS, table, line_end="\n")
        processes.barrier()
        studies, kept = counted(len(self.draws), "synthetic study", "synthetic studies"), len(self.draws) - len(missing)
        logger.info("%s contains %s%s", self.out, studies, f" (there already: {kept})" if kept else "")
        logger.info("next: ccella-fast prepare --data %s, with the configuration of the model", self.out)

    def _check(self, batch: Sequence[Draw]) -> CheckedRequest:
        """The checked request of a batch."""
        return self.sampler.check(_request(batch, self.sampler.config, self._seed, self._settings))

    def _find_missing(self, processes: DistributedContext) -> set[str]:
        """The names of the studies to generate, equal on all ranks: none writes before all have looked at the folder.

        Raises:
            ConfigError: the folder contains something else than an equal set, or a part of one.
        """
        if processes.rank == 0:
            remove_partial_files(self.out, nested=False)
        processes.barrier()
        missing = {draw.name for draw in self.draws}
        present = {entry.name for entry in self.out.iterdir() if not entry.name.startswith(".")} - _OTHER_FILES
        self._refuse(min(present - missing, default=None), "it is not a study of this set")
        for batch in self.batches:
            if not any(draw.name in present for draw in batch):
                continue
            for draw, output in zip(batch, self._check(batch).outputs, strict=True):
                if draw.name in present:
                    path = self.out / draw.name / SIDECAR
                    known = read_json(path) if path.is_file() else {}
                    if not isinstance(known, dict) or known.get("identity") != output.identity:
                        self._refuse(draw.name, "it was generated with other settings, weights or reports")
                    missing.remove(draw.name)
        table = self.out / "studies.csv"
        if table.is_file() and not table.read_bytes().startswith(",".join(COLUMNS).encode()):
            self._refuse(table.name, "it is not the table of a synthetic set")
        processes.barrier()
        return missing

    def _refuse(self, name: str | None, why: str) -> None:
        if name is not None:
            why = f"this folder is not empty, and no earlier state of this set: {why}"
            raise ConfigError(why, path=self.out / name, field="--out", fix="choose another folder")

    def _write_study(self, draw: Draw, checked: CheckedRequest, generated: GeneratedVolume) -> None:
        """Write the folder of a study, all or nothing of it."""
        writer, output = checked.writer, checked.outputs[generated.index]
        assert generated.volume is not None
        with atomic_folder(self.out / draw.name) as folder:
            files = {sequence: folder / f"{sequence}.nii.gz" for sequence in writer.sequences}
            for (sequence, path), volume in zip(files.items(), generated.volume.numpy(), strict=True):
                scale = writer.intensity_scale[sequence]
                content = nifti_bytes(
                    volume * scale, draw.prompt.spacing, window=(0.0, scale), affine=draw.prompt.affine
                )
                path.write_bytes(content)
            sidecar = writer.sidecar(output, generated, files)
            (folder / SIDECAR).write_text(json_text(sidecar), encoding="utf-8")

    def _row(self, draw: Draw, sidecar: dict[str, Any]) -> list[Any]:
        """The row of a study in studies.csv."""
        prompt, probabilities = draw.prompt, sidecar["class_probabilities"]
        known = probabilities if sidecar["class_head"] == "trained" else None
        predicted = max(CLASS_NAMES, key=known.__getitem__) if known else None
        return [
            draw.name, prompt.split, prompt.pirads if self.label == "report" else predicted, prompt.report, "yes",
            prompt.case, prompt.pirads, predicted, known[CLASS_NAMES[1]] if known else None, sidecar["seed"],
        ]  # fmt: skip

    def _run_record(self, processes: DistributedContext, **entries: Any):
        if processes.rank != 0:
            return nullcontext()
        device = str(self.sampler.device)
        return write_run_record(
            self.out, "synthesize", studies=len(self.draws), device=device, processes=processes.world_size, **entries
        )


def _request(draws: Sequence[Draw], config: Config, seed: int, settings: dict[str, Any]) -> Request:
    """The request of some volumes."""
    traits, prompts = config.model.traits, [draw.prompt for draw in draws]
    conditions: dict[str, Any] = {}
    if traits.text:
        conditions["text"] = np.stack([prompt.read_features() for prompt in prompts if prompt.read_features])
        conditions["report_ids"] = [prompt.case for prompt in prompts]
    if traits.class_input == "given":
        conditions["pirads"] = [prompt.pirads for prompt in prompts]
    seeds, spacings = [draw.seed(seed) for draw in draws], [prompt.spacing for prompt in prompts]
    return Request(seeds=seeds, spacing=spacings, progress=False, **conditions, **settings)
