"""What a comparison does and how it is judged, written down before anything is trained.

`protocol.json` has two parts: what was asked for, at the start; and what was decided on real studies alone (see `gates`),
before the first generator is trained. A folder with another protocol is refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ccella_fast.data.phantom.phantom import VERSION
from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.storage import json_text, read_json, write_json
from ccella_fast.variants import VARIANTS

NAME = "protocol.json"
FORMAT = {"format": "ccella_fast.comparison", "version": 1}
_MINI: dict[str, Any] = {
    "variants": ["CCELLA", "MAISI"],  # the first is compared with the second
    # With four seeds, separated distances are significant (p = 1/70) even when two statements share the level.
    "training_seeds": [1, 2, 3, 4],
    "phantom": {
        "version": VERSION,
        # Usual lesions are about one voxel of latents this small. With the first, classifiers of 24 to 160 phantoms of other
        # seeds were right for 0.58 to 0.66 with a contrast of 0.7, and for 0.67 to 0.84 with a contrast of 1, where 24 would
        # do, too few for a generator. The second, with half the contrast, is used if the first is too easy.
        "difficulties": [
            {"lesion_size": 1.5, "lesion_contrast": 0.75}, {"lesion_size": 1.05, "lesion_contrast": 0.375},
        ],
        "real": {"val": 400, "test": 1000, "seed": 511},
        "calibration": {"train": 200, "val": 40, "test": 400, "seed": 512},
        "autoencoder": {"train": 64, "seed": 513},
    },
    "config": {  # changes of configs/demo.json
        "data": {"spacing": [1.8, 1.8, 3.0], "dim": [32, 32, 16]},  # 58 mm around the prostate
        "model": {"attention_levels": [False, True, True], "num_head_channels": [0, 32, 32]},
        "vae_training": {"max_train_steps": 1600},
        "training": {"max_train_steps": 3000, "batch_size": 16},
    },
    "longer_autoencoder_steps": 4800,  # if the first does not keep what shows the class
    "sizes": [24, 40, 64, 96, 160],  # numbers of training studies that are tried
    "wanted_accuracy": [0.65, 0.80],
    "nearest_accuracy": 0.72,
    "sampling": {"solver": "ddpm", "num_inference_steps": 50, "seed": 0, "batch_size": 8},
    "prompts_per_class": 100,  # test cases that volumes are generated from to measure the distance
    "classifier": {"protocol": "matched", "backbone": "small", "updates": 300, "batch_size": 16},
    "classifier_seeds": 8,
    "calibration_seeds": 5,
    "arms": ["r", "rr", "v", "s", "sl", "rs", "rsl", "rb"],
    "margin": 0.05,  # of accuracy, for equivalence
    "features": ["taps", "radiomics", "random"],
    # Without the anatomy: the segmenter does not find the glands of phantoms this coarse.
    "metrics": ["fd", "kid", "prdc", "intensity", "spectrum", "memorisation", "condition"],
    "sensitivity_volumes": 20,
    "spaces": ["taps-l3", "taps-l4", "random"],  # the first that passes the sensitivity gate judges; radiomics misranks
}  # fmt: skip
_SMOKE: dict[str, Any] = {
    "training_seeds": [1, 2],
    "phantom": {
        **_MINI["phantom"],
        "difficulties": [{"lesion_size": 1.5}],
        "real": {"val": 8, "test": 8, "seed": 511},
        "calibration": {"train": 14, "val": 4, "test": 8, "seed": 512},
        "autoencoder": {"train": 4, "seed": 513},
    },
    "config": {
        **_MINI["config"],
        "vae_training": {"max_train_steps": 2},
        "training": {"max_train_steps": 2, "batch_size": 2},
    },
    "longer_autoencoder_steps": None,
    "sizes": [10],
    "sampling": {**_MINI["sampling"], "num_inference_steps": 2},
    "prompts_per_class": 2,
    "classifier": {**_MINI["classifier"], "updates": 2, "batch_size": 4},
    "classifier_seeds": 2,
    "calibration_seeds": 1,
    "features": ["random"],
    "sensitivity_volumes": 3,
    "spaces": ["random"],
}  # fmt: skip
_PAPER: dict[str, Any] = {
    "phantom": None,  # --data
    "config": {},  # of --config, with nothing changed
    "longer_autoencoder_steps": None,
    "sizes": [],
    "sampling": {"solver": "ddpm", "num_inference_steps": 1000, "seed": 0, "batch_size": 1},
    "classifier": {"protocol": "reference", "backbone": "efficientnet-b0"},
    "metrics": [*_MINI["metrics"], "anatomy"],
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": _MINI | _SMOKE,
    "mini": _MINI,
    "table": _MINI | {"variants": list(VARIANTS)},
    "paper": _MINI | _PAPER,
}


def asked_for(
    preset: str, *, variants: Sequence[str] | None = None, seeds: int | None = None, **given: Any
) -> dict[str, Any]:
    """What is asked for: the values of a preset, and what was given in their place.

    Args:
        preset: a key of PRESETS.
        variants: in place of the preset's; the first is compared with the second.
        seeds: number of trainings of each variant.
        given: further entries, such as the identity of the user's data.

    Raises:
        ConfigError: the preset or a variant does not exist, or there are fewer than two variants or seeds.
    """
    if preset not in PRESETS:
        fix = did_you_mean(preset, PRESETS)
        raise ConfigError(f"there is no preset '{preset:.40}'", field="--preset", fix=fix)
    asked = copy.deepcopy(PRESETS[preset]) | given
    for name in variants or ():
        if name not in VARIANTS:
            fix = did_you_mean(name, VARIANTS)
            raise ConfigError(f"there is no variant '{name:.40}'", field="--variants", fix=fix)
    if variants is not None:
        asked["variants"] = list(dict.fromkeys(variants))
    if len(asked["variants"]) < 2:
        why = "a comparison needs two variants: the first is compared with the second"
        raise ConfigError(why, field="--variants", fix="give two or more, for example CCELLA MAISI")
    if seeds is not None:
        if seeds < 2:
            why = f"--seeds must be at least 2, got {seeds}: one training cannot tell chance from effect"
            raise ConfigError(why, field="--seeds", fix="use 3 or more")
        asked["training_seeds"] = list(range(1, seeds + 1))
    return asked


def keep(out: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Write the protocol to a folder, or return the one that it has.

    Raises:
        ConfigError: the folder has another protocol.
    """
    path = out / NAME
    if not path.exists():
        write_json(path, {**FORMAT, "asked": dict(asked), "decided": None})
    kept = read_json(path)
    check_same(path, kept.get("asked", {}), asked)
    return kept


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError if the protocol that a folder has differs from the present one; path: its file."""
    for name in before.keys() | now.keys():
        if before.get(name) != now.get(name):
            why = f"this study began with {name} = {before.get(name)!r:.80}, now it is {now.get(name)!r:.80}"
            raise ConfigError(why, path=path, field=name, fix="choose another --out: another protocol is another study")


def freeze(out: Path, protocol: dict[str, Any], decided: Mapping[str, Any]) -> dict[str, Any]:
    """Add what was decided on real studies, after which nothing is changed; returns the protocol."""
    write_json(out / NAME, protocol | {"decided": dict(decided)})
    return read_json(out / NAME)


def digest(protocol: Mapping[str, Any]) -> str:
    """The SHA-256 of a protocol, which the page shows."""
    return hashlib.sha256(json_text(protocol).encode()).hexdigest()
