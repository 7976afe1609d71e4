"""Copies of the working tree in which files are changed and tests run. The working tree itself is only read."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from operators import Mutant
from table import ROOT

PROCESSES = 2  # as in `make test`


class Copies:
    """Copies of the working tree below a folder, one per process, and the pytest runs in them."""

    def __init__(self, folder: Path):
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
        names = sorted({name for name in listed.stdout.decode().split("\0") if os.path.lexists(ROOT / name) and name})
        self.free: queue.Queue[Path] = queue.Queue()
        self.running: set[subprocess.Popen] = set()
        self.stopped = threading.Event()
        for number in range(PROCESSES):
            copy = folder / str(number) / ROOT.name
            for name in names:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
            self.free.put(copy)

    def passes(self, tests: list[str], seconds: float, mutant: Mutant | None = None) -> tuple[bool | None, str]:
        """Run tests, with a change applied if one is given.

        Returns:
            Whether they pass (None if they take longer than `seconds`), and the output of pytest.
        """
        copy = self.free.get()
        changed = copy / (mutant.file if mutant else tests[0])
        before = changed.read_text()
        try:
            changed.write_text(mutant.text if mutant else before)
            return self._pytest(copy, tests, seconds)
        finally:
            changed.write_text(before)
            self.free.put(copy)

    def _pytest(self, copy: Path, tests: list[str], seconds: float) -> tuple[bool | None, str]:
        options = ["-x", "-p", "no:cacheprovider", f"--basetemp={copy.parent}/tmp"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        # No .pyc files: two changes of equal size within one second would share a file.
        variables = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        with open(copy.parent / "log", "w+") as log:
            # A session of its own, so that all processes started by the tests can be ended with them.
            process = subprocess.Popen(
                command,
                cwd=copy,
                env=os.environ | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.add(process)
            if self.stopped.is_set():
                _end(process)
            try:
                code: int | None = process.wait(max(seconds, 0))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
                self.running.discard(process)
            log.seek(0)
            return (None if code is None else code == 0), log.read()

    def stop(self) -> None:
        """End all runs, and those that are about to start."""
        self.stopped.set()
        for process in list(self.running):
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End the process group of the process: with SIGTERM first, so that launchers can end their own processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(50):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # none is left
                return
            number = 0 if number == signal.SIGTERM else number  # SIGTERM is sent once; signal 0 then only checks
            process.poll()
            time.sleep(0.1)
