"""The Python blocks of the README and of the documentation run as they are, with a tiny checkpoint for a trained one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import monai.bundle
import nibabel
import pytest
import torch

from ccella_fast import cli, load_checkpoint
from evaluation_fixtures import draw, write_prepared
from sampling_fixtures import write_checkpoint
from study_fixtures import write_bert

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "model", "docs/how-to/sample.md": "model", "docs/getting-started.md": "out/demo/model"}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run_blocks(blocks: list[str]) -> dict:
    names: dict = {}
    for block in blocks:
        exec(compile(block, "<block>", "exec"), names)  # noqa: S102
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the checkpoint that every page names."""
    monkeypatch.chdir(tmp_path)
    encoder = {"text.encoder": str(write_bert(tmp_path / "bert", width=16)), "text.dtype": "float32"}
    written = write_checkpoint(tmp_path / "checkpoint", **encoder)
    for name in set(PAGES.values()):
        link = tmp_path / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(written)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(folder, page):
    names = run_blocks(python_blocks((ROOT / page).read_text()))
    volumes = sorted((folder / "samples").glob("*.nii.gz"))
    assert [nibabel.load(path).shape for path in volumes] == [(16, 12, 8)] * 2
    assert names["result"].seeds == [0, 1]
    if page == "README.md":
        assert names["x_0"].shape == names["noise"].shape and bool(torch.isfinite(names["x_0"]).all())


def test_the_block_about_sharing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    run_blocks(python_blocks((ROOT / "docs/how-to/share.md").read_text()))
    assert (tmp_path / "shared" / "model.safetensors").is_file() and (tmp_path / "shared" / "README.md").is_file()


def test_the_blocks_about_other_projects_run(folder):
    names = run_blocks(python_blocks((ROOT / "docs/how-to/other-projects.md").read_text()))
    assert names["x_0"].shape == (2, 1, 32, 32, 8) and bool(torch.isfinite(names["x_0"]).all())
    assert names["output"].noise.shape == names["x"].shape
    assert "group_norm_silu" in str(names["report"])


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_the_commands_and_the_block_about_monai_bundles_run(folder):
    page = (ROOT / "docs/how-to/monai-bundle.md").read_text().replace("\\\n", " ")
    export, run = (shlex.split(line) for line in re.findall(r"^    (\S.*)", page, flags=re.MULTILINE))
    assert (
        export[0] == "ccella-fast" and cli.main([*export[1:], "--weights", "raw"]) == 0
    )  # the tiny one has no average
    network = run_blocks(python_blocks(page))["network"]
    assert torch.equal(network.ella.connector.latents, load_checkpoint("model").model.ella.connector.latents)
    assert run[:4] == ["python", "-m", "monai.bundle", "run"]
    options = {name.removeprefix("--"): value for name, value in zip(run[4::2], run[5::2], strict=True)}
    monai.bundle.run(**{**options, "seed": int(options["seed"])}, device="cpu")  # the command line converts numbers
    assert nibabel.load("ccella-bundle/samples/sample-000_seed3.nii.gz").shape == (16, 12, 8)


def test_a_block_that_does_not_run_is_an_error(folder):
    """Negative control: a name that no block defines, and a page without blocks."""
    text = (ROOT / "README.md").read_text()
    with pytest.raises(NameError, match="unet"):
        run_blocks(python_blocks(text.replace("speed_up(network)", "speed_up(unet)")))
    assert len(python_blocks(text)) == 1 and not python_blocks(text.replace("```python", "```"))


def test_the_block_of_the_evaluation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = {f"case{k}": {"t2w": draw(k)} for k in range(4)}
    write_prepared(tmp_path / "prepared", arrays, spacing=(0.5, 0.5, 0.5625))
    (block,) = python_blocks((ROOT / "docs" / "how-to" / "evaluate.md").read_text())
    names = {"arrays": [draw(10 + k, smooth=2) for k in range(4)]}
    exec(compile(block, "<block>", "exec"), names)  # noqa: S102
    assert names["result"]["fd", "random"].ratio > 1
