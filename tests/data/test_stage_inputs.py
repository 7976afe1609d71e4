"""What a stage of preparation depends on: with any setting or input byte changed, a second `prepare` into a folder gives what a
first one gives. A setting left out of a stage's digest keeps what was made with the old one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccella_fast.config import AugmentationConfig, Config, DataConfig, TextConfig
from ccella_fast.data.preparation import resampling
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.preparation.preview import PreviewStage
from ccella_fast.data.preparation.stage_cache import StageCache
from ccella_fast.data.readers.discovery import find_studies
from study_fixtures import (
    config,
    tree,
    voxels,
    write_bert,
    write_dicom,
    write_merged,
    write_nifti,
    write_studies,
    write_vae,
)

BASE: dict[str, Any] = {"data__sequences": ["t2w"], "data__engine": "torch", "model__latent_channels": [4]}
# A part that is small enough that every value below changes what is drawn.
AUGMENTED = {
    "preset": "none", "rotation": [3.0, 3.0, 6.0], "translation": [2.0] * 3, "zoom": 0.1, "crop": [0.1] * 3, "gamma": 0.1,
    "contrast": 0.1, "brightness": 0.05, "bias": 0.1, "blur": 1.0, "noise": 0.05, "gland": [10.0] * 3, "flip": 0.0,
}  # fmt: skip

# field -> another value; None: what it says is part of the manifest, or it shapes no result.
DATA: dict[str, Any] = {
    "sequences": ["t2w", "adc"], "spacing": [1.7, 1.5, 3.0], "dim": [32, 16, 16], "dataset": "one", "engine": "auto",
}  # fmt: skip
TEXT: dict[str, Any] = {
    "encoder": None, "revision": "other", "max_length": 10, "dtype": "bfloat16", "batch_size": 1,
}  # fmt: skip
AUGMENTATION: dict[str, Any] = {
    "preset": "text", "rotation": [3.0, 3.0, 9.0], "translation": [2.0, 4.0, 2.0], "zoom": 0.2, "crop": [0.2, 0.1, 0.1],
    "gland": [40.0] * 3, "flip": 1.0, "gamma": 0.2, "contrast": 0.2, "brightness": 0.1, "bias": 0.2, "blur": 2.0, "noise": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies, the first of the train split and as DICOM, with an ADC series each; encoders and autoencoders."""
    folder = tmp_path_factory.mktemp("sources")
    write_studies(folder / "studies", 2)
    shutil.rmtree(folder / "studies" / "case0")
    write_dicom(folder / "studies" / "case0" / "t2w")
    for number in range(2):
        write_nifti(folder / "studies" / f"case{number}" / "adc.nii.gz", affine=_affine(number), seed=20 + number)
    write_bert(folder / "bert")
    write_vae(folder / "vae", config())
    write_vae(folder / "other", config(), seed=1)
    return folder


def _affine(number: int) -> np.ndarray | None:
    """The place of `write_dicom`'s series, for the study that has it."""
    return np.array([[-1.5, 0, 0, 31.5], [0, -1.5, 0, 40.25], [0, 0, 3, -20.75], [0, 0, 0, 1]]) if number == 0 else None


def settings_of(sources: Path, variant: str = "CCELLA", **changes: Any) -> Config:
    augmentation = {f"augmentation__{key}": value for key, value in AUGMENTED.items()}
    return config(variant=variant, encoder=sources / "bert", **{**BASE, **augmentation, **changes})


def assert_redone(
    tmp_path: Path, first: Config, second: Config, studies: Path, *, change: Callable[[], Any] = lambda: None,
    other: dict[str, Any] | None = None, same: bool = False, **options: Any,
) -> None:  # fmt: skip
    """prepare with `first`, then with `second` into the same folder, and `second` into a fresh one: equal trees."""
    prepare(studies, tmp_path / "twice", first, **options)
    before = tree(tmp_path / "twice")
    change()
    options |= other or {}
    prepare(studies, tmp_path / "twice", second, **options)
    prepare(studies, tmp_path / "fresh", second, **options)
    after, fresh = tree(tmp_path / "twice"), tree(tmp_path / "fresh")
    differing = {name for name in fresh if after.get(name) != fresh[name]}
    assert not differing
    assert (before == fresh) == same  # the change does change something, where it should


