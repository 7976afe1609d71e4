"""Runs commands of ccella-fast in a folder, each once, some at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ccella_fast.errors import CcellaError
from ccella_fast.storage import read_json, write_json

_PATIENCE = 60  # seconds for a command to end after SIGTERM


class Stages:
    """The commands of a folder that have finished, and those that run.

    A command that has finished is not run again; an interrupted one is, and resumes by itself.

    Args:
        out: the folder, in which commands run. logs/ has what they print, and done/ what has finished.
        jobs: how many run at a time. The cores are shared among them.
    """

    def __init__(self, out: Path, jobs: int):
        self.out, self._jobs = out, jobs
        self._running: set[subprocess.Popen] = set()
        for name in ("done", "logs"):
            (out / name).mkdir(exist_ok=True)

    def run(self, commands: Mapping[str, Sequence[object]]) -> None:
        """Run commands by name; return when all have finished.

        Raises:
            CcellaError: one has failed. Those that were started are waited for, and no other is started.
        """
        failed: list[str] = []

        def run_one(name: str, words: list[str]) -> None:
            if failed or self.is_done(name, words):
                return
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            start = time.perf_counter()
            if self._call(name, words):
                failed.append(name)
                return
            write_json(self._record(name), {"command": words, "seconds": round(time.perf_counter() - start, 1)})

        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                list(pool.map(run_one, commands, (list(map(str, words)) for words in commands.values())))
            except BaseException:  # such as Ctrl-C
                failed.append("")
                self._stop()
                raise
        if failed:
            log = self.out / "logs" / f"{failed[0]}.txt"
            raise CcellaError(f"the command '{failed[0]}' has failed", path=log, fix="read this file, then run again")

    def is_done(self, name: str, words: Sequence[object]) -> bool:
        """Whether this command has finished."""
        record = self._record(name)
        return record.exists() and read_json(record)["command"] == list(map(str, words))

    def seconds(self) -> dict[str, float]:
        """The time of every command that has finished."""
        return {path.stem: read_json(path)["seconds"] for path in sorted((self.out / "done").glob("*.json"))}

    def _record(self, name: str) -> Path:
        return self.out / "done" / f"{name}.json"

    def _call(self, name: str, words: list[str]) -> int:
        # Processes that share cores are faster with one thread each than with OpenMP teams that compete.
        threads = str(max(1, (os.cpu_count() or 1) // self._jobs))
        with open(self.out / "logs" / f"{name}.txt", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ccella_fast.cli", *words],
                cwd=self.out, env={"OMP_NUM_THREADS": threads} | os.environ, stdout=log, stderr=log,
            )  # fmt: skip
            self._running.add(process)
            try:
                return process.wait()
            finally:
                self._running.discard(process)

    def _stop(self) -> None:
        """End the commands that run, so that none goes on without this one."""
        for process in (running := list(self._running)):
            process.terminate()
        for process in running:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
