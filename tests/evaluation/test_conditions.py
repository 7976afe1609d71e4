"""Floors, ceilings and probes on planted generators; probes against plain gradient descent."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.evaluation.conditions import (
    agreement,
    condition_agreement,
    fit_probe,
    quotient_interval,
    spearman,
)

LEVELS = ("apex", "mid", "base")


def cases(n: int, seed: int, noise: float = 1.8, d: int = 40):
    """Features in which class, level and size are written, with noise, and these properties."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(99).standard_normal((d, 5)))[0].T
    positive, level, size = rng.random(n) < 0.4, rng.integers(3, size=n), rng.uniform(8, 20, n)
    features = 2 * positive[:, None] * directions[0] + 3 * directions[1 + level] + (size / 1.5)[:, None] * directions[4]
    features = features + noise * rng.standard_normal((n, d)) * np.linspace(0.3, 1.2, d) + 5
    properties = {
        "class": ["pos" if value else "neg" for value in positive],
        "level": [LEVELS[value] if here else None for value, here in zip(level, positive, strict=True)],
        "size": [float(value) if here else None for value, here in zip(size, positive, strict=True)],
    }
    return features, properties


@pytest.mark.parametrize("name", ["class", "level", "size"])
def test_a_generator_that_copies_held_out_cases_reaches_the_ceiling(name):
    fit, fit_known = cases(150, 0)
    real, known = cases(120, 1)
    order = np.random.default_rng(2).permutation(120)
    copies, prompts = real[order], [known[name][i] for i in order]
    found = condition_agreement(name, real, known[name], copies, prompts, fit=(fit, fit_known[name]))
    assert found.normalized == pytest.approx(1, abs=1e-9) and found.value == found.ceiling
    assert found.floor == pytest.approx(0.5 if name != "size" else 0, abs=0.02)
    assert found.ceiling > (0.75 if name != "size" else 0.5) and found.p < 0.01
    assert found.normalized_ci95[0] < 1 < found.normalized_ci95[1]
    assert found.accuracy == found.ceiling_accuracy and (found.accuracy is None) == (name == "size")
    # Cross-fitted: the probe that reads a copy has not seen the case that it copies.
    crossed = condition_agreement(name, real, known[name], copies, prompts, prompted_by=order.tolist())
    assert crossed.normalized == pytest.approx(1, abs=1e-9)
    seen = condition_agreement(name, real, known[name], copies, prompts)  # negative control
    assert seen.value > crossed.value + 0.02


@pytest.mark.parametrize("name", ["class", "level", "size"])
def test_shuffled_prompts_give_the_floor(name):
    real, known = cases(150, 0)
    synthetic, prompts = cases(150, 3)
    obeyed = condition_agreement(name, real, known[name], synthetic, prompts[name], seed=1)
    assert 0.75 < obeyed.normalized < 1.25
    rng, values = np.random.default_rng(4), []
    for _ in range(8):
        given = [value for value in prompts[name] if value is not None]
        shuffled = iter(rng.permutation(np.array(given)).tolist())
        orders = [None if value is None else next(shuffled) for value in prompts[name]]
        values.append(condition_agreement(name, real, known[name], synthetic, orders, permutations=200))
    assert abs(np.mean([each.normalized for each in values])) < 0.12
    assert sum(each.p < 0.05 for each in values) <= 2
    assert sum(each.normalized_ci95[0] <= 0 <= each.normalized_ci95[1] for each in values) >= 6
    assert all(each.normalized_ci95[1] < obeyed.normalized for each in values)


def test_p_is_uniform_when_the_prompt_has_no_influence():
    real, known = cases(60, 0)
    p = []
    for seed in range(25):
        synthetic, _ = cases(30, 100 + seed)
        prompts = np.random.default_rng(seed).permutation(["pos"] * 15 + ["neg"] * 15).tolist()
        p.append(condition_agreement("class", real, known["class"], synthetic, prompts, permutations=99).p)
    p = np.sort(p)
    assert np.abs(p - (np.arange(25) + 0.5) / 25).max() < 1.63 / np.sqrt(25)  # Kolmogorov and Smirnov, 1 %


def test_a_blurred_generator_is_between_floor_and_ceiling():
    real, known = cases(150, 0)
    synthetic, prompts = cases(150, 3)
    weak = (
        synthetic.mean(0)
        + 0.4 * (synthetic - synthetic.mean(0))
        + 0.7 * np.random.default_rng(0).standard_normal(synthetic.shape)
    )
    clear, faint = (condition_agreement("class", real, known["class"], x, prompts["class"]) for x in (synthetic, weak))
    assert 0 < faint.normalized_ci95[0] < faint.normalized < 0.8 * clear.normalized


