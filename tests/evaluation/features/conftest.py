"""Weight files of random networks, in the forms in which the pretrained ones are published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ccella_fast.evaluation.features import taps
from feature_fixtures import authors_names, keras_form, monai_resnet50


@pytest.fixture(scope="session")
def networks() -> dict[str, nn.Module]:
    """MONAI's networks whose weights are in the files of `weight_files`; the 3D one is not dilated."""
    return {
        "medicalnet": monai_resnet50(3),
        "official": monai_resnet50(2),
        "converted": keras_form(monai_resnet50(2)),
    }


@pytest.fixture(scope="session")
def weight_files(networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("weights")
    forms: dict[str, Callable[[dict], dict]] = {
        "medicalnet": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        "official": authors_names,
        # Converted from Keras: without the counters that torch has added later.
        "converted": lambda state: {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")},
    }
    files = {}
    for name, form in forms.items():
        files[name] = folder / f"{name}.pth"
        torch.save(form(dict(networks[name].state_dict())), files[name])
    yield files
    for file in files.values():  # 370 MB
        file.unlink()


@pytest.fixture(scope="session")
def taps_package() -> None:
    if not taps.is_installed():
        pytest.skip(f"{taps.PACKAGE} is not installed; install it with: {taps.INSTALL}")
