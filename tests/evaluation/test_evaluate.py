"""`evaluate`: the numbers, one volume at a time, and the arguments that are refused."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ccella_fast.errors import ConfigError, DataError
from ccella_fast.evaluation import run
from ccella_fast.evaluation.anatomy import GlandFeatures
from ccella_fast.evaluation.frechet import frechet_distance
from ccella_fast.evaluation.run import evaluate
from ccella_fast.evaluation.volumes import Source, Volume, VolumeSet
from evaluation_fixtures import (
    SPACING,
    CountingExtractor,
    draw,
    some_volumes,
)

pytestmark = pytest.mark.usefixtures("no_prostate_network")


def test_without_a_training_set_the_real_set_standardises_and_memorisation_is_left_out():
    result = evaluate(real=some_volumes(6, 0), synthetic=some_volumes(6, 50), features=[CountingExtractor()], draws=4)
    assert "standardised_by_itself" in result["fd"].guards
    assert "copies" not in {row.metric for row in result.rows}
    assert {"fd", "kid", "mmd", "precision", "coverage", "c2st", "intensity", "spectrum", "msssim"} <= {
        row.metric for row in result.rows
    }


def test_synthetic_volumes_that_are_real_ones_are_marked():
    real = some_volumes(4, 0)
    given = {"features": [CountingExtractor()], "metrics": ["fd", "msssim"], "draws": 4, "real": real}
    copied = evaluate(synthetic=[*some_volumes(3, 50), real[1]], **given)
    assert all("shared_volumes" in row.guards for row in copied.rows)
    assert not any("shared_volumes" in row.guards for row in evaluate(synthetic=some_volumes(4, 50), **given).rows)


def test_real_volumes_that_are_equal_are_marked():
    real, synthetic = some_volumes(6, 0), some_volumes(4, 50)
    given = {"features": [CountingExtractor()], "metrics": ["fd"], "draws": 4}
    repeated = evaluate(real=[*real, real[2]._replace(id="again")], synthetic=synthetic, **given)
    assert all("repeated_volumes" in row.guards for row in repeated.rows)
    twice_generated = evaluate(
        real=real, synthetic=[*synthetic, synthetic[0]._replace(id="again")], **given
    )  # a finding
    assert not any("repeated_volumes" in row.guards for row in twice_generated.rows)


@pytest.mark.parametrize("shape", [(20, 16, 2), (1, 16, 12)])
def test_volumes_that_are_slices_are_named_before_any_feature(shape):
    rng, extractor = np.random.default_rng(0), CountingExtractor()
    volumes = [Volume(rng.random(shape, np.float32), (1.0, 1.0, 3.0), f"s{k}") for k in range(4)]
    with pytest.raises(DataError, match="three axes of at least 3 voxels, got the shape"):
        evaluate(real=volumes, synthetic=volumes, features=[extractor], draws=4)
    assert extractor.calls == 0
    thin = [v._replace(array=rng.random((16, 12, 3), np.float32)) for v in volumes]
    rows = evaluate(real=thin, synthetic=thin[::-1], features=["random"], draws=4).rows  # 3 are enough for every metric
    assert {"fd", "spectrum", "msssim"} <= {row.metric for row in rows}


def test_copies_of_training_volumes_are_found_by_number():
    train, real = some_volumes(40, 0), some_volumes(30, 100)
    planted = [volume._replace(id=f"s{k}") for k, volume in enumerate([*some_volumes(18, 300), train[7], train[31]])]
    given = {"features": [CountingExtractor()], "metrics": ["memorisation"], "draws": 4}
    result = evaluate(real=real, synthetic=planted, train=train, **given)
    assert result["copies", "fake"].value == result["copies", "image-4mm"].value == pytest.approx(2 / 20)
    copies = {case["id"]: case["nearest_train"] for case in result.per_case if case.get("copy")}
    assert copies == {"synthetic-019": "train-008", "synthetic-020": "train-032"}
    clean = evaluate(real=real, synthetic=some_volumes(20, 300), train=train, **given)
    assert clean["copies", "fake"].value == clean["copies", "image-4mm"].value == 0


def test_copies_that_only_one_space_finds_are_named():
    """A mirrored and darker volume is far from its origin in the first space, and a copy in small images."""
    train, real = some_volumes(40, 0), some_volumes(30, 100)
    gone = train[7]._replace(array=np.clip(0.6 * train[7].array[::-1].copy(), 0, 1), id="s18")
    planted = [*(volume._replace(id=f"s{k}") for k, volume in enumerate(some_volumes(18, 300))), gone]
    given = {"features": [CountingExtractor()], "metrics": ["memorisation"], "draws": 4}
    result = evaluate(real=real, synthetic=planted, train=train, **given)
    assert result["copies", "fake"].value == 0 and result["copies", "image-4mm"].value == pytest.approx(1 / 19)
    (found,) = (case for case in result.per_case if case.get("copy"))
    assert (found["id"], found["nearest_train"], found["features"]) == ("synthetic-019", "train-008", "image-4mm")
    others = {case["features"] for case in result.per_case if case["set"] == "synthetic" and not case["copy"]}
    assert others == {"fake"}


def test_the_autoencoder_limit_is_the_distance_to_reconstructions():
    real = some_volumes(10, 0)
    given = {
        "real": real,
        "synthetic": some_volumes(8, 50, smooth=3),
        "features": [CountingExtractor()],
        "metrics": ["fd"],
    }
    assert evaluate(**given)["fd"].limit_autoencoder is None
    perfect = evaluate(**given, reconstructed=real)["fd"]
    assert perfect.limit_autoencoder == pytest.approx(perfect.floor, rel=0.5)
    blurred = [volume._replace(array=draw(k, smooth=2)) for k, volume in enumerate(real)]
    limit = evaluate(**given, reconstructed=blurred)["fd"]
    assert limit.floor * 2 < limit.limit_autoencoder < limit.value_equal_n
    with pytest.raises(DataError, match="in its order"):
        evaluate(**given, reconstructed=blurred[::-1])


@pytest.mark.parametrize("works", [True, False])
def test_glands_of_generated_volumes_are_looked_at_only_if_the_segmenter_works_on_real_ones(monkeypatch, works: bool):
    spacing, segmented = (6.0, 6.0, 6.0), []
    x, y, z = np.ogrid[-8:8, -6:6, -4:4]
    gland = (x / 4) ** 2 + (y / 3) ** 2 + (z / 3) ** 2 < 1

    def segment(volume):
        segmented.append(volume.id)
        return (gland if works else np.zeros_like(gland)), volume.spacing

    monkeypatch.setattr(run, "_segmenters", lambda wanted, device, required: [GlandFeatures(segment, {"name": "fake"})])
    real, synthetic = ([each._replace(spacing=spacing) for each in some_volumes(4, seed)] for seed in (0, 50))
    result = evaluate(real=real, synthetic=synthetic, features=[CountingExtractor()], draws=4)
    row = result["gland_plausible"]
    assert (row.value, row.floor) == ((1, 1) if works else (None, 0))
    assert ("segmenter_fails_on_real" in row.guards) != works and (row.ci95 is not None) == works
    assert segmented == [each.id for each in (*real, *(synthetic if works else []))]
    assert ["volume_cc" in case for case in result.per_case] == [True] * 4 + [works] * 4


def test_sequences_are_compared_one_by_one():
    def both(count, seed, adc):
        t2 = some_volumes(count, seed)
        return [*t2, *(volume._replace(sequence="adc") for volume in some_volumes(count, seed + 500, smooth=adc))]

    given = {"features": [CountingExtractor()], "metrics": ["fd"], "draws": 4}
    result = evaluate(real=both(8, 0, 1), synthetic=both(8, 50, 3), **given)
    t2w, adc = result.rows
    alone = evaluate(real=some_volumes(8, 0), synthetic=some_volumes(8, 50), **given)["fd"]
    assert (t2w.sequence, adc.sequence) == ("t2w", "adc") and t2w.value == alone.value and adc.ratio > 3 * t2w.ratio


def test_iterables_that_are_read_once_suffice():
    real, synthetic = some_volumes(6, 0), some_volumes(6, 50)
    given = {"features": [CountingExtractor()], "draws": 4}
    lists, once = (evaluate(real=f(real), synthetic=f(synthetic), **given) for f in (list, iter))
    assert [row.metric for row in lists.rows if row not in once.rows and row.metric == "msssim"] == ["msssim"]
    numbers = [
        {row.metric: (row.value, row.floor) for row in found.rows if row.metric != "msssim"} for found in (lists, once)
    ]
    assert numbers[0] == numbers[1] and "msssim" not in {row.metric for row in once.rows}


def test_kept_values_of_pairs_are_those_of_their_volumes(tmp_path):
    given = {"real": some_volumes(4, 0), "features": [CountingExtractor()], "metrics": ["msssim"], "draws": 4}
    for seed in (50, 60, 50):
        fresh, kept = (evaluate(synthetic=some_volumes(4, seed), cache=cache, **given) for cache in (None, tmp_path))
        assert fresh["msssim"].value == kept["msssim"].value
    (file, *_) = tmp_path.glob("*.json")
    file.write_text("[0.5")  # damaged: computed again
    again = evaluate(synthetic=some_volumes(4, 50), cache=tmp_path, **given)
    assert (again["msssim"].value, again["msssim"].floor) == (fresh["msssim"].value, fresh["msssim"].floor)


def test_at_most_two_volumes_are_in_memory():
    alive, most = set(), 0

    def read(seed):
        nonlocal most
        array = draw(seed).copy()
        alive.add(seed)
        weakref.finalize(array, alive.discard, seed)
        most = max(most, len(alive))
        return array, SPACING

    def a_set(name, seeds):
        return VolumeSet(
            name, [Source(f"v{seed}", Path(f"v{seed}"), partial(read, seed)) for seed in seeds], Path("."), ""
        )

    metrics = ["fd", "intensity", "spectrum", "msssim", "memorisation"]
    sets = {"real": a_set("r", range(8)), "synthetic": a_set("s", range(20, 28)), "train": a_set("t", range(40, 48))}
    evaluate(**sets, features=[CountingExtractor()], metrics=metrics, draws=4)
    assert 1 <= most <= 2 and not alive
    held = list(sets["real"])  # negative control: the count notices volumes that are kept
    assert most == len(held) == 8


def test_the_protocol_changes_with_what_the_numbers_depend_on(monkeypatch):
    def protocol(features=None, **changes):
        sets = {"real": some_volumes(4, 0), "synthetic": some_volumes(4, 50)}
        if spacing := changes.pop("spacing", None):
            sets = {kind: [volume._replace(spacing=spacing) for volume in volumes] for kind, volumes in sets.items()}
        given = {"metrics": ["kid"], "draws": 4} | changes
        return evaluate(**sets, features=[features or CountingExtractor()], **given).protocol_sha256

    base = protocol()
    with monkeypatch.context() as changed:
        changed.setattr(run, "_N_RULE", "another rule")
        other_rule = protocol()
    others = [
        other_rule,
        protocol(CountingExtractor(weights_sha256="e" * 64)),
        protocol(CountingExtractor(preprocessing="z-score")),
        protocol(spacing=(1.0, 1.0, 3.0)),
        protocol(draws=5),
        protocol(seed=1),
        protocol(metrics=["mmd"]),
        protocol(train=some_volumes(4, 90)),
    ]
    assert len({base, *others}) == 9 and protocol() == base


def test_a_test_case_in_the_training_set_is_refused():
    given = {"synthetic": some_volumes(4, 50), "features": [CountingExtractor()], "metrics": ["fd"], "draws": 4}
    real, train = some_volumes(4, 0), some_volumes(4, 90)
    evaluate(real=real, train=train, **given)
    copied = [*train, real[2]._replace(id="other name")]
    with pytest.raises(DataError, match="'v2' has the same voxels as the training case 'other name'"):
        evaluate(real=real, train=copied, **given)
    of_patient = [[*volumes[:-1], volumes[-1]._replace(patient="p")] for volumes in (real, train)]
    with pytest.raises(DataError, match="'v3' is of the same patient as the training case 'v93'"):
        evaluate(real=of_patient[0], train=of_patient[1], **given)


def test_arguments_of_the_function_are_checked():
    given = {"real": some_volumes(3, 0), "synthetic": some_volumes(3, 50), "features": [CountingExtractor()]}
    other_grid = some_volumes(1, 60)[0]._replace(spacing=(1.5, 1.5, 3.1))
    empty = other_grid._replace(array=np.zeros_like(other_grid.array))
    for wrong, error, words in (
        ({"metrics": ["kidd"]}, ConfigError, "did you mean 'kid'"),
        ({"draws": 1}, ConfigError, "at least 2"),
        ({"real": []}, DataError, "at least 2"),
        ({"real": some_volumes(3, 0) + some_volumes(1, 0)}, DataError, "have the id 'v0'"),
        ({"synthetic": [*some_volumes(2, 50), other_grid]}, DataError, "no common grid: real has 16 x 12 x 8"),
        ({"synthetic": [*some_volumes(2, 50), empty]}, DataError, "equal"),
        ({"train": some_volumes(3, 0)}, DataError, "has the same voxels"),
    ):
        with pytest.raises(error, match=words):
            evaluate(**(given | wrong))


def test_intervals_end_where_the_metric_does():
    """With 3 draws, the interval of Student's distribution is wider than any metric's range."""
    result = evaluate(real=some_volumes(14, 0), synthetic=some_volumes(14, 100), features=["random"], draws=3)
    bounds = {"fd": np.inf, "density": np.inf, "precision": 1.0, "recall": 1.0, "coverage": 1.0}
    for metric, highest in bounds.items():
        row = result[metric, "random"]
        for low, high in (row.ci95, row.details["floor_ci95"]):
            assert 0 <= low <= high <= highest, metric
    assert result["kid", "random"].ci95[0] < 0  # negative control: an unbiased distance may be negative


def test_clipped_neighbours_and_the_extrapolation_have_rows():
    """Half of the synthetic volumes are good. The extrapolation needs at least two volumes per feature."""
    real, good = some_volumes(40, 0), some_volumes(20, 100)
    bad = [volume._replace(array=volume.array * 0.3) for volume in some_volumes(20, 200)]
    given = {"real": real, "features": [CountingExtractor()], "metrics": ["fd", "prdc"], "draws": 4}
    found = evaluate(synthetic=[*good, *bad], **given)
    for name in ("clipped_density", "clipped_coverage"):
        row = found[name, "fake"]
        assert row.value == pytest.approx(0.5, abs=0.2) and row.floor > row.value + 0.2 and row.better == "higher"
        assert 0 <= row.ci95[0] <= row.value <= row.ci95[1] <= 1
    fresh = some_volumes(60, 300)
    found = evaluate(synthetic=fresh, **given)
    features = [np.stack([CountingExtractor()(v)["fake"] for v in each]).astype(np.float64) for each in (real, fresh)]
    a, b = ((x - features[0].mean(0)) / features[0].std(0, ddof=1) for x in features)
    row, plain = found["fd_infinity", "fake"], found["fd", "fake"]
    # The line through the mean distances at n = 20 and n = 40 meets 1 / n = 0 here, far below what is mostly bias.
    rng = np.random.default_rng(1)
    means = [
        np.mean([frechet_distance(*(rng.permutation(x)[:n] for x in (a, b))) for _ in range(100)]) for n in (20, 40)
    ]
    line = 2 * means[1] - means[0]
    assert row.value == pytest.approx(line, abs=0.25 * plain.value) and row.value < 0.6 * plain.value
    assert row.floor == 0 and row.details["slope"] > 0
    few = evaluate(synthetic=good[:9], **given)
    assert "fd_infinity" not in {each.metric for each in few.rows} and few["fd", "fake"].value > 0
