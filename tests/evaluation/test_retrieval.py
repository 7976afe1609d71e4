"""Recall at K against plain sorting, enumerated ties, and chance."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save_file

from ccella_fast.errors import DataError
from ccella_fast.evaluation.folders import evaluate_to_folder
from ccella_fast.evaluation.retrieval import _recall, read_embeddings, text_image_retrieval
from ccella_fast.storage import read_json, write_json
from evaluation_fixtures import CountingExtractor, draw, write_prepared, write_samples


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


def write_embeddings(path: Path, *, shuffled: bool) -> Path:
    """Of twelve reports, the generated volumes that they prompted, and ten real cases with their reports."""
    random = np.random.default_rng(0)
    reports = {
        f"report/{name}": random.standard_normal(16)
        for name in [f"r{k}" for k in range(12)] + [f"case{k}" for k in range(10)]
    }
    order = random.permutation(12) if shuffled else np.arange(12)
    vectors = {f"synthetic/sample-{k:03d}_seed{k}": reports[f"report/r{order[k]}"] for k in range(12)}
    vectors |= {f"real/case{k}": reports[f"report/case{k}"] for k in range(10)}
    save_file({name: vector.astype(np.float32) for name, vector in (reports | vectors).items()}, path)
    return path


@pytest.mark.parametrize("shuffled", [False, True])
def test_vectors_of_a_file_give_rows(tmp_path, no_prostate_network, shuffled):
    write_prepared(tmp_path / "prepared", {f"case{k}": {"t2w": draw(k)} for k in range(10)})
    write_samples(tmp_path / "samples", [draw(100 + k) for k in range(12)])
    for k in range(12):
        path = tmp_path / "samples" / f"sample-{k:03d}_seed{k}.json"
        write_json(path, read_json(path) | {"report_id": f"r{k}"})
    given = {"features": [CountingExtractor()], "metrics": ["condition"], "draws": 4}
    result = evaluate_to_folder(
        tmp_path / "prepared", tmp_path / "samples", tmp_path / "out", **given,
        embeddings=write_embeddings(tmp_path / "vectors.safetensors", shuffled=shuffled),
    )  # fmt: skip
    row = result["retrieval_1"]
    order = np.random.default_rng(0)
    order.standard_normal((22, 16))
    right = np.mean(order.permutation(12) == np.arange(12)) if shuffled else 1.0
    assert row.value == pytest.approx(right) and row.floor == pytest.approx(1 / 22)
    assert row.details["ceiling"] == 1 and row.details["normalized"] == pytest.approx((right - 1 / 22) / (21 / 22))
    assert (row.n_real, row.n_synthetic, row.details["texts"]) == (10, 12, 22)
    assert "retrieval_5" not in {each.metric for each in result.rows}  # needs 50 reports


def test_files_of_vectors_that_cannot_be_used(tmp_path):
    path, vector = tmp_path / "vectors.safetensors", np.ones(4, np.float32)
    with pytest.raises(DataError, match="missing"):
        read_embeddings(path)
    for tensors, words in (
        ({"report/a": vector}, "of generated volumes"),
        ({"report/a": vector, "synthetic/b": vector[:3]}, "not a vector of 4 numbers"),
        ({"report/a": vector, "texts": vector}, "'texts' is not"),
        ({"report/a": np.ones(4, np.int32)}, "not a vector"),
        ({"report/a": vector[:0], "synthetic/b": vector[:0]}, "not a vector"),
        ({"report/a": vector, "synthetic/b": vector * np.nan}, "'synthetic/b' is not finite"),
        ({"report/a": vector, "synthetic/b": vector, "real/c": vector * np.inf}, "'real/c' is not finite"),
        ({"report/a": vector * 0, "synthetic/b": vector}, "'report/a' is zero"),
    ):
        save_file(tensors, path)
        with pytest.raises(DataError, match=words):
            read_embeddings(path)
    save_file({"report/a": vector, "synthetic/b": vector}, path)
    with pytest.raises(DataError, match="no synthetic volume has a vector together with its report"):
        read_embeddings(path).of_pairs({"b": None, "c": "a"}, "synthetic")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="no complete safetensors file"):
        read_embeddings(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_of_any_floating_point_type_are_read(tmp_path, dtype):
    vectors = {"report/a": torch.tensor([1.0, -0.5]), "synthetic/b": torch.tensor([3.0, 2.0])}
    torch_save_file({name: vector.to(dtype) for name, vector in vectors.items()}, tmp_path / "vectors.safetensors")
    found = read_embeddings(tmp_path / "vectors.safetensors")
    assert found.reports["a"].tolist() == [1, -0.5] and found.synthetic["b"].tolist() == [3, 2]
    assert found.reports["a"].dtype == np.float64


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_length_of_vectors_has_no_effect(scale):
    good, images = np.random.default_rng(0).standard_normal((2, 12, 8))
    assert text_image_retrieval(images, good * scale)[0] == text_image_retrieval(images, good)[0]


def test_vectors_of_other_samples_are_seen_before_long_work(tmp_path, caplog):
    write_prepared(tmp_path / "prepared", {f"case{k}": {"t2w": draw(k)} for k in range(4)})
    write_samples(tmp_path / "samples", [draw(100 + k) for k in range(4)], report_id="r1")
    path, vector, extractor = tmp_path / "vectors.safetensors", np.ones(4, np.float32), CountingExtractor()
    given = {"features": [extractor], "metrics": ["condition"], "draws": 4, "embeddings": path}
    save_file({"report/r1": vector, "synthetic/sample-999": vector}, path)
    with pytest.raises(DataError, match="no synthetic volume has a vector together with its report"):
        evaluate_to_folder(tmp_path / "prepared", tmp_path / "samples", tmp_path / "out", **given)
    assert extractor.calls == 0 and not (tmp_path / "out").exists()
    save_file({"report/r1": vector, "synthetic/sample-000_seed0": vector}, path)
    result = evaluate_to_folder(tmp_path / "prepared", tmp_path / "samples", tmp_path / "out", **given)
    assert "retrieval_1" not in {row.metric for row in result.rows}
    assert "that needs vectors of at least 10 reports" in caplog.text
