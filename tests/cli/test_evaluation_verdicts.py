"""The three answers of an evaluation's page: what makes them yes, no and undecided, and what their sentences say."""

from __future__ import annotations

from typing import Any

import pytest

from ccella_fast.report.stored_evaluation import MetricRow, StoredEvaluation, _row, guard_sentence
from ccella_fast.report.verdicts import Verdict, _share_interval, percent, shown, verdicts
from evaluation_page_fixtures import agreement, copies, distance, row


def answers(*rows: dict[str, Any], failed: tuple[str, ...] = (), phantom: bool = False) -> list[Verdict]:
    parsed: list[MetricRow] = [_row(each) for each in rows]
    parsed = [each._replace(guards=(*each.guards, "gate")) if each.features in failed else each for each in parsed]
    return verdicts(StoredEvaluation(parsed, [], {}, "", [], [], phantom, {}))


def good(*rows: dict[str, Any], **more: Any) -> Verdict:
    return answers(*rows, **more)[0]


@pytest.mark.parametrize(
    ("ratio", "half", "guards", "expected"),
    [
        (1.05, 0.15, ["n<d"], "yes"), (1.05, 0.15, ["few"], "undecided"), (1.2, 0.3, [], "undecided"),
        (1.6, 0.3, [], "no"), (1.6, 0.4, [], "undecided"), (4.9, 0.7, ["few"], "no"), (4.9, 0.7, ["no_floor"], "undecided"),
    ],
)  # fmt: skip
def test_good_is_where_the_interval_of_the_ratio_lies(ratio, half, guards, expected):
    verdict = good(distance("taps-l3", ratio, half, guards=guards))
    assert verdict.answer == expected
    if guards != ["no_floor"]:
        assert (
            f"{shown(ratio)} times as far" in verdict.sentence
            and f"interval {shown(ratio - half)} to" in verdict.sentence
        )
        assert (
            "(n = 24)" in verdict.sentence
            and "real volumes (n = 32)" in verdict.sentence
            and "is 2.2:" in verdict.remarks[1]
        )
    else:
        assert verdict.sentence == guard_sentence("no_floor")


def test_the_most_trusted_feature_space_decides_and_others_are_named():
    rows = [distance("radiomics", 30, 1), distance("random", 1.0, 0.1), distance("taps-l3", 4.9, 0.7)]
    verdict = good(*rows)
    assert verdict.answer == "no" and "taps-l3" in verdict.remarks[0]
    assert any("random 1.0; not all give this answer" in remark for remark in verdict.remarks)
    assert "radiomics" not in str(verdict)
    passed_on = good(*rows, failed=("taps-l3",))
    assert passed_on.answer == "yes" and "random" in passed_on.remarks[0]
    assert good(*rows, failed=("taps-l3", "random")).answer == "undecided"
    assert good(distance("radiomics", 30, 1)).answer == "no"  # where there is nothing else
    assert good(row("kid", "taps-l3", 1.0)).answer == "undecided" and good().answer == "undecided"


def test_every_sequence_must_be_good():
    t2w, adc = distance("taps-l3", 1.0, 0.1), distance("random", 2.0, 0.1, sequence="adc")
    assert (good(t2w).answer, good(t2w, adc).answer) == ("yes", "no")
    assert "By sequence: adc no, t2w yes." in good(t2w, adc).remarks
    assert not any("other feature spaces" in remark for remark in good(t2w, adc).remarks)
    unclear = distance("random", 1.2, 0.3, sequence="adc")
    assert good(t2w, unclear).answer == "undecided"


def test_phantoms_are_called_phantoms():
    assert "from phantoms (n = 32) as phantoms are" in good(distance("taps-l3", 2, 0.1), phantom=True).sentence
    assert "phantom" not in str(good(distance("taps-l3", 2, 0.1)))


@pytest.mark.parametrize(
    ("rows", "expected", "words"),
    [
        (
            [copies(0, 100, (0.0, 0.037))],
            "yes",
            "No copy of a training study among 100 generated volumes: at most 3.7 %",
        ),
        ([copies(0, 24, (0.0, 0.138))], "undecided", "at most 14 %"),
        ([copies(0, 100, (0.0, 0.037), n_real=19)], "undecided", "No copy"),
        ([copies(1, 100, (0.002, 0.054))], "no", "1 of 100 generated volumes is a copy"),
        (
            [copies(0, 100, (0, 0.037)), copies(3, 100, (0.01, 0.085), features="image-4mm")],
            "no",
            "3 of 100 generated volumes are",
        ),
        ([], "undecided", "--train"),
    ],
)
def test_new_needs_enough_volumes_without_a_copy(rows, expected, words):
    verdict = answers(*rows)[1]
    assert verdict.answer == expected and words in verdict.sentence


def test_volumes_that_are_too_near_are_a_doubt():
    none = copies(0, 100, (0.0, 0.037))
    assert answers(none, row("below_5pct", "taps-l3", 0.08, n_synthetic=100))[1].answer == "yes"
    near = answers(none, row("below_5pct", "taps-l3", 0.20, n_synthetic=100))[1]
    assert near.answer == "undecided" and any(remark.startswith("20 % are nearer") for remark in near.remarks)


def test_the_interval_of_a_share_is_wilsons():
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29."""
    for count, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert _share_interval(count / n, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (agreement(0.8, (0.6, 1.0)), "yes"), (agreement(0.8, (0.6, 1.0), guards=["few"]), "undecided"),
        (agreement(0.55, (0.25, 0.82)), "undecided"), (agreement(0.1, (-0.2, 0.4)), "no"),
        (agreement(None, None, 0.55, guards=["unreadable"]), "undecided"),
    ],
)  # fmt: skip
def test_obeying_is_measured_between_shuffled_prompts_and_real_volumes(asked, expected):
    verdict = answers(asked)[2]
    assert verdict.answer == expected
    assert (
        "do not read the class" in verdict.sentence
        if asked["details"]["normalized"] is None
        else "95 % interval" in verdict.sentence
    )


def test_the_class_decides_if_it_can_be_read_and_the_best_reader_reads_it():
    zone = {**agreement(0.9, (0.8, 1.0)), "metric": "condition_zone"}
    low, unreadable = agreement(0.1, (-0.2, 0.4)), agreement(None, None, 0.6, guards=["unreadable"])
    assert answers(zone)[2].answer == "yes" and "The zone that was asked for" in answers(zone)[2].sentence
    for rows in ((zone, low), (low, zone)):
        assert answers(*rows)[2].answer == "no" and "Also asked for: zone 90 %." in answers(*rows)[2].remarks
    assert (
        answers(unreadable, zone)[2].answer == "yes"
        and "Also asked for: class unreadable." in answers(unreadable, zone)[2].remarks
    )
    better = {**agreement(0.9, (0.8, 1.0), ceiling=0.95), "features": "foci"}
    for rows in ((low, better), (better, low)):
        assert answers(*rows)[2].answer == "yes" and "features foci" in answers(*rows)[2].remarks[1]
    assert answers(low, better, failed=("foci",))[2].answer == "no"
    assert answers()[2].answer == "undecided"


def test_numbers_are_short():
    assert [shown(value) for value in (None, 0, 4.91, 0.0312, 662.4, 15, -0.01, 0.996, 1e-7)] == [
        "-", "0", "4.9", "0.031", "662", "15", "-0.010", "1.0", "1e-07",
    ]  # fmt: skip
    assert [percent(share) for share in (0, 0.05, 0.037, 0.138, 1, -0.2)] == [
        "0 %",
        "5 %",
        "3.7 %",
        "14 %",
        "100 %",
        "-20 %",
    ]
