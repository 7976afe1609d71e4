"""Studies that occur twice, and what is known from training in the studies that are held out.

Images are compared by their voxels and by signatures, reports by their text. A report that many studies share, or of a few
words, is a template of the clinic and not the same study.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from ccella_fast.data.checking.findings import Finding
from ccella_fast.data.checking.signature import find_copies
from ccella_fast.data.checking.study_facts import StudyFacts

_TEMPLATE_STUDIES = 4  # studies that share a text
_TEMPLATE_WORDS = 8  # shorter texts are shared by chance


def check_duplicates(facts: Sequence[StudyFacts]) -> list[Finding]:
    """Findings about pairs of studies, within a split and across splits."""
    identical = _groups(facts, lambda study: tuple(sorted(study.images.items())) or None)
    same_images = {frozenset((first.id, second.id)) for group in identical for first in group for second in group}
    signed = [study for study in facts if study.signature is not None]
    copies = [
        [signed[first], signed[second]]
        for first, second in find_copies([study.signature for study in signed if study.signature is not None])
        if frozenset((signed[first].id, signed[second].id)) not in same_images
    ]
    found = [
        *_images(identical, "duplicate_images", "have the same voxels"),
        *_images(copies, "similar_images", "are flipped, cropped or rescaled copies of each other"),
        *_patients(facts),
        *_sources(facts),
        *_reports(facts),
    ]
    unsigned = len(facts) - len(signed)
    if signed and unsigned:
        why = f"studies of which no copies were looked for (unreadable, or prepared by an earlier version): {unsigned}"
        found.append(
            Finding("no_signature", "info", why, studies=_ids(study for study in facts if not study.signature))
        )
    return found


def _images(groups: Iterable[list[StudyFacts]], name: str, what: str) -> list[Finding]:
    return [
        _leak(group, f"{len(group)} studies in different splits {what}")
        if _across_splits(group)
        else Finding(name, "warning", f"{len(group)} studies {what}", "keep one of them", _ids(group))
        for group in groups
    ]


def _patients(facts: Sequence[StudyFacts]) -> list[Finding]:
    groups = _groups(facts, lambda study: study.patient)
    why = "one patient has studies in different splits"
    return [_leak(group, why) for group in groups if _across_splits(group)]


def _sources(facts: Sequence[StudyFacts]) -> list[Finding]:
    """A generated study shows what its prompt says, so it belongs to the split of the case that it was generated from."""
    by_id = {study.id: study for study in facts}
    pairs = [[by_id[study.source_case], study] for study in facts if study.source_case in by_id]
    why = "a study and one that was generated from its report or class are in different splits"
    return [_leak(pair, why) for pair in pairs if _across_splits(pair)]


def _reports(facts: Sequence[StudyFacts]) -> list[Finding]:
    found, templates = [], list[StudyFacts]()
    for group in _groups((study for study in facts if study.source_case is None), lambda study: study.report):
        words = group[0].words
        if len(group) >= _TEMPLATE_STUDIES or (words is not None and words < _TEMPLATE_WORDS):
            templates += group
        elif _across_splits(group):
            found.append(_leak(group, f"{len(group)} studies in different splits have the same report"))
        else:
            fix = "check that each report belongs to its study"
            found.append(
                Finding("same_report", "warning", f"{len(group)} studies have the same report", fix, _ids(group))
            )
    if templates:
        why = f"{len(templates)} studies share their report's text with others, as templates of a clinic do"
        found.append(
            Finding("template_reports", "warning", why, "check that the column report is complete", _ids(templates))
        )
    return found


def _leak(group: list[StudyFacts], why: str) -> Finding:
    fix = "put them into one split, or remove all but one"
    return Finding("leakage", "stop", why, fix, _ids(group))


def _groups(facts: Iterable[StudyFacts], key: Callable[[StudyFacts], object]) -> list[list[StudyFacts]]:
    """The studies that have their key in common with another one."""
    groups = defaultdict(list)
    for study in facts:
        if (value := key(study)) is not None:
            groups[value].append(study)
    return [group for group in groups.values() if len(group) > 1]


def _across_splits(group: Iterable[StudyFacts]) -> bool:
    return len({study.split for study in group}) > 1


def _ids(group: Iterable[StudyFacts]) -> tuple[str, ...]:
    return tuple(study.id for study in group)