def test_what_cannot_be_read_or_compared_has_no_value():
    real, known = cases(40, 0)
    synthetic, prompts = cases(10, 1)
    noise = np.random.default_rng(0).standard_normal((40, 30))
    unreadable = condition_agreement("class", noise, known["class"], noise[:10], prompts["class"])
    assert unreadable.normalized is None and set(unreadable.guards) == {"few", "unreadable"}
    assert unreadable.value is not None and unreadable.n_real == 40 and unreadable.n_synthetic == 10
    enough = condition_agreement(
        "class", real, known["class"], *(x[:20] for x in cases(40, 2)[:1]), cases(40, 2)[1]["class"][:20]
    )
    assert "few" not in enough.guards and enough.n_synthetic == 20
    for labels, asked in (
        (["neg"] * 40, prompts["class"]),
        (known["class"], ["neg"] * 10),
        ([None] * 40, prompts["class"]),
        (known["class"], [None] * 10),
        (known["class"], ["no", "such"] * 5),
    ):
        nothing = condition_agreement("class", real, labels, synthetic, asked)
        assert nothing.value is None and nothing.normalized is None and "one_class" in nothing.guards
    for patients in (["a"] * 40, ["a"] * 39 + ["b"]):  # no probe, or one of a single volume, for those of "a"
        assert (
            condition_agreement("class", real, known["class"], synthetic, prompts["class"], patients=patients).value
            is None
        )
    two = condition_agreement(
        "class", real, known["class"], synthetic, prompts["class"], patients=["a"] * 20 + ["b"] * 20
    )
    assert two.value is not None
    with pytest.raises(DataError, match="9 values for 10 volumes"):
        condition_agreement("class", real, known["class"], synthetic, prompts["class"][:9])
    with pytest.raises(DataError, match="40 features per volume|39 features per volume"):
        condition_agreement("class", real, known["class"], synthetic[:, :39], prompts["class"])


def test_patients_are_not_separated():
    """Twin studies of a patient share a mark and, by chance, a class: a probe that sees one twin reads the other."""
    rng = np.random.default_rng(0)
    marks = rng.standard_normal((30, 200))
    classes = ["pos" if value else "neg" for value in rng.random(30) < 0.5]
    real, known = np.repeat(marks, 2, 0) + 0.1 * rng.standard_normal((60, 200)), np.repeat(classes, 2).tolist()
    patients = np.repeat(np.arange(30), 2).tolist()
    apart = condition_agreement("class", real, known, real, known, patients=patients)
    leaked = condition_agreement("class", real, known, real, known)
    assert abs(apart.ceiling - 0.5) < 0.2 < leaked.ceiling - 0.5


def test_the_probe_minimizes_the_penalized_loss():
    features, known = cases(60, 0)
    labels = np.array([value == "pos" for value in known["class"]])
    probe = fit_probe(features, known["class"], ("neg", "pos"))
    x = (features - features.mean(0)) / features.std(0, ddof=1) / np.sqrt(40)
    weight = np.where(labels, 0.5 / labels.mean(), 0.5 / (~labels).mean())
    # Gradient descent on the same loss; the intercept is penalized as a weight of a constant feature is.
    design, w = np.column_stack([x, np.ones(60)]), np.zeros(41)
    for _ in range(40_000):
        wrong = 1 / (1 + np.exp(design @ w)) - (1 - labels)
        w += 0.05 * (design.T @ (weight * wrong) - 0.1 * w)
    np.testing.assert_allclose(probe.read(features)[:, 1], design @ w, atol=1e-4)
    np.testing.assert_allclose(probe.read(features).sum(1), 0, atol=1e-6)
    # A number: the normal equations of ridge regression.
    sizes = np.random.default_rng(0).uniform(8, 20, 60)
    ridge = np.linalg.solve(x.T @ x + np.eye(40), x.T @ (sizes - sizes.mean()))
    np.testing.assert_allclose(
        fit_probe(features, sizes.tolist()).read(features)[:, 0], x @ ridge + sizes.mean(), atol=1e-8
    )


def test_spearman_equals_pearson_of_ranks():
    a, b = np.array([3.0, 1, 4, 1, 5, 9, 2]), np.array([2.0, 7, 1, 8, 2, 8, 1])

    def ranks(values):
        return [np.mean([i + 1 for i, v in enumerate(sorted(values)) if v == value]) for value in values]

    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert spearman(a, a**3) == pytest.approx(1) and np.isnan(spearman(a, np.ones(7)))


def test_resamples_in_which_real_volumes_reach_the_floor_have_no_share():
    """A share of nothing is not defined; the interval is that of the other resamples."""
    known = ["neg"] * 5 + ["pos"] * 5
    read_real = np.array([0, 1, 2, 3, 6, 4, 5, 7, 8, 9])[:, None] * [-1.0, 1.0]
    found = agreement("class", np.zeros((8, 2)), ["neg", "pos"] * 4, read_real, known, ("neg", "pos"))
    assert (found.value, found.floor, found.guards) == (0.5, 0.5, ["few"])
    assert found.ceiling == pytest.approx(0.92) and found.normalized == 0 and found.normalized_ci95 == (0, 0)
    assert quotient_interval([(1.0, 0.0), (np.nan, 1.0), *[(float(k), 2.0) for k in range(101)]]) == (1.25, 48.75)
