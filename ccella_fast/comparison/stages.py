"""Runs commands of ccella-fast in a folder, each once, some at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Pipe
from pathlib import Path

from ccella_fast.errors import CcellaError
from ccella_fast.storage import read_json, write_json

_SERVER = "forkserver"  # the name of its log


class Stages:
    """The commands of a folder that have finished, and those that run; a context manager, at whose end none runs any more.

    A command that has finished is not run again; an interrupted one is, and resumes by itself. Each is a process, forked by
    `ccella_fast.cli.forkserver`.

    Args:
        out: the folder, in which commands run. logs/ has what they print, and done/ what has finished.
        jobs: how many run at a time.

    Attributes:
        cores: for one of them, as they share those of the machine.
    """

    def __init__(self, out: Path, jobs: int):
        self.out, self._jobs = out, jobs
        self.cores = max(1, (os.cpu_count() or 1) // jobs)
        self._server: subprocess.Popen | None = None
        for name in ("done", "logs"):
            (out / name).mkdir(exist_ok=True)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._channel.close()
            self._server.wait()  # it ends the commands that run

    def run(self, commands: Mapping[str, Sequence[object]], *, shared: bool = False) -> None:
        """Run commands by name; return when all have finished.

        Args:
            commands: name -> words.
            shared: run them one after the other, each as `jobs` processes that share its work, which must be a command that
                does so under torchrun.

        Raises:
            CcellaError: one has failed. Those that were started are waited for, and no other is started.
        """
        texts = {name: list(map(str, words)) for name, words in commands.items()}
        waiting = [name for name, words in texts.items() if not self.is_done(name, words)]
        started: dict[str, float] = {}
        failed: list[str] = []
        while started or (waiting and not failed):
            while waiting and not failed and len(started) < (1 if shared else self._jobs):
                name = waiting.pop(0)
                print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
                started[name] = time.perf_counter()
                self._start(name, texts[name], self._jobs if shared else 1)
            name, code = self._wait()
            seconds = round(time.perf_counter() - started.pop(name), 1)
            if code != 0:
                failed.append(name)
            else:
                write_json(self._record(name), {"command": texts[name], "seconds": seconds})
        if failed:
            log = self._log(failed[0])
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

    def _log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.txt"

    # ---- The server

    def _start(self, name: str, words: list[str], processes: int = 1) -> None:
        """Let the server start a command as one or more processes, and start the server before the first one."""
        if self._server is None:
            self._channel, theirs = Pipe()
            # Processes that share cores are faster with one thread each than with OpenMP teams that compete.
            with theirs, open(self._log(_SERVER), "w") as log:
                self._server = subprocess.Popen(
                    [sys.executable, "-m", "ccella_fast.cli.forkserver", str(theirs.fileno())],
                    cwd=self.out, env={"OMP_NUM_THREADS": str(self.cores)} | os.environ, pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
        with self._named_loss():
            self._channel.send_bytes(json.dumps([name, words, f"logs/{name}.txt", processes]).encode())

    def _wait(self) -> tuple[str, int]:
        """The name and the exit code of the next command that ends."""
        with self._named_loss():
            name, code = json.loads(self._channel.recv_bytes())
        return name, code

    @contextmanager
    def _named_loss(self) -> Iterator[None]:
        """Say what has happened if the server does not answer."""
        try:
            yield
        except (EOFError, ConnectionError):
            why = "the process that starts the commands has ended; it may have been killed for lack of memory"
            raise CcellaError(why, path=self._log(_SERVER), fix="read this file, then run again") from None
