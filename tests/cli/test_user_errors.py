"""Mistakes of users, a row each: the command, its exit code, and words that make it fixable without the documentation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ccella_fast.errors import DataError
from ccella_fast.folder_kinds import folder_kind, wrong_folder
from ccella_fast.storage import read_json, write_json
from study_fixtures import tree
from training_fixtures import CONFIG, write_config, write_prepared

ROOT = Path(__file__).resolve().parents[2]
PREPARE = "prepare --data {studies} --out {tmp}/out"
TRAIN = "train --config {config} --data {prepared} --output_dir {tmp}/out"
SAMPLE = "sample --checkpoint {run} --out {tmp}/out"

# name -> (command, exit code, words that the message contains)
USAGE = {
    "misspelled command": ("smaple --out x", 2, ["'smaple'", "did you mean 'sample'?"]),
    "unknown command": ("zebra", 2, ["'zebra'", "prepare", "sample"]),
    "no command": ("", 2, ["COMMAND", "ccella-fast --help"]),
    "misspelled option before a required one": ("prepare --dataa X", 2, ["--dataa", "did you mean --data?"]),
    "abbreviated option": ("prepare --dat x --out y", 2, ["--dat", "did you mean --data?"]),
    "hyphens": ("sample --num-samples 3", 2, ["--num-samples", "did you mean --num_samples?"]),
    "misspelled flag": ("env --jsn", 2, ["--jsn", "did you mean --json?"]),
    "misspelled option of training": ("train --output_dri x", 2, ["did you mean --output_dir?"]),
    "setting as an option": (f"{TRAIN} --batch_size 4", 2, ["--batch_size", "--set training.batch_size=VALUE"]),
    "setting of two sections as an option": (f"{TRAIN} --lr 1", 2, ["use --set training.lr=VALUE\n"]),
    "setting of the autoencoder as an option": (
        "train-vae --data {prepared} --out {tmp}/x --max_train_steps 9",
        2,
        ["use --set vae_training.max_train_steps=VALUE\n"],
    ),
    "setting of the data as an option": ("prepare --spacing 1", 2, ["--spacing", "use --set data.spacing=VALUE\n"]),
    "option of diffusers": (f"{TRAIN} --learning_rate 1e-4", 2, ["--learning_rate", "--set training.lr=NUMBER"]),
    "another option of diffusers": (f"{TRAIN} --resume_from_checkpoint latest", 2, ["use --resume"]),
    "no value": ("prepare --data", 2, ["--data", "expected one argument"]),
    "a required option is missing": ("prepare --data x", 2, ["--out", "required"]),
    "surplus folder": ("report a b", 2, ["b", "belong to no option"]),
    "no samples": (f"{SAMPLE} --num_samples 0", 2, ["--num_samples", "'0'", "at least 1"]),
    "negative seed": (f"{SAMPLE} --seed -1", 2, ["--seed", "'-1'", "at least 0"]),
    "seed too large": (f"{SAMPLE} --seed 99999999999999999999", 2, ["--seed", "whole number"]),
    "no steps": (f"{SAMPLE} --num_inference_steps 0", 2, ["--num_inference_steps", "at least 1"]),
    "half a step": (f"{SAMPLE} --num_inference_steps 2.5", 2, ["--num_inference_steps", "'2.5'", "whole number"]),
    "spacing 0": (f"{SAMPLE} --spacing 5 5 0", 2, ["--spacing", "'0'", "greater than 0"]),
    "spacing not a number": (f"{SAMPLE} --spacing a 5 5", 2, ["--spacing", "'a'", "number"]),
    "two spacings": (f"{SAMPLE} --spacing 5 5", 2, ["--spacing", "expected 3 arguments"]),
    "PI-RADS 6": (f"{SAMPLE} --pirads 6", 2, ["--pirads", "'6'", "1, 2, 3, 4, 5, neg, pos"]),
    "PI-RADS in words": (f"{SAMPLE} --class_override positive", 2, ["--class_override", "'positive'"]),
    "data type": (f"{SAMPLE} --dtype fp16", 2, ["--dtype", "'fp16'", "float32", "bfloat16"]),
    "device": (f"{SAMPLE} --device gpu", 2, ["--device", "'gpu'", "cuda"]),
    "a longer run that is only described": (
        f"{TRAIN} --dry-run --extend_to 5",
        2,
        ["--extend_to", "--dry-run describes"],
    ),
    "nothing to extend": (f"{TRAIN} --extend_to 5", 2, ["no checkpoint", "use --max_train_steps"]),
    "unknown part": (f"{TRAIN} --init_from x --init_skip unett", 2, ["--init_skip", "did you mean 'unet'?"]),
    "parts without weights": (
        f"{TRAIN} --init_skip unet",
        2,
        ["training.init_skip", "--init_from PATH"],
    ),
    "no training steps": (f"{TRAIN} --max_train_steps 0", 2, ["--max_train_steps", "'0'", "at least 1"]),
    "latents": (f"{TRAIN} --latents offline", 2, ["--latents", "did you mean 'online'?"]),
    "negative b-value": ("prepare --data x --out {tmp}/out --b_value -5", 2, ["--b_value", "'-5'", "0 or more"]),
    "b-value in words": ("prepare --data x --out {tmp}/out --b_value high", 2, ["--b_value", "'high'"]),
    "shares in words": ("import --data x --out {tmp}/out --split a b c", 2, ["--split", "'a'"]),
    "format": (f"{SAMPLE} --format dcm", 2, ["--format", "'dcm'", "did you mean 'dicom'?"]),
    "no seed": ("phantom --out {tmp}/out --seed x", 2, ["--seed", "'x'", "whole number"]),
    "no workers": ("check --data x --workers 0", 2, ["--workers", "'0'", "at least 1"]),
    "no folder of results": ("report", 2, ["FOLDER", "ccella-fast report --help"]),
    "no phantoms": ("phantom --out {tmp}/out --num_studies -1", 2, ["--num_studies", "'-1'", "at least 1"]),
}
SETTINGS = {
    "ZeRO -1": (f"{TRAIN} --set training.zero_stage=-1", 2, ["from 0 to 3"]),
    "adapters of no weights": (f"{TRAIN} --set training.low_rank.rank=8", 2, ["low_rank.rank", "--init_from PATH"]),
    "misspelled key": (f"{PREPARE} --set data.dims=[1]", 2, ["'dims'", "--set data.dims=[1]", "did you mean 'dim'?"]),
    "misspelled section": (f"{PREPARE} --set dta.dim=[1]", 2, ["'dta'", "did you mean 'data'?"]),
    "key of another section": (f"{PREPARE} --set data.zero_stage=2", 2, ["did you mean 'training.zero_stage'?"]),
    "key without its section": (f"{PREPARE} --set encoder=x", 2, ["did you mean 'text.encoder'?"]),
    "no value": (f"{PREPARE} --set data.dim", 2, ["'data.dim' has no value", "section.key=value"]),
    "spacing 0": (f"{PREPARE} --set data.spacing=[0.5,0.5,0]", 2, ["data.spacing.2", "got 0", "greater than 0", "mm"]),
    "two sizes": (f"{PREPARE} --set data.dim=[32,32]", 2, ["data.dim", "3 entries", "voxels along R, A, S"]),
    "broken list": (f"{PREPARE} --set data.dim=[32,32", 2, ["data.dim", "a list of 3 entries", "'[32,32'"]),
    "a section is a number": (f"{TRAIN} --set training=3", 2, ["training", "got 3", "{{...}}"]),
    "negative rate": (f"{TRAIN} --set training.lr=-1", 2, ["training.lr", "greater than 0", "got -1", "default"]),
    "infinite rate": (f"{TRAIN} --set training.lr=Infinity", 2, ["training.lr", "greater than 0", "got inf"]),
    "ZeRO 4": (f"{TRAIN} --set training.zero_stage=4", 2, ["training.zero_stage", "from 0 to 3", "got 4"]),
    "fp16": (f"{TRAIN} --set training.precision=fp16", 2, ["training.precision", "'fp16'", "bf16", "fp32"]),
    "variant": (f"{TRAIN} --set model.variant=CCELA", 2, ["CCELA", "did you mean 'CCELLA'?"]),
    "value in the file": (
        "train --config {bad_config} --data {prepared} --output_dir x",
        2,
        ["{bad_config}", "got -1"],
    ),
    "grid does not divide": (f"{PREPARE} --set data.dim=[250,256,128]", 2, ["data.dim", "224", "256"]),
    "grid of training does not divide": (f"{TRAIN} --set data.dim=[30,32,16]", 2, ["data.dim", "not divisible", "[32"]),
    "no such file": ("prepare --data x --out y --config {tmp}/none.json", 2, ["{tmp}/none.json", "does not exist"]),
    "an empty path": ("train --data {prepared} --output_dir= --config c", 2, ["--output_dir", "path is empty"]),
    "no configuration": ("train --data {prepared} --output_dir x", 2, ["--config FILE"]),
    "not JSON": ("prepare --data x --out y --config {not_json}", 2, ["{not_json}", "line 1, column 2"]),
    "DeepSpeed key": (f"{TRAIN} --deepspeed {{ds_typo}}", 2, ["{ds_typo}", "did you mean 'gradient_clipping'?"]),
    "DeepSpeed fp16": (f"{TRAIN} --deepspeed {{ds_fp16}}", 2, ["{ds_fp16}", "fp16", "bf16"]),
    "batch sizes": (f"{TRAIN} --deepspeed {{ds_triad}}", 2, ["{ds_triad}", "train_batch_size 7", "= 4"]),
    "value in the DeepSpeed file": (
        f"{TRAIN} --deepspeed {{ds_value}}",
        2,
        ["{ds_value}", "gradient_clipping", "got -1"],
    ),
}
FOLDERS = {
    "prepared folder as a checkpoint": ("sample --checkpoint {prepared} --out x", 4, ["a prepared folder", "{run}"]),
    "autoencoder as a checkpoint": ("sample --checkpoint {vae} --out x", 4, ["an autoencoder (VAE) folder"]),
    "prepared folder as a run": ("average --run {prepared} --width 0.1 --out {tmp}/x", 4, ["a prepared folder", "{run}"]),
    "run without snapshots": (
        "average --run {run} --width 0.1 --out {tmp}/x",
        4,
        ["{run}/snapshots", "power_ema_snapshot_steps"],
    ),
    "samples as a checkpoint": ("sample --checkpoint {samples} --out x", 4, ["generated samples", "{run}"]),
    "results as a checkpoint": ("sample --checkpoint {results} --out x", 4, ["a folder of results", "{run}"]),
    "export of a prepared folder": ("export --checkpoint {prepared} --out {tmp}/x.pt", 4, ["a prepared folder", "{run}"]),
    "run without a checkpoint": ("sample --checkpoint {unsaved} --out x", 4, ["without a checkpoint yet", "wait"]),
    "DeepSpeed checkpoint": ("sample --checkpoint {deepspeed} --out x", 4, ["a DeepSpeed checkpoint", "--output_dir"]),
    "diffusers model": ("sample --checkpoint {diffusers} --out x", 4, ["a model of diffusers", "--output_dir"]),
    "MONAI bundle": ("sample --checkpoint {bundle} --out x", 4, ["a MONAI bundle", "--output_dir"]),
    "text encoder": ("sample --checkpoint {encoder} --out x", 4, ["a text encoder", "--output_dir"]),
    "no checkpoint": ("sample --checkpoint {tmp}/none --out x", 4, ["{tmp}/none", "does not exist"]),
    "prepared folder as start weights": (f"{TRAIN} --init_from {{prepared}}", 4, ["a prepared folder", "--init_from", "{run}"]),
    "no start weights": (f"{TRAIN} --init_from {{tmp}}/none.pt", 4, ["{tmp}/none.pt", "does not exist"]),
    "studies as prepared data": ("train-vae --data {studies} --out {tmp}/x", 3, ["a folder of studies", "ccella-fast prepare"]),
    "BIDS as prepared data": ("train-vae --data {bids} --out {tmp}/x", 3, ["a BIDS data set", "ccella-fast prepare"]),
    "run as prepared data": (
        "train --config {config} --data {run} --output_dir {tmp}/x", 3, ["a run folder", "give {prepared}"],
    ),
    "prepared folder as studies": ("prepare --data {prepared} --out {tmp}/x", 3, ["a prepared folder", "--data", "studies"]),
    "run as studies": ("prepare --data {run} --out {tmp}/x", 3, ["a run folder", "--data"]),
    "samples as studies": (
        "prepare --data {samples} --out {tmp}/x", 3, ["generated samples", "--data", "FOLDER/CASE/", "--csv"],
    ),
    "samples checked": ("check --data {samples}", 3, ["generated samples, not a folder of studies", "--csv"]),
    "samples as an export": ("import --data {samples} --out {tmp}/x", 3, ["generated samples, not a PACS export", "--csv"]),
    "samples as prepared data": ("train-vae --data {samples} --out {tmp}/x", 3, ["generated samples", "give {prepared}"]),
    "run checked": ("check --data {run}", 3, ["a run folder", "--data"]),
    "no studies to check": ("check --data {empty}", 3, ["an empty folder", "the folders of the studies"]),
    "prepared folder as an export": ("import --data {prepared} --out {tmp}/x", 3, ["a prepared folder", "the PACS"]),
    "no export": ("import --data {tmp}/none --out {tmp}/x", 3, ["{tmp}/none", "--data"]),
    "table as studies": ("prepare --data {table} --out {tmp}/x", 3, ["{table}", "--data", "--csv"]),
    "text as studies": ("prepare --data {latin} --out {tmp}/x", 3, ["{latin}", "UTF-8"]),
    "VAE does not exist": ("prepare --data {studies} --out {tmp}/x --vae {tmp}/none", 4, ["{tmp}/none", "does not exist"]),
    "VAE of sample does not exist": ("sample --checkpoint {latin} --vae {tmp}/none --out x", 4, ["{tmp}/none", "train-vae"]),
    "checkpoint is a web page": ("sample --checkpoint {page} --vae {vae} --out x", 4, ["{page}", "torch.save", "download"]),
    "checkpoint is a pointer": ("sample --checkpoint {pointer} --vae {vae} --out x", 4, ["{pointer}", "git lfs pull"]),
    "checkpoint is empty": ("sample --checkpoint {nothing} --vae {vae} --out x", 4, ["{nothing}", "is empty"]),
    "export of a file": ("export --checkpoint {page} --out {tmp}/x", 4, ["{page}", "a run folder", "--checkpoint"]),
    "export over a folder": ("export --checkpoint {run} --out {studies}", 2, ["this is a folder", "{studies}/CCELLA.pt"]),
    "bundle over a folder": (
        "export --format monai-bundle --checkpoint {run} --out {studies}", 2, ["{studies}", "folder already exists", "--out"],
    ),
    "misspelled format": ("export --format monai --checkpoint {run} --out {tmp}/x", 2, ["'monai'", "monai-bundle"]),
    "resume from nothing": (
        f"{TRAIN} --resume {{tmp}}/none", 4, ["{tmp}/none", "does not exist", "{tmp}/out/checkpoints", "--resume alone"],
    ),
    "resume from a run": (f"{TRAIN} --resume {{run}}", 4, ["{run}", "not a step folder", "--resume alone"]),
    "report files in a folder": (f"{SAMPLE} --report_file {{files}}", 3, ["{files}", "a folder", "{files}/*.txt"]),
    "report on nothing": ("report {tmp}/none", 3, ["{tmp}/none", "does not exist"]),
    "report on a file": ("report {latin}", 3, ["{latin}", "not a folder of results"]),
    "phantoms among studies": ("phantom --out {studies}", 2, ["other files", "{studies}/case1", "--out"]),
    "phantoms over a file": ("phantom --out {latin}", 5, ["{latin}", "a file, not a folder", "--out"]),
    "phantoms where nothing can be": ("phantom --out /proc/none/x", 5, ["/proc/none/x"]),
    "run over a file": ("train --config {config} --data {prepared} --output_dir {latin}", 5, ["{latin}", "a file"]),
    "autoencoder over a file": ("train-vae --data {prepared} --out {latin}", 5, ["{latin}", "a file"]),
    "link to nothing": ("train-vae --data {prepared} --out {link}/x", 5, ["{link}/x", "a link to nothing"]),
    "check over a file": ("check --data {studies} --out {latin}", 5, ["{latin}", "a file, not a folder"]),
    "misspelled finding": ("check --data {studies} --allow leekage", 2, ["'leekage'", "did you mean 'leakage'?"]),
    "reports do not exist": ("import --data {studies} --out {tmp}/x --reports {tmp}/none", 3, ["{tmp}/none", "not exist"]),
    "studies in the export": ("import --data {studies} --out {studies}/new", 2, ["{studies}/new", "--out", "next to"]),
    "report on studies": ("report {studies}", 3, ["a folder of studies", "prepared/"]),
    "report on one part": ("report {prepared}", 3, ["a prepared folder", "give {results}"]),
    "report on an empty folder": ("report {empty}", 3, ["an empty folder"]),
    "no such studies": ("prepare --data {tmp}/none --out {tmp}/x", 3, ["{tmp}/none"]),
    "not prepared": ("train-vae --data {tmp}/none --out {tmp}/x", 3, ["not prepared", "ccella-fast prepare"]),
    "latents are missing": (
        "train --config {config} --data {no_latents} --output_dir {tmp}/x", 3,
        ["does not contain latents", "{no_latents}", "ccella-fast train-vae", "ccella-fast prepare", "--vae"],
    ),
    "dry run on data of another grid": (f"{TRAIN} --dry-run --set data.dim=[64,64,32]", 3, ["{prepared}", "case0"]),
    "dry run with another encoder": (
        "train --config {config} --data {encoded} --output_dir {tmp}/out --dry-run", 3, ["encoder 'other'", "{encoded}"],
    ),
    "dry run without data": ("train --config {config} --data {tmp}/none --output_dir x --dry-run", 3, ["not prepared"]),
    "a run exists": ("train --config {config} --data {prepared} --output_dir {run}", 2, ["{run}", "--resume"]),
    "resume in another folder": (f"{TRAIN} --resume {{prepared}}", 4, ["a prepared folder", "--resume"]),
    "output is a file": ("prepare --data {studies} --out {config}", 5, ["{config}", "not a folder"]),
    "report file is missing": (f"{SAMPLE} --report_file {{tmp}}/none", 3, ["{tmp}/none", "report file"]),
    "report file in latin-1": (f"{SAMPLE} --report_file {{latin}}", 3, ["{latin}", "UTF-8"]),
    "report table is missing": (f"{SAMPLE} --report_table {{tmp}}/none", 3, ["{tmp}/none"]),
    "export over a file": ("export --checkpoint {run} --out {config}", 2, ["{config}", "already exists"]),
}  # fmt: skip
MACHINE = {
    "backend": ({"CCELLA_FAST_BACKEND": "attention=xformers"}, SAMPLE, 2,
                ["CCELLA_FAST_BACKEND", "attention", "'xformers'", "on cpu", "supported here: ", "sdpa"]),
    "backend for training": ({"CCELLA_FAST_BACKEND": "attention=xformers"}, TRAIN, 2, ["'xformers'", "supported here"]),
    "misspelled backend": ({"CCELLA_FAST_BACKEND": "attention=sdap"}, SAMPLE, 2, ["'sdap'", "sdpa"]),
    "misspelled kernel": ({"CCELLA_FAST_BACKEND": "atention=sdpa"}, SAMPLE, 2, ["'atention'", "attention"]),
    "GPU for sampling": ({}, f"{SAMPLE} --device cuda", 2, ["'cuda' cannot be used", "use device cpu"]),
    "second GPU": ({}, f"{SAMPLE} --device cuda:1", 2, ["'cuda:1' cannot be used", "use device cpu"]),
    "GPU for training": ({"DS_ACCELERATOR": "cuda"}, TRAIN, 2, ["DS_ACCELERATOR", "no GPU", "cpu"]),
    "accelerator": ({"DS_ACCELERATOR": "cdua"}, TRAIN, 2, ["'cdua'", "DS_ACCELERATOR", "cpu or cuda"]),
}  # fmt: skip


# Commands that write to the folder {at} -> the folders of the fixture that they may continue.
OUTPUTS = {
    "import --data {studies} --out {at}": {"studies"},
    "prepare --data {files} --out {at}": {"prepared", "no_latents", "encoded"},
    "train-vae --data {prepared} --out {at}": {"vae"},
    "train --config {config} --data {prepared} --output_dir {at}": {"run", "unsaved"},
    "train --config {config} --data {prepared} --output_dir {at} --resume": {"run", "unsaved"},
    "sample --checkpoint {run} --out {at}": {"samples"},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Folders and files of every kind, as small as they are recognized."""
    root = tmp_path_factory.mktemp("places")
    names = ["results", "bids", "deepspeed", "diffusers", "bundle", "encoder", "empty", "unsaved", "studies", "files"]
    found = {name: root / "each" / name / name for name in names}
    for folder in found.values():
        folder.mkdir(parents=True)
    results, files = found["results"], found["files"]
    found |= {"prepared": results / "prepared", "run": results / "model"}
    found |= {"samples": results / "samples", "vae": root / "each" / "vae" / "vae"}
    write_prepared(found["prepared"])
    found["no_latents"] = shutil.copytree(found["prepared"], root / "each" / "no_latents" / "prepared")
    manifest = read_json(found["no_latents"] / "manifest.json")
    write_json(found["no_latents"] / "manifest.json", {**manifest, "scale_factor": None})
    found["encoded"] = shutil.copytree(found["prepared"], root / "each" / "encoded" / "prepared")
    text = {**manifest["text"], "encoder": "other", "fingerprint": "0" * 64}
    write_json(found["encoded"] / "manifest.json", {**manifest, "text": text})
    write_json(found["run"] / "checkpoints" / "step-00000002" / "manifest.json", {"format": "ccella_fast.checkpoint"})
    write_json(found["run"] / "config.json", CONFIG)
    write_json(found["vae"] / "manifest.json", {"format": "ccella_fast.autoencoder", "version": 1})
    write_json(found["samples"] / "sample-000_seed0.json", {})
    write_json(found["unsaved"] / "run_status.json", {"state": "running"})
    write_json(found["bids"] / "dataset_description.json", {})
    write_json(found["diffusers"] / "model_index.json", {})
    write_json(found["encoder"] / "config.json", {"model_type": "t5"})
    write_json(found["bundle"] / "configs" / "metadata.json", {})
    (found["deepspeed"] / "global_step10").mkdir()
    (found["studies"] / "case1").mkdir()
    (found["studies"] / "case1" / "t2w.nii.gz").touch()
    found["config"] = write_config(files / "config.json")
    found["bad_config"] = write_config(files / "bad.json", lr=-1)
    texts = {
        "not_json": "{data: 1}", "ds_typo": '{"gradient_cliping": 1}', "ds_fp16": '{"fp16": {"enabled": true}}',
        "ds_value": '{"gradient_clipping": -1}',
        "ds_triad": '{"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}',
    }  # fmt: skip
    for name, text in texts.items():
        found[name] = files / f"{name}.json"
        found[name].write_text(text)
    for name, text in [("table", "case\n"), ("page", "<!doctype html>"), ("nothing", "")]:
        found[name] = files / f"{name}.csv"
        found[name].write_text(text)
    found["pointer"] = files / "pointer.pt"
    found["pointer"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    found["link"] = files / "link"
    found["link"].symlink_to("nowhere")
    found["latin"] = files / "report.txt"
    found["latin"].write_bytes("Läsion".encode("latin-1"))
    return found


def check(answer: tuple[int, str], code: int, words: list[str], places: dict[str, Path], tmp_path: Path) -> None:
    found, message = answer
    said, error, rest = message.partition("error: ")  # warnings about the data may come first
    lines = rest.strip().splitlines()
    assert found == code and error, message
    assert lines[-1].startswith("  fix: ") and len(lines) <= 5 and said.count("\n") <= 3, message
    assert "internal" not in message and "Traceback" not in message
    for word in words:
        assert word.format(tmp=tmp_path, **places) in message, message
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


ROWS = {f"{kind}: {name}": row for kind, rows in [("usage", USAGE), ("settings", SETTINGS), ("folders", FOLDERS)]
        for name, row in rows.items()}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_can_be_corrected_from_its_message(name, call, places, tmp_path):
    command, code, words = ROWS[name]
    check(call(command), code, words, places, tmp_path)


@pytest.mark.parametrize("name", MACHINE)
def test_what_the_machine_cannot_do_is_refused_before_anything_is_loaded(name, call, places, tmp_path, monkeypatch):
    """The checkpoint of these rows is damaged: reading it first would be another error."""
    environment, command, code, words = MACHINE[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    check(call(command), code, words, places, tmp_path)


@pytest.mark.parametrize("command", OUTPUTS)
def test_nothing_is_written_to_a_folder_of_another_kind(command, call, places, tmp_path):
    folders = {
        name: path for name, path in places.items() if path.is_dir() and name not in ("empty", "files", "results")
    }
    for name in folders.keys() - OUTPUTS[command]:
        before = tree(places[name])
        answer = call(command.replace("{at}", str(places[name])))
        check(
            answer,
            2,
            ["would be mixed with its files", f"  file:  {places[name]}", "a folder of its own"],
            places,
            tmp_path,
        )
        assert tree(places[name]) == before
    for name in OUTPUTS[command]:  # control
        shutil.copytree(places[name], tmp_path / name)
        continued = command.replace("{at}", str(tmp_path / name)).replace("{prepared}", "{empty}")  # no long work
        code, message = call(continued)
        assert code and "mixed" not in message


def test_what_a_killed_command_leaves_is_not_taken_for_studies(tmp_path):
    """The volumes of an interrupted `sample` may be all that is in its folder."""
    (tmp_path / ".partial-1").mkdir()
    for name in (".partial-1/0001.dcm", ".partial-2.nii.gz"):
        (tmp_path / name).touch()
        assert folder_kind(tmp_path) is None
    (tmp_path / "sample-000_seed3.nii.gz").touch()
    assert folder_kind(tmp_path) == "samples"
    (tmp_path / "sample-000_seed3.nii.gz").rename(tmp_path / "t2w.nii.gz")
    assert folder_kind(tmp_path) == "studies"  # control


def test_one_folder_next_to_the_wrong_one_is_offered_and_of_several_the_most_similar(tmp_path):
    def fix(name: str) -> str:
        return str(wrong_folder(tmp_path / name, "prepared", error=DataError)).rpartition("fix:")[2].strip()

    general = "give the folder that `ccella-fast prepare --out` wrote"
    assert fix("data") == general
    names = ["first", "second", "third", "fourth"]
    for name in names:
        write_json(tmp_path / name / "manifest.json", {"format": "ccella_fast.prepared"})
        if name == "first":
            assert fix("data") == f"give {tmp_path / 'first'}"
        if name == "third":
            assert fix("data") == f"{general}; next to it: first, second, third"
    assert fix("data") == f"{general}; next to it: first, fourth, second, ..."
    assert fix("secnod") == f"give {tmp_path / 'second'}"
    (tmp_path / "third" / "images").mkdir()
    assert fix("third/images") == f"give {tmp_path / 'third'}"


def test_words_of_a_report_without_quotes_are_not_printed(call):
    code, message = call("sample --checkpoint x --out y --report PI-RADS 5 canary lesion")
    assert code == 2 and "canary" not in message and "3 words" in message and "quotes" in message


def test_every_setting_misspelled_once_is_found_before_torch_is_imported():
    """Each key without its last letter, through the command, in one process."""
    lines = [
        "import contextlib, io, json, sys",
        "from ccella_fast import cli",
        "from ccella_fast.config import Config",
        "from ccella_fast.config_errors import settings",
        "said = {}",
        "for dotted in settings(Config):",
        "    with contextlib.redirect_stderr(io.StringIO()) as stream:",
        "        code = cli.main(['prepare', '--data', 'x', '--out', 'y', '--set', dotted[:-1] + '=1'])",
        "    said[dotted] = code, stream.getvalue()",
        "print(json.dumps([said, 'torch' in sys.modules]))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    said, torch_is_imported = json.loads(done.stdout)
    assert len(said) >= 60 and not torch_is_imported
    for dotted, (code, message) in said.items():
        key = dotted.rpartition(".")[2]
        assert code == 2 and len(message.splitlines()) == 3, message
        assert f"unknown key '{key[:-1]}'" in message and f"--set {dotted[:-1]}=1" in message
        assert "did you mean" in message and key in message.splitlines()[-1], message
