"""`ccella-fast export --format monai-bundle`: MONAI itself loads, verifies and runs the folder, without a network."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import monai.bundle
import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from canary_fixtures import contents, spellings
from ccella_fast import load_checkpoint
from ccella_fast.checkpoint import write_manifest
from ccella_fast.cli import main
from ccella_fast.errors import CheckpointError, ConfigError, DiskError
from ccella_fast.models import build_model
from ccella_fast.pirads import CLASSES
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.sampling.monai_bundle import export_monai_bundle
from ccella_fast.storage import read_json, write_json
from sampling_fixtures import THREE, TOKENS, WIDTH, write_checkpoint
from study_fixtures import tree, write_bert

# Required by MONAI's schema of 2024-07-25, and the types there.
REQUIRED = {
    "schema": "string", "version": "string", "monai_version": "string", "pytorch_version": "string", "numpy_version": "string",
    "required_packages_version": "object", "task": "string", "description": "string", "authors": "string",
    "copyright": "string", "network_data_format": "object",
}  # fmt: skip
TENSOR = {
    "type": "string", "format": "string", "num_channels": "integer", "spatial_shape": "array", "dtype": "string",
    "value_range": "array",
}  # fmt: skip
PYTHON = {"string": str, "object": dict, "array": list, "integer": int}
VARIANTS = {"CCELLA": {}, "DECOUPLED": {}, "RADMAISI": {}, "MAISI": THREE}
TRAINED_ON = {"classes": [3, 4], "spacing": [[1.5, 1.5, 3.0], [1.5, 1.5, 3.0]]}
CANARY = "Zebedee-1971"
# MONAI warns that it executes the configuration of a bundle, and that the schema has no hash.
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file", "ignore:No hash value")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """With an encoder, averaged weights that differ from the raw ones, and what must not be passed on."""
    folder = tmp_path_factory.mktemp("run")
    encoder = {"text.encoder": str(write_bert(folder / "bert", width=WIDTH)), "text.dtype": "float32"}
    step = write_checkpoint(
        folder / "step", **encoder, **{"paths.model_dir": f"/home/{CANARY}", "name": CANARY, "data.dataset": CANARY}
    )
    averaged = {name: tensor + 0.01 for name, tensor in load_file(step / "model.safetensors").items()}
    save_file(averaged, step / "ema.safetensors")
    state = read_json(step / "training_state.json")
    write_json(step / "training_state.json", {**state, "trained_on": TRAINED_ON, "data_sha256": CANARY})
    (step / "manifest.json").unlink()
    write_manifest(step, step=12)
    return step


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    export_monai_bundle(checkpoint, folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    for name in ("download", "download_url"):
        monkeypatch.setattr(f"monai.bundle.scripts.{name}", refuse)


def load(bundle: Path, **options) -> torch.nn.Module:
    return monai.bundle.load(
        bundle.name, bundle_dir=bundle.parent, workflow_type="inference", device="cpu", **options
    ).eval()


def same(network: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    state = network.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("weights", "file"), [(None, "ema"), ("raw", "model")])
def test_monai_loads_the_network_with_the_weights_of_the_checkpoint(checkpoint, tmp_path, offline, weights, file):
    export_monai_bundle(checkpoint, tmp_path / "bundle", weights=weights)
    network, tensors = load(tmp_path / "bundle"), load_file(checkpoint / f"{file}.safetensors")
    original = load_checkpoint(checkpoint, weights=weights)
    assert same(network, tensors)
    assert same(load(tmp_path / "bundle", model=build_model(original.config)), tensors)
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 6, 4), (TOKENS, WIDTH)))
    inputs = {"x": x, "timesteps": torch.tensor([3, 900]), "spacing": torch.full((2, 3), 150.0), "text": text}
    with torch.no_grad():
        outputs, expected = network(**inputs), original.model(**inputs)
    assert all(map(torch.equal, outputs, expected)) and outputs.noise.std() > 0.1

    values = torch.load(tmp_path / "bundle" / "models" / "model.pt", weights_only=True)  # negative control
    values["unet.conv_in.conv.bias"][0] += 1e-6
    torch.save(values, tmp_path / "bundle" / "models" / "model.pt")
    assert not same(load(tmp_path / "bundle"), tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_metadata_describe_the_inputs_and_outputs_of_the_network(tmp_path, offline, variant):
    """Tensors of the stated shapes, types and ranges are all that the network needs, and it returns those stated."""
    export_monai_bundle(write_checkpoint(tmp_path / "step", variant, **VARIANTS[variant]), tmp_path / "bundle")
    formats = read_json(tmp_path / "bundle" / "configs" / "metadata.json")["network_data_format"]
    inputs = {}
    for name, entry in formats["inputs"].items():
        low, high = entry["value_range"] or (0, 1)
        values = torch.rand(2, entry["num_channels"], *entry["spatial_shape"]) * (high - low) + low
        inputs[name] = values.to(getattr(torch, entry["dtype"]))
    inputs["timesteps"] = inputs["timesteps"].squeeze(1)
    network = load(tmp_path / "bundle")
    with torch.no_grad():
        outputs = network(**inputs)._asdict()
    shapes = {name: (2, entry["num_channels"], *entry["spatial_shape"]) for name, entry in formats["outputs"].items()}
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items() if tensor is not None} == shapes
    assert shapes["noise"] == (2, 12 if variant == "MAISI" else 4, 8, 6, 4)
    assert {"text": "text" in inputs, "pirads": "pirads" in inputs} == {
        "text": variant in ("CCELLA", "DECOUPLED"),
        "pirads": variant in ("DECOUPLED", "RADMAISI"),
    }
    for name in inputs:
        with pytest.raises((TypeError, ValueError), match=name):
            network(**{other: value for other, value in inputs.items() if other != name})
    for entry in [*formats["inputs"].values(), *formats["outputs"].values()]:
        assert len(entry["channel_def"]) in (0, entry["num_channels"])
        assert all(isinstance(entry[key], PYTHON[kind]) for key, kind in TENSOR.items())


def test_the_metadata_have_the_required_fields_and_say_what_is_known(bundle, checkpoint):
    metadata = read_json(bundle / "configs" / "metadata.json")
    assert all(isinstance(metadata[name], PYTHON[kind]) for name, kind in REQUIRED.items())
    assert metadata["version"] in metadata["changelog"]
    assert "averaged weights of step 12" in metadata["changelog"][metadata["version"]]
    assert metadata["monai_version"] == monai.__version__ and metadata["numpy_version"] == np.__version__
    assert torch.__version__.startswith(metadata["pytorch_version"]) and "+" not in metadata["pytorch_version"]
    assert metadata["authors"] == metadata["copyright"] == "not stated"
    assert "Not for clinical use" in metadata["intended_use"]
    readme = (bundle / "docs" / "README.md").read_text()
    assert "Not for clinical use" in readme and load_checkpoint(checkpoint).config.text.encoder in readme
    formats = metadata["network_data_format"]
    assert formats["inputs"]["timesteps"]["value_range"] == [0, 999]
    assert formats["inputs"]["spacing"]["channel_def"]["2"] == "voxel size in mm along S times 100"
    assert formats["outputs"]["class_logits"]["channel_def"] == {"0": "PI-RADS 1 and 2", "1": "PI-RADS 3 to 5"}
    assert (CLASSES["2"], CLASSES["3"]) == ([1, 0], [0, 1])
    assert "NVIDIA" in (bundle / "LICENSE").read_text()


def test_monai_verifies_the_metadata(bundle, tmp_path):
    """Against a schema with the required fields of MONAI's, which is not downloaded because the file exists."""
    pytest.importorskip("jsonschema")
    tensor = {"type": "object", "required": [*TENSOR], "properties": {name: {"type": TENSOR[name]} for name in TENSOR}}
    named = {"type": "object", "additionalProperties": tensor}
    formats = {
        "type": "object",
        "required": ["inputs", "outputs"],
        "properties": {"inputs": named, "outputs": named},
    }
    fields = {name: {"type": kind} for name, kind in REQUIRED.items()} | {"network_data_format": formats}
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": [*REQUIRED], "properties": fields}))
    path = bundle / "configs" / "metadata.json"
    monai.bundle.verify_metadata(meta_file=str(path), filepath=schema)
    metadata = read_json(path)
    wrong = [{**metadata, "authors": 3}, {**metadata, "network_data_format": {"inputs": {}}}]
    for number, values in enumerate([*wrong, *({k: metadata[k] for k in metadata if k != name} for name in REQUIRED)]):
        write_json(tmp_path / f"{number}.json", values)
        with pytest.raises(ValueError, match="schema"):
            monai.bundle.verify_metadata(meta_file=str(tmp_path / f"{number}.json"), filepath=schema)


