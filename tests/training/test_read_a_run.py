"""The commands of docs/how-to/read-a-run.md, with a small model and a few steps, and what the page says that they write."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from ccella_fast.storage import write_json
from study_fixtures import write_bert
from training_fixtures import CONFIG, SMALL_AUTOENCODER, WIDTH, environment, metrics, write_visible

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "read-a-run.md"


def commands(text: str) -> list[list[str]]:
    """The indented commands of a page."""
    blocks = re.sub(r"\\\n +", "", text)
    return [shlex.split(line) for line in re.findall(r"^    (ccella-fast .*)$", blocks, flags=re.MULTILINE)]


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_visible(Path("prepared"), ["train"] * 8)
    encoder = write_bert(tmp_path / "bert", width=WIDTH)
    text = {**CONFIG["text"], "encoder": str(encoder)}
    training = {**CONFIG["training"], "max_train_steps": 2, "checkpointing_steps": 500}
    few = {"samples": 2, "sample_inference_steps": 2}
    Path("configs").mkdir()
    write_json(
        Path("configs/ccella.json"),
        {**CONFIG, "text": text, "training": training, "autoencoder": SMALL_AUTOENCODER, "monitoring": few},
    )
    found = commands(PAGE.read_text())
    assert [words[1] for words in found] == ["train", "report", "sample"]
    # In processes of their own: `train` ends with its process group, which DeepSpeed cannot begin twice in a process.
    for words in found:
        command = [sys.executable, "-m", "ccella_fast.cli", *words[1:]]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    line = metrics(Path("model"))[-1]
    named = re.findall(r"^\| ((?:`\w+`(?: \.\.\. |, )?)+) \|", PAGE.read_text(), flags=re.MULTILINE)
    keys = {key for cell in named for key in re.findall(r"`(\w+)`", cell)}
    assert {key for key in keys if key.startswith(("val_", "train_eval", "overfits", "sample_"))} <= line.keys()
    assert {"seconds_per_step", "tflops", "peak_memory_mib"} <= metrics(Path("model"))[0].keys() & keys
    assert Path("model/best").resolve().name == "step-00000002"
    assert len(list(Path("model/previews").iterdir())) == 1 and len(list(Path("samples").glob("*.nii.gz"))) == 1
    page = Path("report.html").read_text()
    assert "after 2 steps of the training" in page and not re.search(r"case\d", page)
