"""Is it good, is it new, does it obey the report: one verdict and one sentence for each question.

The rules are fixed before any generator is looked at. Yes and no need an interval that lies on one side of a limit; all else is
undecided, and the sentence says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ccella_fast.quantities import counted
from ccella_fast.report.stored_evaluation import EXPLAINING, MetricRow, StoredEvaluation, guard_sentence

MARGIN = 1.25  # times the floor: between a blur of 0.5 mm and one of 1 mm of real volumes, in the feature space taps-l3
MOST_COPIES = 0.05  # share of the volumes; the interval must be below it
LEAST_HELD_OUT = 20
OBEYED = 0.5  # of the way from shuffled prompts (0) to real volumes (1)
CONDITION = "condition_"  # rows of a property that was asked for; the class decides if there is a row for it
COUNTERFACTUAL = "counterfactual_"  # rows of a property in pairs of the same noise that were asked for different values
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


def verdicts(stored: StoredEvaluation) -> list[Verdict]:
    """The three verdicts, in the order of the questions."""
    return [_good(stored), _new(stored), _obeys(stored)]


def shown(value: float | None, digits: int = 2) -> str:
    """A number with this many significant digits; "-" for none."""
    if value is None:
        return "-"
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded == 0 or abs(rounded) < 1e-4:
        return f"{rounded:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def percent(share: float) -> str:
    """A share in percent, with a decimal where it is needed below 10 %."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 10 or abs(value - round(value)) < 0.05 else f"{value:.1f} %"


def _good(stored: StoredEvaluation) -> Verdict:
    question = "Is it good?"
    rows = [row for row in stored.named("fd") if row.features != EXPLAINING] or stored.named("fd")
    if not rows:
        return Verdict(question, "undecided", "No distance of generated volumes to real ones was computed.", [])
    judged = [row for row in rows if row.ratio is not None and row.ratio_ci95 and not row.has(*_SILENCING)]
    if not judged:
        reasons = _sentences(rows[0], _SILENCING) or [
            "The distance of generated volumes to real ones has no floor or interval."
        ]
        return Verdict(question, "undecided", reasons[0], [_distance(rows[0])])
    first, *others = judged
    answers = [_against_margin(row) for row in judged]
    assert first.ratio_ci95
    low, high = first.ratio_ci95
    interval = f"95 % interval {shown(max(0.0, low))} to {shown(high)}; up to {MARGIN:g} counts as equal"
    words = f"{stored.word}s"
    ratio = f"{shown(first.ratio)} times as far from {words} (n = {first.n_real}) as {words} are from each other"
    sentence = f"Generated volumes (n = {first.n_synthetic}) are {ratio} ({interval})."
    remarks = [_distance(first)]
    if first.limit_autoencoder is not None and first.floor:
        limit = shown(first.limit_autoencoder / first.floor)
        remarks.append(f"The limit of this autoencoder is {limit}: {words} that were only encoded and decoded.")
    same = [answer for row, answer in zip(others, answers[1:], strict=True) if row.sequence == first.sequence]
    if same:
        spaces = ", ".join(f"{row.features} {shown(row.ratio)}" for row in others if row.sequence == first.sequence)
        agree = "the same answer" if set(same) == {answers[0]} else "not all give this answer"
        remarks.append(f"In other feature spaces: {spaces}; {agree}.")
    remarks += _sentences(first, ("few", "standardised_by_itself"))
    decisive = {row.sequence: answer for row, answer in reversed(list(zip(judged, answers, strict=True)))}
    if len(decisive) > 1:
        remarks.append(
            "By sequence: " + ", ".join(f"{name} {answer}" for name, answer in sorted(decisive.items())) + "."
        )
    found = set(decisive.values())
    answer: Answer = "no" if "no" in found else "yes" if found == {"yes"} else "undecided"
    return Verdict(question, answer, sentence, remarks)


def _against_margin(row: MetricRow) -> Answer:
    assert row.ratio_ci95
    low, high = row.ratio_ci95
    if low > MARGIN:
        return "no"
    return "yes" if high <= MARGIN and not row.has("few") else "undecided"


