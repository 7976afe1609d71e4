"""Distances of decoded samples to real studies, for the scripts that compare ways of sampling.

The metrics are those of `ccella-fast evaluate`. The k-th sample is asked for the report, the class and the voxel size of the
k-th study, so the samples should show what the studies show.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.checkpoint import Checkpoint
from ccella_fast.errors import CheckpointError, ConfigError, DataError
from ccella_fast.evaluation.collecting import collect
from ccella_fast.evaluation.features.extractor import Extractor
from ccella_fast.evaluation.findings import CaseFindings, read_findings
from ccella_fast.evaluation.foci import FociFeatures
from ccella_fast.evaluation.metrics import Draws, Sets, feature_rows
from ccella_fast.evaluation.prompted import condition_rows
from ccella_fast.evaluation.results import Row, plain_values
from ccella_fast.evaluation.run import load_extractors
from ccella_fast.evaluation.volumes import Volume, open_volumes
from ccella_fast.models.autoencoder import load_autoencoder
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.sampling.decoding import Decoder

SAMPLES = 24  # of each way of sampling, unless there are fewer studies
METRICS = {"fd", "kid"}
DRAWS = Draws(100, 0)
LEGEND = (
    "Fréchet distance as a multiple of that between halves of the real studies; kernel distance (KID); how clearly the class "
    "that was asked for shows, from 0 % (as with prompts in random order) to 100 % (as in the studies), - if it cannot be read."
)
_SHOWN = ("taps-l3", "random")  # the spaces of a table


class Prompt(NamedTuple):
    """What a sample is asked for.

    Attributes:
        text: (1, L, E) features of the report; None if the variant takes none.
        pirads: "neg" or "pos"; None if it is unknown.
        spacing: mm.
    """

    text: Tensor | None
    pirads: str | None
    spacing: list[float]


class Judged(NamedTuple):
    """What the comparison of a way of sampling with real studies gave.

    Attributes:
        rows: as in metrics.json, for each metric, feature space and sequence; none if a sample cannot be compared.
        defect: why, such as a sample that is not finite or of which all voxels are equal; None if there are rows.
    """

    rows: list[Row]
    defect: str | None

    def as_json(self) -> dict[str, Any]:
        """The rows and the defect."""
        return {"rows": [plain_values(asdict(row)) for row in self.rows], "defect": self.defect}

    def spaces(self) -> list[tuple[str, str]]:
        """The sequences and feature spaces of a table: a trained network, where there is one, and the control."""
        return [
            (row.sequence, space)
            for space in _SHOWN
            for row in self.rows
            if (row.metric, row.features) == ("fd", space)
        ]

    def cells(self, sequence: str, space: str) -> tuple[str, str, str]:
        """What a table shows in one space: the three numbers of LEGEND."""
        if self.defect is not None:
            return "defective", "-", "-"
        chosen = {row.metric: row for row in self.rows if (row.sequence, row.features) == (sequence, space)}
        ratio, kid = chosen["fd"].ratio, chosen["kid"].value
        # Of the probes, the one that reads real volumes best.
        read = [row for row in self.rows if row.metric == "condition_class" and row.sequence == sequence]
        best = max(read, key=lambda row: row.details["ceiling"], default=None)
        share = None if best is None else best.details["normalized"]
        return (
            "-" if ratio is None else f"{ratio:.2f}",
            "-" if kid is None else f"{kid:.3g}",
            "-" if share is None else f"{100 * share:.0f} %",
        )


class RealStudies:
    """Real studies, of which each prompts a sample, and with which the decoded samples are compared.

    Args:
        folder: a prepared folder or a split of it, `FOLDER:test`, that the model was not trained on.
        checkpoint: with an autoencoder.
        device: of the networks.
        findings: of the studies, from `read_findings`.

    Raises:
        ConfigError: the studies have another grid or other text features than the model.
        CheckpointError: the checkpoint has no autoencoder.
        DataError: the folder is not a prepared one, or a study cannot be read.
    """

    def __init__(
        self, folder: str, checkpoint: Checkpoint, device: torch.device, *, findings: CaseFindings | None = None
    ):
        config, self._variant = checkpoint.config, checkpoint.model.variant
        volumes = open_volumes(folder, field="--real")
        if volumes.manifest is None:
            raise DataError("this is not a prepared folder", path=volumes.path, field="--real", fix="give one")
        if checkpoint.autoencoder is None:
            why = "this checkpoint has no autoencoder, so its samples cannot be compared with real studies"
            raise CheckpointError(why, path=checkpoint.path, field="--real", fix="give a run folder")
        self.manifest, self._findings = volumes.manifest, findings
        for name, ours, theirs in (
            ("data.dim", config.data.dim, self.manifest.data.dim),
            ("data.sequences", config.data.sequences, self.manifest.data.sequences),
            ("model.input_dim", config.model.input_dim, self.manifest.text and self.manifest.text.width),
        ):
            if (name != "model.input_dim" or self._variant.text) and ours != theirs:
                why = f"the studies do not fit the model: {name} is {ours} in its configuration and {theirs} there"
                raise ConfigError(why, path=volumes.path, field="--real", fix="prepare them as for its training")
        chosen = {source.id for source in volumes.sources}
        needs_class = self._variant.class_input == "given"
        self.cases = [
            case for case in self.manifest.cases if case.id in chosen and not (needs_class and case.pirads is None)
        ]
        self._decoder = Decoder(
            load_autoencoder(checkpoint.autoencoder, config.autoencoder).to(device),
            config.model.latent_channels, checkpoint.scale_factor, None,
        )  # fmt: skip
        self._device = device
        self.extractors: list[Extractor] = load_extractors(None, device=str(device))
        self._tables, self._grid = collect(
            volumes, [*self.extractors, FociFeatures()], name=volumes.name, progress=True
        )

    def prompt(self, k: int) -> Prompt:
        """The prompt of sample k. Studies are used again if there are more samples."""
        case = self.cases[k % len(self.cases)]
        text = torch.tensor(self.manifest.array(case, "text", verify=True))[None] if self._variant.text else None
        pirads = None if case.pirads is None else CLASS_NAMES[case.pirads.index(1)]
        return Prompt(text, pirads, list(case.spacing))

    def compare(self, latents: Iterable[Tensor]) -> Judged:
        """Compare decoded samples with the studies. latents: (C, X, Y, Z) each, in the order of the prompts."""
        extractors = [*self.extractors, FociFeatures()]
        try:
            found, _ = collect(self._decoded(latents), extractors, name="samples", grid=self._grid)
        except DataError as error:  # few steps may give a black volume; the other ways of sampling are still measured
            return Judged([], error.why)
        rows: list[Row] = []
        for sequence, samples in found.items():
            sets = Sets(self._tables[sequence], samples)
            about = {
                space: {name: each.identity.get(name) for name in ("weights_sha256", "preprocessing")}
                for each in extractors
                for space in each.spaces
                if space in samples.spaces
            }
            for space in about.keys() - FociFeatures.spaces.keys():
                rows += feature_rows(sets, space, METRICS, DRAWS, about[space])
            rows += condition_rows(sets, about, self._findings, DRAWS)
        return Judged(sorted(rows, key=lambda row: (row.sequence, row.metric, str(row.features))), None)

    def _decoded(self, latents: Iterable[Tensor]) -> Iterator[Volume]:
        asked = self._variant.text or self._variant.class_input == "given"
        for k, latent in enumerate(latents):
            (decoded,) = self._decoder.submit(latent[None].to(self._device), None, decode=True)
            if decoded.volume is None or not decoded.finite:
                raise DataError("a sample is not finite", path=f"sample-{k}", fix="use more steps or another solver")
            (_, pirads, spacing), case = self.prompt(k), self.cases[k % len(self.cases)]
            for sequence, array in zip(self.manifest.data.sequences, decoded.volume.numpy(), strict=True):
                facts = {"pirads": pirads, "prompt": case.id} if asked else {}
                yield Volume(array, tuple(spacing), f"sample-{k}", sequence, **facts)  # type: ignore[arg-type]


def add_real_options(parser: argparse.ArgumentParser) -> None:
    """Add `--real` and `--findings`."""
    about = (
        "prepared folder, or FOLDER:test, that the model was not trained on: also decode the samples, prompted by its "
        "studies, and compare them with its images (needs --checkpoint)"
    )
    parser.add_argument("--real", metavar="FOLDER", help=about)
    parser.add_argument("--findings", type=Path, metavar="FILE", help="of these studies, as for ccella-fast evaluate")


def open_real(arguments: argparse.Namespace, checkpoint: Checkpoint | None, device: torch.device) -> RealStudies | None:
    """The studies of `--real`; None without this option."""
    if arguments.real is None:
        if arguments.findings is not None:
            raise ConfigError(
                "findings describe real studies, and none are given", field="--findings", fix="add --real"
            )
        return None
    if checkpoint is None or arguments.grid is not None:
        why = "samples are compared with real studies if they are of a trained model and its own grid"
        raise ConfigError(why, field="--real", fix="give --checkpoint and no --grid, or leave out --real")
    findings = None if arguments.findings is None else read_findings(arguments.findings)
    return RealStudies(arguments.real, checkpoint, device, findings=findings)
