"""Extractors by name, messages about wrong names, what all have in common, and no network."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ccella_fast.errors import CheckpointError, ConfigError, DataError
from ccella_fast.evaluation.features import taps
from ccella_fast.evaluation.features.extractor import Extractor, load_extractor
from feature_fixtures import make_volume


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=["radiomics", "random", "taps"])
def extractor(request: pytest.FixtureRequest, no_network: None) -> Extractor:
    if request.param == "taps":
        request.getfixturevalue("taps_package")
    return load_extractor(request.param)


def test_extractors_without_weights_of_the_user(extractor: Extractor):
    volume = make_volume((44, 40, 12), (2.0, 2.0, 3.0))
    kept = volume.array.copy()
    first = extractor(volume)
    extractor(make_volume((30, 40, 12), (2.5, 2.0, 3.0), seed=1))
    second = extractor(volume._replace(id="other", patient="p"))
    assert {name: array.shape for name, array in first.items()} == {n: (size,) for n, size in extractor.spaces.items()}
    for name, array in first.items():
        assert array.dtype == np.float32 and np.isfinite(array).all()
        np.testing.assert_array_equal(array, second[name])
    np.testing.assert_array_equal(volume.array, kept)
    identity = json.loads(json.dumps(extractor.identity, allow_nan=False))
    assert identity == extractor.identity and {"extractor", "version", "preprocessing"} <= set(identity)


def test_volumes_without_features_are_named(extractor: Extractor):
    volume = make_volume(name="case-7")
    for array in (np.full_like(volume.array, np.nan), np.full_like(volume.array, 0.5)):
        with pytest.raises(DataError, match="'case-7'"):
            extractor(volume._replace(array=array))


def test_networks_of_the_user(weight_files: dict[str, Path], no_network: None, tmp_path: Path):
    specs = {
        f"medicalnet={weight_files['medicalnet']}": "ccella",
        f"medicalnet={weight_files['medicalnet']}:medicalnet": "medicalnet",
        f"radimagenet={weight_files['converted']}": "ccella",
        f"radimagenet={weight_files['official']}": "official",
        f"radimagenet={weight_files['official']}:maisi": "maisi",
    }
    identities = []
    for spec, name in specs.items():
        extractor = load_extractor(spec, allow_unknown_weights=True)
        assert extractor.identity["input"] == name
        identities.append(json.dumps(extractor.identity))
    assert len(set(identities)) == len(specs)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_extractor(next(iter(specs)))
    colon = tmp_path / "a:b.pth"
    colon.symlink_to(weight_files["converted"])
    assert load_extractor(f"radimagenet={colon}", allow_unknown_weights=True).identity["input"] == "ccella"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tabs", "did you mean 'taps'"),
        ("", "use one of: medicalnet, radimagenet, radiomics, random, taps"),
        ("medicalnet", "write medicalnet=FILE"),
        ("medicalnet=", "write medicalnet=FILE"),
        ("taps=model.onnx", "'taps' is given without a file"),
        ("medicalnet=weights.pth:maisi", "'medicalnet' has no input called 'maisi'"),
        ("radimagenet=weights.pth:maysi", "did you mean 'maisi'"),
    ],
)
def test_wrong_names_are_explained(spec: str, words: str):
    with pytest.raises(ConfigError) as caught:
        load_extractor(spec)
    assert words in str(caught.value) and caught.value.field == "features" and len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("spec", ["medicalnet=absent.pth", "radimagenet=absent.pth:maisi", "medicalnet=a:b"])
def test_absent_files_are_named(spec: str):
    with pytest.raises((CheckpointError, ConfigError), match="does not exist|no input"):
        load_extractor(spec)


def test_radiomics_does_not_import_monai():
    code = (
        "import sys; from ccella_fast.evaluation.features.extractor import load_extractor\n"
        "load_extractor('radiomics'); print('monai' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_absent_package_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(taps, "PACKAGE", "lavlab-taps-that-nobody-has")
    taps.load_network.cache_clear()
    with pytest.raises(ConfigError, match="pip install --no-deps lavlab-taps==1.1.2"):
        load_extractor("taps")