def _new(stored: StoredEvaluation) -> Verdict:
    question = "Is it new?"
    rows = [row for row in stored.named("copies") if row.value is not None and row.ci95]
    if not rows:
        sentence = "Copies of training studies were not looked for: give the training set with --train."
        return Verdict(question, "undecided", sentence, [])
    worst = max(rows, key=lambda row: (row.value or 0, not row.has("gate")))
    assert worst.value is not None and worst.ci95
    n, held_out, (low, high) = worst.n_synthetic, worst.n_real, worst.ci95
    copies = round(worst.value * n)
    spaces = ", ".join(dict.fromkeys(row.features or "images" for row in rows))
    volumes = counted(n, "generated volume")
    remarks = [f"Compared with {counted(held_out, 'held-out volume')}, features {spaces}."]
    if copies:
        are, interval = "is a copy" if copies == 1 else "are copies", f"95 % interval {percent(low)} to {percent(high)}"
        sentence = f"{copies} of {volumes} {are} of training studies ({interval}, in {worst.features})."
        return Verdict(question, "no", sentence, remarks)
    sentence = f"No copy of a training study among {volumes}: at most {percent(high)} are copies (95 % confidence)."
    doubts = []
    near = max(stored.named("below_5pct"), key=lambda row: row.value or 0, default=None)
    if near is not None and near.value is not None and _share_interval(near.value, near.n_synthetic)[0] > MOST_COPIES:
        doubts.append(
            f"{percent(near.value)} are nearer to a training study than 95 % of held-out ones, in {near.features}."
        )
    if held_out < LEAST_HELD_OUT:
        doubts.append(
            f"Yes needs at least {LEAST_HELD_OUT} held-out volumes, which say how near a new volume usually is."
        )
    if high > MOST_COPIES:
        doubts.append(f"Yes needs a bound of at most {percent(MOST_COPIES)}: 73 volumes without a copy.")
    return Verdict(question, "undecided" if doubts else "yes", sentence, remarks + doubts)


def _share_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n volumes (Wilson 1927)."""
    z2 = 1.96**2
    middle, half = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def _obeys(stored: StoredEvaluation) -> Verdict:
    question = "Does it obey the report?"
    asked = [row for row in stored.rows if row.metric.startswith(CONDITION)]
    if not asked:
        return Verdict(question, "undecided", "Nothing that was asked for was looked for in the generated volumes.", [])
    # Of the probes that read a property, the one that reads it best from real volumes.
    asked.sort(
        key=lambda row: (not _is_readable(row), row.metric != CONDITION + "class", -(row.number("ceiling") or -1))
    )
    first, words = asked[0], f"{stored.word}s"
    score = {"auc": "AUC", "spearman": "Rank correlation"}.get(str(first.details.get("score")), "Score")
    real = f"{words} {shown(first.number('ceiling'))}"
    reached = f"generated {shown(first.value)}, {real}, prompts in random order {shown(first.floor)}"
    remarks = [f"{score}: {reached}.", _read_counts(first, stored)]
    if not _is_readable(first):
        sentence = (
            f"The probes do not read the {_property(first)} of {words} reliably, so nothing follows for generated ones."
        )
        return Verdict(question, "undecided", sentence, remarks)
    share, interval = first.number("normalized"), first.pair("normalized_ci95")
    assert share is not None and interval is not None
    low, high = interval
    bounds = f"95 % interval {percent(low)} to {percent(high)}"
    sentence = (
        f"The {_property(first)} that was asked for shows at {percent(share)} of the strength in {words} ({bounds})."
    )
    others = {_property(row): row.number("normalized") for row in reversed(asked) if row.metric != first.metric}
    if others:
        found = [
            f"{name} {'unreadable' if value is None else percent(value)}" for name, value in sorted(others.items())
        ]
        remarks.append(f"Also asked for: {', '.join(found)}.")
    remarks.append(f"Yes needs at least {percent(OBEYED)}, with the whole interval.")
    remarks += _sentences(first, ("few",))
    answer: Answer = "no" if high < OBEYED else "yes" if low >= OBEYED and not first.has("few") else "undecided"
    return Verdict(question, answer, sentence, remarks)


def _is_readable(row: MetricRow) -> bool:
    """Whether the probe reads the property from real volumes."""
    return (
        row.number("normalized") is not None
        and row.pair("normalized_ci95") is not None
        and not row.has("unreadable", "gate")
    )


def _property(row: MetricRow) -> str:
    return row.metric.removeprefix(CONDITION).replace("_", " ")


def _distance(row: MetricRow) -> str:
    return "Fréchet distance" + (f" in the features {row.features}." if row.features else ".")


def _read_counts(row: MetricRow, stored: StoredEvaluation) -> str:
    reader = f"Read by linear probes on the features {row.features}" if row.features else "Measured by the segmenter"
    return f"{reader}; n = {row.n_real} {stored.word}s, {row.n_synthetic} generated."


def _sentences(row: MetricRow, guards: Sequence[str]) -> list[str]:
    return [guard_sentence(guard) for guard in guards if guard in row.guards]
