"""Recall at K against plain sorting, enumerated ties, and chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.evaluation.retrieval import _recall, text_image_retrieval


def test_recall_equals_sorting():
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((60, 8))
    match = rng.integers(60, size=90)
    images = texts[match] + 0.8 * rng.standard_normal((90, 8))
    similarity = (images / np.linalg.norm(images, axis=1)[:, None]) @ (texts / np.linalg.norm(texts, axis=1)[:, None]).T
    found = text_image_retrieval(images, texts, match)
    assert [result.k for result in found] == [1, 5, 10]
    for result in found[:2]:
        hits = [match[i] in np.argsort(-row)[: result.k] for i, row in enumerate(similarity)]
        assert result.image_to_text == pytest.approx(np.mean(hits))
        columns = [j for j in range(60) if j in match]
        hits = [(match[np.argsort(-similarity[:, j])[: result.k]] == j).any() for j in columns]
        assert result.text_to_image == pytest.approx(np.mean(hits))
        assert result.image_to_text_ci95[0] < result.image_to_text < result.image_to_text_ci95[1]
    assert found[2].image_to_text is None and found[2].text_to_image is None  # 60 reports are fewer than 10 * 10
    assert found[2].guards == ["few_candidates"] and found[0].guards == []


def test_unrelated_embeddings_retrieve_by_chance():
    rng, values = np.random.default_rng(1), []
    for _ in range(30):
        (one, five) = text_image_retrieval(rng.standard_normal((50, 6)), rng.standard_normal((50, 6)), ks=(1, 5))
        values.append((one.image_to_text, five.image_to_text))
    assert np.mean(values, 0) == pytest.approx((one.chance, five.chance), abs=0.02) and five.chance == 0.1


def test_ties_count_with_the_probability_of_their_order():
    similarity = np.array([[0.9, 0.5, 0.5, 0.5, 0.1, 0.5]])
    for right in ((1,), (1, 3), (0, 2), (4,), (4, 5)):
        belongs = np.zeros((1, 6), bool)
        belongs[0, list(right)] = True
        for k in range(1, 7):
            hits = []
            for order in itertools.permutations(range(6)):
                ranked = sorted(order, key=lambda i: -similarity[0, i])  # stable: ties stay in random order
                hits.append(bool(set(ranked[:k]) & set(right)))
            assert _recall(similarity, belongs, k)[0] == pytest.approx(np.mean(hits))
    # An embedding that is the same for every report retrieves by chance, not always and not never.
    same = text_image_retrieval(np.ones((40, 3)), np.ones((40, 3)), ks=(1,))[0]
    assert same.image_to_text == pytest.approx(1 / 40) == same.chance


def test_useless_embeddings_are_refused():
    good = np.random.default_rng(0).standard_normal((12, 4))
    broken = good.copy()
    broken[3] = 0
    with pytest.raises(DataError, match="row 3 of the text embeddings is zero"):
        text_image_retrieval(good, broken)
    broken[3] = np.nan
    with pytest.raises(DataError, match="not finite"):
        text_image_retrieval(broken, good)
    with pytest.raises(DataError, match="from 0 to 11"):
        text_image_retrieval(good, good, [12] * 12)
    with pytest.raises(DataError, match="from 0 to 10"):
        text_image_retrieval(good, good[:11])
    with pytest.raises(DataError, match="features per volume"):
        text_image_retrieval(good, good[:, :3])