@pytest.mark.parametrize("variant", ["CCELLA", "RADMAISI"])
def test_monai_runs_the_bundle(bundle, checkpoint, tmp_path, offline, variant):
    """It generates the volume that the command generates from the checkpoint, and another one for another seed."""
    if variant != "CCELLA":
        checkpoint, bundle = write_checkpoint(tmp_path / "step", variant), tmp_path / "bundle"
        export_monai_bundle(checkpoint, bundle)
    file = bundle / "configs" / "inference.json"
    settings = read_json(file)
    report, pirads = settings.get("report"), settings.get("pirads")
    assert (report is None, pirads is None) == ((True, False) if variant == "RADMAISI" else (False, True))
    assert (settings["seed"], settings["solver"], settings["num_inference_steps"]) == (0, "ddim", 5)

    def run(name: str, **changes) -> tuple[np.ndarray, dict]:
        options = {"bundle_root": str(bundle), "output_dir": str(tmp_path / name), "device": "cpu", **changes}
        monai.bundle.run(config_file=str(file), **options)
        (volume,) = (tmp_path / name).glob("*.nii.gz")
        return nibabel.load(volume).get_fdata(), read_json(volume.with_name(volume.name.replace(".nii.gz", ".json")))

    volume, sidecar = run("out")
    request = {"reports": report and [report], "num_samples": 1, "seed": 0, "pirads": pirads}
    sample_to_folder(checkpoint, tmp_path / "own", device="cpu", **request)
    assert np.array_equal(volume, nibabel.load(tmp_path / "own" / "sample-000_seed0.nii.gz").get_fdata())
    assert volume.shape == (16, 12, 8) and (sidecar["seed"], sidecar["num_inference_steps"]) == (0, 5)
    other, changed = run("other", seed=3, num_inference_steps=4, solver="unipc")
    assert not np.array_equal(volume, other)
    assert (changed["seed"], changed["num_inference_steps"], changed["solver"]) == (3, 4, "unipc")


