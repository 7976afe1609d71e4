"""Each command asks for the packages that it uses, before any work, and for no others. Real runs are in test_demo.py."""

from __future__ import annotations

import sys

import pytest

from ccella_fast.optional import PACKAGES
from command_packages import USED, unused
from training_fixtures import write_prepared

# A command whose folders are wrong, with the exit code of that mistake; it says so only if no package is missing.
MISTAKEN = {
    "phantom": ("phantom --out {file}/out", 5),
    "import": ("import --data {none} --out {tmp}/out", 3),
    "check": ("check --data {none}", 3),
    "prepare": ("prepare --data {none} --out {tmp}/out", 3),
    "train-vae": ("train-vae --data {none} --out {tmp}/out", 3),
    "train": ("train --data {none} --output_dir {tmp}/out", 2),
    "average": ("average --run {none} --width 0.1 --out {tmp}/out", 4),
    "sample": ("sample --checkpoint {none} --out {tmp}/out", 4),
    "synthesize": ("synthesize --checkpoint {none} --data {none} --out {tmp}/out", 4),
    "sensitivity": ("sensitivity --real {none} --out {tmp}/out", 3),
    "evaluate": ("evaluate --real {none} --synthetic {none} --out {tmp}/out", 3),
    "classify": ("classify --real {none} --out {tmp}/out", 3),
    "compare": ("compare --config {none} --out {tmp}/out", 2),
    "report": ("report {none}", 3),
    "export": ("export --checkpoint {none} --out {tmp}/out.pt", 4),
    "push": ("push --checkpoint {none} --repo owner/name --out {tmp}/out", 4),
}
# What an option or a kind of folder needs besides, or needs no longer.
MORE = [
    ("prepare --data {none} --out {tmp}/out --preview", "matplotlib"),
    ("check --data {none} --out {tmp}/out", "jinja2"),
    ("sample --checkpoint {none} --out {tmp}/out --format dicom", "pydicom"),
    ("classify --real {none} --out {tmp}/out --protocol reference", "SimpleITK"),
]
LATER = {"transformers"}  # of `prepare` and `sample`: when the text encoder is made, which not every variant has


@pytest.fixture
def places(tmp_path):
    file = tmp_path / "file"
    file.touch()
    return {"file": file, "none": tmp_path / "none"}


def hide(monkeypatch, packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("name", MISTAKEN)
def test_what_a_command_does_not_use_may_be_absent(name, call, monkeypatch):
    command, code = MISTAKEN[name]
    assert unused(name)
    hide(monkeypatch, unused(name))
    found, said = call(command)
    assert found == code and "pip install" not in said, said


@pytest.mark.parametrize(
    ("command", "package"),
    [(MISTAKEN[name][0], package) for name, used in USED.items() for package in used
     if name == "check" or package not in LATER] + MORE,
)  # fmt: skip
def test_what_a_command_uses_is_asked_for_before_anything_else(command, package, call, monkeypatch, tmp_path):
    hide(monkeypatch, [package])
    found, said = call(command)
    extra = PACKAGES[package]
    assert found == 2 and said.startswith(f"error: this command needs {package}, which is not installed\n"), said
    assert f'pip install "ccella-fast[{extra}]"' in said and not (tmp_path / "out").exists()


def test_all_that_is_missing_is_said_at_once(call, monkeypatch):
    hide(monkeypatch, ["pydicom", "nibabel"])
    found, said = call(MISTAKEN["import"][0])
    assert found == 2 and "needs pydicom and nibabel, which are not installed" in said
    assert 'pip install "ccella-fast[commands,dicom]"' in said


def test_a_prepared_folder_is_checked_without_readers_of_images(call, monkeypatch, tmp_path):
    write_prepared(tmp_path / "prepared")
    hide(monkeypatch, USED["check"])
    found, said = call("check --data {tmp}/prepared")
    assert found in (0, 1) and "pip install" not in said, said
