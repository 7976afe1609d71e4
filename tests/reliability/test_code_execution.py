"""Hostile files: none of the code in them is executed, and each is refused with an error that says why (goal R11)."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccella_fast.errors import CcellaError
from study_fixtures import config, write_bert

# Each is what a pickle may call: (function, arguments that create the canary).
CALLS: dict[str, Callable[[Path], tuple[Any, tuple[Any, ...]]]] = {
    "os.system": lambda canary: (os.system, (f"touch {canary}",)),
    "os.mkdir": lambda canary: (os.mkdir, (str(canary),)),
    "open": lambda canary: (open, (str(canary), "w")),
    "exec": lambda canary: (exec, (f"open({str(canary)!r}, 'w')",)),
    "eval": lambda canary: (eval, (f"open({str(canary)!r}, 'w')",)),
    "Popen": lambda canary: (subprocess.call, (["touch", str(canary)],)),
    "Path.touch": lambda canary: (Path.touch, (canary,)),
    "torch.save": lambda canary: (torch.save, ({}, str(canary))),
}


class Hostile:
    """An object whose pickle calls a function."""

    def __init__(self, call: tuple[Any, tuple[Any, ...]]):
        self.call = call

    def __reduce__(self):
        return self.call


def _reference_pt(folder: Path, hostile: Hostile) -> Callable[[], Any]:
    from ccella_fast.checkpoint import load_checkpoint

    torch.save({"unet_state_dict": hostile}, folder / "CCELLA.pt")
    return lambda: load_checkpoint(folder / "CCELLA.pt")


def _legacy_pt(folder: Path, hostile: Hostile) -> Callable[[], Any]:
    from ccella_fast.checkpoint import load_checkpoint

    torch.save({"unet_state_dict": hostile}, folder / "CCELLA.pt", _use_new_zipfile_serialization=False)
    return lambda: load_checkpoint(folder / "CCELLA.pt")


def _vae_pt(folder: Path, hostile: Hostile) -> Callable[[], Any]:
    from ccella_fast.models.autoencoder import load_autoencoder

    torch.save({"encoder.conv": hostile}, folder / "autoencoder.pt")
    return lambda: load_autoencoder(folder / "autoencoder.pt", config().autoencoder)


def _vae_state(folder: Path, hostile: Hostile) -> Callable[[], Any]:
    from ccella_fast.models.weights import read_pt

    torch.save({"step": 1, "model": hostile}, folder / "state.pt")
    return lambda: read_pt(folder / "state.pt")


def _deepspeed_shard(folder: Path, hostile: Hostile) -> Callable[[], Any]:
    from ccella_fast.training.old_checkpoints import SafeShards

    torch.save({"optimizer_state_dict": hostile}, folder / "zero_pp_rank_0_optim_states.pt")
    return lambda: SafeShards().load(str(folder / "zero_pp_rank_0_optim_states.pt"), "cpu")


def _features_npy(folder: Path, hostile: Hostile) -> Callable[[], Any]:
    from ccella_fast.data.manifest import open_array

    np.save(folder / "text.npy", np.array([hostile], dtype=object), allow_pickle=True)
    return lambda: open_array(folder / "text.npy")


def _features_npz(folder: Path, hostile: Hostile) -> Callable[[], Any]:
    from ccella_fast.data.manifest import open_array

    with zipfile.ZipFile(folder / "text.npy", "w") as archive:
        archive.writestr("array.npy", b"\x93NUMPY\x01\x00" + pickle.dumps(hostile))
    return lambda: open_array(folder / "text.npy")


PICKLES = [_reference_pt, _legacy_pt, _vae_pt, _vae_state, _deepspeed_shard, _features_npy, _features_npz]
EXPRESSIONS = {
    "_target_": {"_target_": "os.system", "command": "touch {canary}"},
    "$ expression": "$__import__('os').system('touch {canary}')",
    "$@ reference": "$@os.system('touch {canary}')",
    "YAML tag": "!!python/object/apply:os.system ['touch {canary}']",
}
PLACES = ["model.variant", "data.spacing", "training.lr", "text.encoder", "model"]


def _hostile_configurations(folder: Path, canary: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Configurations with code in several places, in our form and in the reference's, and DeepSpeed files."""
    from ccella_fast.config import load_config, make_config
    from ccella_fast.training.deepspeed_config import merge_deepspeed_config

    cases: list[tuple[str, Callable[[], Any]]] = []
    for name, value in EXPRESSIONS.items():
        text = json.dumps(value).replace("{canary}", str(canary))
        for place in PLACES:
            nested: Any = json.loads(text)
            for key in reversed(place.split(".")):
                nested = {key: nested}
            path = folder / f"{len(cases)}.json"
            path.write_text(json.dumps(nested))
            if (name, place) not in [
                ("YAML tag", "text.encoder"),
                ("$ expression", "text.encoder"),
                ("$@ reference", "text.encoder"),
            ]:
                cases.append((f"{name} in {place}", partial(load_config, path)))
        definition = folder / f"def-{len(cases)}.json"
        definition.write_text(json.dumps({"diffusion_unet_def": json.loads(text), "noise_scheduler": json.loads(text)}))
        empty = folder / "empty.json"
        empty.write_text("{}")
        cases.append((f"{name} in def", partial(load_config, [empty, empty, definition])))
    merge = partial(merge_deepspeed_config, config(), world_size=1, output_dir=folder, auto_precision=lambda: "fp32")
    code = base64.b64encode(json.dumps({"optimizer": {"type": "os.system"}}).encode()).decode()
    for name, content in [("base64", code), ("optimizer", '{"optimizer": {"type": "os.system", "params": {}}}')]:
        path = folder / f"{name}.json"
        path.write_text(content)
        cases.append((f"DeepSpeed {name}", partial(merge, path)))
    cases.append(("DeepSpeed base64 argument", partial(merge, code)))
    cases.append(("--set", lambda: make_config([f"model.variant=__import__('os').mkdir('{canary}')"])))
    return cases


