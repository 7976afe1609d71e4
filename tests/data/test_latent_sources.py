"""The sources of latents for training (memory maps, the device, online encoding) all give the same stream of batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ccella_fast.config import Config
from ccella_fast.data.augmentation.engine_choice import check_engine, make_engine
from ccella_fast.data.augmentation.parameters import Augmentation
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.loading import resident_latents
from ccella_fast.data.loading.dataset import PreparedDataset, StudyEpoch
from ccella_fast.data.loading.online_latents import OnlineLatents
from ccella_fast.data.loading.resident_latents import ResidentLatents, choose_latent_source
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.latent_encoder import LatentEncoder
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.diffusion.objective import Objective
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.storage import read_json, write_json
from ccella_fast.training.autoencoder.run import train_vae
from ccella_fast.training.batches import BatchStream
from ccella_fast.training.run import train
from study_fixtures import config, write_bert, write_studies, write_vae
from training_fixtures import losses, settings, train_here, write_prepared

CPU = torch.device("cpu")


class Prepared:
    """Small studies prepared with an autoencoder, reports and two augmented copies, shared by the tests of this file."""

    def __init__(self, folder: Path):
        self.folder, self.out, bert = folder, folder / "prepared", write_bert(folder / "bert")
        self.settings: Config = config(
            variant="CCELLA", encoder=bert, training__latents="online", training__batch_size=2, training__precision="fp32",
            training__max_train_steps=4, training__checkpointing_steps=2, training__ema_decay=0.0,
        )  # fmt: skip
        self.studies = write_studies(folder / "studies", 5)
        self.vae = write_vae(folder / "vae", self.settings)
        prepare(self.studies, self.out, self.settings, vae=self.vae, augment=2)

    def dataset(self, needs="images") -> PreparedDataset:
        return PreparedDataset(self.out, self.settings, needs=needs)

    def online(self, engine: str = "auto") -> OnlineLatents:
        data = self.settings.data.model_copy(update={"engine": engine})
        dataset = PreparedDataset(self.out, self.settings.model_copy(update={"data": data}), needs="images")
        return OnlineLatents(dataset, self.out / "vae", CPU, seed=3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("online"))


def batch_stream(dataset, source, *, batch_size=2, rank=0, world_size=1) -> BatchStream:
    return BatchStream(
        dataset, seed=3, batch_size=batch_size, accumulation=1, rank=rank, world_size=world_size, scale=torch.ones(4),
        objective=Objective(), source=source,
    )  # fmt: skip


# ---- resident latents ----


def test_resident_latents_equal_memory_mapped_latents(tmp_path: Path, prepared: Prepared):
    dataset = prepared.dataset("latents")
    assert dataset.copies == 2
    kept = ResidentLatents(dataset, CPU, torch.float32)
    for step in range(9):  # four studies, three versions of each
        ours, mapped = (batch_stream(dataset, source).micro_batch(step, 0) for source in (kept, dataset))
        assert ours.batch.ids == mapped.batch.ids and ours.class_share == mapped.class_share
        pairs = list(zip(ours.tensors(), mapped.tensors(), strict=True))
        assert len(pairs) == 9 and all(torch.equal(resident, expected) for resident, expected in pairs)
    assert not torch.equal(
        batch_stream(dataset, kept).micro_batch(0, 0).latents, batch_stream(dataset, kept).micro_batch(4, 0).latents
    )


def test_equal_reports_are_stored_once(tmp_path: Path):
    write_prepared(tmp_path, cases=4)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for case in manifest["cases"]:
        case["files"]["text"] = manifest["cases"][0]["files"]["text"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    dataset = PreparedDataset(tmp_path, settings())
    kept = ResidentLatents(dataset, CPU, torch.bfloat16)
    assert kept._text is not None and kept._text.shape[0] == 1 and kept._text.dtype == torch.bfloat16
    latents = 4 * 2 * (4 * 8 * 8 * 4 * 4 + 128)  # 128: the header of a .npy
    assert resident_latents.bytes_needed(dataset, torch.bfloat16) == latents + (8 * 32 * 4 + 128) // 2


def test_choice_of_the_source_follows_free_memory_and_is_logged(
    prepared: Prepared, monkeypatch, caplog: pytest.LogCaptureFixture
):
    dataset = prepared.dataset("latents")
    with caplog.at_level("INFO", logger="ccella_fast"):
        assert isinstance(choose_latent_source(dataset, CPU, torch.float32), ResidentLatents)
        needed = resident_latents.bytes_needed(dataset, torch.float32)
        for free, processes, fits in [(4 * needed, 1, True), (4 * needed - 1, 1, False), (4 * needed, 2, False)]:
            monkeypatch.setattr(resident_latents, "free_memory", lambda *_, free=free: free)
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))  # the processes share the memory of the machine
            assert (choose_latent_source(dataset, CPU, torch.float32) is not dataset) == fits
    assert "resident on cpu" in caplog.text and "memory-mapped" in caplog.text and "12 volumes" in caplog.text


def test_each_version_of_a_study_is_used_once_per_cycle(prepared: Prepared):
    dataset = prepared.dataset("latents")
    for study in range(len(dataset)):
        assert sorted(dataset.copy_of(StudyEpoch(study, epoch)) for epoch in range(3)) == [0, 1, 2]


# ---- augmented copies ----


def test_copies_are_reproducible_from_their_parameters(prepared: Prepared):
    manifest, settings = load_manifest(prepared.out), prepared.settings
    train_cases = [case for case in manifest.cases if case.split == "train"]
    assert [len(case.augmented) for case in manifest.cases] == [2 if c in train_cases else 0 for c in manifest.cases]
    engine, encoder = (
        make_engine("torch", settings.augmentation, CPU, settings.data.dim),
        LatentEncoder(prepared.vae, settings.autoencoder),
    )
    case, shape = train_cases[1], tuple(settings.data.dim)
    for copy in case.augmented:
        applied = Augmentation(**copy.parameters)
        request = VolumeRequest(
            prepared.out / case.files["image/t2w"].path,
            shape,
            (0, 0, 0),
            shape,
            tuple(settings.data.spacing),
            applied.for_sequence("t2w"),
        )
        mean, sigma = encoder.posterior(engine.make(request)[None])
        for name, value in (("mean", mean), ("sigma", sigma)):
            stored = manifest.array(case, f"latent_{name}/t2w", verify=True, files=copy.files)
            np.testing.assert_array_equal(stored, value[0].numpy())
        assert copy.spacing == pytest.approx(applied.spacing(settings.data.spacing)) and copy.spacing != case.spacing
    own = manifest.array(case, "latent_mean/t2w")
    assert np.abs(own - manifest.array(case, "latent_mean/t2w", files=case.augmented[0].files)).max() > 0.01
    item = prepared.dataset("latents").item(1, 2)
    np.testing.assert_allclose(item.spacing.numpy() / 100, case.augmented[1].spacing, rtol=1e-6)
    assert torch.equal(item.latent_mean, mean[0]) and torch.equal(item.latent_sigma, sigma[0])  # the second copy


def test_augmented_latents_are_verified_like_the_own_latents(prepared: Prepared, tmp_path: Path):
    out = Path(shutil.copytree(prepared.out, tmp_path / "out"))
    cases = json.loads((out / "manifest.json").read_text())["cases"]
    path = out / cases[0]["augmented"][1]["files"]["latent_sigma/t2w"]["path"]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="SHA-256") as caught:
        PreparedDataset(out, prepared.settings)
    assert caught.value.path == str(path)
    manifest = read_json(out / "manifest.json")
    del manifest["cases"][0]["augmented"][1]  # one study now has only one copy
    write_json(out / "manifest.json", manifest)
    assert PreparedDataset(out, prepared.settings).copies == 1


def test_copies_are_kept_until_augment_0_removes_them(prepared: Prepared, tmp_path: Path):
    out, settings = tmp_path / "out", prepared.settings
    prepare(prepared.studies, out, settings, vae=prepared.vae)
    plain = (out / "manifest.json").read_text()
    assert "augmented" not in plain
    prepare(prepared.studies, out, settings, vae=prepared.vae, augment=1)
    first = (out / "manifest.json").read_text()
    prepare(prepared.studies, out, settings, vae=prepared.vae)
    assert (out / "manifest.json").read_text() == first != plain
    prepare(prepared.studies, out, settings, vae=prepared.vae, augment=0)
    assert (out / "manifest.json").read_text() == plain
    with pytest.raises(ConfigError, match="need an autoencoder"):
        prepare(prepared.studies, out, settings, augment=1)
    mirrored = settings.model_copy(update={"augmentation": settings.augmentation.model_copy(update={"flip": 0.5})})
    with pytest.raises(ConfigError, match="CCELLA reads the report"):
        prepare(prepared.studies, out, mirrored, vae=prepared.vae, augment=1)


def test_mirrored_copies_raise_for_a_variant_that_reads_reports(tmp_path: Path):
    """The copies were prepared for a variant without report; then the folder was prepared for a variant with report."""
    studies, bert = write_studies(tmp_path / "studies", 3), write_bert(tmp_path / "bert")
    blind, reading = (
        config(variant=variant, encoder=bert, augmentation__preset="none", augmentation__flip=1)
        for variant in ("MAISI", "CCELLA")
    )
    vae, out = write_vae(tmp_path / "vae", blind), tmp_path / "prepared"
    prepare(studies, out, blind, vae=vae, augment=1)
    prepare(studies, out, reading, vae=vae)
    assert PreparedDataset(out, blind).copies == 1
    with pytest.raises(DataError, match="CCELLA reads the report, but .* 'case0' are mirrored") as caught:
        PreparedDataset(out, reading)
    assert caught.value.field == "case0.augmented" and "--augment 0" in caught.value.fix
    assert PreparedDataset(out, reading, needs="images").copies == 0
    prepare(studies, out, reading, vae=vae, augment=0)
    assert PreparedDataset(out, reading).copies == 0


# ---- online encoding ----


def test_online_latents_equal_the_prepared_copies(prepared: Prepared):
    """Epoch k of online training uses the same volumes as copy k of `prepare --augment`."""
    source, manifest = prepared.online(), load_manifest(prepared.out)
    source.seed = prepared.settings.training.seed
    batch = next(source.batches(lambda n: [StudyEpoch(2, 1), StudyEpoch(0, 2)], 1))
    for row, (study, copy) in enumerate([(2, 1), (0, 2)]):
        case = source.dataset.cases[study]
        stored = manifest.array(case, "latent_mean/t2w", files=case.augmented[copy - 1].files)
        np.testing.assert_allclose(batch.latent_mean[row].numpy(), stored, atol=1e-5)
        np.testing.assert_allclose(batch.spacing[row].numpy() / 100, case.augmented[copy - 1].spacing, rtol=1e-6)
        assert batch.ids[row] == case.id and torch.equal(batch.text[row], source.dataset.item(study).text)
    other = manifest.array(case, "latent_mean/t2w", files=case.augmented[0].files)
    assert np.abs(batch.latent_mean[1].numpy() - other).max() > 1e-3


def test_stream_does_not_depend_on_ranks_or_restarts(prepared: Prepared):
    dataset = prepared.dataset()
    whole = [steps[0] for steps in batch_stream(dataset, prepared.online(), batch_size=4).steps(0, 3, background=False)]
    resumed = [
        steps[0] for steps in batch_stream(dataset, prepared.online(), batch_size=4).steps(2, 3, background=True)
    ]
    assert torch.equal(resumed[0].latents, whole[2].latents) and not torch.equal(whole[1].latents, whole[2].latents)
    parts = [
        [
            steps[0]
            for steps in batch_stream(dataset, prepared.online(), batch_size=2, rank=r, world_size=2).steps(
                1, 3, background=True
            )
        ]
        for r in range(2)
    ]
    for step in (1, 2):
        both = [part[step - 1] for part in parts]
        assert [name for part in both for name in part.batch.ids] == whole[step].batch.ids
        torch.testing.assert_close(torch.cat([part.latents for part in both]), whole[step].latents, rtol=0, atol=1e-6)
    # With four studies and a global batch of four, each step is an epoch and contains each study once.
    assert all(sorted(samples.batch.ids) == sorted(dataset.ids) for samples in whole)


def test_engines_give_the_same_latents(prepared: Prepared, require):
    require("nvidia.dali")
    picks = [[StudyEpoch(0, 0), StudyEpoch(1, 0)], [StudyEpoch(2, 5), StudyEpoch(0, 7)]]
    ours, theirs = (
        torch.cat([b.latent_mean for b in prepared.online(name).batches(picks.__getitem__, 2)])
        for name in ("torch", "dali")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert (ours[0] - ours[3]).abs().max() > 0.02  # negative control: another epoch of the same study


def test_online_training_resumes_with_the_same_losses(prepared: Prepared, tmp_path: Path):
    settings = prepared.settings
    assert train(settings, data=prepared.out, run=tmp_path / "whole") == 0
    short = tmp_path / "parts"
    assert train(settings, data=prepared.out, run=short) == 0
    shutil.rmtree(short / "checkpoints" / "step-00000004")
    assert train(settings, data=prepared.out, run=short, resume="latest") == 0
    assert losses(short) == losses(tmp_path / "whole") and len({loss for _, loss in losses(short)}) == 4


def test_online_training_requires_images_an_autoencoder_and_no_flip(prepared: Prepared, tmp_path: Path):
    with pytest.raises(DataError, match="does not contain an autoencoder"):
        train_here(tmp_path / "run", write_prepared(tmp_path / "data"), latents="online")
    mirrored = prepared.settings.model_copy(
        update={"augmentation": prepared.settings.augmentation.model_copy(update={"flip": 0.5})}
    )
    with pytest.raises(ConfigError, match="'left' is on the right"):
        train(mirrored, data=prepared.out, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unavailable_engine_raises_before_anything_is_written(prepared: Prepared, tmp_path: Path, monkeypatch):
    """Otherwise the corrected command would fail because the folder already contains a run."""
    monkeypatch.setattr(
        "ccella_fast.data.augmentation.engine_choice._why_dali_is_unavailable", lambda: "it is not installed"
    )
    data = prepared.settings.data.model_copy(update={"engine": "dali"})
    wanted = prepared.settings.model_copy(update={"data": data})
    commands = [
        lambda: train(wanted, data=prepared.out, run=tmp_path / "run"),
        lambda: train_vae(prepared.out, tmp_path / "vae", wanted),
        lambda: prepare(prepared.studies, tmp_path / "prepared", wanted, vae=prepared.vae, augment=1),
    ]
    for command in commands:
        with pytest.raises(ConfigError, match="DALI cannot be used: it is not installed"):
            command()
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    check_engine("auto")


def test_image_that_is_deleted_during_training_is_named(prepared: Prepared, tmp_path: Path):
    shutil.copytree(prepared.out, tmp_path / "copy")
    dataset = PreparedDataset(tmp_path / "copy", prepared.settings, needs="images")
    source = OnlineLatents(dataset, prepared.out / "vae", CPU, seed=3)
    stream = batch_stream(dataset, source, batch_size=4).steps(0, 3, background=True)
    next(stream)
    path = tmp_path / "copy" / dataset.cases[0].files["image/t2w"].path
    path.unlink()
    with pytest.raises(DataError) as caught:
        list(stream)
    assert caught.value.path == str(path)
