"""Is it good, is it new, does it obey the report: one verdict and one sentence for each question.

The rules are fixed before any generator is looked at. Yes and no need an interval that lies on one side of a limit; all else is
undecided, and the sentence says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ccella_fast.quantities import counted
from ccella_fast.report.findings import EXPLAINING, Findings, MetricRow, guard_sentence

MARGIN = 1.25  # times the floor: between a blur of 0.5 mm and one of 1 mm of real volumes, in the feature space taps-l3
MOST_COPIES = 0.05  # share of the volumes; the interval must be below it
FEW_HELD_OUT = 20
OBEYED = 0.5  # of the way from shuffled prompts (0) to real volumes (1)
LEAST_SPAN = 0.1  # between shuffled prompts and real volumes: with less the reader of the images cannot read them
CONDITIONS = ("class_agreement", "side_agreement", "zone_agreement", "size_agreement", "gland_volume", "retrieval")
_SILENCING = ("no_floor", "one_volume", "gate")  # no verdict follows from such a row

Answer = Literal["yes", "no", "undecided"]


class Verdict(NamedTuple):
    """An answer.

    Attributes:
        question: in plain words.
        answer: "yes", "no" or "undecided".
        sentence: why, with the value, its interval and the number of volumes.
        remarks: further sentences, such as guards.
    """

    question: str
    answer: Answer
    sentence: str
    remarks: list[str]


def verdicts(findings: Findings) -> list[Verdict]:
    """The three verdicts, in the order of the questions."""
    return [_good(findings), _new(findings), _obeys(findings)]


def shown(value: float | None, digits: int = 2) -> str:
    """A number with this many significant digits, never in scientific notation unless it is tiny; "-" for none."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, places)}f}" if -1 < places < 5 or value >= 1 else f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share in percent, with a decimal where it is below 10 %."""
    return f"{100 * share:.0f} %" if share in (0, 1) or share >= 0.1 else f"{100 * share:.1f} %"


def _good(findings: Findings) -> Verdict:
    question = "Is it good?"
    word = "phantom" if findings.phantom else "real"
    rows = [row for row in findings.named("fd") if row.features != EXPLAINING] or findings.named("fd")
    if not rows:
        return Verdict(question, "undecided", "No distance between generated and real volumes was computed.", [])
    judged = [row for row in rows if row.ratio_ci95 and row.ratio is not None and not set(row.guards) & set(_SILENCING)]
    if not judged:
        reasons = _sentences(rows[:1], _SILENCING) or ["No ratio to the floor with an interval was computed."]
        return Verdict(question, "undecided", reasons[0], [_counts(rows[0], word)])
    headline = judged[0]
    answers = [_against_margin(row) for row in judged]
    assert headline.ratio is not None and headline.ratio_ci95
    low, high = headline.ratio_ci95
    ratio = f"{shown(headline.ratio)} times as far from {word} ones as {word} ones are from each other"
    interval = f"95 % interval {shown(max(0.0, low))} to {shown(high)}; up to {MARGIN:g} counts as equal"
    sentence = f"Generated volumes are {ratio} ({interval})."
    remarks = [_counts(headline, word)]
    if headline.limit_autoencoder is not None and headline.floor:
        limit = shown(headline.limit_autoencoder / headline.floor)
        remarks.append(
            f"Volumes that were only encoded and decoded are {limit} times as far: the limit of this autoencoder."
        )
    others = [place for place, row in enumerate(judged) if place and row.sequence == headline.sequence]
    if others:
        agree = sum(answers[place] == answers[0] for place in others)
        spaces = ", ".join(f"{judged[place].features} {shown(judged[place].ratio)}" for place in others)
        remarks.append(f"Other feature spaces: {spaces}; {agree} of {len(others)} lead to the same answer.")
    remarks += _sentences([headline], ("few", "standardised_by_itself"))
    pairs = reversed(list(zip(judged, answers, strict=True)))
    firsts = {row.sequence: each for row, each in pairs}  # of the most trusted space of each sequence
    answer: Answer = "no" if "no" in firsts.values() else "yes" if set(firsts.values()) == {"yes"} else "undecided"
    if len(firsts) > 1:
        remarks.append(
            "By sequence: " + ", ".join(f"{sequence} {each}" for sequence, each in sorted(firsts.items())) + "."
        )
    return Verdict(question, answer, sentence, remarks)


def _against_margin(row: MetricRow) -> Answer:
    assert row.ratio_ci95
    low, high = row.ratio_ci95
    if low > MARGIN:
        return "no"
    return "yes" if high <= MARGIN and "few" not in row.guards else "undecided"


def _new(findings: Findings) -> Verdict:
    question = "Is it new?"
    rows = [row for row in findings.named("memorisation") if row.value is not None]
    if not rows:
        sentence = "Nobody looked for copies of training studies: give the training set with --train."
        return Verdict(question, "undecided", sentence, [])
    worst = max(rows, key=lambda row: (row.value or 0, row.ci95 or (0, 0)))
    n, held_out = worst.n_synthetic, int(worst.details.get("n_held_out", worst.n_real))
    copies, space = round((worst.value or 0) * n), worst.features or "the images"
    low, high = worst.ci95 or (0.0, 1.0)
    remarks = [
        f"Compared with the distances of {counted(held_out, 'held-out volume')} to the training set, in "
        + (f"{counted(len(rows), 'space')}: {', '.join(sorted({row.features or 'images' for row in rows}))}.")
    ]
    if "share_below_5pct" in worst.details:
        near = float(worst.details["share_below_5pct"])
        remarks.append(f"Nearer than 95 % of the held-out volumes: {percent(near)} (5 % are expected), in {space}.")
    if copies:
        are = "is a copy" if copies == 1 else "are copies"
        interval = f"95 % interval {percent(low)} to {percent(high)}"
        sentence = f"{copies} of {counted(n, 'generated volume')} {are} of training studies ({interval}), in {space}."
        return Verdict(question, "no", sentence, remarks)
    bound = f"at most {percent(high)} are, with 95 % confidence"
    sentence = f"None of {counted(n, 'generated volume')} is a copy of a training study ({bound})."
    if held_out < FEW_HELD_OUT:
        remarks.append(
            f"With fewer than {FEW_HELD_OUT} held-out volumes nobody knows how near a new volume usually is."
        )
        return Verdict(question, "undecided", sentence, remarks)
    if high > MOST_COPIES:
        remarks.append(f"Yes needs at most {percent(MOST_COPIES)}: generate more volumes.")
        return Verdict(question, "undecided", sentence, remarks)
    return Verdict(question, "yes", sentence, remarks)


def _obeys(findings: Findings) -> Verdict:
    question = "Does it obey the report?"
    rows = [
        row for row in findings.rows if row.metric in CONDITIONS and row.value is not None and row.floor is not None
    ]
    rows = [row for row in rows if _ceiling(row) is not None]
    if not rows:
        sentence = "Nothing that a report states was looked for in the generated volumes."
        return Verdict(question, "undecided", sentence, [])
    first = min(rows, key=lambda row: (CONDITIONS.index(row.metric), "gate" in row.guards))
    ceiling, floor, value = _ceiling(first), first.floor, first.value
    assert ceiling is not None and floor is not None and value is not None
    what = first.metric.removesuffix("_agreement").replace("_", " ")
    scale = f"shuffled prompts {shown(floor)}, real volumes {shown(ceiling)}"
    remarks = [f"{counted(first.n_synthetic, 'generated volume')}; read by a probe that was fitted to real volumes."]
    if ceiling - floor < LEAST_SPAN:
        sentence = f"The {what} cannot be read from real volumes either ({scale}), so nothing follows."
        return Verdict(question, "undecided", sentence, remarks)
    share = (value - floor) / (ceiling - floor)
    low, high = ((bound - floor) / (ceiling - floor) for bound in first.ci95 or (-math.inf, math.inf))
    interval = f", 95 % interval {percent(low)} to {percent(high)}" if first.ci95 else ""
    found = f"is found in the volumes with a score of {shown(value)} ({scale})"
    sentence = f"The {what} that was asked for {found}: {percent(share)} of the way{interval}."
    answer: Answer = "yes" if low >= OBEYED else "no" if high < OBEYED else "undecided"
    remarks.append(f"Yes needs at least {percent(OBEYED)}, with the whole interval.")
    return Verdict(question, answer, sentence, remarks + _sentences([first], ("few", "gate")))


def _ceiling(row: MetricRow) -> float | None:
    value = row.details.get("ceiling")
    return None if value is None else float(value)


def _counts(row: MetricRow, word: str) -> str:
    metric = "Fréchet distance" + (f" in {row.features}" if row.features else "")
    return f"{metric}; {row.n_real} {word} and {counted(row.n_synthetic, 'generated volume')}."


def _sentences(rows: Sequence[MetricRow], guards: Sequence[str]) -> list[str]:
    return [guard_sentence(guard) for guard in guards for row in rows if guard in row.guards]
