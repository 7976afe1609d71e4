"""Answers and tables of a comparison, from a made-up record whose numbers are computed by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ccella_fast.comparison import results


def row(metric: str, features: str, value: float | None, **more: Any) -> dict[str, Any]:
    return {
        "metric": metric,
        "features": features,
        "value": value,
        "floor": 2.0,
        "limit_autoencoder": 3.0,
        "ceiling": None,
        **more,
    }


def contrast(name: str, difference: float, half: float, p: float = 0.5, equal: str = "undecided") -> dict[str, Any]:
    low, high = difference - half, difference + half
    verdict = "yes" if low > 0 else "no" if high < 0 else "undecided"
    return {"contrast": name, "metric": "accuracy", "difference": difference, "ci95": [low, high], "p": p, "verdict": verdict,
            "equivalence": {"margin": 0.05, "p": 0.5, "verdict": equal}}  # fmt: skip


def record(first: list[float], second: list[float], contrasts: list[dict[str, Any]]) -> dict[str, Any]:
    generators = [
        {"variant": variant, "seed": seed, "rows": [
            row("fd", "taps-l3", value), row("fd", "radiomics", 99.0), row("kid", "taps-l3", value / 100),
            row("condition_class", "foci", 0.5 + value / 100, ceiling=0.9), row("copies", "taps-l3", 0.0),
        ]}
        for variant, values in (("CCELLA", first), ("MAISI", second))
        for seed, value in enumerate(values, start=1)
    ]  # fmt: skip
    jobs = [("r", None, 0.70), ("r", None, 0.72), ("rs", "CCELLA", 0.74), ("rs", "CCELLA", 0.76), ("rb", "MAISI", 0.71)]
    return {
        "protocol": {"asked": {"variants": ["CCELLA", "MAISI"]}, "decided": {"space": "taps-l3"}},
        "protocol_sha256": "0" * 64, "generators": generators, "contrasts": contrasts, "paper": results.PAPER,
        "classifiers": [{"arm": arm, "variant": variant, "accuracy": accuracy} for arm, variant, accuracy in jobs],
    }  # fmt: skip


CONTRASTS = [
    contrast("rs-rr", 0.04, 0.03, p=0.01),
    contrast("s-r", -0.01, 0.02, equal="yes"),
    contrast("rs-rb", 0.01, 0.03),
]


def answers(found: dict[str, Any]) -> dict[str, str]:
    return {each.name: each.answer for each in results.statements(found)}


def test_permutations_are_enumerated():
    a, b = [1.0, 2.0, 4.0], [3.0, 5.0, 6.0]
    least = sum(sum(chosen) <= sum(a) for chosen in itertools.combinations([*a, *b], 3)) / 20
    assert results.permutation_p(a, b) == least == 2 / 20
    assert results.permutation_p(b, a) == 19 / 20
    assert results.permutation_p([1, 2, 3], [4, 5, 6]) == 1 / 20  # separated: the least with three and three
    assert results.permutation_p([1, 1], [1, 1]) == 1


def test_the_statements_follow_from_distances_and_contrasts():
    far, near = [20.0, 22.0, 21.0, 23.0], [10.0, 12.0, 11.0, 13.0]
    assert answers(record(near, far, CONTRASTS)) == {"O1": "yes", "O2": "yes", "O3": "yes", "O4": "undecided"}
    assert answers(record(far, near, CONTRASTS))["O1"] == "no"
    assert answers(record([10.0, 21.0, 12.0, 22.0], [11.0, 20.0, 13.0, 23.0], CONTRASTS))["O1"] == "undecided"
    o1, o2, *others = results.statements(record(near, far, CONTRASTS))
    assert o1.p == pytest.approx(1 / 70) and o2.p == 0.01
    assert o2.p_holm == pytest.approx(0.02) and o1.p_holm == pytest.approx(0.02)  # Holm: 2 x 0.01, then at least that
    assert "+4.0 points (+1.0 to +7.0)" in o2.sentence and "11.5 (10, 12, 11, 13) against 21.5" in o1.sentence
    assert [each.p for each in others] == [None, None]


def test_two_primary_statements_share_the_level():
    near, far = [10.0, 11.0, 12.0], [20.0, 21.0, 22.0]
    worse = [contrast("rs-rr", 0.02, 0.03, p=0.2), *CONTRASTS[1:]]
    o1, o2, *_ = results.statements(record(near, far, worse))
    assert o1.p == pytest.approx(0.05) and o1.p_holm == pytest.approx(0.1) and o1.answer == "undecided"
    assert o2.answer == "undecided"
    barely = [contrast("rs-rr", 0.04, 0.03, p=0.04), *CONTRASTS[1:]]
    o1, o2, *_ = results.statements(record([1.0, 2.0, 9.0], [3.0, 4.0, 5.0], barely))
    assert o2.p_holm == pytest.approx(0.08) and o2.answer == "undecided"  # alone, it would be a yes


def test_what_is_not_known_is_undecided():
    found = record([10.0, 11.0], [20.0, 21.0], [])
    found["generators"][0]["rows"][0]["value"] = None
    assert answers(found) == dict.fromkeys(("O1", "O2", "O3", "O4"), "undecided")


def test_the_table_has_the_floor_the_limit_and_the_variants():
    found = record([10.0, 12.0], [20.0, 22.0], CONTRASTS)
    found["statements"] = [each._asdict() for each in results.statements(found)]
    rows = {line[0]: dict(zip(results.COLUMNS, line, strict=True)) for line in results.table(found)}
    assert (rows["real against real"]["FD"], rows["real against real"]["class AUC"]) == ("2", "0.9")
    assert rows["real against real"]["accuracy of rs"] == "0.71 ± 0.014"
    assert rows["autoencoder alone"]["FD"] == "3" and rows["autoencoder alone"]["accuracy of rs"] == "–"
    assert rows["CCELLA"]["FD"] == "11 ± 1.4" and rows["CCELLA"]["KID"] == "0.11 ± 0.014"
    assert rows["CCELLA"]["accuracy of rs"] == "0.75 ± 0.014" and rows["MAISI"]["accuracy of rs"] == "0.71"
    assert rows["CCELLA"]["coverage"] == "–"  # was not computed
    assert (rows["CCELLA"]["report"], rows["MAISI"]["report"], rows["CCELLA"]["head"]) == ("yes", "no", "cascade")
    page = results.markdown(found, results.table(found))
    assert "| CCELLA | yes | predicted | cascade | 0.11 ± 0.014 | 11 ± 1.4 |" in page and "0.071" in page
    assert "on other data" in page and found["protocol_sha256"] in page
    assert r"11 $\pm$ 1.4" in results.latex(results.table(found)) and "±" not in results.latex(results.table(found))
