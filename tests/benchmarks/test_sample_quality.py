"""What the studies of sampling report besides latents: distances of decoded samples to the studies that prompt them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ccella_fast import FastSampler, load_checkpoint
from ccella_fast.errors import CheckpointError, ConfigError, DataError
from ccella_fast.evaluation.findings import CaseFindings
from ccella_fast.evaluation.run import evaluate
from ccella_fast.evaluation.volumes import Volume, open_volumes
from evaluation_fixtures import SPACING, CountingExtractor, draw, write_nifti, write_prepared
from sampling_fixtures import TOKENS, WIDTH, write_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A checkpoint and ten studies with reports, of which six are in the split test."""
    root = tmp_path_factory.mktemp("quality")
    random = np.random.default_rng(3)
    arrays = {f"case{k}": {"t2w": draw(k, smooth=1 + k % 3)} for k in range(10)}
    texts = {case: random.standard_normal((TOKENS, WIDTH)) for case in arrays}
    write_prepared(root / "prepared", arrays, splits={f"case{k}": "train" for k in range(4)}, texts=texts)
    write_checkpoint(root / "model", **{"scheduler.num_train_timesteps": 20})
    write_checkpoint(root / "blind", with_vae=False)
    write_checkpoint(root / "large", **{"data.dim": [16, 16, 8]})
    return root


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the scripts share, with a quick stand-in for the networks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sample_quality

    monkeypatch.setattr(sample_quality, "load_extractors", lambda *_, **__: [CountingExtractor()])
    monkeypatch.setattr(sample_quality, "_SHOWN", ("fake",))
    return sample_quality


def evaluated(folders: Path, arrays: list[np.ndarray], classes: list[str | None], *metrics: str):
    """The evaluation of volumes by the public function."""
    samples = [
        Volume(array, SPACING, f"s{k}", pirads=name)
        for k, (array, name) in enumerate(zip(arrays, classes, strict=True))
    ]
    real = open_volumes(f"{folders}/prepared:test", field="real")
    return evaluate(real=real, synthetic=samples, features=[CountingExtractor()], metrics=metrics, draws=100)


def test_samples_are_prompted_by_the_studies_and_compared_with_them(folders, quality):
    loaded = load_checkpoint(folders / "model")
    findings = CaseFindings({"side": {f"case{k}": ("left", "right")[k % 2] for k in range(10)}}, {})
    real = quality.RealStudies(f"{folders}/prepared:test", loaded, CPU, findings=findings)
    assert len(real.cases) == 6
    for k in (0, 5, 7):
        case = f"case{4 + k % 6}"
        text, pirads, spacing = real.prompt(k)
        np.testing.assert_array_equal(text[0], np.load(folders / "prepared" / "text" / f"{case}.npy"))
        assert pirads == ("neg", "pos", None)[int(case[4:]) % 3] and spacing == list(SPACING)
    latents = torch.randn(6, 4, 8, 6, 4, generator=torch.Generator().manual_seed(0))
    sampler = FastSampler.from_checkpoint(folders / "model", dtype="float32", device="cpu")
    with torch.no_grad():
        arrays = [sampler.autoencoder.decode(x[None])[0, 0].clamp(0, 1).numpy() for x in latents]
    judged = real.compare(latents)
    expected = evaluated(folders, arrays, [real.prompt(k).pirads for k in range(6)], "fd", "kid", "condition")
    found = {(row.metric, row.features): row for row in judged.rows}
    for metric in ("fd", "kid", "condition_class"):
        row, truth = found[metric, "fake"], expected[metric, "fake"]
        assert (row.value, row.floor) == (pytest.approx(truth.value, rel=1e-3), pytest.approx(truth.floor, rel=1e-3))
    assert found["condition_side", "fake"].n_synthetic == 6  # the prompts are known, so their findings are asked for
    ratio, kid, _ = judged.cells("t2w", "fake")
    assert ratio == f"{found['fd', 'fake'].ratio:.2f}" and kid == f"{found['kid', 'fake'].value:.3g}"
    other = {row.metric: row.value for row in real.compare(latents * 0.5).rows if row.features == "fake"}
    assert abs(other["fd"] / found["fd", "fake"].value - 1) > 0.05
    broken = real.compare([latents[0], torch.full_like(latents[1], torch.nan)])
    assert broken.rows == [] and broken.cells("t2w", "fake") == ("defective", "-", "-")
    assert broken.defect == "a sample is not finite"


