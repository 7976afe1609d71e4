"""`prepare --preview` draws correct pictures without study ids, and only when their inputs change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ccella_fast import cli
from ccella_fast.data.preparation.images import ImageTask, read_images
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import ConfigError
from ccella_fast.report.figures import Panel, montage
from ccella_fast.report.html import write_report
from study_fixtures import config, times, tree, write_merged, write_nifti, write_studies, write_vae

MIRRORED = {"augmentation__preset": "none", "augmentation__flip": 1.0, "augmentation__noise": 0.02}


def test_one_picture_per_study_drawn_once_and_shown_in_the_report(tmp_path: Path):
    studies, out, settings = write_studies(tmp_path / "studies", 2), tmp_path / "prepared", config(**MIRRORED)
    prepare(studies, out, settings, preview=True)
    pictures = sorted((out / "preview").iterdir())
    assert [path.name for path in pictures] == ["case0.png", "case1.png"]
    before = times(out)
    prepare(studies, out, settings, preview=True)
    assert times(out) == before
    earlier = tree(out)
    write_nifti(studies / "case1" / "t2w.nii.gz", seed=7)
    prepare(studies, out, settings, preview=True)
    changed = {name for name, value in tree(out).items() if earlier[name] != value}
    assert {"preview/case1.png", "images/case1/t2w.npy"} <= changed and "preview/case0.png" not in changed
    page = write_report(tmp_path).read_text()
    assert page.count("Study 1 as read, as prepared") >= 1 and "Study 2 as read" in page and "case1" not in page


def test_command_line_draws_pictures(tmp_path: Path):
    studies, arguments = write_studies(tmp_path / "studies", 1), []
    for key, value in config(**MIRRORED).dump()["data"].items():
        arguments += ["--set", f"data.{key}={value}".replace("'", '"')] if key in ("spacing", "dim") else []
    command = ["prepare", "--data", str(studies), "--out", str(tmp_path / "out"), "--preview", "--set", "model.variant=MAISI",
               "--set", "model.num_channels=[32,32]", "--set", "model.attention_levels=[false,true]",
               "--set", "model.num_head_channels=[0,32]"]  # fmt: skip
    assert cli.main([*command, *arguments]) == 0
    assert (tmp_path / "out/preview/case0.png").stat().st_size > 10_000


def test_volumes_with_different_voxel_sizes_are_drawn_at_one_scale(tmp_path: Path):
    """A wrong voxel size would change the length of the object in the picture."""
    widths = []
    for shape, spacing in [((50, 50, 50), 1.0), ((25, 25, 25), 1.0), ((25, 25, 25), 2.0)]:
        volume = np.zeros(shape)
        volume[5:15] = 0.6  # letters and the scale bar are brighter
        big = Panel(np.zeros((60, 60, 60)), (1, 1, 1), "")
        (tmp_path / "a.png").write_bytes(montage([big] * 4 + [Panel(volume, (spacing,) * 3, ""), big], window=(0, 1)))
        pixels = imread(tmp_path / "a.png")[..., :3].mean(-1)
        rows = (np.abs(pixels - 0.6) < 0.02).sum(1)
        widths.append(int(np.median(rows[rows > 10])))
    assert widths[0] == pytest.approx(widths[1], abs=3) and widths[2] == pytest.approx(2 * widths[0], abs=4)


def test_series_are_read_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A reader that crashes would otherwise end the command; the control is that this process would notice a read."""
    studies, read = write_studies(tmp_path / "studies", 1), []
    monkeypatch.setattr("ccella_fast.data.preparation.images.read_volume", lambda *_, **__: read.append(1))
    prepare(studies, tmp_path / "out", config(**MIRRORED), preview=True, workers=1)
    assert (tmp_path / "out/preview/case0.png").is_file() and not read
    with pytest.raises(AttributeError):
        read_images(ImageTask("a", {"t2w": studies}, config().data, tmp_path))
    assert read


def test_preview_of_studies_without_images_raises(tmp_path: Path):
    write_merged(tmp_path)
    with pytest.raises(ConfigError, match="come without images"):
        prepare(
            tmp_path / "merged.json",
            tmp_path / "out",
            config(variant="CCELLA"),
            embedding_base_dir=tmp_path / "emb",
            preview=True,
        )


def test_preview_and_latents_in_one_call(tmp_path: Path):
    settings = config(**MIRRORED)
    prepare(
        write_studies(tmp_path / "studies", 1),
        tmp_path / "out",
        settings,
        preview=True,
        vae=write_vae(tmp_path / "vae", settings),
    )
    assert (tmp_path / "out/preview/case0.png").is_file() and (tmp_path / "out/latents/case0/t2w_mean.npy").is_file()
