"""All checks that need no image file, as `prepare`, training and `check` make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ccella_fast.config import Config
from ccella_fast.data.checking.classes import check_classes
from ccella_fast.data.checking.duplicates import check_duplicates
from ccella_fast.data.checking.findings import Finding, log_findings, raise_if_stopped
from ccella_fast.data.checking.geometry import check_geometry
from ccella_fast.data.checking.study_facts import StudyFacts, facts_of_manifest
from ccella_fast.data.loading.selection import select_studies
from ccella_fast.data.manifest import NAME, Manifest


def check_facts(facts: Sequence[StudyFacts], config: Config) -> list[Finding]:
    """Findings about classes, reports, duplicates and, where the series were read, geometry."""
    return [*check_classes(facts, config), *check_duplicates(facts), *check_geometry(facts, config)]


def check_before_training(manifest: Manifest, config: Config, allow: Sequence[str]) -> None:
    """Log what is remarkable about a prepared folder.

    Args:
        manifest: Of the prepared folder; its images are not opened.
        config: The configuration of the training.
        allow: Names of findings with which training starts nevertheless.

    Raises:
        DataError: If training on it is pointless, or cannot be judged because training studies are held out too.
    """
    aside = {case.id for case in select_studies(manifest, config, "val")}
    facts = [fact._replace(split="val") if fact.id in aside else fact for fact in facts_of_manifest(manifest)]
    findings = check_facts(facts, config)
    raise_if_stopped(findings, allow, Path(manifest.folder) / NAME)
    log_findings(findings)
