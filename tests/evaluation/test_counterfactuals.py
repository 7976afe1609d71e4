"""Pairs of the same noise: how they are found, and the effect of what was asked for against planted ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ccella_fast import FastSampler, cli
from ccella_fast.errors import DataError
from ccella_fast.evaluation.counterfactuals import Drift, counterfactual_effect, pair_samples
from ccella_fast.evaluation.folders import evaluate_to_folder
from ccella_fast.evaluation.volumes import open_volumes
from ccella_fast.report.evaluation import write_evaluation_page
from ccella_fast.storage import read_json, write_json
from evaluation_fixtures import CountingExtractor, draw, write_prepared, write_samples
from sampling_fixtures import FakeEncoder, write_checkpoint

DIRECTIONS = np.linalg.qr(np.random.default_rng(99).standard_normal((20, 20)))[0]


def cases(count: int, seed: int):
    """Features with noise of one unit, in which a class is 3 units along one direction and a size is along another."""
    rng = np.random.default_rng(seed)
    classes, sizes = rng.random(count) < 0.5, rng.uniform(8, 20, count)
    features = (
        rng.standard_normal((count, 20)) + 3 * classes[:, None] * DIRECTIONS[0] + sizes[:, None] / 4 * DIRECTIONS[1]
    )
    return features, ["pos" if each else "neg" for each in classes], sizes.tolist()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0, -0.5])
def test_the_effect_is_the_planted_share_of_the_real_difference(share):
    real, classes, sizes = cases(300, 0)
    before, asked, lengths = cases(40, 5)
    wanted = ["neg" if each == "pos" else "pos" for each in asked]
    sign = np.array([1 if each == "pos" else -1 for each in wanted])[:, None]
    after = before + share * 3 * sign * DIRECTIONS[0] + 0.05 * np.random.default_rng(1).standard_normal(before.shape)
    found = counterfactual_effect("class", real, classes, before, after, asked, wanted)
    assert (
        found.value == pytest.approx(share, abs=0.12) and found.ci95[0] < share + 0.05 and found.ci95[1] > share - 0.05
    )
    assert (found.n_real, found.pairs, found.guards) == (300, 40, [])
    assert (found.p < 0.01) == (share != 0) and (found.moved > 0.9) == (share > 0)
    # The size, which was not asked for: it does not move, unless the generator confuses both.
    still = counterfactual_effect("size", real, sizes, before, after, lengths, lengths)
    assert isinstance(still, Drift) and still.value < 0.2
    confused = counterfactual_effect("size", real, sizes, before, after + 2 * DIRECTIONS[1], lengths, lengths)
    assert confused.value > 1 and confused.p < 0.01


def test_the_effect_of_a_number_and_what_cannot_be_read():
    real, classes, sizes = cases(300, 0)
    before, asked, lengths = cases(30, 5)
    longer = [length + (6 if k % 2 else -6) for k, length in enumerate(lengths)]
    steps = np.array(longer) - np.array(lengths)
    after = before + 0.7 * steps[:, None] / 4 * DIRECTIONS[1]
    found = counterfactual_effect("size", real, sizes, before, after, lengths, longer)
    assert found.value == pytest.approx(0.7, abs=0.05) and found.moved == 1
    shuffled = np.random.default_rng(2).permutation(classes).tolist()
    blind = counterfactual_effect("class", real, shuffled, before, after, ["neg"] * 30, ["pos"] * 30)
    assert blind.value is None and blind.guards == ["unreadable"]
    assert counterfactual_effect("class", real, ["pos"] * 300, before, after, ["neg"] * 30, ["pos"] * 30) is None
    few = counterfactual_effect("class", real, classes, before[:5], after[:5], ["neg"] * 5, ["pos"] * 5)
    assert few.guards == ["few"] and few.pairs == 5
    with pytest.raises(DataError, match="equal numbers"):
        counterfactual_effect("class", real, classes, before, after[:5], ["neg"] * 30, ["pos"] * 30)


def change(folder: Path, number: int, **values: object) -> None:
    path = folder / f"sample-{number:03d}_seed{number}.json"
    write_json(path, read_json(path) | values)


def test_samples_are_paired_by_their_noise(tmp_path, caplog):
    arrays = [draw(k) for k in range(4)]
    samples = open_volumes(write_samples(tmp_path / "neg", arrays, given="neg"), field="--synthetic")
    others = write_samples(tmp_path / "pos", [x * 0.5 for x in reversed(arrays)], given="pos")
    for number in range(4):  # the same seeds in another order
        change(others, number, seed=3 - number)
    found = pair_samples(samples, open_volumes(others, field="--counterfactual"), field="--counterfactual")
    places = {volume.id: volume for volume in found}
    for volume in samples:
        np.testing.assert_allclose(places[volume.id].array, volume.array * 0.5, atol=1e-6)
        assert (volume.pirads, places[volume.id].pirads) == ("neg", "pos")
    change(others, 2, num_inference_steps=6)  # other settings
    fewer = pair_samples(samples, open_volumes(others, field="x"), field="x")
    assert len(fewer) == 3 and "1 sample without a counterpart left out" in caplog.text
    same = write_samples(tmp_path / "same", arrays, given="neg")
    for bad, words in ((same, "another class or report"), (tmp_path / "files", "sidecars")):
        if bad.name == "files":
            bad.mkdir()
            (bad / "a.nii.gz").write_bytes((others / "sample-002_seed2.nii.gz").read_bytes())
        with pytest.raises(DataError, match=words):
            pair_samples(samples, open_volumes(bad, field="x"), field="x")


def test_pairs_of_the_sampler_s_own_files(tmp_path):
    """Two reports with the seeds 0 and 1 each, once for each class."""
    sampler = FastSampler.from_checkpoint(
        write_checkpoint(tmp_path / "model"), device="cpu", text_encoder=FakeEncoder()
    )
    request = {"reports": ["a", "a", "bb", "bb"], "report_ids": ["r1", "r1", "r2", "r2"], "seeds": [0, 1, 0, 1]}
    for name in ("neg", "pos"):
        sampler(**request, class_override=name, num_inference_steps=2, progress=False).save(tmp_path / name)
    sampler(**request, class_override="pos", num_inference_steps=3, progress=False).save(tmp_path / "other")
    first, second, other = (open_volumes(tmp_path / name, field="x") for name in ("neg", "pos", "other"))
    paired = {source.id: source for source in pair_samples(first, second, field="x").sources}
    for source in first.sources:
        other_class = paired[source.id]
        assert (other_class.prompt, other_class.pirads, other_class.path.name) == (
            source.prompt,
            "pos",
            source.path.name,
        )
    with pytest.raises(DataError, match="the seed and the settings"):
        pair_samples(first, other, field="x")


def test_other_reports_are_paired_where_the_noise_is_unique(tmp_path):
    first = write_samples(tmp_path / "a", [draw(k) for k in range(4)], report_id="left")
    second = write_samples(tmp_path / "b", [draw(k) for k in range(4)], report_id="right")
    for number in range(4):
        change(first, number, seed=number // 2, report=number % 2, report_id=f"left{number % 2}")
        change(second, number, seed=number)
    with pytest.raises(DataError, match="another class or report"):  # two reports have the seed 0: which one is meant?
        pair_samples(*(open_volumes(each, field="x") for each in (first, second)), field="x")
    for number in range(4):
        change(first, number, seed=number)
    found = pair_samples(*(open_volumes(each, field="x") for each in (first, second)), field="x")
    assert [source.prompt for source in found.sources] == ["right"] * 4 and len(
        {source.id for source in found.sources}
    ) == 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Real volumes that are darker if they are positive, and samples of the same seeds of both classes."""
    root = tmp_path_factory.mktemp("pairs")
    arrays = {f"case{k}": {"t2w": draw(k) * (0.5 if k % 3 == 1 else 1)} for k in range(27)}
    write_prepared(root / "prepared", arrays)
    sides = [f"case{k},{('left', 'right')[k % 2]}" for k in range(27)]
    (root / "findings.csv").write_text("\n".join(["case,side", *sides]) + "\n")
    drawn = [draw(100 + k) for k in range(10)]
    write_samples(root / "neg", drawn, given="neg")
    write_samples(root / "pos", [x * 0.5 for x in drawn], given="pos")
    write_samples(root / "deaf", [np.clip(x + 1e-3 * draw(k), 0, 1) for k, x in enumerate(drawn)], given="pos")
    return root


