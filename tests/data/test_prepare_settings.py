"""A prepared folder is not replaced by a run with other settings unless that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import ConfigError
from study_fixtures import config, tree, write_bert, write_studies, write_vae


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return write_studies(tmp_path / "studies")


def test_other_settings_are_refused_before_anything_changes(studies: Path, tmp_path: Path):
    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings, vae=write_vae(tmp_path / "vae", settings))
    before = tree(out)
    coarse = config(data__spacing=[2.0, 2.0, 3.0])
    for arguments in ({}, {"vae": tmp_path / "vae"}):
        with pytest.raises(ConfigError) as error:
            prepare(studies, out, coarse, **arguments)
        message = str(error.value)
        assert f"data.spacing was {settings.data.spacing}, now [2.0, 2.0, 3.0]" in message
        assert "image of 3 studies, latent of 3 studies" in message
        assert "--overwrite" in message and "data.dim" not in message and len(message.splitlines()) <= 5
        assert tree(out) == before
    prepare(studies, out, coarse, overwrite=True)
    prepared = load_manifest(out)
    assert prepared.data.spacing == [2.0, 2.0, 3.0] and prepared.scale_factor is None
    assert tree(out)["images/case0/t2w.npy"] != before["images/case0/t2w.npy"]


def test_latents_of_another_autoencoder_are_refused(studies: Path, tmp_path: Path):
    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings, vae=write_vae(tmp_path / "a", settings))
    before = tree(out)
    other = write_vae(tmp_path / "b", settings, seed=1)
    with pytest.raises(ConfigError, match="the autoencoder was .*latent of 3 studies") as error:
        prepare(studies, out, settings, vae=other)
    assert "image of" not in str(error.value) and tree(out) == before
    prepare(studies, out, settings, vae=other, overwrite=True)
    assert load_manifest(out).vae != before


def test_other_settings_of_the_text_encoder_are_refused(studies: Path, tmp_path: Path):
    out, encoder = tmp_path / "out", write_bert(tmp_path / "bert")
    prepare(studies, out, config(variant="CCELLA", encoder=encoder))
    before = tree(out)
    with pytest.raises(ConfigError, match="text.max_length was .*, now 16. .*text of 3 studies") as error:
        prepare(studies, out, config(variant="CCELLA", encoder=encoder, text__max_length=16))
    assert "image of" not in str(error.value) and tree(out) == before


def test_another_b_value_is_refused(studies: Path, tmp_path: Path):
    """Equal values of an argument that no configuration holds are recorded with each study."""
    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings, b_value=1400)
    before = tree(out)
    prepare(studies, out, settings, b_value=1400)  # control
    for other in (800, None):
        with pytest.raises(ConfigError, match=f"--b_value was 1400, now {other}. .*image of 3 studies"):
            prepare(studies, out, settings, b_value=other)
    assert tree(out) == before
    prepare(studies, out, settings, b_value=800, overwrite=True)
    prepare(studies, tmp_path / "plain", settings)
    with pytest.raises(ConfigError, match="--b_value was None, now 800"):
        prepare(studies, tmp_path / "plain", settings, b_value=800)


def test_additions_need_no_permission(studies: Path, tmp_path: Path):
    """Latents, reports, studies and changed series are added to a complete folder as before."""
    out, settings = tmp_path / "out", config()
    prepare(studies, out, settings)
    prepare(studies, out, settings, vae=write_vae(tmp_path / "vae", settings))
    assert load_manifest(out).scale_factor is not None
    with_text = config(variant="CCELLA", encoder=write_bert(tmp_path / "bert"))
    prepare(studies, out, with_text, vae=tmp_path / "vae")
    assert load_manifest(out).text is not None
    more = write_studies(tmp_path / "studies", 4)
    prepare(more, out, with_text, vae=tmp_path / "vae")
    assert len(load_manifest(out).cases) == 4


def test_an_interrupted_change_goes_on_without_permission(studies: Path, tmp_path: Path):
    """The manifest is deleted when results are first replaced: from then on there is nothing complete to protect."""
    out, coarse = tmp_path / "out", config(data__spacing=[2.0, 2.0, 3.0])
    prepare(studies, out, config())
    (out / "manifest.json").unlink()
    prepare(studies, out, coarse)
    assert load_manifest(out).data.spacing == [2.0, 2.0, 3.0]
