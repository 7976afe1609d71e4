"""The writer: a final name never holds a partial file."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from ccella_fast import storage
from ccella_fast.errors import DataError, DiskError


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path):
    target = tmp_path / "a.json"
    storage.write_json(target, {"old": 1})
    with pytest.raises(RuntimeError), storage.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert storage.read_json(target) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.fixture
def happened(monkeypatch):
    """(call, path, mode at that moment) of every flush and rename, in their order."""
    calls = []
    fsync = os.fsync

    def watched_fsync(handle):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}"), stat.S_IMODE(os.fstat(handle).st_mode)))
        fsync(handle)

    def watched(rename):
        def call(source, target):
            calls.append(("rename", str(source), stat.S_IMODE(os.stat(source).st_mode)))
            rename(source, target)

        return call

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(os, "rename", watched(os.rename))
    return calls


def test_a_file_is_flushed_before_its_rename_and_the_folder_after(tmp_path, happened):
    """Otherwise a power failure leaves the final name on an empty file, or no name at all."""
    storage.write_json(tmp_path / "a.json", {})
    mode = stat.S_IMODE((tmp_path / "a.json").stat().st_mode)
    _, temporary, _ = happened[0]
    expected = [("fsync", temporary, mode), ("rename", temporary, mode)]
    assert happened[:2] == expected and [call[:2] for call in happened[2:]] == [("fsync", str(tmp_path))]


def test_all_of_a_folder_is_flushed_before_its_rename_and_its_parent_after(tmp_path, happened):
    with storage.atomic_folder(tmp_path / "f") as temporary:
        (temporary / "deep" / "deeper").mkdir(parents=True)
        for name in ("x", "deep/y", "deep/deeper/z"):
            (temporary / name).write_text(name)
    mode = stat.S_IMODE((tmp_path / "f").stat().st_mode)
    below = {f"{temporary}/{name}" for name in ("x", "deep", "deep/y", "deep/deeper", "deep/deeper/z")}
    *entries, flushed, renamed, last = happened
    assert {path for _, path, _ in entries} == below and {call for call, *_ in entries} == {"fsync"}
    assert (flushed, renamed) == (("fsync", str(temporary), mode), ("rename", str(temporary), mode))
    assert last[:2] == ("fsync", str(tmp_path))


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_those_that_open_and_mkdir_give(tmp_path, mask):
    """`mkstemp` and `mkdtemp` make what only the owner reads: a colleague could not use a run."""
    before = os.umask(mask)
    try:
        (tmp_path / "plain.json").write_text("{}")
        (tmp_path / "plain").mkdir()
        storage.write_json(tmp_path / "ours.json", {})
        with storage.atomic_folder(tmp_path / "ours") as temporary:
            storage.write_json(temporary / "a.json", {})
    finally:
        left = os.umask(before)
    assert left == mask  # the process's own stays as it was
    mode = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert mode["ours.json"] == mode["a.json"] == mode["plain.json"] == 0o666 & ~mask
    assert mode["ours"] == mode["plain"] == 0o777 & ~mask


def test_atomic_folder_publishes_all_or_nothing(tmp_path):
    with pytest.raises(RuntimeError), storage.atomic_folder(tmp_path / "f") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with storage.atomic_folder(tmp_path / "f") as temporary:
        (temporary / "x").write_text("whole")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "x").read_text() == "whole" and os.listdir(tmp_path) == ["f"]


WRITER = """
import sys
from ccella_fast.storage import atomic_path
while True:
    for byte in (b"a", b"b"):
        with atomic_path(sys.argv[1]) as temporary:
            temporary.write_bytes(byte * 3_000_000)
