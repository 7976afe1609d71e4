"""The cases that synthetic studies are generated from, and how many from each."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ccella_fast.config import Config
from ccella_fast.data.loading.dataset import check_encoder, check_spacing
from ccella_fast.data.manifest import CASE_ID, NAME, Manifest, Split, StudyEntry, load_manifest
from ccella_fast.data.readers.study_table import studies_of
from ccella_fast.data.readers.text_checks import check_id
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.quantities import counted
from ccella_fast.variants import Variant

logger = logging.getLogger("ccella_fast")
Label = Literal["report", "predicted"]  # the class that a synthetic study is given: of its source, or predicted


@dataclass(frozen=True)
class CasePrompt:
    """What is known of a case, for volumes that show what its report says.

    Attributes:
        case: its name.
        split: "train", "val" or "test"; also of what is generated from it.
        pirads: "neg" or "pos"; None if its class is unknown.
        spacing: voxel size in mm.
        affine: of the model's grid for this case, voxels to RAS mm (4, 4); None: the grid is centered at the origin.
        read_features: reads the text features (L, E) of its report; None if it has no report.
        report: the text, where it is known.
    """

    case: str
    split: Split
    pirads: str | None
    spacing: tuple[float, ...]
    affine: list[list[float]] | None
    read_features: Callable[[], np.ndarray] | None = field(repr=False)
    report: str | None = field(default=None, repr=False)  # confidential


class Draw(NamedTuple):
    """One volume to generate: the k-th from a case."""

    prompt: CasePrompt
    k: int

    @property
    def name(self) -> str:
        """Of the synthetic study."""
        return f"{self.prompt.case}-synth-{self.k}"

    def seed(self, seed: int) -> int:
        """The seed of its noise, which depends on the case, k and the seed of the set alone."""
        digest = hashlib.sha256(f"{seed} {self.k} {self.prompt.case}".encode()).digest()
        return int.from_bytes(digest[:6], "big")


def prompts_of_prepared(folder: str | Path, split: Split, config: Config) -> list[CasePrompt]:
    """The cases of a split of a prepared folder, whose text features are read when they are needed.

    Raises:
        DataError: the folder is not a prepared one, it has no study in the split, or it was prepared for another grid or
            text encoder than those of the model.
    """
    prepared = load_manifest(folder)
    check_spacing(prepared, config)
    if prepared.data.dim != config.data.dim:
        why = f"the images have {prepared.data.dim} voxels, but {config.data.dim} are configured"
        fix = "prepare the data with the configuration of the model"
        raise DataError(why, path=prepared.folder / NAME, field="data.dim", fix=fix)
    if config.model.traits.text:
        check_encoder(prepared, config)
    cases = [case for case in prepared.cases if case.split == split]
    if not cases:
        known = ", ".join(sorted({case.split for case in prepared.cases}))
        why = f"there is no study in the split '{split}'"
        raise DataError(why, path=prepared.folder / NAME, field="cases", fix=f"use --split with one of: {known}")
    return [
        CasePrompt(
            case.id, case.split, None if case.pirads is None else CLASS_NAMES[case.pirads.index(1)],
            tuple(case.spacing), [list(row) for row in case.affine],
            None if case.text_isnull else partial(_read_features, prepared, case),
        )
        for case in cases
    ]  # fmt: skip


def _read_features(prepared: Manifest, case: StudyEntry) -> np.ndarray:
    return np.array(prepared.array(case, "text", verify=True))


def null_text_of(folder: str | Path) -> np.ndarray | None:
    """The features (1, L, E) of the null report that a prepared folder contains; None if it does not."""
    prepared = load_manifest(folder)
    if prepared.null_text is None:
        return None
    return np.array(prepared.open_entry(prepared.null_text, "null_text", verify=True))[None]


def prompts_of_table(table: str | Path, config: Config, text_encoder: Any = None) -> list[CasePrompt]:
    """The rows of a table like studies.csv, whose reports are encoded at once.

    Args:
        table: the file.
        config: of the model.
        text_encoder: an object with `encode(reports).features`; default: the configured one.

    Raises:
        DataError: the table cannot be read, or a row is invalid.
    """
    studies = studies_of(Path(table))
    reports = list(dict.fromkeys(study.report for study in studies if study.report))
    features: dict[str, np.ndarray] = {}
    if reports and config.model.traits.text:
        if text_encoder is None:
            from ccella_fast.data.text_encoder import TextEncoder

            text_encoder = TextEncoder(config.text)
        features = dict(zip(reports, np.asarray(text_encoder.encode(reports).features, np.float32), strict=True))
    return [
        CasePrompt(
            check_id(study.id, Path(table), study.field), study.split,
            None if study.pirads is None else CLASS_NAMES[study.pirads.index(1)], tuple(config.data.spacing), None,
            partial(features.__getitem__, study.report) if study.report in features else None, study.report,
        )
        for study in studies
    ]  # fmt: skip


def choose_draws(
    prompts: Sequence[CasePrompt], variant: Variant, *, per_case: int = 1, per_class: int | None = None
) -> list[Draw]:
    """The volumes to generate, in the order of the cases.

    Cases that lack what the variant is conditioned on, a report or a class, are left out, and counted in the log.

    Args:
        prompts: the cases.
        variant: of the model.
        per_case: volumes from each case.
        per_class: volumes of each class, in place of `per_case`: cases of a class are used in turn until there are as many.

    Raises:
        ConfigError: a number is below 1, no case is left, or a class has none.
    """
    for name, number in (("per_case", per_case), ("per_class", per_class)):
        if number is not None and number < 1:
            raise ConfigError(f"--{name} must be at least 1, got {number}", field=f"--{name}", fix="use 1 or more")
    usable = list(prompts)
    needs = {
        "report": (variant.text, lambda prompt: prompt.read_features is not None),
        "class": (variant.class_input == "given" or per_class is not None, lambda prompt: prompt.pirads is not None),
    }
    for what, (is_needed, has) in needs.items():
        kept = [prompt for prompt in usable if not is_needed or has(prompt)]
        if len(kept) < len(usable):
            logger.warning("cases without a %s, which are left out: %d", what, len(usable) - len(kept))
        usable = kept
    if not usable:
        why = f"none of {counted(len(prompts), 'case')} has what {variant.name} is conditioned on"
        raise ConfigError(why, field="cases", fix="give cases with reports" + (" and classes" if per_class else ""))
    equally = dict.fromkeys((prompt.case for prompt in usable), per_case)
    counts = equally if per_class is None else _balanced(usable, per_class)
    draws = [Draw(prompt, k) for prompt in usable for k in range(counts[prompt.case])]
    for draw in draws:
        if not re.fullmatch(CASE_ID, draw.name):
            why = f"the name of a case leaves no room for that of a study from it: {len(draw.prompt.case)} characters"
            raise ConfigError(why, field=draw.prompt.case[:60], fix="use names of at most 100 characters")
    return draws


def _balanced(prompts: Sequence[CasePrompt], per_class: int) -> dict[str, int]:
    """How many volumes each case gives, so that each class has `per_class`."""
    counts = {}
    for name in CLASS_NAMES:
        of_class = [prompt for prompt in prompts if prompt.pirads == name]
        if not of_class:
            why = f"no case of the class {name} is left, of which --per_class wants {per_class}"
            raise ConfigError(why, field="--per_class", fix="use --per_case, or give cases of both classes")
        for number, prompt in enumerate(of_class):
            counts[prompt.case] = (per_class - number - 1) // len(of_class) + 1
    return counts
