"""Commands crash in the middle; no name, id or word of a report is in what they have said and left.

A crash is an error that quotes its input, a full disk, a signal, or a damaged file. What identifies a patient may be in the
private folder of an import alone, and the words of a report in its table of studies alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import crashed_command
from canary_fixtures import contents, spellings
from ccella_fast import cli
from ccella_fast.data.checking.findings import STOPPING
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.storage import write_json
from ccella_fast.training.run import train
from pacs_fixtures import CANARIES, remove, write_export
from study_fixtures import config, write_bert, write_dicom, write_studies, write_vae

FIXTURES = Path(crashed_command.__file__).parent
ROOT = FIXTURES.parents[1]
WORD, NAME = "kanarienvogel", "Quagga^Zebedee"
REPORT = f"left zone lesion of 9 mm {WORD} of QUAGGA and MRN77880"
SMALL = {
    "data__dim": [32, 32, 32], "model__num_latents": 4, "model__adapter_blocks": 2, "model__adapter_heads": 2,
    "model__adapter_time_dim": 16, "model__class_head_dim": 8, "training__max_train_steps": 2, "training__batch_size": 2,
    "training__precision": "fp32", "training__checkpointing_steps": 1, "sampling__num_inference_steps": 2,
    "sampling__solver": "ddim", "sampling__batch_size": 1, "text__max_length": 16, "data__engine": "torch",
    "vae_training__max_train_steps": 2, "vae_training__patch": [16, 16, 16],
}  # fmt: skip
ALLOW = [word for name in STOPPING for word in ("--allow", name)]


IDENTITY = [*CANARIES[:-1], f"{CANARIES[-1]}."]
# What an error quotes.
QUOTED = " ".join([REPORT, NAME, *IDENTITY])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, studies with reports, and what the commands have made of them, all with the canaries."""
    folder = tmp_path_factory.mktemp("world")
    write_export(folder / "export", patients=1, visits=1)
    for series in (1, 2, 3, 5, 6, 7, 8, 11, 12, 13):
        remove(folder / "export", series=series)
    (folder / "reports.csv").write_text(f'accession,report\nACC555100,"{REPORT}"\n')
    studies = write_studies(folder / "studies", 4)
    write_dicom(studies / "scanned" / "t2w", t0010_0010=NAME, t0010_0020="MRN77880")
    table = studies / "studies.csv"
    table.write_text(table.read_text().replace("lesion of", f"{REPORT} lesion of") + f'scanned,train,4,"{REPORT}"\n')
    settings = config(variant="CCELLA", encoder=write_bert(folder / "bert"), **SMALL)
    write_json(folder / "config.json", settings.dump())
    vae = write_vae(folder / "vae", settings)
    prepare(studies, folder / "prepared", settings, vae=vae)
    environment = dict(os.environ)
    try:
        assert train(settings, data=folder / "prepared", run=folder / "model", allow=STOPPING) == 0
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return folder


def arguments(name: str, world: Path, out: Path) -> list[str]:
    """The command line; everything is written below `out`."""
    settings, one = ["--config", world / "config.json"], ["--workers", "1"]
    studies = ["--data", world / "studies"]
    samples = ["--checkpoint", world / "model", "--report", REPORT, "--out", out / "samples", "--device", "cpu"]
    imports = ["--data", world / "export", "--out", out / "studies", "--reports", world / "reports.csv", *one]
    known: dict[str, list[object]] = {
        "import": ["import", *imports],
        "import --write": ["import", *imports, "--write"],
        "check": ["check", *studies, "--out", out / "check", *settings, *one],
        "prepare": [
            "prepare",
            *studies,
            "--out",
            out / "prepared",
            "--vae",
            world / "vae",
            "--preview",
            *settings,
            *one,
        ],
        "train": ["train", "--data", world / "prepared", "--output_dir", out / "model", *ALLOW, *settings],
        "sample": ["sample", *samples],
        "sample --format dicom": ["sample", *samples, "--format", "dicom"],
        "synthesize": [
            "synthesize",
            "--checkpoint",
            world / "model",
            "--data",
            world / "prepared",
            "--out",
            out / "synthetic",
            "--device",
            "cpu",
        ],
        "classify": [
            "classify",
            "--real",
            world / "prepared",
            "--arms",
            "r",
            "--seeds",
            "1",
            "--updates",
            "2",
            "--device",
            "cpu",
            "--backbone",
            "small",
            "--validation_fraction",
            "0",
            "--out",
            out / "classify",
        ],
        "phantom": ["phantom", "--out", out / "phantoms", "--num_studies", "2"],
    }
    return [str(word) for word in known[name]]


