"""Mistakes that need a real checkpoint, run, prepared folder or second command: exit code and words of the message."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.storage import read_json, write_json
from sampling_fixtures import write_checkpoint
from study_fixtures import config, tree, write_studies
from training_fixtures import train_here, write_config, write_prepared

RESUME = "train --config {config} --data {prepared} --output_dir {run} --resume --max_train_steps"
SAMPLE = "sample --checkpoint {checkpoint} --out {tmp}/out"
HOLD = """
import sys
from ccella_fast.folder_lock import lock_folder
with lock_folder(sys.argv[1], "another command", name=sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""

# name -> (command, exit code, words that the message contains)
ROWS = {
    "training without classes and reports": (
        "train --config {config} --data {no_table} --output_dir {tmp}/out", 3,
        ["none of the training studies has a class", "pirads", "--allow no_class --allow no_reports"],
    ),
    "dry run without classes and reports": (
        "train --config {config} --data {no_table} --output_dir {tmp}/out --dry-run", 3, ["no_class", "no_reports"],
    ),
    "training on negative studies": (
        "train --config {config} --data {negative} --output_dir {tmp}/out", 3, ["with PI-RADS 3-5: none", "--allow one_class"],
    ),
    "training on one study": (
        "train --config {config} --data {one} --output_dir {tmp}/out", 3, ["one study", "case0", "--allow too_few_studies"],
    ),
    "class of a model that predicts it": (f"{SAMPLE} --pirads 5", 2, ["predicts the class", "--class_override"]),
    "solver of another library": (f"{SAMPLE} --solver euler", 2, ["no solver 'euler'", "use one of: ddim, ddpm"]),
    "solver of a flow": (f"{SAMPLE} --solver euler_flow", 2, ["rectified flow", "use one of: ddpm, ddim"]),
    "too many steps": (f"{SAMPLE} --num_inference_steps 2000", 2, ["num_inference_steps", "1 to 1000", "got 2000"]),
    "no autoencoder": ("sample --checkpoint {weights} --out {tmp}/out", 4, ["{weights}", "no", "autoencoder", "--vae"]),
    "no autoencoder in a folder": (
        "sample --checkpoint {no_vae} --out {tmp}/out", 4, ["{no_vae}", "does not contain an autoencoder", "--vae"],
    ),
    "samples of another request": (
        "sample --checkpoint {no_text} --out {samples} --pirads 2", 2, ["another request", "{samples}", "--overwrite"],
    ),
    "text encoder without network": (f"{SAMPLE} --report lesion", 2, ["text.encoder", "flan-t5", "hf download google/"]),
    "resume with another learning rate": (
        f"{RESUME} 1 --set training.lr=1", 2, ["training.lr is 1.0", "started with 0.002", "restore"],
    ),
    "resume with another architecture": (
        f"{RESUME} 1 --set model.num_res_blocks=2", 2, ["num_res_blocks is 2", "started with 1", "--output_dir"],
    ),
    "resume for more steps": (f"{RESUME} 8", 2, ["max_train_steps is 8", "with 1"]),
    "no averaged weights": ("export --checkpoint {no_vae} --out {tmp}/x.pt", 4, ["averaged", "--weights raw"]),
    "bundle without an autoencoder": (
        "export --format monai-bundle --checkpoint {no_vae} --weights raw --out {tmp}/out", 4,
        ["{no_vae}", "no autoencoder", "prepare --vae"],
    ),
    "prepare with another spacing": (
        "prepare --config {small} --data {studies} --out {images} --workers 1 --set data.spacing=[2,2,3]", 2,
        ["data.spacing was [1.5, 1.5, 3.0], now [2.0, 2.0, 3.0]", "image of 3 studies", "--overwrite"],
    ),
    "prepare into the studies": (
        "prepare --config {small} --data {studies} --out {studies}", 2, ["in the folder of studies", "next to --data"],
    ),
    "prepare into a folder in the studies": (
        "prepare --config {small} --data {studies} --out {studies}/prepared", 2, ["in the folder of studies", "--out"],
    ),
    "prepare into a run": ("prepare --config {small} --data {studies} --out {run}", 2, ["a run folder", "{run}", "--out"]),
    "train-vae into its data": ("train-vae --config {small} --data {images} --out {images}", 2, ["a prepared folder", "--out"]),
    "train into its data": (
        "train --config {config} --data {prepared} --output_dir {images}", 2, ["a prepared folder", "{images}", "--output_dir"],
    ),
    "train into prepared data, continued": (
        "train --config {config} --data {prepared} --output_dir {images} --resume", 2, ["a prepared folder", "--output_dir"],
    ),
    "sample into a checkpoint": ("sample --checkpoint {no_text} --out {no_text} --pirads 2", 2, ["this is a checkpoint"]),
    "sample into the run": ("sample --checkpoint {no_text} --out {run} --pirads 2", 2, ["a run folder", "mixed", "{run}"]),
}  # fmt: skip
WRITERS = {
    "phantom": "phantom --out {tmp}/held --num_studies 1",
    "prepare": "prepare --config {small} --data {studies} --out {tmp}/held --workers 1",
    "train": "train --config {config} --data {prepared} --output_dir {tmp}/held",
    "train, continued": "train --config {config} --data {prepared} --output_dir {tmp}/held --resume",
    "train-vae": "train-vae --config {small} --data {images} --out {tmp}/held",
    "sample": "sample --checkpoint {no_text} --out {tmp}/held --pirads 2",
    "import": "import --data {studies} --out {tmp}/held",
    "import, written": "import --data {studies} --out {tmp}/held --write",
    "import with the same key": "import --data {studies} --out {tmp}/other --private {tmp}/held/key",
    "export": "export --checkpoint {checkpoint} --out {tmp}/held/model.pt",
    "export of a bundle": "export --format monai-bundle --checkpoint {checkpoint} --out {tmp}/held/bundle",
}
LOCKS = {
    "import with the same key": ".key.lock",
    "export": ".model.pt.lock",
    "export of a bundle": ".bundle.lock",
}  # others lock .lock


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints, a run and prepared folders, as small as they work."""
    root = tmp_path_factory.mktemp("places")
    found = {"prepared": write_prepared(root / "prepared"), "config": write_config(root / "config.json")}
    changes = {
        "no_table": lambda cases: [{**case, "pirads": None, "text_isnull": 1} for case in cases],
        "negative": lambda cases: [{**case, "pirads": [1, 0]} for case in cases],
        "one": lambda cases: cases[:1],
    }
    for name, change in changes.items():
        found[name] = shutil.copytree(found["prepared"], root / name)
        manifest = read_json(found[name] / "manifest.json")
        write_json(found[name] / "manifest.json", {**manifest, "cases": change(manifest["cases"])})
    for name, variant, with_vae in [
        ("checkpoint", "CCELLA", True),
        ("no_vae", "CCELLA", False),
        ("no_text", "RADMAISI", True),
    ]:
        found[name] = write_checkpoint(root / name / "step", variant, with_vae=with_vae)
    found["weights"] = root / "weights.pt"
    found["weights"].touch()
    found["samples"] = root / "samples"
    write_json(found["samples"] / "sample-000_seed0.json", {})
    found["run"] = root / "run"
    train_here(found["run"], found["prepared"], max_train_steps=1)
    found["small"], found["studies"], found["images"] = (
        root / "small.json",
        write_studies(root / "studies"),
        root / "images",
    )
    write_json(found["small"], config().dump())
    prepare(found["studies"], found["images"], config(), workers=1)
    return found


def error_of(message: str) -> list[str]:
    """The lines of the error; warnings about the data may come first."""
    _, error, rest = message.partition("error: ")
    assert error and "internal" not in rest and "Traceback" not in message, message
    return rest.strip().splitlines()


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_with_real_folders_can_be_corrected_from_its_message(name, call, places, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kept = {each: tree(places[each]) for each in ("images", "run", "samples", "studies")}
    command, code, words = ROWS[name]
    found, message = call(command)
    lines = error_of(message)
    assert found == code and lines[-1].startswith("  fix: ") and len(lines) <= 5, message
    for word in words:
        assert word.format(tmp=tmp_path, **places) in message, message
    assert not (tmp_path / "out").exists() and not (tmp_path / "x.pt").exists()
    assert {each: tree(places[each]) for each in kept} == kept


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_command_does_not_write_to_the_folder_of_the_first(name, call, places, tmp_path):
    lock = LOCKS.get(name, ".lock")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "held"), lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        found, message = call(WRITERS[name])
        inside = sorted(path.name for path in (tmp_path / "held").iterdir())
        holder.communicate("")
    lines = error_of(message)
    assert found == 2 and len(lines) <= 5, message
    assert f"'another command', process {holder.pid}" in message and str(tmp_path / "held") in message
    assert "wait until it has ended" in lines[-1] and inside == [lock]
    assert not list(tmp_path.iterdir())  # the first one has written nothing either


def test_a_folder_without_a_table_is_prepared_with_a_warning_and_stops_check(call, places, tmp_path):
    studies = shutil.copytree(places["studies"], tmp_path / "studies")
    (studies / "studies.csv").unlink()
    command = f"--config {{small}} --data {studies} --workers 1"
    found, message = call(f"prepare {command} --out {tmp_path / 'out'}")
    assert found == 0 and "no_table: there is no studies.csv" in message
    found, _ = call(f"check {command} --set model.variant=CCELLA")
    assert found == 3


def test_export_names_a_command_that_samples_the_model(call, places, tmp_path):
    """Where a .pt file says too little, this is the checkpoint itself."""
    code, message = call("export --checkpoint {no_text} --weights raw --out {tmp}/RADMAISI.pt")
    (command,) = [line.removeprefix("next: ccella-fast ") for line in message.splitlines() if line.startswith("next: ")]
    assert code == 0 and f"--checkpoint {places['no_text']} " in command and "no grid and no text encoder" in message
    code, message = call(f"{command} --pirads 4 --num_inference_steps 2")
    assert code == 0, message
    assert (tmp_path / "samples" / "sample-000_seed0.nii.gz").is_file()
