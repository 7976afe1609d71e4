"""Reading generated volumes back from the files that `ccella-fast sample` has written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ccella_fast.data.readers.nifti import read_nifti_array


def read_sample(path: Path) -> np.ndarray:
    """The intensities (X, Y, Z), axes R, A, S, of a NIfTI file, or of a folder with a DICOM series.

    Unlike `read_volume` it accepts constant volumes, which a model that was hardly trained generates.
    """
    if not path.is_dir():
        return read_nifti_array(path)[0]
    from pydicom import dcmread

    slices = [dcmread(file) for file in sorted(path.glob("*.dcm"))]
    stack = np.stack([each.pixel_array * float(each.RescaleSlope) for each in slices])
    return stack.transpose(2, 1, 0)[::-1, ::-1, :].astype(np.float32)  # rows run to the left, columns to the posterior
