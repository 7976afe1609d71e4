"""The digests of stages cover all inputs: after a change of a setting or an input byte, `prepare` into the old folder and into
a new one give the same tree. A setting that is missing in a digest would keep the result of its old value.
"""

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
from ccella_fast.data.preparation.stages import ImageStage
from ccella_fast.data.preparation.worker_pool import WorkerPool
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
# Small strengths, so that each value of AUGMENTATION below changes the parameters drawn.
AUGMENTED = {
    "preset": "none", "rotation": [3.0, 3.0, 6.0], "translation": [2.0] * 3, "zoom": 0.1, "crop": [0.1] * 3, "gamma": 0.1,
    "contrast": 0.1, "brightness": 0.05, "bias": 0.1, "blur": 1.0, "noise": 0.05, "gland": [10.0] * 3, "flip": 0.0,
}  # fmt: skip

# Field -> another value.
DATA: dict[str, Any] = {
    "sequences": ["t2w", "adc"], "spacing": [1.7, 1.5, 3.0], "dim": [32, 16, 16], "dataset": "one", "engine": "auto",
}  # fmt: skip
TEXT: dict[str, Any] = {
    "revision": "other", "max_length": 10, "dtype": "bfloat16", "batch_size": 1,
}  # fmt: skip
AUGMENTATION: dict[str, Any] = {
    "preset": "text", "rotation": [3.0, 3.0, 9.0], "translation": [2.0, 4.0, 2.0], "zoom": 0.2, "crop": [0.2, 0.1, 0.1],
    "gland": [40.0] * 3, "flip": 1.0, "gamma": 0.2, "contrast": 0.2, "brightness": 0.1, "bias": 0.2, "blur": 2.0, "noise": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies with ADC, the first one in the train split and as DICOM; a text encoder and two autoencoders."""
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
    """The affine of the series that `write_dicom` writes, for the study that has it; else None."""
    return np.array([[-1.5, 0, 0, 31.5], [0, -1.5, 0, 40.25], [0, 0, 3, -20.75], [0, 0, 0, 1]]) if number == 0 else None


def settings_of(sources: Path, variant: str = "CCELLA", **changes: Any) -> Config:
    augmentation = {f"augmentation__{key}": value for key, value in AUGMENTED.items()}
    return config(variant=variant, encoder=sources / "bert", **{**BASE, **augmentation, **changes})


def assert_redone(
    tmp_path: Path, first: Config, second: Config, studies: Path, *, change: Callable[[], Any] = lambda: None,
    other: dict[str, Any] | None = None, same: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Prepare with `first` and then `second` into one folder, and with `second` into a new one: the trees must be equal.

    Args:
        change: Called before the second run; changes the studies.
        other: Options of `prepare` that differ in the second run.
        same: Whether the change must have no effect.
    """
    prepare(studies, tmp_path / "twice", first, **options)
    before = tree(tmp_path / "twice")
    change()
    options |= other or {}
    prepare(studies, tmp_path / "twice", second, **options, overwrite=True)
    prepare(studies, tmp_path / "once", second, **options)
    after, fresh = tree(tmp_path / "twice"), tree(tmp_path / "once")
    differing = {name for name in fresh if after.get(name) != fresh[name]}
    assert not differing
    assert (before == fresh) == same  # control: the change has an effect where it should


@pytest.mark.parametrize("field", DataConfig.model_fields)
def test_data_setting_is_an_input(field: str, sources: Path, tmp_path: Path):
    changed: dict[str, Any] = {f"data__{field}": DATA[field]}
    if field == "sequences":
        changed["model__latent_channels"] = [4, 4]
    first, second = settings_of(sources, "MAISI"), settings_of(sources, "MAISI", **changed)
    assert_redone(tmp_path, first, second, sources / "studies", vae=sources / "vae", same=field == "engine")


@pytest.mark.parametrize("field", [field for field in TextConfig.model_fields if field != "encoder"])
def test_text_setting_is_an_input(field: str, sources: Path, tmp_path: Path):
    first, second = settings_of(sources), settings_of(sources, **{f"text__{field}": TEXT[field]})
    assert_redone(tmp_path, first, second, sources / "studies", same=field == "batch_size")


@pytest.fixture(scope="module")
def latents(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and latents, which do not depend on augmentation, and another one with augmented latents too."""
    folder = tmp_path_factory.mktemp("latents")
    settings = settings_of(sources, "MAISI")
    prepare(sources / "studies", folder / "plain", settings, vae=sources / "vae")
    shutil.copytree(folder / "plain", folder / "augmented")
    prepare(sources / "studies", folder / "augmented", settings, vae=sources / "vae", augment=1)
    return folder


@pytest.mark.parametrize("field", AugmentationConfig.model_fields)
def test_augmentation_strength_is_an_input(field: str, sources: Path, latents: Path, tmp_path: Path):
    """Except `preset`, which only fills in strengths that are not given; here all are given."""
    settings = settings_of(sources, "MAISI", **{f"augmentation__{field}": AUGMENTATION[field]})
    trees = []
    for name in ("augmented", "plain"):
        shutil.copytree(latents / name, tmp_path / name)
        prepare(sources / "studies", tmp_path / name, settings, vae=sources / "vae", augment=1)
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1]
    assert (trees[0] == tree(latents / "augmented")) == (field == "preset")


@pytest.mark.parametrize("field", AugmentationConfig.model_fields)
def test_augmentation_strength_is_an_input_of_previews(field: str, sources: Path, latents: Path):
    """Only digests are compared, because drawing takes seconds."""
    records = StageCache(latents / "plain")
    studies = find_studies(sources / "studies")
    images = ImageStage(records, studies, settings_of(sources, "MAISI"), WorkerPool(1))
    before, after = (
        PreviewStage(records, studies, settings_of(sources, "MAISI", **changes), images).inputs(studies[0])
        for changes in ({}, {f"augmentation__{field}": AUGMENTATION[field]})
    )
    assert (before == after) == (field == "preset")


def test_changed_augmentation_draws_previews_again(sources: Path, tmp_path: Path):
    one = {"augmentation__preset": "none", "data__dim": [32, 16, 16]}
    first, second = (config(augmentation__gamma=gamma, **one) for gamma in (0.1, 0.5))
    assert_redone(tmp_path, first, second, sources / "studies", preview=True)


def test_seed_copies_and_autoencoder_are_inputs(sources: Path, tmp_path: Path):
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
def test_file_of_the_text_encoder_is_an_input(name: str, sources: Path, tmp_path: Path):
    folder = Path(shutil.copytree(sources / "bert", tmp_path / "bert"))
    settings = config(variant="CCELLA", encoder=folder)

    def change() -> None:
        content = bytearray((folder / name).read_bytes())
        if name in ENCODER:
            old, new = ENCODER[name]
            assert old in content
            content = content.replace(old, new)
        else:
            content[-1] ^= 64  # a high bit of the exponent of the last weight
        (folder / name).write_bytes(content)

    assert_redone(tmp_path, settings, settings, sources / "studies", change=change)


@pytest.mark.parametrize("number", [0, 8, 17], ids="slice{}".format)
def test_slice_of_a_dicom_series_is_an_input(number: int, sources: Path, tmp_path: Path):
    studies = Path(shutil.copytree(sources / "studies", tmp_path / "studies"))
    slices = sorted((studies / "case0" / "t2w").iterdir())

    def change() -> None:
        content = bytearray(slices[number].read_bytes())
        content[-2000:-1990] = bytes(10)
        slices[number].write_bytes(content)

    settings = config(data__spacing=[1.5, 1.5, 3.0], data__dim=[32, 32, 32], augmentation__noise=0.1)
    assert_redone(tmp_path, settings, settings, studies, change=change, vae=sources / "vae", augment=1)


def test_set_of_dicom_slices_is_an_input(sources: Path, tmp_path: Path):
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


def test_voxels_position_report_class_and_split_are_inputs(sources: Path, tmp_path: Path):
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
def test_files_prepared_by_the_reference_are_inputs(name: str, tmp_path: Path):
    write_merged(tmp_path)
    path = tmp_path / "emb" / "c1" / name

    def change() -> None:
        (tmp_path / "emb" / "c0" / name).replace(path)
        shutil.copy(tmp_path / "emb" / "c2" / name, tmp_path / "emb" / "c0" / name)

    settings = config(variant="CCELLA")
    options = {"embedding_base_dir": tmp_path / "emb"}
    assert_redone(tmp_path, settings, settings, tmp_path / "merged.json", change=change, **options)


def test_constants_of_the_protocol_belong_to_the_recipe():
    """Digests do not cover code: when these constants change, increase IMAGE_RECIPE and update this line."""
    from ccella_fast.data.preparation import stages

    assert (resampling.PERCENTILES, resampling.ADC_WINDOW, stages.IMAGE_RECIPE) == ((0.0, 99.5), (0.0, 3000.0), 2)
