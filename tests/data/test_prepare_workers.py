"""Preparation in several processes: the same bytes, all defects reported, and an error if a worker process dies."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ccella_fast.data.preparation.images import ImageTask, bytes_needed
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.preparation.worker_pool import WorkerPool, count_workers
from ccella_fast.errors import DataError
from pool_tasks import die, refuse, threads
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


def test_killed_worker_raises_an_error_that_names_studies():
    names = [f"study{number}" for number in range(8)]
    start = time.monotonic()
    with (
        pytest.raises(DataError, match="a worker process was killed .* at one of: .*study3") as caught,
        WorkerPool(2) as pool,
    ):
        list(pool.run(die, range(8), names, bytes_each=1))
    assert time.monotonic() - start < 60 and "what is done is kept" in caught.value.fix
    assert len(str(caught.value).splitlines()) <= 5


def test_defects_are_returned_and_other_tasks_continue():
    with WorkerPool(2) as pool:
        done = {each.task: each.result for each in pool.run(refuse, range(5), list("abcde"), bytes_each=1)}
        workers = {child.pid for child in multiprocessing.active_children()}
        again = {each.result for each in pool.run(refuse, [0, 1], list("ab"), bytes_each=1)}
    assert isinstance(done.pop(2), DataError) and os.getpid() not in done.values()
    assert set(done.values()) | again <= workers  # the same processes serve every run
    with WorkerPool(1) as pool:
        assert {each.result for each in pool.run(refuse, [0, 1], list("ab"), bytes_each=1)} == {os.getpid()}


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


def test_full_dev_shm_falls_back_to_one_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.Lock", full)  # a semaphore is a file in /dev/shm
    monkeypatch.setattr("multiprocessing.synchronize.BoundedSemaphore", full)
    with caplog.at_level("WARNING", logger="ccella_fast"), WorkerPool(2) as pool:
        assert {each.result for each in pool.run(refuse, [0, 1], list("ab"), bytes_each=1)} == {os.getpid()}
    assert caplog.text.count("is /dev/shm full?") == 1 and "No space left" in caplog.text


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