COMMANDS = [
    "import", "import --write", "check", "prepare", "train", "sample", "sample --format dicom", "synthesize", "classify",
    "phantom",
]  # fmt: skip


def begin(name: str, world: Path, out: Path) -> list[str]:
    """The command line, after what must have been run before it."""
    if name == "import --write":
        assert cli.main(arguments("import", world, out)) == 0
    return arguments(name, world, out)


def where(out: Path, said: str) -> list[tuple[str, str]]:
    """The places below `out`, and "said", with the canary that they hold."""
    found = []
    places = [("said", said.encode()), *contents(out)]
    for canary in [*IDENTITY, WORD]:
        secrets = spellings(canary)
        for place, content in places:
            is_table = canary == WORD and place.startswith("studies/") and place.count("/") == 1
            if not place.startswith("studies.private/") and not is_table and any(each in content for each in secrets):
                found.append((place, canary))
    return found


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training sets variables of the environment. It ends a process group that DeepSpeed would still use here."""
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.parametrize("name", COMMANDS)
def test_errors_of_libraries_and_full_disks(name: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    """A full disk at the first file that is put into its place, an error at the last; an unbroken run counts them."""
    code, writes = crashed_command.run(begin(name, world, tmp_path / "whole"), None, 0, "")
    assert code == 0 and writes >= 1
    said = "".join(capfd.readouterr())
    assert where(tmp_path / "whole", said) == []
    for kind, expected, write in (("exception", 1, writes - 1), ("full_disk", 5, 0)):
        given = begin(name, world, tmp_path / kind)
        capfd.readouterr()
        code, done = crashed_command.run(given, kind, write, QUOTED)
        said = "".join(capfd.readouterr())
        assert (code, done) == (expected, write + 1), said
        assert "error: " in said and where(tmp_path / kind, said) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_tracebacks(name: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    """With --debug, of an error that quotes nothing itself."""
    given = begin(name, world, tmp_path)
    with pytest.raises(RuntimeError, match="^broken$") as caught:
        crashed_command.run([*given, "--debug"], "exception", 0, "broken")
    said = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert "crashed_command.py" in said and where(tmp_path, said) == []


READS_TEXT = [
    ("check", "ccella_fast.data.readers.discovery.apply_table"),
    ("prepare", "ccella_fast.data.readers.discovery.apply_table"),
    ("prepare", "ccella_fast.data.text_encoder.TextEncoder.encode"),
    ("sample", "ccella_fast.data.text_encoder.TextEncoder.encode"),
    ("import", "ccella_fast.data.importing.import_studies.extend_key"),
    ("import", "ccella_fast.data.importing.import_studies.match_reports"),
    ("import --write", "ccella_fast.data.importing.import_studies._write_table"),
]


@pytest.mark.parametrize(("name", "function"), READS_TEXT)
def test_errors_where_text_is_read(
    name: str, function: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    given, quoted = begin(name, world, tmp_path), []

    def fails(*values: object, **named: object) -> None:
        quoted.append(repr((values, named)))
        raise ValueError(f"{quoted} {QUOTED}")

    monkeypatch.setattr(function, fails)
    code = cli.main(given)
    said = "".join(capfd.readouterr())
    assert code == 1 and "internal: ValueError" in said and quoted  # control: it was reached
    assert where(tmp_path, said) == []


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGE: list[tuple[str, str, Callable[[bytes], bytes], int]] = [
    ("import", "export/**/*.dcm", cut, 0),  # it is listed in the private folder
    ("import", "reports.csv", lambda content: content + b'"' + REPORT.encode(), 3),
    ("import", "reports.csv", lambda content: content.replace(b"report\n", b"narration\n"), 3),
    ("check", "studies/studies.csv", lambda content: content.replace(b"train,2,", b"train,"), 3),
    ("check", "studies/scanned/t2w/*", cut, 3),
    ("prepare", "studies/studies.csv", lambda content: content.replace(b"train,2,", b"train,"), 3),
    ("prepare", "studies/studies.csv", lambda content: content.replace(b"case,split", REPORT.encode() + b",split"), 3),
    ("prepare", "studies/scanned/t2w/*", cut, 3),
    ("prepare", "studies/case0/t2w.nii.gz", cut, 3),
    ("train", "prepared/text/*", cut, 3),
    ("train", "prepared/manifest.json", cut, 3),
    ("sample", "model/checkpoints/*/model.safetensors", cut, 4),
]


@pytest.mark.parametrize(("name", "pattern", "change", "expected"), DAMAGE)
def test_damaged_files(
    name: str,
    pattern: str,
    change: Callable[[bytes], bytes],
    expected: int,
    world: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
):
    copy = Path(shutil.copytree(world, tmp_path / "world"))
    for path in sorted(copy.glob(pattern))[:1] if "export" in pattern or "scanned" in pattern else copy.glob(pattern):
        content = path.read_bytes()
        path.write_bytes(change(content))
        assert path.read_bytes() != content
    settings = (copy / "config.json").read_text().replace(str(world), str(copy))
    (copy / "config.json").write_text(settings)
    code = cli.main(arguments(name, copy, tmp_path / "out"))
    said = "".join(capfd.readouterr())
    assert code == expected, said
    assert where(tmp_path / "out", said) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigterm", "sigkill", "file_size"])
@pytest.mark.parametrize("name", COMMANDS)
def test_ended_processes(name: str, kind: str, world: Path, tmp_path: Path):
    """Signals at three points of each command; files that may not become larger, also in worker processes."""
    _, writes = crashed_command.run(begin(name, world, tmp_path / "whole"), None, 0, "")
    path = os.pathsep.join([str(FIXTURES), str(ROOT), os.environ.get("PYTHONPATH", "")])
    points = [200, 2000, 20_000] if kind == "file_size" else sorted({0, writes // 2, writes - 1})
    codes = {"sigterm": {143}, "sigkill": {-signal.SIGKILL}, "file_size": {0, 5}}[kind]
    for point in points:
        out = tmp_path / str(point)
        command = [sys.executable, "-m", "crashed_command", kind, str(point), QUOTED, *begin(name, world, out)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert where(out, done.stdout + done.stderr) == [], point
        is_trained = (name, kind, done.returncode) == ("train", "sigterm", 0)  # the signal came after the last step
        assert done.returncode in codes or is_trained, (point, done.stderr[-2000:])


def test_the_search_finds_what_is_there(tmp_path: Path):
    """Negative control."""
    for name in ("studies.private/key.csv", "studies/studies.csv", "studies/p1/t2w.nii.gz", "studies.import/page.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{WORD} ZEBEDEE")
    found = where(tmp_path, QUOTED)
    assert {canary for place, canary in found if place == "said"} == {*IDENTITY, WORD}
    assert {place for place, canary in found if canary == WORD} == {
        "said",
        "studies/p1/t2w.nii.gz",
        "studies.import/page.html",
    }
    assert {place for place, canary in found if canary == "ZEBEDEE"} == {
        "said", "studies/studies.csv", "studies/p1/t2w.nii.gz", "studies.import/page.html",
    }  # fmt: skip
