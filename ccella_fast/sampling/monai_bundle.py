"""`ccella-fast export --format monai-bundle`: a checkpoint as a folder that `monai.bundle` loads and runs.

The folder follows MONAI's specification (https://monai.readthedocs.io/en/latest/mb_specification.html): configs/metadata.json,
configs/inference.json, models/model.pt, docs/README.md and LICENSE. models/ is also a folder as `save_pretrained` writes it,
from which inference.json samples.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import ccella_fast
from ccella_fast.checkpoint import Checkpoint, check_exportable
from ccella_fast.config import Config
from ccella_fast.diffusion.objective import process_in_words
from ccella_fast.diffusion.prediction import IN_WORDS
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.folder_lock import lock_folder
from ccella_fast.sampling.pretrained import (
    SamplerParts,
    is_shared_encoder,
    load_pretrained,
    save_pretrained_files,
    shared_config,
)
from ccella_fast.storage import atomic_folder, write_json
from ccella_fast.variants import CLASS_SCALE, SPACING_SCALE

logger = logging.getLogger("ccella_fast")
_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_VERSION = "0.1.0"  # of a bundle; its owner counts on from there
_USE = "Research on synthetic images. Not for clinical use: generated volumes are not for diagnosis."
_PAPER = (
    "Grabke, Haider, Taati: Prompt-Guided Latent Diffusion with Predictive Class Conditioning for 3D Prostate MRI "
    "Generation. arXiv 2506.10230"
)
_REPORT, _PIRADS = "PI-RADS 5 lesion in the left peripheral zone", 5  # an example, of no patient
_CLASSES = {"0": "PI-RADS 1 and 2", "1": "PI-RADS 3 to 5"}

_README = """# {name}

{description}

{use}

| file | content |
|---|---|
| `models/model.pt` | the weights of the network, a state dict ({weights}) |
| `models/` | the same weights as safetensors, the autoencoder and the configuration: what is sampled from |
| `configs/inference.json` | generates one volume; its first entries are settings, such as the seed |
| `configs/metadata.json` | inputs and outputs of the network, versions |

The bundle needs ccella_fast {version} and MONAI.{encoder}

In Python, with the name of this folder and the path of the folder that contains it:

    network = monai.bundle.load(NAME, bundle_dir=PATH, workflow_type="inference")

In this folder, after `pip install fire`; the volume is written to `samples/`:

    python -m monai.bundle run --config_file configs/inference.json

Before you pass the bundle on, enter authors and copyright in `configs/metadata.json` and the license in `LICENSE`. A model
that was trained on patient data may hold patient data: treat it like the data it comes from.
"""
_LICENSE = """No license has been stated for the weights in models/. Whoever passes this bundle on replaces this text by the
license under which they give the weights.

If the autoencoder in models/vae has the weights of MAISI, they are NVIDIA's, for non-commercial research and evaluation.

