"""Preparation in several processes: the same bytes, all defects reported, and an error if a worker process dies."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ccella_fast.data.preparation import worker_pool
from ccella_fast.data.preparation.images import ImageTask, bytes_needed
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.preparation.worker_pool import WorkerPool, count_workers
from ccella_fast.errors import ConfigError, DataError
from pool_tasks import damage, die, fail, refuse, threads
from study_fixtures import config, tree, write_nifti, write_studies


def test_result_does_not_depend_on_the_number_of_workers(tmp_path: Path):
    studies = write_studies(tmp_path / "studies", 5)
    coarser = {"data__spacing": [2.0, 2.0, 3.5], "data__dim": [32, 32, 16]}  # smoothed and interpolated
    for workers in (1, 2):
        prepare(studies, tmp_path / str(workers), config(**coarser), workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    prepare(studies, tmp_path / "3", config(data__spacing=[2.0, 2.0, 3.4], data__dim=[32, 32, 16]), workers=1)
    assert tree(tmp_path / "3") != tree(tmp_path / "1")
    record = json.loads((tmp_path / "2/run_record.json").read_text())["stages"]["image"]
    assert sorted(record["seconds_per_study"]) == [f"case{number}" for number in range(5)]
    assert all(0 < seconds < 60 for seconds in record["seconds_per_study"].values())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_ends_is_the_result_of_its_study(workers: int):
    names = [f"study{number}" for number in range(8)]
    with WorkerPool(workers, seconds=5) as pool:
        results = {done.task: done.result for done in pool.run(die, range(8), names, bytes_each=1)}
        again = [done.result for done in pool.run(die, [0], ["study0"], bytes_each=1)]
    assert {task: results[task] for task in (0, 1, 2, 4, 7)} == {task: task for task in (0, 1, 2, 4, 7)}
    assert again == [0]
    for task, words in [
        (3, "'study3' was killed (out of memory?)"),
        (5, "'study5' crashed (SIGSEGV)"),
        (6, "more than 5 s"),
    ]:
        assert isinstance(results[task], DataError) and words in str(results[task])
        assert results[task].field == f"study{task}" and results[task].fix


def test_a_study_is_not_blamed_for_the_one_before_it():
    with WorkerPool(1) as pool:
        done = {each.task: each.result for each in pool.run(damage, range(4), list("abcd"), bytes_each=1)}
        assert done[0] == done[1] != done[2] == done[3]  # task 2 was done once more, in another process
        alone = {each.task: each.result for each in pool.run(die, [5], ["e"], bytes_each=1)}
    assert isinstance(alone[0], DataError)  # control: what crashes in a new process too is to blame


def test_a_worker_that_is_killed_between_two_tasks_is_replaced():
    with WorkerPool(1) as pool:
        first = [each.result for each in pool.run(refuse, [0], ["a"], bytes_each=1)]
        os.kill(first[0], signal.SIGKILL)
        while _alive(first[0]):
            time.sleep(0.01)
        again = [each.result for each in pool.run(refuse, [0, 1], ["a", "b"], bytes_each=1)]
    assert again[0] == again[1] != first[0]


def test_a_file_that_a_killed_worker_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The worker is killed while it writes the second study, which another one reads again."""
    begin, left = worker_pool._Worker.begin, tmp_path / "out" / "images" / "case1" / ".partial-abc.npy"

    def begin_and_die(worker, *given):
        begin(worker, *given)
        if worker.begun == 5 and not left.exists():  # each study is checked first
            worker.process.kill()
            left.parent.mkdir(parents=True, exist_ok=True)
            left.write_bytes(b"half")

    monkeypatch.setattr(worker_pool._Worker, "begin", begin_and_die)
    prepare(write_studies(tmp_path / "studies", 3), tmp_path / "out", config(), workers=1)
    assert not list(tmp_path.rglob(".partial*")) and len(list(tmp_path.rglob("out/images/*/t2w.npy"))) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reader_that_crashes_names_the_study_and_not_the_others(tmp_path: Path, workers: int):
    """With a reader that ends its process for one file, as a fault in a C++ library would."""
    studies = write_studies(tmp_path / "studies", 3)
    (studies / "case1" / "t2w.nii.gz").write_bytes(b"crash")
    damaged = studies / "case2" / "t2w.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from ccella_fast.data.preparation import images, worker_pool\n"
        "import crashing_reader\n"
        "worker_pool._PRELOADED.append('crashing_reader')\n"
        "from ccella_fast import cli\n"
        f"sys.exit(cli.main(['prepare', '--data', {str(studies)!r}, '--out', {str(tmp_path / 'out')!r}, '--workers', "
        f"'{workers}', '--set', 'model.variant=MAISI', '--set', 'data.dim=[32,32,32]']))\n"
    )
    (tmp_path / "crashing_reader.py").write_text(
        "import os, signal\n"
        "from ccella_fast.data.readers import volume_file\n"
        "plain = volume_file.FORMATS['.nii.gz']\n"
        "def read(path, *more):\n"
        "    if path.read_bytes() == b'crash':\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return plain(path, *more)\n"
        "volume_file.FORMATS['.nii.gz'] = read\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path(__file__).resolve().parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 3, done.stderr[-2000:]
    error = done.stderr[done.stderr.rindex("error: ") :]
    assert "'case1' crashed (SIGSEGV)" in error and "1 more defect" in error and len(error.splitlines()) <= 5
    assert "internal" not in done.stderr and not (tmp_path / "out").exists()


def test_defects_are_returned_and_other_tasks_continue():
    with WorkerPool(2) as pool:
        done = {each.task: each.result for each in pool.run(refuse, range(5), list("abcde"), bytes_each=1)}
        again = {each.result for each in pool.run(refuse, [0, 1], list("ab"), bytes_each=1)}
    assert isinstance(done.pop(2), DataError) and os.getpid() not in done.values()
    assert again <= set(done.values())  # the same processes serve every run
    with WorkerPool(1) as pool:
        alone = {each.result for each in pool.run(refuse, [0, 1], list("ab"), bytes_each=1)}
    assert len(alone) == 1 and os.getpid() not in alone  # also a single worker is a process of its own


def test_an_error_that_no_study_explains_is_raised():
    with WorkerPool(2) as pool, pytest.raises(ZeroDivisionError):
        list(pool.run(fail, [0], ["a"], bytes_each=1))


def test_workers_use_one_thread_and_this_process_is_unchanged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    main = dict(vars(sys.modules["__main__"]))
    with WorkerPool(2) as pool:
        assert {each.result[1] for each in pool.run(threads, [0, 1], list("ab"), bytes_each=1)} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "5" and "MKL_NUM_THREADS" not in os.environ
    assert vars(sys.modules["__main__"]) == main


def test_workers_find_every_defect(tmp_path: Path):
    studies = write_studies(tmp_path / "studies", 4)
    for number in (1, 3):
        path = studies / f"case{number}" / "t2w.nii.gz"
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="1 more defect") as caught:
        prepare(studies, tmp_path / "out", config(), workers=2)
    assert caught.value.path == str(studies / "case1" / "t2w.nii.gz") and not (tmp_path / "out").exists()


