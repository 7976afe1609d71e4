"""Diversity, intensities, spectra and small images against MONAI, closed forms, SimpleITK and plain loops."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ccella_fast.errors import DataError
from ccella_fast.evaluation import images
from ccella_fast.evaluation.copying import memorisation
from ccella_fast.evaluation.volumes import Volume


def smooth(shape=(24, 24, 16), seed=0, sigma=2.0) -> np.ndarray:
    """A smooth random volume in [0, 1]."""
    noise = np.random.default_rng(seed).random(shape, np.float32)
    array = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(noise), sigma))
    return ((array - array.min()) / (array.max() - array.min())).astype(np.float32)


def volumes(arrays: Sequence[np.ndarray], spacing=(1.0, 1.0, 1.0)) -> list[Volume]:
    return [Volume(array, spacing, f"case-{number}") for number, array in enumerate(arrays)]


@pytest.mark.parametrize("shape", [(64, 60, 16), (24, 24, 24), (20, 18, 9), (5, 6, 4)])
def test_ms_ssim_equals_monai(shape):
    from monai.metrics.regression import compute_ms_ssim

    a = smooth(shape, 1)
    b = np.clip(0.2 * a + 0.1 * np.random.default_rng(2).random(shape), 0, 1).astype(np.float32)  # darker, and noise
    levels, kernel_size = images.ms_ssim_scales(shape)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:levels])
    x, y = torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None]
    expected = float(compute_ms_ssim(x, y, 3, kernel_size=kernel_size, weights=(weights / weights.sum()).tolist()))
    assert images.ms_ssim(a, b, levels, kernel_size) == pytest.approx(expected, abs=2e-5)
    assert images.ms_ssim(a, a, levels, kernel_size) == pytest.approx(1, abs=1e-6)
    assert expected < 0.99
    # Negative control: another window gives another value.
    if kernel_size > 3:
        assert images.ms_ssim(a, b, levels, kernel_size - 2) != pytest.approx(expected, abs=1e-4)


def test_the_number_of_levels_is_the_largest_that_monai_accepts():
    from monai.metrics.regression import compute_ms_ssim

    def accepts(shape, levels, kernel_size) -> bool:
        x = torch.zeros(1, 1, *shape)
        try:
            compute_ms_ssim(x, x, 3, kernel_size=kernel_size, weights=[1 / levels] * levels)
        except (ValueError, RuntimeError):
            return False
        return True

    for smallest in (3, 4, 7, 11, 12, 13, 16, 27, 28):
        shape = (30, 29, smallest)
        levels, kernel_size = images.ms_ssim_scales(shape)
        assert accepts(shape, levels, kernel_size)
        assert not accepts(shape, levels + 1, 3) or levels == 5
        assert kernel_size == 11 or not accepts(shape, levels, kernel_size + 2)
    assert images.ms_ssim_scales((64, 64, 16)) == (3, 3)
    assert images.ms_ssim_scales((256, 256, 128)) == (5, 7)
    assert images.ms_ssim_scales((200, 200, 200)) == (5, 11)
    with pytest.raises(DataError, match="at least 3 voxels"):
        images.ms_ssim_scales((64, 64, 2))


def test_diversity_finds_a_generator_that_repeats_itself():
    varied = volumes([smooth((16, 16, 9), seed) for seed in range(6)])
    collapsed = volumes([np.clip(varied[0].array + 0.01 * smooth((16, 16, 9), seed), 0, 1) for seed in range(6)])
    classes = ["neg", "neg", "neg", "pos", "pos", None]
    different, same = (images.ms_ssim_diversity(given, classes=classes) for given in (varied, collapsed))
    assert same.mean > 0.95 > different.ci95[1]
    assert different.ci95[0] < different.mean < different.ci95[1]
    assert (different.pairs, different.same_class_pairs, different.other_class_pairs) == (15, 4, 6)
    assert (different.levels, different.kernel_size) == (2, 3)
    plain = [images.ms_ssim(varied[i].array, varied[j].array, 2, 3) for i, j in ((0, 1), (0, 2), (1, 2), (3, 4))]
    assert different.same_class == pytest.approx(np.mean(plain))
    unnamed = images.ms_ssim_diversity(varied[:2])
    assert unnamed.same_class is None and unnamed.other_class is None and unnamed.ci95 == (0, 1)


def test_pairs_are_random_distinct_and_of_different_patients():
    patients = ["a", "a", "b", None, None, "b"]
    allowed = {(i, j) for i in range(6) for j in range(i + 1, 6)} - {(0, 1), (2, 5)}
    assert {tuple(pair) for pair in images.draw_pairs(patients).tolist()} == allowed
    some = images.draw_pairs(patients, 5, seed=3)
    assert len({tuple(pair) for pair in some.tolist()}) == 5
    assert (some == images.draw_pairs(patients, 5, seed=3)).all()
    assert any((some != images.draw_pairs(patients, 5, seed=seed)).any() for seed in range(4))
    drawn = np.zeros((6, 6), int)
    for seed in range(600):
        drawn[tuple(images.draw_pairs(patients, 1, seed)[0])] += 1
    assert all(20 < drawn[pair] < 80 for pair in allowed) and drawn.sum() == 600
    with pytest.raises(DataError, match="at least two patients, got 1"):
        images.draw_pairs(["a", "a"])
    with pytest.raises(DataError, match="got 0"):
        images.draw_pairs([])


def test_two_volumes_are_in_memory_at_a_time():
    class Lazy(Sequence):
        alive: list = []
        most = 0

        def __len__(self):
            return 7

        def __getitem__(self, index):
            array = smooth((6, 6, 6), index)
            self.alive.append(weakref.ref(array))
            Lazy.most = max(Lazy.most, sum(ref() is not None for ref in self.alive))
            return Volume(array, (1, 1, 1), str(index))

    assert images.ms_ssim_diversity(Lazy()).pairs == 21
    assert Lazy.most <= 3  # the two of a pair, and the one that is being read in place of the second
    with pytest.raises(DataError, match=r"different shapes in one set: \(6, 6, 6\) and \(6, 6, 7\)"):
        images.ms_ssim_diversity(volumes([smooth((6, 6, 6)), smooth((6, 6, 7))]))


def test_the_interval_of_diversity_covers():
    """Scalars as volumes and |a - b| as similarity: the mean over pairs of normal numbers is 2 / sqrt(pi) * sd."""
    rng, truth, covered = np.random.default_rng(0), 2 / np.sqrt(np.pi) * 0.1, []
    naive = []
    for draw in range(300):
        points = 0.1 * rng.standard_normal(30)
        pairs = images.draw_pairs([None] * 30, 200, seed=draw)
        values = np.abs(points[pairs[:, 0]] - points[pairs[:, 1]])
        low, high = images.summarize_pairs(values, pairs, [None] * 30, 1, 3).ci95
        covered.append(low <= truth <= high)
        naive.append(abs(values.mean() - truth) <= 1.96 * values.std() / np.sqrt(len(values)))
    assert 0.92 <= np.mean(covered) <= 0.99
    assert np.mean(naive) < 0.85  # negative control: pairs are not independent


def test_intensity_distance_is_the_wasserstein_distance():
    rng = np.random.default_rng(0)
    a, b = rng.beta(2, 5, (20, 20, 20)).astype(np.float32), rng.beta(3, 3, (20, 20, 20)).astype(np.float32)
    one, two = (images.intensity_histogram(array)[None] for array in (a, b))
    expected = np.abs(np.sort(a.ravel()) - np.sort(b.ravel())).mean()  # of samples of equal size
    assert images.intensity_distance(one, two) == pytest.approx(expected, abs=1 / images.INTENSITY_BINS)
    assert images.intensity_distance(one, one) == 0
    moved = images.intensity_histogram(a * 0.5 + 0.25)[None]
    assert images.intensity_distance(images.intensity_histogram(a * 0.5)[None], moved) == pytest.approx(0.25, abs=1e-3)
    both = np.concatenate([one, two])
    assert images.intensity_distance(both, two) == pytest.approx(images.intensity_distance(one, two) / 2)
    # Values outside [0, 1] are in the end bins, whatever the size of the volume.
    ends = images.intensity_histogram(np.array([[[-3.0, 0, 0.999, 1, 2, 7]]], np.float32))
    assert ends[0] == pytest.approx(2 / 6) and ends[-1] == pytest.approx(4 / 6) and ends.sum() == pytest.approx(1)


def test_spectrum_of_white_noise_is_flat_and_blur_removes_what_the_formula_says():
    rng, sigma = np.random.default_rng(0), 0.8
    x = 0.1 * rng.standard_normal((48, 40, 36)).astype(np.float32)
    spectra = images.power_spectra(x)
    assert spectra.shape == (3, images.FREQUENCY_BINS)
    assert np.abs(spectra[:, 2:] - 20 * np.log10(0.1)).max() < 1.5
    # Periodic blur along x and y multiplies the axial power by exp(-(2 pi f sigma)^2), f in cycles per voxel.
    fx, fy = np.fft.fftfreq(48)[:, None, None], np.fft.fftfreq(40)[None, :, None]
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2))
    blurred = np.fft.ifft2(np.fft.fft2(x, axes=(0, 1)) * transfer, axes=(0, 1)).real
    f = (np.arange(images.FREQUENCY_BINS) + 0.5) / images.FREQUENCY_BINS / 2
    lost = images.power_spectra(blurred)[images.PLANES.index("axial")] - spectra[images.PLANES.index("axial")]
    expected = -10 / np.log(10) * (2 * np.pi * f * sigma) ** 2
    assert np.abs(lost - expected)[4:20].max() < 1.2 and expected[19] < -8


def test_spectrum_equals_a_loop_over_slices_and_frequencies():
    x = np.random.default_rng(1).random((9, 14, 11)).astype(np.float32)
    for plane, axis in enumerate(range(3)):
        slices = np.moveaxis(x.astype(np.float64), axis, 0)
        rows, columns = slices.shape[1:]
        hann = [np.sin(np.pi * np.arange(1, n + 1) / (n + 1)) ** 2 for n in (rows, columns)]
        window = np.outer(*hann)
        power: dict[int, list[float]] = {}
        for one in slices:
            spectrum = np.abs(np.fft.fft2((one - one.mean()) * window)) ** 2 / (window**2).sum()
            for i, v in enumerate(np.fft.fftfreq(rows)):
                for j, u in enumerate(np.fft.fftfreq(columns)):
                    ring = int(2 * np.hypot(u, v) * images.FREQUENCY_BINS)
                    if (i, j) != (0, 0):
                        power.setdefault(ring, []).append(spectrum[i, j])
        got = images.power_spectra(x)[plane]
        for ring, values in power.items():
            if ring < images.FREQUENCY_BINS:
                assert got[ring] == pytest.approx(10 * np.log10(np.mean(values)), abs=1e-3)


def test_spectral_distance_has_a_sign_and_a_size():
    rng = np.random.default_rng(0)
    real = rng.normal(-40, 3, (5, 3, images.FREQUENCY_BINS))
    darker = real - 6
    darker[:, 1] += 6
    distance = images.spectral_distance(real.reshape(5, -1), darker)
    assert distance.planes == pytest.approx((6, 0, 6)) and distance.high == pytest.approx(-4)
    assert distance.total == pytest.approx(np.sqrt(24))
    assert images.spectral_distance(real, real[::-1]).total == pytest.approx(0, abs=1e-9)


def test_small_images_are_block_means():
    x = smooth((48, 48, 24), 3)
    blocks = sitk.GetArrayFromImage(sitk.BinShrink(sitk.GetImageFromArray(x), [2, 2, 2]))
    np.testing.assert_allclose(images.small_image(x, (2, 2, 2)), blocks, atol=1e-6)
    # A straight line stays one, whatever the voxel size; coordinates are from the middle, in mm.
    for spacing, shape in (
        ((0.5, 0.7, 3.0), (260, 170, 19)),
        ((2.25, 2.25, 3.0), (64, 64, 20)),
        ((5, 4.5, 6), (30, 30, 12)),
    ):
        x, y, z = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True))
        line = (x[:, None, None] + 2 * y[:, None] - z).astype(np.float32)
        x, y, z = ((np.arange(n) - (n - 1) / 2) * 4 for n in images.SMALL_SHAPE)
        expected = x[:, None, None] + 2 * y[:, None] - z
        small = images.small_image(line, spacing)
        assert np.abs(small - expected).max() < max(spacing)  # steps of a voxel
        assert np.abs(small - expected).mean() < 0.3 * max(spacing)
    # Beyond the edge the last voxel goes on.
    short = images.small_image(
        np.broadcast_to(np.arange(1.0, 5)[None, None], (24, 24, 4)).astype(np.float32), (4, 4, 4)
    )
    assert short[0, 0].tolist() == [1, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 4]


def test_correlation_equals_a_loop_over_shifts_and_flips():
    small = [images.small_image(smooth((24, 24, 12), seed), (4, 4, 4)) for seed in range(4)]
    a, b = np.stack(small[:2]), np.stack(small[2:])
    got = images.image_correlations(a, b.reshape(2, -1))
    for i in range(2):
        for j in range(2):
            best = -1.0
            for other in (b[j], b[j][::-1]):
                for dx, dy, dz in np.ndindex(5, 5, 5):
                    part = other[dx : dx + 20, dy : dy + 20, dz : dz + 8]
                    best = max(best, np.corrcoef(a[i, 2:-2, 2:-2, 2:-2].ravel(), part.ravel())[0, 1])
            assert got[i, j] == pytest.approx(best, abs=1e-5)


def test_planted_copies_are_found_also_moved_flipped_and_brighter():
    training = [smooth((48, 48, 24), seed, 3) for seed in range(8)]
    gallery = np.stack([images.small_image(x, (2, 2, 2)) for x in training])
    noise = 0.02 * np.random.default_rng(5).standard_normal((48, 48, 24))
    copies = {
        0: training[0],
        2: np.roll(training[2], (4, -2, 2), (0, 1, 2)),
        4: training[4][::-1],
        5: 0.95 * training[5] + 0.03 + noise,
    }
    small = np.stack([images.small_image(np.asarray(x, np.float32), (2, 2, 2)) for x in copies.values()])
    nearest = images.nearest_images(small, gallery)
    assert nearest.row.tolist() == list(copies) and nearest.correlation.min() > 0.95
    fresh = np.stack([images.small_image(smooth((48, 48, 24), 100 + seed, 3), (2, 2, 2)) for seed in range(4)])
    assert images.nearest_images(fresh, gallery).correlation.max() < 0.9
    correlation, shift, flipped = images.best_alignment(small[1], gallery[2])
    assert shift == (2, -1, 1) and not flipped and correlation == pytest.approx(nearest.correlation[1], abs=1e-6)
    assert images.best_alignment(small[2], gallery[4])[1:] == ((0, 0, 0), True)
    assert (images.image_correlations(np.full_like(small, 0.3), gallery) == 0).all()


def test_memorisation_counts_copies_in_every_disguise_and_no_others():
    rng = np.random.default_rng(0)
    anatomy = smooth((48, 48, 24), 7, 5)  # common to all patients

    def patients(count: int, seed: int) -> np.ndarray:
        return np.stack([0.7 * anatomy + 0.3 * smooth((48, 48, 24), seed + i, 3) for i in range(count)])

    train, held_out, fresh = patients(40, 100), patients(60, 200), patients(32, 300)
    disguises = [
        lambda x: x,
        lambda x: np.roll(x, 1, 0),
        lambda x: x[::-1],
        lambda x: 1.05 * x,
        lambda x: x + 0.01 * rng.standard_normal(x.shape),
        lambda x: sitk.GetArrayFromImage(sitk.DiscreteGaussian(sitk.GetImageFromArray(x), 1.0)),
        lambda x: np.roll(x, (2, -3, 1), (0, 1, 2)),
        lambda x: 0.5 * np.roll(x[::-1], 2, 1) + 0.3,
    ]
    copies = [disguise(train[5 * i]) for i, disguise in enumerate(disguises)]

    def small(arrays) -> np.ndarray:
        return np.stack([images.small_image(np.asarray(x, np.float32), (2, 2, 2)).ravel() for x in arrays])

    found = images.image_memorisation(small(train), small(held_out), small([*copies, *fresh]))
    assert np.flatnonzero(found.nearest.is_copy).tolist() == list(range(8)) and found.copies == 8 / 40
    assert found.nearest.row[:8].tolist() == [5 * i for i in range(8)] and found.ct is None
    assert images.image_memorisation(small(train), small(held_out), small(fresh)).copies == 0
    features = memorisation(small(train), small(held_out), small(copies))  # negative control: no shift, no mirror image
    assert not features.nearest.is_copy[[2, 7]].any()


def test_the_extractor_returns_its_spaces():
    extractor = images.ImageFeatures()
    found = extractor(Volume(smooth(), (3.0, 3.0, 3.0), "a"))
    assert {name: vector.shape for name, vector in found.items()} == {
        name: (n,) for name, n in extractor.spaces.items()
    }
    assert all(vector.dtype == np.float32 and np.isfinite(vector).all() for vector in found.values())
