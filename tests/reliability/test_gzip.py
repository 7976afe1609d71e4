"""One flipped bit in a `.nii.gz` file: every flip is refused, or does not change the image (goal R8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from ccella_fast.data.readers.volume_file import read_volume
from ccella_fast.errors import DataError
from study_fixtures import voxels, write_nifti


def test_every_flipped_bit_is_refused(tmp_path: Path, goal: Callable[..., None]):
    path = write_nifti(tmp_path / "t2w.nii.gz", voxels((20, 18, 8)))
    content, expected = path.read_bytes(), read_volume(path).array
    rng = np.random.default_rng(0)
    accepted = unnoticed_by_nibabel = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[int(rng.integers(10, len(damaged)))] ^= 1 << int(rng.integers(8))  # after the header of the gzip stream
        path.write_bytes(bytes(damaged))
        try:
            read_volume(path)
            accepted += 1
        except DataError:
            pass
        try:
            unnoticed_by_nibabel += not np.array_equal(nibabel.load(path).get_fdata(), expected)
        except Exception:  # nibabel raises several types
            continue
    assert unnoticed_by_nibabel > 100  # control: a common reader accepts many of these files
    goal("R8", value=accepted, target=0, n=400)
