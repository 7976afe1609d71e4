"""One writer per folder: in any process, however a holder ends, and with nothing left behind."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from ccella_fast import folder_lock
from ccella_fast.checkpoint import export_reference
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import CcellaError, ConfigError, DiskError
from ccella_fast.folder_lock import lock_folder
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.training.autoencoder.run import train_vae
from ccella_fast.training.run import train
from study_fixtures import config

HOLDER = """
import sys, time
from ccella_fast.folder_lock import lock_folder
with lock_folder(sys.argv[1], "ccella-fast prepare"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of the folder `out`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_that_cannot_be_made_is_an_error_and_not_tried_again():
    """Making a folder in /proc fails as if its parent were missing."""
    with pytest.raises(DiskError, match="cannot be written"), lock_folder("/proc/none/x", "test"):
        pass


def test_second_writer_is_told_who_the_first_is(tmp_path: Path, holder):
    with pytest.raises(ConfigError) as error, lock_folder(tmp_path / "out", "train.py"):
        pytest.fail("two writers")
    message = str(error.value)
    assert f"process {holder.pid} on {os.uname().nodename} since 20" in message and "'ccella-fast prepare'" in message
    assert str(tmp_path / "out") in message and "fix:" in message
    with lock_folder(tmp_path / "other", "train.py"):  # control: another folder is free
        pass


def test_what_to_do_if_the_machine_of_the_first_writer_is_lost(tmp_path: Path, holder):
    """The lock of another machine may outlive it on a file server; deleting the file makes it the lock of no path."""
    lock = tmp_path / "out" / ".lock"
    with pytest.raises(ConfigError) as error, lock_folder(tmp_path / "out", "train.py"):
        pytest.fail("two writers")
    assert "delete" not in error.value.fix  # control: this machine is not lost
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "host": "node7"}))
    with pytest.raises(ConfigError) as error, lock_folder(tmp_path / "out", "train.py"):
        pytest.fail("two writers")
    assert f"if node7 is gone, delete {lock}" in error.value.fix and "on node7 since" in str(error.value)
    lock.unlink()
    with lock_folder(tmp_path / "out", "train.py"):
        pass


def test_killed_holder_holds_nothing(tmp_path: Path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / ".lock").exists()
    with lock_folder(tmp_path / "out", "train.py"):
        assert json.loads((tmp_path / "out" / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]", "null"])
def test_unreadable_description_does_not_matter(tmp_path: Path, content: str):
    (tmp_path / ".lock").write_text(content)
    with lock_folder(tmp_path, "train.py"):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(ConfigError, match="just started"), lock_folder(tmp_path, "train.py"):
            pytest.fail("two writers")


def test_nothing_is_left_behind(tmp_path: Path):
    with lock_folder(tmp_path / "new" / "folder", "train.py"):
        assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [".lock"]
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "old", "train.py"):
        raise ZeroDivisionError
    assert list((tmp_path / "old").iterdir()) == []
    with lock_folder(tmp_path / "used", "train.py"):
        (tmp_path / "used" / "result").write_text("")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["result"]


def test_lock_is_not_inherited_by_workers(tmp_path: Path):
    """A worker that outlives its parent must not keep the folder."""
    with lock_folder(tmp_path, "train.py"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
        worker = multiprocessing.get_context("spawn").Process(target=signal.pause, daemon=True)
        worker.start()
        try:
            while b"spawn_main" not in Path(f"/proc/{worker.pid}/cmdline").read_bytes():
                time.sleep(0.001)  # it is still a copy of this process, about to run the worker's program
            handles = [os.readlink(f"/proc/{pid}/fd/{each}") for pid in (child.pid, worker.pid) for each in "012"]
            handles += [
                str(path.resolve()) for pid in (child.pid, worker.pid) for path in Path(f"/proc/{pid}/fd").iterdir()
            ]
            own = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
            assert str(tmp_path / ".lock") in own  # control: this process has it open
            assert str(tmp_path / ".lock") not in handles
        finally:
            worker.kill()
            worker.join()
            child.communicate()


def test_one_of_many_threads_holds_it_at_a_time(tmp_path: Path):
    """Also while holders remove the file and the folder, and others are about to lock them."""
    inside, most, failures, held = [0], [0], list[BaseException](), [0]
    guard = threading.Lock()

    def work() -> None:
        while held[0] < 60 and not failures:
            try:
                with lock_folder(tmp_path / "a" / "b", "train.py"):
                    with guard:
                        inside[0] += 1
                        held[0] += 1
                        most[0] = max(most[0], inside[0])
                    with guard:
                        inside[0] -= 1
            except ConfigError:
                pass
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and most[0] == 1


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
@pytest.mark.parametrize("collisions", [50, None])
def test_folder_that_others_remove_while_it_is_created(tmp_path: Path, monkeypatch, error, collisions: int | None):
    """`Path.mkdir` finds the parent gone, or the folder there and then gone; without an end (None), it is an error."""
    mkdir, calls = Path.mkdir, [0]

    def collide(self: Path, *args, **options) -> None:
        calls[0] += 1
        if collisions is None or calls[0] <= collisions:
            raise error(errno.ENOENT if error is FileNotFoundError else errno.EEXIST, "collision")
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", collide)
    expected = pytest.raises(DiskError) if collisions is None else nullcontext()
    with expected, lock_folder(tmp_path / "a" / "b", "train.py"):
        assert calls[0] > 50 and (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()


def test_path_that_is_no_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError), lock_folder(tmp_path / "file", "train.py"):
        pytest.fail("locked a file")
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("text")
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(DiskError), lock_folder(tmp_path / "out", "train.py"):
        pytest.fail("followed a link")
    assert (tmp_path / "victim").read_text() == "text"


@pytest.mark.parametrize("command", ["prepare", "train-vae", "train", "sample"])
def test_commands_stop_before_they_look_at_their_input(tmp_path: Path, holder, command: str):
    """None of the inputs exists, so that without the lock the error is another one."""
    missing, out = tmp_path / "missing", tmp_path / "out"
    run = {
        "prepare": lambda out: prepare(missing, out, config()),
        "train-vae": lambda out: train_vae(missing, out, config()),
        "train": lambda out: train(config(), data=missing, run=out),
        "sample": lambda out: sample_to_folder(missing, out, reports=None, num_samples=1, seed=0),
    }[command]
    with pytest.raises(ConfigError, match="another command is writing to this folder"):
        run(out)
    assert [path.name for path in out.iterdir()] == [".lock"]
    with pytest.raises(CcellaError) as error:  # control
        run(tmp_path / "free")
    assert "another command" not in str(error.value) and not (tmp_path / "free").exists()


def test_exports_of_other_files_do_not_disturb_each_other(tmp_path: Path):
    with lock_folder(tmp_path, "ccella-fast export", name=".a.pt.lock"):
        with pytest.raises(ConfigError, match="another command"):
            export_reference(tmp_path / "missing", tmp_path / "a.pt")
        with pytest.raises(CcellaError) as error:
            export_reference(tmp_path / "missing", tmp_path / "b.pt")
    assert "another command" not in str(error.value)


def test_lock_of_a_removed_file_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The holder removes the file after this process has opened it and before this process has locked it."""
    whole, calls = folder_lock.fcntl.flock, []

    def flock(handle: int, operation: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(handle)
        whole(handle, operation)

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    with lock_folder(tmp_path, "train.py"):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()