@pytest.mark.parametrize(
    ("folder", "model", "error", "words"),
    [
        ("prepared:test", "blind", CheckpointError, "no autoencoder"),
        ("prepared:test", "large", ConfigError, "data.dim"),
        ("files", "model", DataError, "not a prepared folder"),
    ],
)
def test_studies_that_do_not_fit_are_named(folders, quality, folder, model, error, words):
    if not (folders / "files").exists():
        write_nifti(folders / "files" / "a.nii.gz", draw(0))
    with pytest.raises(error, match=words):
        quality.RealStudies(f"{folders}/{folder}", load_checkpoint(folders / model), CPU)


def test_few_steps_are_judged_by_decoded_volumes(folders, quality, monkeypatch, tmp_path, capsys):
    script = load("few_step_quality", monkeypatch)
    monkeypatch.setattr(script, "STEPS", (1, 4))
    command = ["--checkpoint", folders / "model", "--out", tmp_path, "--solvers", "ddim", "dpmpp_2m"]
    assert script.main([*map(str, command), "--real", f"{folders}/prepared:test"]) == 0
    record = json.loads((tmp_path / "few_step_quality.json").read_text())
    assert record["seeds"] == 6
    sets = {(each["solver"], each["steps"]): each for each in record["evaluation"]}
    assert set(sets) == {(name, count) for name in ("ddim", "dpmpp_2m") for count in (1, 4, 20)}
    real = quality.RealStudies(f"{folders}/prepared:test", load_checkpoint(folders / "model"), CPU)
    prompts = [real.prompt(k) for k in range(6)]
    sampler = FastSampler.from_checkpoint(folders / "model", dtype="float32", device="cpu")
    values = {}
    for solver, count in (("ddim", 1), ("dpmpp_2m", 20)):
        result = sampler(
            text=torch.cat([prompt.text for prompt in prompts]), seeds=list(range(6)), solver=solver,
            num_inference_steps=count, progress=False,
        )  # fmt: skip
        expected = evaluated(folders, list(result.volumes[:, 0].numpy()), [None] * 6, "fd")
        found = {row["metric"]: row for row in sets[solver, count]["rows"] if row["features"] == "fake"}
        assert found["fd"]["value"] == pytest.approx(expected["fd", "fake"].value, rel=1e-2)
        values[solver] = found["fd"]["ratio"]
    assert values["ddim"] != pytest.approx(
        values["dpmpp_2m"], rel=1e-2
    )  # the numbers are those of a solver and its steps
    written = (tmp_path / "few_step_quality.md").read_text()
    line = next(line for line in written.splitlines() if line.startswith("| ddim") and ";" in line)
    assert f"| {values['ddim']:.2f}; " in line and "t2w, fake" in written and written in capsys.readouterr().out
    for options, words in (
        (["--random_full_model", "--real", f"{folders}/prepared"], "--checkpoint and no --grid"),
        ([*map(str, command[:2]), "--real", f"{folders}/prepared:test", "--seeds", "1"], "at least 2"),
        ([*map(str, command[:2]), "--findings", f"{folders}/none.csv"], "add --real"),
    ):
        assert script.main([*options, "--out", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


def test_optimizations_are_judged_by_decoded_volumes(folders, quality, monkeypatch, tmp_path, capsys):
    script = load("sampler_optimizations", monkeypatch)
    monkeypatch.setattr(script, "ONE_OFF", ())
    monkeypatch.setattr(script, "REUSES", script.REUSES[-2:])
    monkeypatch.setattr(script, "SAMPLES", 3)
    command = ["--checkpoint", folders / "model", "--out", tmp_path, "--num_inference_steps", 6, "--minutes", 0]
    assert script.main([*map(str, command), "--real", f"{folders}/prepared:test"]) == 0
    record = json.loads((tmp_path / "sampler_optimizations.json").read_text())
    assert list(record["evaluation"]) == [row["name"] for row in record["rows"]] and record["latent"][0] == 3
    distances = {
        name: next(row["value"] for row in each["rows"] if (row["metric"], row["features"]) == ("fd", "fake"))
        for name, each in record["evaluation"].items()
    }
    exact, truth = distances["fp32 weights"], distances["all off, fp32"]
    reused = distances["reuse, interval 5, depth 1"]
    assert exact == pytest.approx(truth, rel=1e-3) and abs(reused / truth - 1) > abs(exact / truth - 1)
    printed = capsys.readouterr().out
    assert "t2w, fake" in printed and "Last columns: Fréchet" in printed
