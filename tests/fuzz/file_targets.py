"""What the commands write and read again: prepared folders and checkpoints; text encoders; configurations."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

import mutations as m
from mutations import Mutation, on_one_file
from target import CANARY, Content, Target, digest, text_target

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_REFERENCE = ("env.json", "config.json", "def.json")


def _write_features(folder: Path) -> None:
    from study_fixtures import write_merged

    write_merged(folder, count=1)


def _read_features(folder: Path) -> Content:
    from ccella_fast.data.manifest import open_array
    from ccella_fast.data.preparation.latent_encoder import import_latent
    from study_fixtures import config

    text = np.array(open_array(folder / "emb" / "c0" / "text.npy"))
    return Content(digest(text, *import_latent(folder / "emb" / "c0" / "axt2_emb.nii.gz", config())))


def _read_array(folder: Path) -> Content:
    from ccella_fast.data.manifest import open_array

    return Content(digest(np.array(open_array(folder / "emb" / "c0" / "text.npy"))))


def _write_prepared(folder: Path) -> None:
    from training_fixtures import write_prepared

    write_prepared(folder / "prepared", cases=2)


def _read_prepared(folder: Path) -> Content:
    from ccella_fast.data.manifest import load_manifest

    manifest = load_manifest(folder / "prepared")
    arrays = [np.array(manifest.array(case, key, verify=True)) for case in manifest.cases for key in sorted(case.files)]
    return Content(digest(manifest.model_dump(), *arrays))


def _write_checkpoint(folder: Path) -> None:
    from sampling_fixtures import write_checkpoint

    write_checkpoint(folder / "checkpoint", "MAISI")


def _read_checkpoint(folder: Path) -> Content:
    from ccella_fast.checkpoint import load_checkpoint

    loaded = load_checkpoint(folder / "checkpoint")
    weights = [value.numpy() for value in loaded.model.state_dict().values()]
    return Content(digest(loaded.config.dump(), loaded.scale_factor, *weights))


def _write_config(folder: Path) -> None:
    from study_fixtures import config, write_nifti

    (folder / "config.json").write_text(json.dumps(config(data__dim=[32, 32, 32]).dump(), indent=1))
    write_nifti(folder / "s1" / "t2w.nii.gz")


def _read_config(folder: Path) -> Content:
    from ccella_fast.config import load_config

    return Content(digest(load_config(folder / "config.json").dump()))


def _write_deepspeed(folder: Path) -> None:
    values = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e7},
        "activation_checkpointing": {"partition_activations": False},
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(values, indent=1))


def _read_deepspeed(folder: Path) -> Content:
    from ccella_fast.training.deepspeed_config import merge_deepspeed_config
    from study_fixtures import config

    merged, passed = merge_deepspeed_config(
        config(), folder / "ds.json", world_size=1, output_dir=Path("run"), auto_precision=lambda: "fp32"
    )
    return Content(digest(merged.dump(), passed))


def _any_file(suffix: str = "", *, guarded: bool) -> list[Mutation]:
    changes = {"flip": m.overwrite, "cut": m.cut, "splice": m.splice, "empty": m.empty}
    return [Mutation(name, on_one_file(change, suffix), guarded) for name, change in changes.items()]


def _write_reference_config(folder: Path) -> None:
    """The three files of the reference."""
    for name in _REFERENCE:
        (folder / name).write_bytes((CONFIGS / f"CCELLA_{name}").read_bytes())


def _read_reference_config(folder: Path) -> Content:
    from ccella_fast.config import load_config

    return Content(digest(load_config([folder / name for name in _REFERENCE]).dump()))


def _write_hjson(folder: Path) -> None:
    (folder / "ds.json").write_text(
        "{\n  # DeepSpeed reads Hjson\n  train_micro_batch_size_per_gpu: 2\n  gradient_clipping: 1.0\n  bf16: {enabled: true}\n"
        "  zero_optimization: {\n    stage: 2, reduce_bucket_size: 5e7\n    overlap_comm: true\n  }\n}\n"
    )


def _write_reference(folder: Path) -> None:
    from ccella_fast.checkpoint import export_reference
    from sampling_fixtures import write_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        export_reference(write_checkpoint(Path(temporary) / "checkpoint", "MAISI"), folder / "MAISI.pt")


def _read_reference(folder: Path) -> Content:
    from ccella_fast.reference_checkpoint import read_reference

    found = read_reference(folder / "MAISI.pt")
    weights = [value.numpy() for value in found.state_dict.values()]
    return Content(digest(found.scale_factor, found.epoch, found.config.model_dump(), *weights))


def _write_autoencoder(folder: Path) -> None:
    from study_fixtures import config, write_vae

    write_vae(folder / "vae", config())


def _read_autoencoder(folder: Path) -> Content:
    from ccella_fast.models.autoencoder import load_autoencoder

    return Content(digest(*(value.numpy() for value in load_autoencoder(folder / "vae").state_dict().values())))


def _write_encoder(folder: Path) -> None:
    from study_fixtures import write_bert

    write_bert(folder / "bert")


def _read_encoder(folder: Path) -> Content:
    from ccella_fast.data.text_encoder import TextEncoder
    from study_fixtures import config

    encoder = TextEncoder(config(encoder=folder / "bert").text)
    return Content(digest(encoder.encode([f"lesion of 4 mm {CANARY}"]).features))


def _prepare_with_config(folder: Path, out: Path) -> list[str]:
    command = ["ccella_fast.cli", "prepare", "--data", str(folder), "--out", str(out)]
    return [*command, "--config", str(folder / "config.json"), "--workers", "1"]


def _sample(folder: Path, out: Path) -> list[str]:
    command = ["ccella_fast.cli", "sample", "--checkpoint", str(folder / "checkpoint"), "--out", str(out)]
    return [*command, "--device", "cpu"]


_TEXT_HEADER = [Mutation("header", on_one_file(m.header(128), "text.npy"))]
_WEIGHTS = _any_file(".safetensors", guarded=True)

TARGETS = [
    Target("text.npy", _write_features, _read_array, _TEXT_HEADER, 2000),
    Target("latents of the reference", _write_features, _read_features, _any_file("emb.nii.gz", guarded=True), 2000),
    Target("prepared arrays", _write_prepared, _read_prepared, _any_file(".npy", guarded=True), 1000),
    text_target("prepared manifest", _write_prepared, "manifest.json", _read_prepared, 1000),
    Target("checkpoint", _write_checkpoint, _read_checkpoint, _WEIGHTS, 3000, _sample),
    text_target("checkpoint's JSON", _write_checkpoint, ".json", _read_checkpoint, 1000, command=_sample),
    Target("checkpoint of the reference", _write_reference, _read_reference, _any_file(".pt", guarded=True), 2000),
    Target("autoencoder", _write_autoencoder, _read_autoencoder, _WEIGHTS, 500),
    text_target("autoencoder's JSON", _write_autoencoder, ".json", _read_autoencoder, 1000),
    Target("text encoder", _write_encoder, _read_encoder, _any_file("", guarded=False), 500),
    text_target("text encoder's JSON", _write_encoder, ".json", _read_encoder, 1000),
    text_target("configuration", _write_config, "config.json", _read_config, 1500, command=_prepare_with_config),
    text_target("configuration of the reference", _write_reference_config, ".json", _read_reference_config, 1500),
    text_target("DeepSpeed file", _write_deepspeed, "ds.json", _read_deepspeed, 500),
    text_target("DeepSpeed file in Hjson", _write_hjson, "ds.json", _read_deepspeed, 1000),
]