@pytest.mark.parametrize("field", DataConfig.model_fields)
def test_every_data_setting(field: str, sources: Path, tmp_path: Path):
    changed: dict[str, Any] = {f"data__{field}": DATA[field]}
    if field == "sequences":
        changed["model__latent_channels"] = [4, 4]
    first, second = settings_of(sources, "MAISI"), settings_of(sources, "MAISI", **changed)
    assert_redone(tmp_path, first, second, sources / "studies", vae=sources / "vae", same=field == "engine")


@pytest.mark.parametrize("field", [field for field in TextConfig.model_fields if field != "encoder"])
def test_every_text_setting(field: str, sources: Path, tmp_path: Path):
    first, second = settings_of(sources), settings_of(sources, **{f"text__{field}": TEXT[field]})
    assert_redone(tmp_path, first, second, sources / "studies", same=field == "batch_size")


@pytest.fixture(scope="module")
def latents(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and latents, which no strength of augmentation shapes, and in another folder augmented latents too."""
    folder = tmp_path_factory.mktemp("latents")
    settings = settings_of(sources, "MAISI")
    prepare(sources / "studies", folder / "plain", settings, vae=sources / "vae")
    shutil.copytree(folder / "plain", folder / "augmented")
    prepare(sources / "studies", folder / "augmented", settings, vae=sources / "vae", augment=1)
    return folder


@pytest.mark.parametrize("field", AugmentationConfig.model_fields)
def test_every_strength_of_augmentation(field: str, sources: Path, latents: Path, tmp_path: Path):
    """`preset` only fills in strengths that are not given; here all are."""
    settings = settings_of(sources, "MAISI", **{f"augmentation__{field}": AUGMENTATION[field]})
    trees = []
    for name in ("augmented", "plain"):
        shutil.copytree(latents / name, tmp_path / name)
        prepare(sources / "studies", tmp_path / name, settings, vae=sources / "vae", augment=1)
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1]
    assert (trees[0] == tree(latents / "augmented")) == (field == "preset")


@pytest.mark.parametrize("field", AugmentationConfig.model_fields)
def test_every_strength_is_an_input_of_the_previews(field: str, sources: Path, latents: Path):
    """By the digest alone, because pictures take seconds."""
    records = StageCache(latents / "plain")
    studies = find_studies(sources / "studies")
    before, after = (
        PreviewStage(records, studies, settings_of(sources, "MAISI", **changes)).inputs(studies[0])
        for changes in ({}, {f"augmentation__{field}": AUGMENTATION[field]})
    )
    assert (before == after) == (field == "preset")


def test_previews_are_drawn_again(sources: Path, tmp_path: Path):
    one = {"augmentation__preset": "none", "data__dim": [32, 16, 16]}
    first, second = (config(augmentation__gamma=gamma, **one) for gamma in (0.1, 0.5))
    assert_redone(tmp_path, first, second, sources / "studies", preview=True)


def test_the_seed_the_copies_and_the_autoencoder(sources: Path, tmp_path: Path):
    first, second = settings_of(sources, "MAISI"), settings_of(sources, "MAISI", training__seed=5)
    options = {"vae": sources / "vae", "augment": 1}
    assert_redone(tmp_path / "seed", first, second, sources / "studies", **options)
    assert_redone(tmp_path / "vae", first, first, sources / "studies", other={"vae": sources / "other"}, **options)
    assert_redone(tmp_path / "copies", first, first, sources / "studies", other={"augment": 2}, **options)


ENCODER = {
    "vocab.txt": (b"left", b"lefd"),
    "config.json": (b'"gelu"', b'"relu"'),
    "tokenizer_config.json": (b"true", b"false"),
}


@pytest.mark.parametrize("name", [*ENCODER, "model.safetensors"])
def test_every_file_of_the_encoder(name: str, sources: Path, tmp_path: Path):
    folder = Path(shutil.copytree(sources / "bert", tmp_path / "bert"))
    settings = config(variant="CCELLA", encoder=folder)

    def change() -> None:
        content = bytearray((folder / name).read_bytes())
        if name in ENCODER:
            old, new = ENCODER[name]
            assert old in content
            content = content.replace(old, new)
        else:
            content[-1] ^= 64  # a high bit of the last weight's exponent
        (folder / name).write_bytes(content)

    assert_redone(tmp_path, settings, settings, sources / "studies", change=change)


@pytest.mark.parametrize("number", [0, 8, 17])
def test_every_slice_of_a_dicom_series(number: int, sources: Path, tmp_path: Path):
    studies = Path(shutil.copytree(sources / "studies", tmp_path / "studies"))
    slices = sorted((studies / "case0" / "t2w").iterdir())

    def change() -> None:
        content = bytearray(slices[number].read_bytes())
        content[-2000:-1990] = bytes(10)
        slices[number].write_bytes(content)

    settings = config(data__spacing=[1.5, 1.5, 3.0], data__dim=[32, 32, 32], augmentation__noise=0.1)
    assert_redone(tmp_path, settings, settings, studies, change=change, vae=sources / "vae", augment=1)


def test_a_slice_that_comes_or_goes(sources: Path, tmp_path: Path):
    studies = Path(shutil.copytree(sources / "studies", tmp_path / "studies"))
    positions = {path: float(_position(path)) for path in (studies / "case0" / "t2w").iterdir()}
    last = max(positions, key=lambda path: positions[path])
    assert_redone(tmp_path, config(), config(), studies, change=last.unlink)


def _position(path: Path) -> str:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader.GetMetaData("0020|0032").split("\\")[2]


def test_voxels_position_report_class_and_split(sources: Path, tmp_path: Path):
    studies = Path(shutil.copytree(sources / "studies", tmp_path / "studies"))
    series, table = studies / "case1" / "t2w.nii.gz", studies / "studies.csv"
    values, moved = voxels(seed=1), np.diag([-1.5, -1.5, 3.0, 1.0])

    def rewrite(old: str, new: str) -> Callable[[], Any]:
        return lambda: table.write_text(table.read_text().replace(old, new))

    table.write_text("case,split,pirads,report\ncase0,train,2,left lesion\ncase1,test,4,right lesion\n")
    values[20, 18, 9] += 1
    settings = settings_of(sources)
    for number, change in enumerate([
        lambda: write_nifti(series, values), lambda: write_nifti(series, values, moved), rewrite("left lesion", "left zone"),
        rewrite("2,left", "4,left"), rewrite("test,4", "train,4"), rewrite(",right lesion", ","),
    ]):  # fmt: skip
        assert_redone(tmp_path / str(number), settings, settings, studies, change=change, vae=sources / "vae")


@pytest.mark.parametrize("name", ["axt2_emb.nii.gz", "text.npy"])
def test_the_references_prepared_files(name: str, tmp_path: Path):
    write_merged(tmp_path)
    path = tmp_path / "emb" / "c1" / name

    def change() -> None:
        (tmp_path / "emb" / "c0" / name).replace(path)
        shutil.copy(tmp_path / "emb" / "c2" / name, tmp_path / "emb" / "c0" / name)

    settings = config(variant="CCELLA")
    options = {"embedding_base_dir": tmp_path / "emb"}
    assert_redone(tmp_path, settings, settings, tmp_path / "merged.json", change=change, **options)


def test_the_protocols_numbers_are_part_of_the_recipe(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A change of code is no change of a setting: whoever changes these numbers raises IMAGE_RECIPE, and then this line."""
    from ccella_fast.data.preparation import stages

    assert (resampling.PERCENTILES, resampling.ADC_WINDOW, stages.IMAGE_RECIPE) == ((0.0, 99.5), (0.0, 3000.0), 2)