def test_number_of_workers_follows_cores_tasks_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [count_workers(tasks, 1) for tasks in (0, 3, 8, 100)] == [1, 1, 2, 8]
    monkeypatch.setattr("ccella_fast.data.preparation.worker_pool.free_memory", lambda: 10 * 2**30)
    task = ImageTask("a", {}, config(data__dim=[256, 256, 128]).data, tmp_path)
    assert count_workers(100, bytes_needed(task)) == 8 and count_workers(100, 3 * 2**30) == 1


def test_a_process_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", full)
    with WorkerPool(2) as pool, pytest.raises(ConfigError, match="no worker process can be started: Resource"):
        list(pool.run(refuse, [0, 1], list("ab"), bytes_each=1))


def test_workers_end_with_a_killed_parent():
    code = (
        "import sys, os, time\n"
        "from ccella_fast.data.preparation.worker_pool import WorkerPool\n"
        "from pool_tasks import refuse\n"
        "with WorkerPool(2) as pool:\n"
        "    for done in pool.run(refuse, [0, 1, 3, 4], list('abcd'), bytes_each=1):\n"
        "        print(done.result, flush=True)\n"
        "    time.sleep(60)\n"
    )
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1] / "fixtures"), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()) for _ in range(4)}
    assert all(_alive(pid) for pid in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_script_without_main_guard_is_not_run_again(tmp_path: Path):
    write_nifti(tmp_path / "studies/a/t2w.nii.gz")
    write_nifti(tmp_path / "studies/b/t2w.nii.gz")
    script = tmp_path / "script.py"
    script.write_text(
        "from study_fixtures import config\n"
        "from ccella_fast.data.preparation.prepare import prepare\n"
        "print('here')\n"
        f"prepare({str(tmp_path / 'studies')!r}, {str(tmp_path / 'out')!r}, config(), workers=2)\n"
    )
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1] / "fixtures"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=120
    )
    assert done.returncode == 0 and done.stdout.count("here") == 1, done.stderr[-2000:]
    assert (tmp_path / "out/manifest.json").is_file()