def _remote_code(folder: Path, canary: Path, file: str, key: str) -> Callable[[], Any]:
    """A text encoder whose folder brings its own Python code."""
    from ccella_fast.data.text_encoder import TextEncoder

    encoder = shutil.copytree(folder / "bert", folder / f"remote-{file}-{key}")
    values = json.loads((encoder / file).read_text())
    values["auto_map"] = {key: "hostile.Hostile"}
    if file == "config.json":
        values["model_type"] = "hostile"
    else:
        values["tokenizer_class"] = "Hostile"
    (encoder / file).write_text(json.dumps(values))
    (encoder / "hostile.py").write_text(f"open({str(canary)!r}, 'w')\nclass Hostile: pass\n")
    return lambda: TextEncoder(config(encoder=encoder, variant="CCELLA").text).encode(["lesion"])


def test_nothing_in_a_hostile_file_is_executed(tmp_path: Path, goal: Callable[..., None]):
    canary, cases = tmp_path / "executed", []
    for builder in PICKLES:
        for name, call in CALLS.items():
            folder = tmp_path / f"{builder.__name__}-{name}"
            folder.mkdir()
            cases.append((folder.name, builder(folder, Hostile(call(canary)))))
    canary.unlink(missing_ok=True)
    write_bert(tmp_path / "bert")
    for file, key in [
        ("config.json", "AutoConfig"), ("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer"),
    ]:  # fmt: skip
        cases.append((f"remote code in {file}, {key}", _remote_code(tmp_path, canary, file, key)))
    (tmp_path / "configs").mkdir()
    cases += _hostile_configurations(tmp_path / "configs", canary)
    executed, accepted = [], []
    for name, use in cases:
        try:
            use()
            accepted.append(name)
        except CcellaError as error:
            assert len(str(error).splitlines()) <= 5, name
        if canary.exists():
            executed.append(name)
            canary.rmdir() if canary.is_dir() else canary.unlink()
    assert accepted == [], accepted
    assert len(cases) >= 60
    goal("R11", value=len(executed), target=0, n=len(cases))


@pytest.mark.parametrize("name", CALLS)
def test_an_unsafe_load_would_execute_it(name: str, tmp_path: Path):
    """Control: every call is a live one."""
    canary = tmp_path / "executed"
    content = pickle.dumps(Hostile(CALLS[name](canary)))
    assert not canary.exists()
    pickle.loads(content)  # noqa: S301
    assert canary.exists()


def test_no_source_file_asks_for_an_unsafe_load():
    root = Path(__file__).resolve().parents[2]
    words = ["weights_only=False", "allow_pickle=True", "torch.hub.load", "trust_remote_code=True", "pickle.load"]
    unsafe = re.compile("|".join([*map(re.escape, words), r"(?<![.\w`])(eval|exec)\("]))
    files = [
        path for name in ("ccella_fast", "kernels", "benchmarks", "examples") for path in (root / name).rglob("*.py")
    ]
    assert len(files) > 100
    assert [path.name for path in files if unsafe.search(path.read_text())] == []