def test_the_default_output_is_in_the_bundle(checkpoint, tmp_path, monkeypatch):
    export_monai_bundle(checkpoint, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path / "bundle")
    monai.bundle.run(config_file="configs/inference.json", device="cpu")
    assert (tmp_path / "bundle" / "samples" / "sample-000_seed0.nii.gz").is_file()


def test_paths_of_the_machine_and_the_state_of_the_training_are_not_passed_on(bundle, checkpoint):
    def holds(folder: Path) -> list[str]:
        return [name for name, content in contents(folder) if any(each in content for each in spellings(CANARY))]

    assert holds(bundle) == [] and {*holds(checkpoint)} == {"config.json", "training_state.json"}
    assert read_json(bundle / "models" / "training_state.json")["trained_on"] == TRAINED_ON


def test_what_exists_is_kept_and_a_full_disk_leaves_nothing(bundle, checkpoint, tmp_path, monkeypatch):
    before = tree(bundle)
    with pytest.raises(ConfigError, match="folder already exists"):
        export_monai_bundle(checkpoint, bundle)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file already exists"):
        export_monai_bundle(checkpoint, tmp_path / "file")
    assert tree(bundle) == before and (tmp_path / "file").read_text() == "mine"

    def full(values, path):
        path.write_bytes(b"partial")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskError, match="disk is full"):
        export_monai_bundle(checkpoint, tmp_path / "new" / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_name_of_the_encoder_replaces_the_folder_of_this_machine(checkpoint, tmp_path, capsys):
    command = ["export", "--checkpoint", str(checkpoint), "--text_encoder", "google/flan-t5-small"]
    assert main([*command, "--format", "monai-bundle", "--out", str(tmp_path / "bundle")]) == 0
    folder = load_checkpoint(checkpoint).config.text.encoder
    assert read_json(tmp_path / "bundle/models/config.json")["text"]["encoder"] == "google/flan-t5-small"
    written = [path for path in (tmp_path / "bundle").rglob("*") if path.suffix in (".json", ".md")]
    assert len(written) > 5 and not any(folder in path.read_text() for path in written)
    assert main([*command, "--out", str(tmp_path / "CCELLA.pt")]) == 2
    assert "--text_encoder" in capsys.readouterr().err and not (tmp_path / "CCELLA.pt").exists()


def test_a_checkpoint_without_an_autoencoder_and_a_file_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no autoencoder") as caught:
        export_monai_bundle(write_checkpoint(tmp_path / "step", "MAISI", with_vae=False), tmp_path / "out" / "bundle")
    assert caught.value.path == str(tmp_path / "step") and not (tmp_path / "out").exists()
    (tmp_path / "CCELLA.pt").touch()
    with pytest.raises(CheckpointError, match="this is a file"):
        export_monai_bundle(tmp_path / "CCELLA.pt", tmp_path / "out" / "bundle")


def test_a_bundle_given_as_a_checkpoint_is_answered_with_the_folder_in_it(bundle):
    with pytest.raises(CheckpointError, match="this is a MONAI bundle") as caught:
        load_checkpoint(bundle)
    assert caught.value.fix == f"give {bundle / 'models'}"
    assert load_checkpoint(bundle / "models").step == 12


@pytest.mark.parametrize("encoder", [None, "google/flan-t5-small"])
def test_an_encoder_that_others_do_not_have_is_warned_about(checkpoint, tmp_path, caplog, encoder):
    export_monai_bundle(checkpoint, tmp_path / "bundle", text_encoder=encoder)
    assert ("--text_encoder" in caplog.text) is (encoder is None)
    readme = (tmp_path / "bundle/docs/README.md").read_text()
    assert (str(checkpoint.parent) in readme) is (encoder is None)
