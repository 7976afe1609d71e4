"""Preparation: correct values, no repeated work, nothing lost, and the same bytes after any interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import ConfigError, DataError
from study_fixtures import config, times, tree, write_bert, write_merged, write_nifti, write_studies, write_vae

TESTS = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return write_studies(tmp_path / "studies")


def test_images_follow_the_protocol(studies: Path, tmp_path: Path):
    """Without resampling, the whole computation can be done by hand."""
    out = tmp_path / "out"
    prepare(studies, out, config())
    prepared = load_manifest(out)
    assert [case.id for case in prepared.cases] == ["case0", "case1", "case2"]
    for number, case in enumerate(prepared.cases):
        image = nibabel.as_closest_canonical(nibabel.load(studies / case.id / "t2w.nii.gz"))
        raw = np.asarray(image.dataobj, dtype=np.float64)[4:36, 2:34, 1:17]
        low, high = raw.min(), np.percentile(raw, 99.5)
        expected = np.clip((raw - low) / (high - low), 0, 1)
        values = prepared.array(case, "image/t2w", verify=True)
        np.testing.assert_allclose(values, expected, atol=1e-6)
        assert np.abs(values - expected[::-1]).max() > 0.1  # control: a flip differs
        corner = nibabel.affines.apply_affine(image.affine, [4, 2, 1])
        np.testing.assert_allclose(np.array(case.affine)[:3, 3], corner, atol=1e-3)
        assert case.window["t2w"] == pytest.approx((low, high))
        assert case.split == ("test" if number == 1 else "train")
        assert case.pirads == [[1, 0], [0, 1], None][number] and case.text_isnull == int(number == 2)
    highs = [case.window["t2w"][1] for case in prepared.cases if case.split == "train"]
    assert prepared.intensity_scale == {"t2w": pytest.approx(np.median(highs))}
    assert prepared.vae is None and prepared.scale_factor is None and prepared.text is None
    assert json.loads((out / "run_record.json").read_text())["studies"] == 3


def test_prepared_arrays_are_plain_npy(studies: Path, tmp_path: Path):
    prepare(studies, tmp_path / "out", config())
    with open(tmp_path / "out/images/case0/t2w.npy", "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    assert (shape, fortran, dtype) == ((32, 32, 16), False, np.dtype("<f4"))


def test_second_run_writes_nothing(studies: Path, tmp_path: Path, bert: Path):
    out, settings = tmp_path / "out", config(variant="CCELLA", encoder=bert)
    prepare(studies, out, settings, vae=write_vae(tmp_path / "vae", settings))
    before = times(out)
    prepare(studies, out, settings, vae=tmp_path / "vae")
    assert times(out) == before
    prepare(studies, out, settings)  # without --vae latents are kept
    assert times(out) == before
    assert load_manifest(out).scale_factor is not None


def test_run_record_keeps_the_times_of_every_stage(studies: Path, tmp_path: Path):
    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings)
    first = json.loads((out / "run_record.json").read_text())["stages"]
    assert set(first) == {"check", "image"} and first["image"]["studies"] == 3
    prepare(studies, out, settings, vae=write_vae(tmp_path / "vae", settings))
    second = json.loads((out / "run_record.json").read_text())["stages"]
    assert set(second) == {"check", "image", "latent"} and second["image"] == first["image"]
    write_nifti(studies / "case1" / "t2w.nii.gz", seed=9)
    prepare(studies, out, settings, vae=tmp_path / "vae")
    third = json.loads((out / "run_record.json").read_text())["stages"]
    assert [third[name]["studies"] for name in ("check", "image", "latent")] == [1, 1, 1]


def test_only_changed_inputs_are_prepared_again(studies: Path, tmp_path: Path, bert: Path):
    out, settings = tmp_path / "out", config(variant="CCELLA", encoder=bert)
    vae = write_vae(tmp_path / "vae", settings)
    prepare(studies, out, settings, vae=vae)
    before, stamps = tree(out), times(out)

    write_nifti(studies / "case1" / "t2w.nii.gz", seed=9)
    prepare(studies, out, settings, vae=vae)
    changed = {name for name, value in tree(out).items() if before.get(name) != value}
    assert changed == {
        "images/case1/t2w.npy",
        "latents/case1/t2w_mean.npy",
        "latents/case1/t2w_sigma.npy",
        "cases/case1.json",
        "manifest.json",
    }
    untouched = str(out / "images/case0/t2w.npy")
    assert times(out)[untouched] == stamps[untouched]

    table = studies / "studies.csv"
    table.write_text(table.read_text().replace("lesion of 4 mm", "lesion of 9 mm"))
    earlier = tree(out)
    prepare(studies, out, settings, vae=vae)
    changed = {name for name, value in tree(out).items() if earlier.get(name) != value}
    assert {name.split("/")[0] for name in changed} == {"text", "cases", "manifest.json"}


def test_damaged_or_missing_results_are_prepared_again(studies: Path, tmp_path: Path):
    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings)
    before = tree(out)
    (out / "images/case0/t2w.npy").unlink()
    damaged = bytearray((out / "images/case1/t2w.npy").read_bytes())
    damaged[-1] ^= 1
    (out / "images/case1/t2w.npy").write_bytes(damaged)
    (out / "cases/case2.json").write_text("{")
    assert tree(out) != before
    prepare(studies, out, settings)
    assert tree(out) == before


def test_deleted_autoencoder_is_stored_again(studies: Path, tmp_path: Path):
    """Online training needs it, and refers to `prepare` if it is missing."""
    vae, out = write_vae(tmp_path / "vae", config()), tmp_path / "out"
    prepare(studies, out, config(), vae=vae)
    before = tree(out)
    shutil.rmtree(out / "vae")
    assert tree(out) != before
    prepare(studies, out, config(), vae=vae)
    assert tree(out) == before


def test_another_autoencoder_gives_other_latents(studies: Path, tmp_path: Path):
    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings, vae=write_vae(tmp_path / "a", settings))
    first = load_manifest(out)
    prepare(studies, out, settings, vae=write_vae(tmp_path / "b", settings, seed=1), overwrite=True)
    second = load_manifest(out)
    assert first.vae != second.vae and first.scale_factor != second.scale_factor
    assert first.cases[0].files["image/t2w"] == second.cases[0].files["image/t2w"]
    assert first.cases[0].files["latent_mean/t2w"] != second.cases[0].files["latent_mean/t2w"]


def test_scale_factor_is_that_of_sampled_latents(studies: Path, tmp_path: Path):
    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings, vae=write_vae(tmp_path / "vae", settings))
    prepared = load_manifest(out)
    train = [case for case in prepared.cases if case.split == "train"]
    means = np.stack([prepared.array(case, "latent_mean/t2w") for case in train]).astype(np.float64)
    sigmas = np.stack([prepared.array(case, "latent_sigma/t2w") for case in train]).astype(np.float64)
    variance = means.var(ddof=1) + np.mean(sigmas**2)
    assert prepared.scale_factor == [pytest.approx(variance**-0.5, rel=1e-9)]
    rng = np.random.default_rng(0)
    sampled = np.std([means + sigmas * rng.standard_normal(means.shape) for _ in range(20)], ddof=1)
    assert prepared.scale_factor[0] == pytest.approx(1 / sampled, rel=0.01)
    assert abs(means.std(ddof=1) - sampled) / sampled > 0.02, "control: sigma contributes"


def test_latents_equal_the_output_of_the_encoder(studies: Path, tmp_path: Path):
    import torch

    from ccella_fast.models.autoencoder import load_autoencoder

    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings, vae=write_vae(tmp_path / "vae", settings))
    prepared = load_manifest(out)
    case = prepared.cases[2]
    with torch.no_grad():
        image = torch.tensor(np.array(prepared.array(case, "image/t2w")))[None, None]
        mean, sigma = load_autoencoder(tmp_path / "vae").encode(image)
    np.testing.assert_allclose(prepared.array(case, "latent_mean/t2w"), mean[0].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(prepared.array(case, "latent_sigma/t2w"), sigma[0].numpy(), rtol=1e-5, atol=1e-6)


def test_each_report_is_encoded_once_and_blank_reports_are_null(
    tmp_path: Path, bert: Path, caplog: pytest.LogCaptureFixture
):
    from ccella_fast.data.text_encoder import TextEncoder

    studies = write_studies(tmp_path / "studies", 6)
    long = " ".join(["word"] * 30) + " end"
    lines = ["case,report", "case0,left lesion", "case1,left lesion", "case2,  ", f"case3,{long}", "case4,right lesion"]
    (studies / "studies.csv").write_text("\n".join(lines) + "\n")
    settings = config(variant="CCELLA", encoder=bert)
    with caplog.at_level("INFO", logger="ccella_fast"):
        prepare(studies, tmp_path / "out", settings)
    prepared = load_manifest(tmp_path / "out")
    paths = [case.files["text"].path for case in prepared.cases]
    assert paths[0] == paths[1] and paths[2] == paths[5] and len(set(paths)) == 4  # a blank report equals a missing row
    assert [case.text_isnull for case in prepared.cases] == [0, 0, 1, 0, 0, 1]
    assert prepared.truncated_reports == ["case3"]
    assert "case3" in caplog.text and "word" not in caplog.text and "lesion" not in caplog.text
    encoder = TextEncoder(settings.text)
    for number, report in [(0, "left lesion"), (2, ""), (3, long)]:
        features = prepared.array(prepared.cases[number], "text", verify=True)
        np.testing.assert_allclose(features, encoder.encode([report]).features[0], atol=1e-5)
    difference = prepared.array(prepared.cases[0], "text") - prepared.array(prepared.cases[4], "text")
    assert np.abs(difference).max() > 0.01  # control: left and right differ


def test_three_sequences_share_the_t2_grid(real_data: Path, tmp_path: Path):
    """One real study with T2, high b and ADC, from its folder to 12-channel latents."""
    (tmp_path / "studies").mkdir()
    shutil.copytree(real_data / "mri/prostatex-0000", tmp_path / "studies/a")
    changes = {"data__sequences": ["t2w", "hbv", "adc"], "model__latent_channels": [4, 4, 4]}
    settings = config(data__spacing=[2.0, 2.0, 3.0], data__dim=[64, 64, 16], **changes)
    prepare(tmp_path / "studies", tmp_path / "out", settings, vae=write_vae(tmp_path / "vae", settings))
    prepared = load_manifest(tmp_path / "out")
    case = prepared.cases[0]
    assert len(prepared.scale_factor) == 3 and prepared.intensity_scale["adc"] == 3000
    assert case.window["adc"] == (0, 3000)
    truth = nibabel.as_closest_canonical(
        nibabel.load(real_data / "mri/prostatex-0000/resampled-by-picai_prep/adc.nii.gz")
    )
    values = truth.get_fdata()
    adc = prepared.array(case, "image/adc") * 3000
    index = np.stack(np.meshgrid(*[np.arange(20, 44)] * 2, np.arange(3, 13), indexing="ij"), -1)
    at = nibabel.affines.apply_affine(np.linalg.inv(truth.affine) @ np.array(case.affine), index)
    at = np.rint(at).astype(int)
    expected = values[at[..., 0], at[..., 1], at[..., 2]]
    inside = adc[20:44, 20:44, 3:13]
    assert np.corrcoef(inside.ravel(), expected.ravel())[0, 1] > 0.97
    assert np.corrcoef(inside[::-1].ravel(), expected.ravel())[0, 1] < 0.9


def test_real_studies_are_prepared(real_data: Path, tmp_path: Path):
    prepare(real_data, tmp_path / "out", config(data__spacing=[3.0, 3.0, 3.0], data__dim=[64, 64, 16]))
    prepared = load_manifest(tmp_path / "out")
    assert len(prepared.cases) == 5
    assert all(case.pirads is None and case.text_isnull == 1 for case in prepared.cases)
    for case in prepared.cases:
        image = prepared.array(case, "image/t2w")
        center, rim = image[20:44, 20:44, 4:12], image[:4]
        assert 0.1 < center.mean() < 0.9 and rim.mean() < center.mean() + 0.5 and image.max() == 1
        assert np.array(case.affine)[2, 1] > 0.4  # oblique: 12 degrees at least


# ---- files that the reference implementation prepared ----


def test_files_prepared_by_the_reference_are_imported(tmp_path: Path):
    latents = write_merged(tmp_path)
    out, entries = tmp_path / "out", json.loads((tmp_path / "merged.json").read_text())
    entries[0]["spacing"] = [0.6, 0.6, 0.7]  # a stated spacing has precedence over the affine
    del entries[1]["spacing"]
    (tmp_path / "merged.json").write_text(json.dumps(entries))
    prepare(tmp_path / "merged.json", out, config(variant="CCELLA"), embedding_base_dir=tmp_path / "emb")
    prepared = load_manifest(out)
    for number, case in enumerate(prepared.cases):
        mean = prepared.array(case, "latent_mean/t2w", verify=True)
        np.testing.assert_array_equal(mean, latents[case.id].transpose(3, 0, 1, 2))
        np.testing.assert_array_equal(prepared.array(case, "text"), np.load(tmp_path / "emb" / case.id / "text.npy"))
        assert set(case.files) == {"latent_mean/t2w", "text"} and case.text_isnull == number % 2
        assert case.spacing == ([0.6, 0.6, 0.7] if number == 0 else [0.5, 0.5, 0.5625]) and case.affine[0][0] == -0.5
    assert prepared.intensity_scale == {"t2w": 1}  # unknown
    values = np.stack(list(latents.values())).astype(np.float64)
    assert prepared.scale_factor == [pytest.approx(1 / values.std(ddof=1), rel=1e-9)]
    before = times(out)
    prepare(tmp_path / "merged.json", out, config(variant="CCELLA"), embedding_base_dir=tmp_path / "emb")
    assert times(out) == before


def test_imports_that_do_not_match_raise(tmp_path: Path):
    write_merged(tmp_path)
    arguments = {"embedding_base_dir": tmp_path / "emb"}
    with pytest.raises(DataError, match="text features have the shape \\(12, 32\\)"):
        prepare(tmp_path / "merged.json", tmp_path / "out", config(variant="CCELLA", text__max_length=16), **arguments)
    with pytest.raises(DataError, match="the latent is \\(4, 8, 8, 4\\)"):
        prepare(tmp_path / "merged.json", tmp_path / "out", config(data__dim=[32, 32, 32]), **arguments)
    with pytest.raises(DataError, match="two autoencoders do not mix"):
        vae = write_vae(tmp_path / "vae", config())
        prepare(tmp_path / "merged.json", tmp_path / "out", config(), vae=vae, **arguments)
    (tmp_path / "emb/c1/axt2_emb.nii.gz").unlink()
    with pytest.raises(DataError, match="2 studies come as latents"):
        prepare(tmp_path / "merged.json", tmp_path / "out", config(), **arguments)
    assert not (tmp_path / "out").exists()


def test_encoder_of_another_width_raises(studies: Path, tmp_path: Path, bert: Path):
    with pytest.raises(ConfigError, match="features of the text encoder are 32 wide, but model.input_dim is 48"):
        prepare(studies, tmp_path / "out", config(variant="CCELLA", encoder=bert, model__input_dim=48))
    assert not (tmp_path / "out").exists()
