"""Hostile paths in lists and tables of studies: nothing outside the folder of studies is opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

#: Ways to leave the folder `studies`; {} is a file outside it, as an absolute path.
ENTRIES = [
    "{}", "/{}", "//{}", "file://{}", "file:{}", "./{}", " {}", "{} ", "{}/", "{}\0", "\0{}", "{}\0.nii.gz", "~{}",
    "~/../..{}", "~", "~root", "$HOME", "${HOME}", "%HOME%", "$(cat {})", "`cat {}`", "|cat {}", "{};x", "-", "--", ".",
    "..", "/", "//", "./", "../", "../..", "../../..", "...", "....", ". .", "x/..", "x/../..",
    "a/../../outside/t2w.nii.gz", "a/./../../outside/t2w.nii.gz", "a//..//..//outside//t2w.nii.gz",
    "../outside/t2w.nii.gz", "./../outside/t2w.nii.gz", "../outside", "../outside/report.txt", "../outside/dicom",
    "..\\outside\\t2w.nii.gz", "..\\..\\outside", "\\\\server\\share\\t2w.nii.gz", "//server/share/t2w.nii.gz",
    "C:\\t2w.nii.gz", "C:/t2w.nii.gz", "C:t2w.nii.gz", "\\\\?\\C:\\x", "NUL", "CON", "/dev/stdin", "/dev/zero",
    "/dev/random", "/dev/fd/0", "/proc/self/environ", "/proc/self/mem", "/etc/passwd", "/etc/hostname",
    "/home/user/.ssh/id_rsa", "http://127.0.0.1/x", "https://localhost/t2w.nii.gz", "ftp://localhost/x", "s3://bucket/x",
    "gs://bucket/x", "data:text/plain,x", "smb://x/y", "%2e%2e/outside/t2w.nii.gz", "..%2foutside%2ft2w.nii.gz",
    "%2e%2e%2foutside", "..%c0%afoutside", "..%252foutside", "․․/outside/t2w.nii.gz", "‥/outside/t2w.nii.gz",
    "．．/outside/t2w.nii.gz", "..∕outside∕t2w.nii.gz", "..／outside／t2w.nii.gz", "..⁄outside", "\u202e../outside",
    "..\u200b/outside", "\ufeff../outside", "../outside\n", "..\r/outside", "\t../outside",
    "../outside/t2w.nii.gz\x1b[2J", "linked.nii.gz", "linked/t2w.nii.gz", "linked/report.txt", "linked/dicom",
    "linked.txt", "a/linked.nii.gz", "a/linked/t2w.nii.gz", "chain.nii.gz", "chain2/t2w.nii.gz",
    "loop/loop/loop/linked/t2w.nii.gz", "loop/../linked/t2w.nii.gz", "hard/../../outside/t2w.nii.gz", "slices",
    "dangling.nii.gz", "a" * 300, "a/" * 3000 + "x", "../" * 500 + "etc/passwd",
    "x" * 200 + "/../../outside/t2w.nii.gz",
]  # fmt: skip

SCRIPT = """
import csv, json, sys
from pathlib import Path
from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.data.readers.volume_file import read_volume
from ccella_fast.errors import DataError
root, outside = Path(sys.argv[1]), Path(sys.argv[2])
entries, kinds = json.loads(sys.stdin.read()), ["list", "csv", "bids", "features"]
opened, accepted, count = [], 0, 0
sound = root / "a/t2w.nii.gz"
read_volume(sound)  # what is imported on the way opens files of packages
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)

def is_outside(path):
    path = Path(path.removeprefix("b'").removesuffix("'"))
    resolved = path.resolve()
    return not resolved.is_relative_to(root) and not any(resolved.is_relative_to(place) for place in PACKAGES)

PACKAGES = [Path(place).resolve() for place in (sys.prefix, sys.base_prefix, sys.argv[3])]

def attempt(data, **options):
    global accepted, count
    count += 1
    try:
        for study in find_studies(data, **options):
            accepted += study.id == "x"
            for path in (*study.files.values(), *study.latent_files.values(), study.text_file):
                if path is not None and path.suffix != ".npy":
                    read_volume(path)
    except DataError:
        pass

for entry in entries:
    for name in ("axt2", "b1600", "adc"):
        text = json.dumps([{"folder": "x", "axt2": "a/t2w.nii.gz"} | {name: entry}])
        (root / "list.json").write_text(text)
        attempt(root / "list.json")
    text = json.dumps([{"folder": "x", "axt2": "a/t2w.nii.gz", "text": entry + ".npy", "text_isnull": 0}])
    (root / "list.json").write_text(text)
    attempt(root / "list.json", embedding_base_dir=root)
    plain = entry.encode("utf-8", "replace").decode()
    with open(root / "plain/studies.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["case", "report_file"], ["a", plain]])
    attempt(root / "plain")
    table = "participant_id\\treport_file\\nsub-01\\t" + plain + "\\n"
    (root / "bids/participants.tsv").write_text(table, encoding="utf-8")
    attempt(root / "bids")
attempt(root)
found = sorted({path for path in opened if is_outside(path)})
opened.clear()
open(outside / "t2w.nii.gz", "rb").close()
print(json.dumps({"opened": found, "count": count, "accepted": accepted, "control": [p for p in opened if is_outside(p)]}))
"""


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """A folder of studies with links that lead out of it, and a readable study and report outside."""
    from study_fixtures import write_nifti

    root, outside = tmp_path / "studies", tmp_path / "outside"
    for folder in (root / "a", root / "plain/a", root / "bids/sub-01/anat", outside):
        write_nifti(folder / ("sub-01_T2w.nii.gz" if folder.name == "anat" else "t2w.nii.gz"))
    (root / "bids/dataset_description.json").write_text("{}")
    (outside / "report.txt").write_text("a report")
    (outside / "text.npy").write_bytes(b"x")
    (outside / "dicom").mkdir()
    (outside / "dicom/1.dcm").write_bytes(b"\0" * 128 + b"DICM")
    for place in (root, root / "a", root / "plain", root / "bids"):
        (place / "linked").symlink_to(outside)
        (place / "linked.nii.gz").symlink_to(outside / "t2w.nii.gz")
        (place / "linked.nii.gz.npy").symlink_to(outside / "text.npy")
        (place / "linked.txt").symlink_to(outside / "report.txt")
        (place / "chain.nii.gz").symlink_to("linked.nii.gz")
        (place / "chain2").symlink_to("linked")
        (place / "loop").symlink_to(".")
        (place / "hard").mkdir()
        (place / "slices").mkdir()
        (place / "slices/1.dcm").symlink_to(outside / "dicom/1.dcm")
        (place / "dangling.nii.gz").symlink_to(outside / "absent")
    return root


def test_nothing_outside_the_folder_is_opened(studies: Path, goal: Callable[..., None]):
    """R10: at least 200 hostile entries of lists and tables, 0 files opened outside. The images that are accepted are read."""
    outside = studies.parent / "outside"
    targets = [outside / "t2w.nii.gz", outside / "report.txt", outside / "dicom"]
    entries = [entry.replace("{}", str(target)) for entry in ENTRIES for target in targets if "{}" in entry]
    entries += [entry for entry in ENTRIES if "{}" not in entry]
    package = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(studies), str(outside), str(package)],
        input=json.dumps(entries), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(package)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["opened"] == [] and result["count"] >= 200
    assert result["control"] == [str(outside / "t2w.nii.gz")], "the hook sees files outside"
    assert result["accepted"] >= 2, "entries that stay inside are accepted"
    goal("R10", value=len(result["opened"]), target=0, n=result["count"])
