"""PreparedDataset: the numbers of docs/explanation/method.md, section 1.5, and errors that name the study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ccella_fast.data.loading.dataset import PreparedDataset, collate
from ccella_fast.errors import DataError
from ccella_fast.storage import read_json, sha256, write_json
from training_fixtures import settings, write_prepared


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_prepared(tmp_path)


def edit(folder: Path, change) -> None:
    manifest = read_json(folder / "manifest.json")
    change(manifest)
    write_json(folder / "manifest.json", manifest)


def replace_array(folder: Path, manifest: dict, case: int, key: str, array: np.ndarray) -> None:
    entry = manifest["cases"][case]["files"][key]
    np.save(folder / entry["path"], array)
    entry |= {"sha256": sha256(folder / entry["path"]), "bytes": (folder / entry["path"]).stat().st_size}


def test_classes_and_spacings_of_a_batch_are_scaled(folder: Path):
    dataset = PreparedDataset(folder, settings())
    batch = collate([dataset[index] for index in (1, 4, 0)])
    assert batch.ids == ["case1", "case4", "case0"] and len(dataset) == 5
    torch.testing.assert_close(batch.pirads, torch.tensor([[0.0, 100.0], [0.0, 0.0], [100.0, 0.0]]))
    torch.testing.assert_close(batch.spacing, torch.tensor([[50.0, 50.0, 56.25]] * 3))
    assert batch.has_class.tolist() == [True, False, True]
    assert dataset.has_class == [True, True, True, True, False]
    for position, case in enumerate(batch.ids):
        mean = np.load(folder / f"latents/{case}/t2w_mean.npy")
        np.testing.assert_array_equal(batch.latent_mean[position].numpy(), mean)
        text = np.load(folder / f"text/{int(case[-1]):064x}.npy")
        np.testing.assert_array_equal(batch.text[position].numpy(), text)
    assert not torch.equal(batch.latent_mean[0], batch.latent_mean[2])
    assert (batch.latent_sigma == np.float32(0.1)).all() and batch.latent_mean.dtype == torch.float32


def test_has_class_is_false_without_a_report(folder: Path):
    edit(folder, lambda manifest: manifest["cases"][0].update(text_isnull=1))
    dataset = PreparedDataset(folder, settings())
    assert not dataset[0].has_class and dataset[0].pirads.tolist() == [100, 0] and dataset.has_class[0] is False


def test_a_missing_sigma_is_zero(folder: Path):
    edit(folder, lambda manifest: manifest["cases"][2]["files"].pop("latent_sigma/t2w"))
    dataset = PreparedDataset(folder, settings())
    assert not dataset[2].latent_sigma.any() and dataset[1].latent_sigma.all()
    assert dataset[2].latent_sigma.shape == dataset[2].latent_mean.shape


def test_sequences_are_concatenated_along_the_channels(folder: Path):
    def add(manifest: dict) -> None:
        manifest["data"]["sequences"] = ["t2w", "adc"]
        for case in manifest["cases"]:
            files = case["files"]
            files["latent_mean/adc"], files["latent_sigma/adc"] = files["latent_sigma/t2w"], files["latent_sigma/t2w"]

    edit(folder, add)
    changes = {"data__sequences": ["t2w", "adc"], "model__latent_channels": [4, 4]}
    sample = PreparedDataset(folder, settings(**changes))[0]
    assert sample.latent_mean.shape == (8, 8, 8, 4)
    np.testing.assert_array_equal(sample.latent_mean[:4].numpy(), np.load(folder / "latents/case0/t2w_mean.npy"))
    assert (sample.latent_mean[4:] == np.float32(0.1)).all()


def test_split_and_dataset_select_studies(folder: Path):
    def mark(manifest: dict) -> None:
        manifest["cases"][0]["split"] = "test"
        manifest["cases"][1]["dataset"] = "Institute1"

    edit(folder, mark)
    assert PreparedDataset(folder, settings(), "test").ids == ["case0"]
    assert PreparedDataset(folder, settings()).ids == ["case1", "case2", "case3", "case4"]
    assert PreparedDataset(folder, settings(data__dataset="Institute1")).ids == ["case1"]
    with pytest.raises(DataError, match="did you mean 'Institute1'"):
        PreparedDataset(folder, settings(data__dataset="Institut1"))
    edit(folder, lambda manifest: manifest["cases"][2].update(dataset="words of a report"))
    with pytest.raises(DataError) as caught:
        PreparedDataset(folder, settings(data__dataset="words"))
    assert "report" not in str(caught.value)
    with pytest.raises(DataError, match="no study in the split 'test'"):
        PreparedDataset(folder, settings(data__dataset="Institute1"), "test")


@pytest.mark.parametrize("variant", ["DECOUPLED", "RADMAISI"])
def test_variants_with_given_class_need_the_class_of_every_study(folder: Path, variant: str):
    with pytest.raises(DataError, match=f"{variant} is given the class of every study, but it is not known for case4"):
        PreparedDataset(folder, settings(model__variant=variant))
    edit(folder, lambda manifest: manifest["cases"].pop())
    assert len(PreparedDataset(folder, settings(model__variant=variant))) == 4


def test_variants_without_text_do_not_read_text(folder: Path):
    edit(folder, lambda manifest: [case["files"].pop("text") for case in manifest["cases"]])
    dataset = PreparedDataset(folder, settings(model__variant="MAISI"))
    assert collate([dataset[0], dataset[1]]).text is None
    with pytest.raises(DataError, match="the study 'case0' has no text"):
        PreparedDataset(folder, settings())


def test_wrong_shapes_raise(folder: Path):
    with pytest.raises(DataError, match="its shape is \\(4, 8, 8, 4\\).*\\(4, 16, 8, 4\\)") as caught:
        PreparedDataset(folder, settings(data__dim=[64, 32, 16]))
    assert caught.value.field == "case0.files.latent_mean/t2w"
    edit(folder, lambda manifest: replace_array(folder, manifest, 3, "text", np.zeros((8, 31), np.float32)))
    with pytest.raises(DataError, match="its shape is \\(8, 31\\).*\\(8, 32\\)") as caught:
        PreparedDataset(folder, settings())
    assert caught.value.field == "case3.files.text" and "text" in caught.value.path


def test_missing_latents_and_sequences_raise(folder: Path):
    changes = {"data__sequences": ["t2w", "adc"], "model__latent_channels": [4, 4]}
    with pytest.raises(DataError, match="has no latent_mean/adc"):
        PreparedDataset(folder, settings(**changes))
    edit(folder, lambda manifest: manifest["cases"][2]["files"].pop("latent_mean/t2w"))
    with pytest.raises(DataError, match="the study 'case2' has no latent_mean/t2w") as caught:
        PreparedDataset(folder, settings())
    assert "--vae" in caught.value.fix


def test_another_spacing_raises(folder: Path):
    with pytest.raises(DataError, match="prepared at") as caught:
        PreparedDataset(folder, settings(data__spacing=[0.5, 0.5, 3.0]))
    assert caught.value.field == "data.spacing"


@pytest.mark.parametrize(
    ("ranks", "shown"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
    ],
    ids=["no-rank", "rank0", "rank1", "rank8-local-rank0"],
)
def test_only_rank_0_shows_a_bar(folder: Path, ranks: dict, shown: bool, monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    PreparedDataset(folder, settings())
    assert ("checking prepared files" in capfd.readouterr().err) == shown


def test_a_changed_file_raises_on_opening(folder: Path):
    path = folder / "latents/case3/t2w_mean.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256") as caught:
        PreparedDataset(folder, settings())
    assert caught.value.path == str(path) and "case3" in caught.value.field


def test_reports_must_be_encoded_as_configured(folder: Path):
    """Training with one encoder and sampling with another would not be detected otherwise."""
    text = {"encoder": "some/encoder", "max_length": 8, "dtype": "float32", "fingerprint": "abc"}
    edit(folder, lambda manifest: manifest["text"].update(text))
    right = {"text__encoder": "some/encoder", "text__max_length": 8, "text__dtype": "float32"}
    assert len(PreparedDataset(folder, settings(**right))) == 5
    others = {"text__encoder": "other", "text__revision": "v2", "text__max_length": 16, "text__dtype": "bfloat16"}
    for key, value in others.items():
        with pytest.raises(DataError, match="reports were encoded with") as caught:
            PreparedDataset(folder, settings(**right | {key: value}))
        assert caught.value.field == key.replace("__", ".")
    assert len(PreparedDataset(folder, settings(model__variant="MAISI"))) == 5