The files in configs/ and docs/ are written by ccella_fast and have its license, Apache-2.0:
https://www.apache.org/licenses/LICENSE-2.0
"""


def export_monai_bundle(
    path: str | Path, out: str | Path, *, weights: str | None = None, text_encoder: str | None = None
) -> None:
    """Write a checkpoint as a MONAI bundle.

    Args:
        path: a run folder (its newest valid step) or a step folder.
        out: the folder, which must not exist.
        weights: "ema", "raw", or None for the averaged weights if there are any.
        text_encoder: replaces the encoder of the configuration, which others do not have if it is a folder of this machine.

    Raises:
        ConfigError: `out` exists, or another export is writing it.
        CheckpointError: a file of the checkpoint is missing or damaged, or it has no autoencoder.
    """
    out = Path(out)
    check_exportable(path)
    if out.exists():
        what = "folder" if out.is_dir() else "file"
        fix = "choose another name, or remove it"
        raise ConfigError(f"this {what} already exists", path=out, field="--out", fix=fix)
    with lock_folder(out.parent, "ccella-fast export", name=f".{out.name}.lock"):
        loaded, autoencoder, origin = load_pretrained(path, vae=None, weights=weights)
        if autoencoder is None:
            why = "this checkpoint has no autoencoder, without which a bundle generates no volumes"
            fix = "train on a folder prepared with `ccella-fast prepare --vae`, or export the reference's format"
            raise CheckpointError(why, path=loaded.path, fix=fix)
        config = shared_config(loaded.config, text_encoder)
        if config.model.traits.text and not is_shared_encoder(config.text.encoder):
            why = "the bundle names the text encoder '%s', a folder that others do not have. Fix: export with --text_encoder"
            logger.warning(why, config.text.encoder)
        state = {
            "step": loaded.step,
            "scale_factor": loaded.scale_factor,
            "intensity_scale": loaded.intensity_scale,
            "trained_on": loaded.trained_on,
            "averaged": loaded.averaged,
        }
        metadata = _metadata(loaded)
        with atomic_folder(out) as partial:
            models = partial / "models"
            save_pretrained_files(models, SamplerParts(config, loaded.model, autoencoder, state, origin))
            torch.save(load_file(models / "model.safetensors"), models / "model.pt")
            write_json(partial / "configs" / "metadata.json", metadata)
            write_json(partial / "configs" / "inference.json", _inference(config))
            (partial / "docs").mkdir()
            (partial / "docs" / "README.md").write_text(_readme(loaded, config, metadata), encoding="utf-8")
            (partial / "LICENSE").write_text(_LICENSE, encoding="utf-8")


def _inference(config: Config) -> dict[str, Any]:
    """The configuration that `monai.bundle` parses: `network_def` builds the network, `run` writes one volume."""
    row, sizes = config.model.traits, config.model.model_dump(mode="json")
    settings: dict[str, Any] = {}
    if row.text:
        settings["report"] = _REPORT
    if row.class_input == "given":
        settings["pirads"] = _PIRADS
    settings |= {
        "seed": 0, "solver": config.sampling.solver, "num_inference_steps": config.sampling.num_inference_steps,
    }  # fmt: skip
    arguments: dict[str, Any] = {name: f"@{name}" for name in settings}
    arguments["reports"] = [arguments.pop("report")] if row.text else None
    return {
        **settings,
        "imports": ["$import torch"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/samples'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": {"_target_": "ccella_fast.build_model", "source": sizes.pop("variant"), **sizes},
        "run": [
            {
                "_target_": "ccella_fast.sampling.command.sample_to_folder",
                "checkpoint": "$@bundle_root + '/models'",
                "out": "@output_dir",
                "num_samples": 1,
                "device": "@device",
                **arguments,
            }
        ],
    }


def _metadata(loaded: Checkpoint) -> dict[str, Any]:
    config, row = loaded.config, loaded.config.model.traits
    prompts = ["a radiology report"] * row.text + ["a PI-RADS class"] * (row.class_input == "given")
    task = "Generation of 3D prostate MRI" + (f" from {' and '.join(prompts)}" if prompts else "")
    size, spacing = (" x ".join(f"{value:g}" for value in values) for values in (config.data.dim, config.data.spacing))
    sequences = " + ".join(config.data.sequences)
    packages = ["pydantic", "safetensors", "nibabel", "matplotlib", *(["transformers"] if row.text else [])]
    return {
        "schema": _SCHEMA,
        "version": _VERSION,
        "changelog": {_VERSION: f"exported by ccella_fast {ccella_fast.__version__}: {_weights(loaded)}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            "ccella-fast": ccella_fast.__version__,
            **{name: version(name) for name in packages},
        },
        "name": f"{row.name} {sequences} prostate MRI",
        "task": task,
        "description": f"Latent diffusion model ({row.name}) of prostate MRI ({sequences}) with {size} voxels of {spacing} mm. "
        f"The network predicts {IN_WORDS[config.scheduler.prediction]}, from a noisy latent "
        f"({process_in_words(config.scheduler, config.check_grid())}).",
        "authors": "not stated",
        "copyright": "not stated",
        "intended_use": _USE,
        "references": [_PAPER],
        "network_data_format": _network_data_format(config),
    }


def _network_data_format(config: Config) -> dict[str, Any]:
    """The arguments of `DiffusionModel.forward` that the variant uses, in order, and the entries of its result."""
    model, row = config.model, config.model.traits
    channels = [
        f"{sequence}, latent channel {number}"
        for sequence, count in zip(config.data.sequences, model.latent_channels, strict=True)
        for number in range(count)
    ]
    latent = _tensor("image", "latent", len(channels), config.check_grid(), channel_def=_numbered(channels))
    total, is_flow = config.scheduler.num_train_timesteps, config.scheduler.is_flow
    axes = [f"voxel size in mm along {axis} times {SPACING_SCALE:g}" for axis in ("R", "A", "S")]
    inputs = {
        "x": latent,
        "timesteps": _tensor(
            "timesteps", "timesteps", 1, [], dtype="float32" if is_flow else "int64",
            value_range=[0, total if is_flow else total - 1],
        ),
        "spacing": _tensor("spacing", "spacing", 3, [], channel_def=_numbered(axes)),
    }  # fmt: skip
    if row.text:
        inputs["text"] = _tensor("series", "sequence", config.text.max_length, [model.input_dim])
    if row.class_input == "given":
        inputs["pirads"] = _tensor(
            "probabilities", "classes", model.num_classes, [], value_range=[0, CLASS_SCALE], channel_def=_CLASSES
        )
    outputs = {"noise": latent}
    if row.class_input == "predicted":
        outputs["class_logits"] = _tensor("logits", "classes", model.num_classes, [], channel_def=_CLASSES)
    return {"inputs": inputs, "outputs": outputs}


def _tensor(
    kind: str,
    form: str,
    num_channels: int,
    spatial_shape: list[int],
    *,
    dtype: str = "float32",
    value_range: Sequence[float] = (),
    channel_def: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A tensor format specifier: the tensor has the shape (B, num_channels, *spatial_shape); timesteps have the shape (B,)."""
    return {
        "type": kind,
        "format": form,
        "modality": "MR" if kind == "image" else "n/a",
        "num_channels": num_channels,
        "spatial_shape": spatial_shape,
        "dtype": dtype,
        "value_range": list(value_range),
        "is_patch_data": False,
        "channel_def": channel_def or {},
    }


def _numbered(names: list[str]) -> dict[str, str]:
    return {str(number): name for number, name in enumerate(names)}


def _weights(loaded: Checkpoint) -> str:
    kind = {True: "averaged weights", False: "raw weights", None: "weights"}[loaded.averaged]
    return f"{kind} of step {loaded.step}"


def _readme(loaded: Checkpoint, config: Config, metadata: dict[str, Any]) -> str:
    encoder = config.text.encoder if config.model.traits.text else None
    return _README.format(
        name=metadata["name"],
        description=metadata["description"],
        use=_USE,
        weights=_weights(loaded),
        version=ccella_fast.__version__,
        encoder=f" Reports are encoded by `{encoder}`, which is not part of the bundle." if encoder else "",
    )
