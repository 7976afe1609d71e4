"""The command `evaluate`: folders in and out, continuing, sharing among processes, what is written and what is refused."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ccella_fast import cli
from ccella_fast.config import make_config
from ccella_fast.data.example_volumes import read_examples
from ccella_fast.errors import CheckpointError, ConfigError, DataError
from ccella_fast.evaluation.folders import evaluate_to_folder, sensitivity_to_folder
from ccella_fast.evaluation.reconstruction import LatentFeatures, reconstructions
from ccella_fast.evaluation.run import evaluate
from ccella_fast.evaluation.volumes import open_volumes
from ccella_fast.folder_lock import lock_folder
from ccella_fast.models.autoencoder import Autoencoder, save_autoencoder
from ccella_fast.storage import sha256
from evaluation_fixtures import (
    CANARIES,
    CountingExtractor,
    draw,
    some_volumes,
    write_nifti,
    write_prepared,
    write_samples,
)
from sampling_fixtures import TINY, scrambled
from training_fixtures import environment, free_port

pytestmark = pytest.mark.usefixtures("no_prostate_network")
GOOD = "--real {0}/prepared --synthetic {0}/samples"
QUICK = ["fd", "kid", "intensity", "msssim", "memorisation"]
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A prepared folder with a train and a test split, and samples that are smoother than its images."""
    root = tmp_path_factory.mktemp("folders")
    arrays = {f"{CANARIES[0]}-{k}": {"t2w": draw(k)} for k in range(14)}
    splits = {name: "train" for name in list(arrays)[:6]}
    write_prepared(root / "prepared", arrays, splits=splits, patients={name: k // 2 for k, name in enumerate(arrays)})
    write_samples(root / "samples", [draw(100 + k, smooth=2) for k in range(6)], given="pos", report_id=CANARIES[1])
    return root


def run_folders(folders, out, **settings):
    """`evaluate_to_folder` for the test split, with the training split."""
    given = {"features": [CountingExtractor()], "metrics": QUICK, "draws": 8} | settings
    prepared = folders / "prepared"
    return evaluate_to_folder(f"{prepared}:test", folders / "samples", out, train=f"{prepared}:train", **given)


def written(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def without_times(found: dict) -> dict:
    found = copy.deepcopy(found)
    for row in found["rows"]:
        assert row.pop("seconds") >= 0
    return found


def test_the_distance_is_that_of_the_standardised_features(folders, tmp_path):
    result = run_folders(folders, tmp_path / "out")
    volume = some_volumes(1, 0)[0]

    def features(*arrays):
        return np.stack(
            [CountingExtractor()(volume._replace(array=array))["fake"] for array in arrays], dtype=np.float64
        )

    train = features(*(draw(k) for k in range(6)))
    real, synthetic = features(*(draw(k) for k in range(6, 14))), features(*(draw(100 + k, smooth=2) for k in range(6)))
    a, b = ((x - train.mean(0)) / train.std(0, ddof=1) for x in (real, synthetic))
    covariances = [np.cov(x.T) for x in (a, b)]
    roots = np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sum(covariances)) - 2 * np.sqrt(roots).real.sum()
    row = result["fd", "fake"]
    assert row.value == pytest.approx(expected, rel=1e-5)
    assert row.floor < row.value_equal_n and row.ratio == pytest.approx(row.value_equal_n / row.floor)
    assert row.ci95[0] < row.value < row.ci95[1]
    assert (row.n_real, row.n_synthetic, row.dim, row.better) == (8, 6, 5, "lower")
    assert "few" in row.guards and "standardised_by_itself" not in row.guards
    assert result["copies", "fake"].value == 0 and result["msssim"].value > result["msssim"].floor


def test_real_volumes_are_decoded_from_their_latents(tmp_path):
    networks = [scrambled(Autoencoder(make_config(TINY).autoencoder)).eval() for _ in range(2)]
    with torch.no_grad():
        networks[1].post_quant_conv.conv.bias += 1
        arrays = {f"case{k}": draw(k) for k in range(4)}
        latents = {
            case: networks[0].encode(torch.from_numpy(x)[None, None])[0][0].numpy() for case, x in arrays.items()
        }
        decoded = [networks[0].decode(torch.from_numpy(z)[None])[0, 0].clamp(0, 1).numpy() for z in latents.values()]
    for number, network in enumerate(networks):
        save_autoencoder(network, tmp_path / f"vae{number}")
    digest = sha256(tmp_path / "vae0" / "model.safetensors")
    images = {case: {"t2w": x} for case, x in arrays.items()}
    prepared = write_prepared(tmp_path / "prepared", images, latents=latents, vae_sha256=digest)
    volumes = reconstructions(open_volumes(prepared, field="--real"), tmp_path / "vae0")
    for volume, expected, original in zip(volumes, decoded, arrays.values(), strict=True):
        np.testing.assert_allclose(volume.array, expected, atol=1e-5)
        assert not np.allclose(volume.array, original, atol=0.05)
    samples = write_samples(tmp_path / "samples", [draw(50 + k) for k in range(4)])
    given = {"features": [CountingExtractor()], "metrics": ["fd"], "draws": 4, "vae": tmp_path / "vae0"}
    limit = evaluate_to_folder(prepared, samples, tmp_path / "out", **given)["fd"].limit_autoencoder
    listed = [volume._replace(patient=None) for volume in open_volumes(prepared, field="--real")]
    again = [volume._replace(array=x) for volume, x in zip(listed, decoded, strict=True)]
    del given["vae"]
    synthetic = some_volumes(4, 50)
    direct = evaluate(real=listed, synthetic=synthetic, reconstructed=again, **given)["fd"].limit_autoencoder
    assert limit == pytest.approx(direct, rel=1e-4)
    train = some_volumes(8, 200)
    given |= {"latents": LatentFeatures(tmp_path / "vae0"), "metrics": ["memorisation"], "train": train}
    nearness = [
        evaluate(real=some_volumes(6, 300), synthetic=[*synthetic, other], **given)["memorisation_index", "latent"]
        for other in (train[2], *some_volumes(1, 400))
    ]
    assert nearness[0].value > nearness[1].value + 1 and nearness[0].weights_sha256 == digest
    given = {"features": [CountingExtractor()], "metrics": ["fd"], "draws": 4}
    for vae, error, words in (
        (tmp_path / "vae1", CheckpointError, "another autoencoder"),
        (tmp_path / "none", CheckpointError, "does not exist"),
    ):
        with pytest.raises(error, match=words):
            evaluate_to_folder(prepared, samples, tmp_path / "other", **given, vae=vae)
    assert not (tmp_path / "other").exists()


def test_some_sequences_of_a_folder_can_be_chosen(folders, tmp_path):
    both = {f"case{k}": {"t2w": draw(k), "adc": draw(k + 500)} for k in range(6, 14)}
    prepared, samples = write_prepared(tmp_path / "both", both), folders / "samples"
    given = {"features": [CountingExtractor()], "metrics": ["fd"], "draws": 4}
    chosen = evaluate_to_folder(prepared, samples, tmp_path / "out", sequences=["t2w"], **given)
    alone = evaluate_to_folder(f"{folders}/prepared:test", samples, tmp_path / "other", **given)
    assert [row.sequence for row in chosen.rows] == ["t2w"] and chosen["fd"].value == alone["fd"].value


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from evaluation_fixtures import CountingExtractor
import test_evaluate_folders
class Killed(CountingExtractor):
    def __call__(self, volume):
        if self.calls == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(volume)
from pathlib import Path
test_evaluate_folders.run_folders(Path(sys.argv[1]), Path(sys.argv[2]), features=[Killed()])
"""


def test_a_killed_run_continues_and_gives_the_same_numbers(folders, tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, folders, tmp_path / "out", FIXTURES]
    done = subprocess.run(
        [str(part) for part in command], env=environment(PYTHONPATH=path), capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out" / "metrics.json").exists()
    extractor, fresh = CountingExtractor(), CountingExtractor()
    run_folders(folders, tmp_path / "out", features=[extractor])
    run_folders(folders, tmp_path / "fresh", features=[fresh])
    assert (extractor.calls, fresh.calls) == (20 - 9, 20)
    assert without_times(written(tmp_path / "out")) == without_times(written(tmp_path / "fresh"))
    again = CountingExtractor()
    run_folders(folders, tmp_path / "out", features=[again])
    other = CountingExtractor(preprocessing="another")
    run_folders(folders, tmp_path / "out", features=[other])
    assert (again.calls, other.calls) == (0, 20)
    elsewhere = CountingExtractor()
    run_folders(folders, tmp_path / "elsewhere", features=[elsewhere], cache=tmp_path / "out" / "features")
    assert elsewhere.calls == 0 and not (tmp_path / "elsewhere" / "features").exists()
    assert without_times(written(tmp_path / "elsewhere")) == without_times(written(tmp_path / "fresh"))


WITHOUT_PAGE = """
import sys
from ccella_fast import cli
from ccella_fast.report import evaluation
evaluation.write_evaluation_page = lambda folder: None
cli.main(sys.argv[1:])
"""


def test_two_processes_give_what_one_gives(folders, tmp_path):
    prepared, given = folders / "prepared", {"features": ["radiomics"], "metrics": ["fd", "msssim", "memorisation"]}
    options = ["--real", f"{prepared}:test", "--synthetic", folders / "samples", "--train", f"{prepared}:train"]
    options += [
        "--features",
        *given["features"],
        "--metrics",
        *given["metrics"],
        "--draws",
        "8",
        "--out",
        tmp_path / "two",
    ]
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT_PAGE, "evaluate", *map(str, options)],
            env=environment(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "fd" in said[0] and "fd" not in said[1]  # the table is printed once
    run_folders(folders, tmp_path / "one", **given)
    one, two = (without_times(written(tmp_path / name)) for name in ("one", "two"))
    assert one["rows"] == two["rows"] and one["per_case"] == two["per_case"]
    assert one["protocol_sha256"] == two["protocol_sha256"]


def call(*arguments) -> int:
    """The exit code of the command, in this process."""
    try:
        return cli.main([str(each) for each in arguments])
    except SystemExit as left:
        return int(left.code or 0)


def test_the_files_hold_the_schema_and_no_text(folders, tmp_path):
    run_folders(folders, tmp_path / "out")
    found = written(tmp_path / "out")
    names = ["schema", "protocol_sha256", "rows", "per_case", "generator", "environment"]
    assert list(found) == names and found["schema"] == 1
    assert found["generator"] == {"solver": "ddim", "num_inference_steps": 5, "weights_sha256": "0" * 64}
    assert found["protocol_sha256"] == sha256(tmp_path / "out" / "protocol.json")
    names = {
        "metric", "features", "weights_sha256", "preprocessing", "set", "reference", "value", "ci95", "floor", "ratio",
        "limit_autoencoder", "n_real", "n_synthetic", "dim", "better", "guards", "seconds", "sequence",
    }  # fmt: skip
    assert all(names <= set(row) for row in found["rows"])
    row = found["rows"][0]
    assert (row["set"], row["reference"], row["weights_sha256"]) == ("samples", "prepared:test", "f" * 64)
    assert [case["id"] for case in found["per_case"]][::8] == ["real-001", "synthetic-001"]
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        content = f"{file.relative_to(tmp_path)}".encode() + file.read_bytes()
        assert not [word for word in CANARIES if word.encode() in content], file
        assert file.suffix in (".json", ".safetensors", ".gz")


def test_the_volumes_that_the_page_shows_are_kept(folders, tmp_path):
    run_folders(folders, tmp_path / "out")
    stored = read_examples(tmp_path / "out" / "examples")
    kept = {(each.kind, each.number): each.read()[0] for each in stored.volumes}
    assert not stored.phantom and {("real", k) for k in (1, 2, 3, 4)} < set(kept)
    np.testing.assert_allclose(kept["real", 2], draw(7), atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(kept["synthetic", 3], draw(102, smooth=2), atol=0.5 / 255 + 1e-6)
    case = next(case for case in written(tmp_path / "out")["per_case"] if case["id"] == "synthetic-001")
    number = int(case["nearest_train"].removeprefix("train-"))
    np.testing.assert_allclose(kept["train", number], draw(number - 1), atol=0.5 / 255 + 1e-6)


def test_sensitivity_is_measured_once_for_a_folder(folders, tmp_path):
    extractor, again = CountingExtractor(), CountingExtractor()
    real, out = f"{folders}/prepared:test", tmp_path / "out"
    first = sensitivity_to_folder(real, out, features=[extractor], num_volumes=4)
    assert first == sensitivity_to_folder(real, out, features=[again], num_volumes=4)
    assert extractor.calls > 4 * 8 and again.calls == 0
    (gate,) = json.loads((out / "sensitivity.json").read_text())["gates"]
    assert gate["space"] == "fake" and gate["rows"][0]["family"] == "blur" and gate["rows"][0]["n"] == 4
    run_folders(folders, out)  # into the same folder
    with pytest.raises(DataError, match="at least 3"):
        sensitivity_to_folder(f"{folders}/prepared:test", tmp_path / "other", features=[extractor], num_volumes=2)
    assert not (tmp_path / "other" / "sensitivity.json").exists()


def test_sensitivity_needs_a_common_grid(tmp_path):
    for k in range(3):
        write_nifti(tmp_path / "files" / f"image-{k}.nii.gz", 500 * draw(50 + k)[: 16 - 2 * k])
    with pytest.raises(DataError, match="no common grid") as caught:
        sensitivity_to_folder(tmp_path / "files", tmp_path / "out", features=[CountingExtractor()])
    assert "image-1.nii.gz" in str(caught.value) and not (tmp_path / "out" / "sensitivity.json").exists()


def test_the_command_prints_a_table_and_names_the_next_one(folders, tmp_path, capsys):
    options = ["--features", "radiomics", "--metrics", "fd", "--draws", "4", "--out", tmp_path / "evaluation"]
    assert call("evaluate", "--real", folders / "prepared", "--synthetic", folders / "samples", *options) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[:3] == ["metric", "features", "sequence"] and "few, n<d" in out
    assert f"wrote {tmp_path}/evaluation/report.html" in err and f"next: ccella-fast report {tmp_path}" in err
    assert "Fréchet" in (tmp_path / "evaluation" / "report.html").read_text()


def test_a_folder_has_one_writer(folders, tmp_path):
    with lock_folder(tmp_path / "out", "another command"), pytest.raises(ConfigError, match="'another command'"):
        run_folders(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_findings_of_other_cases_are_not_ignored_in_silence(folders, tmp_path, caplog):
    for case, is_known in (
        (f"{CANARIES[0]}-9", True),
        ("someone else", False),
        (f"{CANARIES[0]}-0", False),
    ):  # -0: train
        for row in (f"side\n{case},left", f"report\n{case},Prostate 42 cc"):
            (tmp_path / "findings.csv").write_text(f"case,{row}\n")
            caplog.clear()
            run_folders(folders, tmp_path / "out", findings=tmp_path / "findings.csv", metrics=["fd"])
            assert ("findings.csv states nothing of any real case" in caplog.text) != is_known


def test_results_are_not_written_between_volumes(folders, tmp_path, monkeypatch):
    for k in range(3):
        write_nifti(tmp_path / "files" / f"image-{k}.nii.gz", 500 * draw(50 + k))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "files")
    for run in (
        lambda: evaluate_to_folder(".", folders / "samples", "evaluation"),
        lambda: evaluate_to_folder(folders / "prepared", tmp_path / "files", "more/evaluation"),
        lambda: sensitivity_to_folder(tmp_path / "files", "evaluation"),
    ):
        with pytest.raises(ConfigError, match="are all taken for volumes"):
            run()
    assert sorted(tmp_path.rglob("*")) == before


def test_plain_files_are_enough_and_no_socket_is_opened(tmp_path, monkeypatch):
    for kind, smooth in (("real", 1), ("synthetic", 2)):
        for k in range(6):
            write_nifti(tmp_path / kind / f"image-{k}.nii.gz", 500 * draw(50 * smooth + k, smooth=smooth))

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(AssertionError):
        socket.create_connection(("127.0.0.1", 9))
    result = evaluate_to_folder(
        tmp_path / "real", tmp_path / "synthetic", tmp_path / "out", features=["radiomics"], draws=4
    )
    assert result["fd", "radiomics"].ratio > 1 and not [path.name for path in tmp_path.iterdir() if path.name[0] == "."]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """Folders that do not fit together."""
    root = tmp_path_factory.mktemp("mistakes")
    two = {name: {"t2w": draw(k)} for k, name in enumerate("ab")}
    write_prepared(root / "prepared", two)
    write_prepared(root / "coarse", two, spacing=(1.5, 1.5, 4.0))
    write_prepared(root / "small", {name: {"t2w": draw(k)[:-4]} for k, name in enumerate("ab")})
    write_prepared(root / "both", {name: {"t2w": draw(k), "adc": draw(k + 9)} for k, name in enumerate("ab")})
    write_samples(root / "samples", [draw(50), draw(51)])
    write_samples(root / "one", [draw(50)])
    constant, infinite = draw(50), draw(50)
    constant[:], infinite[3, 3, 3] = 0.25, np.inf
    write_samples(root / "constant", [draw(50), constant])
    write_samples(root / "infinite", [draw(50), infinite])
    (root / "empty").mkdir()
    (root / "weights.pth").write_bytes(b"PK\x03\x04 cut off")
    return root


@pytest.mark.parametrize(
    ("code", "options", "words"),
    [
        (3, "--real {0}/coarse --synthetic {0}/samples", "16 x 12 x 8 voxels of 1.5 x 1.5 x 4 mm"),
        (3, "--real {0}/small --synthetic {0}/samples", "data.dim=[12,12,8]"),
        (3, "--real {0}/both --synthetic {0}/samples", "adc and t2w, the synthetic set t2w"),
        (3, "--real {0}/prepared --synthetic {0}/one", "at least 2"),
        (3, "--real {0}/one --synthetic {0}/samples", "leave this sequence out with --sequences"),
        (3, "--real {0}/prepared --synthetic {0}/constant", "sample-001_seed1.nii.gz"),
        (3, "--real {0}/prepared --synthetic {0}/infinite", "sample-001_seed1.nii.gz"),
        (3, "--real {0}/prepared --synthetic {0}/empty", "an empty folder"),
        (3, "--real {0}/prepared --synthetic {0}/samples --train {0}/prepared", "has the same voxels as"),
        (3, "--real {0} --synthetic {0}/samples", "{0}/"),
        (3, "--real {0}/prepared --synthetic {0}/samples --sequences hbv", "only t2w"),
        (3, "--real {0}/prepared --synthetic {0}/samples --vae {0}/none", "no latents"),
        (2, "--real {0}/prepared --synthetic {0}/samples --metrics memorisation", "--train"),
        (2, "--real {0}/prepared --synthetic {0}/samples --metrics fdd", "did you mean 'fd'"),
        (2, "--real {0}/prepared --synthetic {0}/samples --features radiomic", "did you mean 'radiomics'"),
        (2, "--real {0}/prepared:tests --synthetic {0}/samples", "did you mean 'test'"),
        (2, "--real {0}/prepared --synthetic {0}/samples --features random random", "given twice"),
        (2, "--real {0}/prepared --synthetic {0}/samples --draws 1", "at least 2"),
        (2, "--real {0}/prepared --synthetic {0}/samples --device cuda:7", "cuda:7"),
        (4, f"{GOOD} --features medicalnet={{0}}/weights.pth", "--allow_unknown_weights"),
        (4, f"{GOOD} --features medicalnet={{0}}/weights.pth --allow_unknown_weights", "the end of this weight file"),
        (2, "--real {0}/prepared --synthetic {0}/samples --out {0}/prepared", "a prepared folder"),
    ],
)
def test_mistakes_are_named_and_nothing_is_left_behind(mistakes, tmp_path, monkeypatch, capsys, code, options, words):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in mistakes.rglob("*")}
    features = [] if "--features" in options else ["--features", "radiomics"]
    assert call("evaluate", *options.format(mistakes).split(), *features) == code
    lines = capsys.readouterr().err.strip().splitlines()
    message = "\n".join(line for line in lines if line.startswith(("error:", "  file:", "  field:", "  fix:")))
    assert words.format(mistakes) in message and len(message.splitlines()) <= 5, lines
    assert "internal" not in message and "fix:" in message
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob(".*"))
    assert {path: path.stat().st_mtime_ns for path in mistakes.rglob("*")} == before
