"""A prepared folder and a configuration small enough to train in a second, and a way to launch the door."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.storage import sha256, write_json

ROOT = Path(__file__).resolve().parents[1]
DOOR = ROOT / "ccella_fast" / "train.py"
CHANNELS, GRID, TOKENS, WIDTH = 4, (8, 8, 4), 8, 32
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "variant": "CCELLA",
        "num_channels": [8, 16, 16],
        "attention_levels": [False, True, True],
        "num_head_channels": [0, 8, 8],
        "num_res_blocks": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "input_dim": WIDTH,
        "num_latents": 4,
        "adapter_blocks": 2,
        "adapter_heads": 2,
        "adapter_time_dim": 32,
        "class_head_dim": 16,
    },
    "data": {"dim": [32, 32, 16]},
    "text": {"encoder": "test", "max_length": TOKENS, "dtype": "float32"},
    "training": {
        "batch_size": 2,
        "lr": 2e-3,
        "max_train_steps": 6,
        "ema_decay": 0.9,
        "precision": "fp32",
        "checkpointing_steps": 3,
    },
}


def write_prepared(folder: Path, *, cases: int = 5, nan_in: str | None = None) -> Path:
    """A prepared folder without studies behind it: random latents and text, classes for all but the last case, which has
    no report either. `nan_in`: id of a case whose latent holds a NaN."""
    random = np.random.default_rng(7)
    entries = []
    for number in range(cases):
        case, last = f"case{number}", number == cases - 1
        mean = random.standard_normal((CHANNELS, *GRID), dtype=np.float32)
        if case == nan_in:
            mean[0, 0, 0, 0] = np.nan
        arrays = {
            "latent_mean/t2w": (f"latents/{case}/t2w_mean.npy", mean),
            "latent_sigma/t2w": (f"latents/{case}/t2w_sigma.npy", np.full_like(mean, 0.1)),
            "text": (f"text/{number:064x}.npy", random.standard_normal((TOKENS, WIDTH), dtype=np.float32)),
        }
        files = {key: _write_array(folder, *entry) for key, entry in arrays.items()}
        entries.append(
            {
                "id": case,
                "split": "train",
                "dataset": None,
                "spacing": [0.5, 0.5, 0.5625],
                "pirads": None if last else [[1, 0], [0, 1]][number % 2],
                "text_isnull": int(last),
                "affine": np.diag([0.5, 0.5, 0.5625, 1.0]).tolist(),
                "window": {"t2w": [0.0, 700.0]},
                "files": files,
            }
        )
    manifest = {
        "format": "ccella_fast.prepared",
        "version": 1,
        "data": {"sequences": ["t2w"], "spacing": [0.5, 0.5, 0.5625], "dim": [32, 32, 16], "dataset": None},
        "text": {
            "encoder": "test",
            "revision": None,
            "max_length": TOKENS,
            "dtype": "float32",
            "width": WIDTH,
            "fingerprint": "imported",
        },
        "vae": {"sha256": "0" * 64},
        "scale_factor": [0.97],
        "intensity_scale": {"t2w": 712.0},
        "truncated_reports": [],
        "cases": entries,
    }
    write_json(folder / "manifest.json", manifest)
    return folder


def write_config(path: Path, **training: Any) -> Path:
    """CONFIG with some training settings changed."""
    write_json(path, {**CONFIG, "training": {**CONFIG["training"], **training}})
    return path


def train_here(
    folder: Path, data: Path, *, resume: str | None = None, deepspeed_file: Path | None = None, **training: Any
) -> int:
    """Train in this process, a world of one; dotted names of other sections are given as `model__variant="MAISI"`."""
    from ccella_fast.config import load_config
    from ccella_fast.training.run import train

    names = {key.replace("__", ".") if "__" in key else f"training.{key}": value for key, value in training.items()}
    write_json(folder.parent / "config.json", CONFIG)
    config = load_config(folder.parent / "config.json", names)
    before = dict(os.environ)
    try:
        return train(config, data=data, run=folder, resume=resume, deepspeed_file=deepspeed_file)
    finally:
        os.environ.clear()
        os.environ.update(before)


def weights(folder: Path, step: int, name: str = "model") -> dict[str, Any]:
    """Tensors of a published checkpoint."""
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def remade(folder: Path) -> None:
    """Write a manifest that is right for what the step folder holds now, as an attacker would."""
    from ccella_fast.checkpoint import write_manifest
    from ccella_fast.storage import read_json

    manifest = read_json(folder / "manifest.json")
    (folder / "manifest.json").unlink()
    write_manifest(folder, **{key: manifest[key] for key in ("step", "world_size", "versions")})


def environment(**extra: str) -> dict[str, str]:
    """One thread, no rank variables, our interpreter's commands first."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**clean, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path, **extra}


def start(*arguments: Any, launcher: tuple[str, ...] = (sys.executable,), **extra: str) -> subprocess.Popen[str]:
    """`LAUNCHER train.py ARGUMENTS` in its own session, output captured."""
    command = [*launcher, str(DOOR), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments: Any, launcher: tuple[str, ...] = (sys.executable,), code: int = 0, **extra: str) -> str:
    """Run to the end, check the exit code, give the output."""
    process = start(*arguments, launcher=launcher, **extra)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged step, as written."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def _write_array(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return {"path": name, "sha256": sha256(path), "bytes": path.stat().st_size}