def run(folders: Path, out: Path, other: str) -> dict:
    evaluate_to_folder(
        folders / "prepared", folders / "neg", out, counterfactual=folders / other, features=[CountingExtractor()],
        metrics=["condition"], draws=4, findings=folders / "findings.csv",
    )  # fmt: skip
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    return next(row for row in rows if (row["metric"], row["features"]) == ("counterfactual_class", "fake"))


def test_the_effect_of_the_class_is_a_row_of_the_page(folders, tmp_path, no_prostate_network):
    row = run(folders, tmp_path / "out", "pos")
    assert 0.7 < row["value"] < 1.3 and row["floor"] == 0 and (row["n_real"], row["n_synthetic"]) == (18, 10)
    assert row["details"]["moved"] == 1 and row["details"]["ceiling"] == 1 and row["ci95"][0] > 0.5
    moved = row["details"]["not_asked_for"]["side"]["mean_change_sd"]  # the reading of the side is of brightness too
    assert "Effect of asking for another class, same noise" in write_evaluation_page(tmp_path / "out").read_text()
    deaf = run(folders, tmp_path / "out", "deaf")  # negative control
    assert abs(deaf["value"]) < 0.1 and deaf["details"]["not_asked_for"]["side"]["mean_change_sd"] < 0.1 * moved


def test_the_command_names_folders_that_are_no_pairs(folders, tmp_path, capsys):
    command = ["evaluate", "--real", folders / "prepared", "--synthetic", folders / "neg", "--counterfactual"]
    assert cli.main([*map(str, command), str(folders / "neg"), "--out", str(tmp_path / "out")]) == 3
    message = capsys.readouterr().err
    assert cli.main([*map(str, command), str(folders / "pos"), "--out", str(tmp_path / "out"), "--metrics", "fd"]) == 2
    assert "add condition to --metrics" in capsys.readouterr().err
    assert "another class or report" in message and "--counterfactual" in message and not (tmp_path / "out").exists()