"""


def test_killed_writer_leaves_a_whole_file(tmp_path):
    target = tmp_path / "a.bin"
    for wait in (0.0, 0.03, 0.07):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)])
        while not target.exists():
            time.sleep(0.005)
        time.sleep(wait)
        process.kill()
        process.wait()
        content = target.read_bytes()
        assert len(content) == 3_000_000 and len(set(content)) == 1
    storage.remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_what_a_killed_checkpoint_left_is_swept_and_nothing_else(tmp_path):
    """Also a file that was being written inside a folder that was: it goes with its folder."""
    for name in (".partial-step-1/.partial-x.json", ".partial-step-1/deep/.partial-y/z", ".partial-a.json", "kept/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "kept" / ".partial-c.json").write_text("")
    storage.remove_partial_files(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["kept", "kept/b"]


def test_full_disk_is_named_and_loses_nothing(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: the write fails half-way with an errno."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ccella_fast.storage import atomic_path; from ccella_fast.errors import DiskError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with atomic_path(sys.argv[1]) as t: t.write_bytes(b'x' * 5000)\n"
        "except DiskError as e: print(e)\n"
    )
    target = tmp_path / "a.bin"
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert "the disk is full" in done.stdout and str(target) in done.stdout
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("kind", ["atomic_path", "atomic_folder"])
def test_a_full_disk_is_named_also_by_files_of_tensors(tmp_path, kind):
    place = "t" if kind == "atomic_path" else "t / 'a.safetensors'"
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import numpy as np\n"
        f"from ccella_fast.storage import {kind}; from ccella_fast.errors import DiskError\n"
        "from safetensors.numpy import save_file; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        f"    with {kind}(sys.argv[1]) as t: save_file({{'a': np.zeros(5000)}}, {place})\n"
        "except DiskError as e: print(e)\n"
    )
    target = tmp_path / "a.safetensors"
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert "the disk is full" in done.stdout and str(target) in done.stdout and not os.listdir(tmp_path)
    with pytest.raises(SafetensorError, match="not a failed write"), getattr(storage, kind)(target):
        raise SafetensorError("not a failed write")


def test_unwritable_folder_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        storage.write_json(tmp_path / "file" / "a.json", {})


def test_folders_above_are_made_and_long_names_of_files_refused(tmp_path):
    storage.write_json(tmp_path / "a" / "b" / "c.json", {})
    with storage.atomic_folder(tmp_path / "d" / "e" / "f") as temporary:
        (temporary / "x").write_text("")
    assert (tmp_path / "a" / "b" / "c.json").is_file() and (tmp_path / "d" / "e" / "f" / "x").is_file()
    for name in ("x" * 255, "ä" * 127, "a/" + "x" * 255):
        assert storage.safe_join(tmp_path, name) == tmp_path / name
    for name in ("x" * 256, "ä" * 128, "a/" + "x" * 256):  # bytes, not letters
        with pytest.raises(DataError, match="more than 255 bytes"):
            storage.safe_join(tmp_path, name)
    room = 4094 - len(bytes(tmp_path))  # of the longest path that the system opens, after the slash
    longest = ("x/" * room)[:room].rstrip("/").ljust(room, "x")
    assert storage.safe_join(tmp_path, longest) == tmp_path / longest
    with pytest.raises(DataError, match="this path has more than 4095 bytes"):
        storage.safe_join(tmp_path, longest + "x")


def test_json_as_it_is_written(tmp_path):
    """For people to read: the order given, letters as they are, two spaces, a newline at the end."""
    storage.write_json(tmp_path / "a.json", {"b": "Prüfung", "a": [1]})
    assert (tmp_path / "a.json").read_bytes().decode() == '{\n  "b": "Prüfung",\n  "a": [\n    1\n  ]\n}\n'


def test_where_nothing_can_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    storage.check_writable(tmp_path / "not" / "yet", "--out")
    assert os.listdir(tmp_path) == []  # it only looks
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file is a file, not a folder") as caught:
        storage.check_writable(tmp_path / "file" / "deep", "--out")
    assert (caught.value.path, caught.value.field) == (str(tmp_path / "file" / "deep"), "--out")
    for refused in (os.W_OK, os.X_OK):  # root may do all, so the system's answer is replaced
        monkeypatch.setattr(os, "access", lambda path, mode, refused=refused: not mode & refused)
        with pytest.raises(DiskError, match="this folder cannot be written"):
            storage.check_writable(tmp_path / "new", "--out")


@pytest.mark.parametrize("entry", ["/etc/passwd", "../x", "a/../../x", "", "a\0b", "\udc80", "link/x"])
def test_paths_stay_inside(tmp_path, entry):
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(DataError, match="leaves the data folder"):
        storage.safe_join(tmp_path, entry, path="manifest.json", field="[0].axt2")
    assert storage.safe_join(tmp_path, "a/b.nii.gz") == tmp_path / "a" / "b.nii.gz"


def test_json_has_no_nan_and_errors_cross_processes(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []
    error = DataError("why", path=tmp_path, field="f", fix="x")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 (our own bytes)
