"""Volumes that are kept for a page: what is read back is what was given, in 8 bits, and carries no id."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from ccella_fast.data import example_volumes
from ccella_fast.data.example_volumes import Example, read_examples, write_examples


def example(number: int, shape=(20, 12, 8), kind="real", sequence="t2w") -> Example:
    array = np.random.default_rng(number).uniform(-0.2, 1.2, shape).astype(np.float32)
    return Example(kind, number, sequence, array, (0.5, 0.75, 3.0))


def test_a_volume_is_read_back_in_8_bits(tmp_path):
    given = [example(1), example(2, kind="train", sequence="adc"), example(1)]
    write_examples(tmp_path / "examples", given, phantom=True)
    kept = read_examples(tmp_path / "examples")
    assert kept.phantom
    assert [(each.kind, each.number, each.sequence) for each in kept.volumes] == [
        ("real", 1, "t2w"),
        ("train", 2, "adc"),
    ]
    for one, stored in zip(given, kept.volumes, strict=False):
        for array, spacing in (stored.read(), through_nibabel(stored.path)):
            assert np.abs(array - np.clip(one.array, 0, 1)).max() <= 0.5 / 255 + 1e-6
            assert spacing == pytest.approx((0.5, 0.75, 3.0))


def through_nibabel(path) -> tuple[np.ndarray, tuple[float, ...]]:
    image = nibabel.load(path)
    assert image.get_data_dtype() == np.uint8 and nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    return image.get_fdata(), image.header.get_zooms()


def test_large_volumes_are_cropped_at_their_centre(tmp_path, monkeypatch):
    monkeypatch.setattr(example_volumes, "CROP", (10, 20, 4))
    one = example(1)
    write_examples(tmp_path / "examples", [one])
    array, _ = read_examples(tmp_path / "examples").volumes[0].read()
    assert array.shape == (10, 12, 4)
    assert np.abs(array - np.clip(one.array[5:15, :, 2:6], 0, 1)).max() <= 0.5 / 255 + 1e-6


def test_the_folder_is_replaced_and_equal_volumes_give_equal_bytes(tmp_path):
    write_examples(tmp_path / "examples", [example(1), example(2)])
    first = {path.name: path.read_bytes() for path in (tmp_path / "examples").iterdir()}
    write_examples(tmp_path / "examples", [example(1), example(2)])
    assert {path.name: path.read_bytes() for path in (tmp_path / "examples").iterdir()} == first
    write_examples(tmp_path / "examples", [example(3)])
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == ["examples.json", "real-3-t2w.nii.gz"]
    assert read_examples(tmp_path / "nothing") == ([], False)
