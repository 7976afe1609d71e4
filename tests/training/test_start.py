"""The start of a run: all processes agree, or all end with the message of one; a start that fails leaves nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.errors import DataError
from ccella_fast.storage import read_json, write_json
from training_fixtures import ROOT, environment, settings, write_config, write_prepared

# What the second of two processes has instead -> exit code and words of the message of both.
DIFFERENCES = {
    "checkpoint": (4, ["process 1 on ", f"sees a file with the SHA-256 {'f' * 64}, where process 0 sees one with "]),
    "step": (2, ["step of the checkpoint is 0 on process 1", "but 1 on process 0"]),
    "folder": (2, ["process 1 on ", "sees no such file", "on a disk that all machines share"]),
    "setting": (2, ["training.lr is 0.25 on process 1", "but 0.002 on process 0"]),
    "data": (2, ["data_sha256 is ", " on process 1"]),
    "code": (2, [f"code of ccella_fast is '{'0' * 64}' on process 1", "on process 0"]),
    "version": (2, ["version of torch is '0.1' on process 1"]),
    "deepspeed": (2, ["DeepSpeed's steps_per_print is 7 on process 1"]),
}
# Both see these, but only one process looks.
OF_ONE = {
    "damaged study": (3, ["this file is damaged", "(process 1)"]),
    "damaged checkpoint": (4, ["every checkpoint of this run is damaged"]),
    "locked by none": (2, ["already contains a run"]),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory, data):
    """The messages of both processes, by what the second has instead."""
    folder = tmp_path_factory.mktemp("disagreeing")
    write_prepared(folder / "others", cases=4)
    damaged = write_prepared(folder / "damaged" / "data")
    (damaged / "latents" / "case1" / "t2w_mean.npy").write_bytes(
        (damaged / "latents" / "case0" / "t2w_mean.npy").read_bytes()
    )
    config = write_config(folder / "config.json", batch_size=1, max_train_steps=1, checkpointing_steps=1)
    state = {"run": str(folder / "run"), "config": str(config), "data": str(folder / "data"), "resume": None}
    shutil.copytree(data, folder / "data")
    resumed = {**state, "resume": "latest"}
    jobs: list[dict[str, Any]] = [{**state, "second": None}]
    jobs += [{**resumed, "second": name} for name in DIFFERENCES]
    jobs += [{**state, "run": str(folder / "new"), "data": str(damaged), "second": None}, {**state, "second": None}]
    (folder / "broken" / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_json(folder / "broken" / "config.json", read_json(config))
    write_json(folder / "broken" / "checkpoints" / "step-00000001" / "manifest.json", {})
    jobs += [{**resumed, "run": str(folder / "broken"), "second": None}, {**resumed, "second": None}]
    write_json(folder / "jobs.json", jobs)
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "tests" / "fixtures" / "disagreeing_ranks.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, env=environment(), timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    names = ["first", *DIFFERENCES, "damaged study", "locked by none", "damaged checkpoint", "last"]
    ranks = [json.loads((folder / f"jobs.json.{rank}").read_text()) for rank in (0, 1)]
    assert not (folder / "new").exists()
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(names)}


@pytest.mark.parametrize("name", [*DIFFERENCES, *OF_ONE])
def test_a_difference_is_one_message_on_all_processes(said, name):
    code, words = {**DIFFERENCES, **OF_ONE}[name]
    zero, one = said[name]
    assert zero == one
    assert zero[0] == code and all(word in zero[1] for word in words), zero


def test_processes_that_see_the_same_train(said):
    assert said["first"] == said["last"] == [None, None]


def test_processes_of_a_machine_share_the_hashing_of_studies(tmp_path, monkeypatch):
    data = write_prepared(tmp_path / "data")
    text = data / "text" / f"{3:064x}.npy"
    content = bytearray(text.read_bytes())
    content[-1] ^= 1
    text.write_bytes(content)
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        if rank == "0":  # that of case 3
            with pytest.raises(DataError, match="damaged"):
                PreparedDataset(data, settings())
        else:
            PreparedDataset(data, settings())
    monkeypatch.undo()
    with pytest.raises(DataError, match="damaged"):
        PreparedDataset(data, settings())
