"""run_status.json: what a run is doing and how it ended, with the exit code, which some launchers hide."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

from ccella_fast.entrypoint import ending_of
from ccella_fast.errors import CcellaError, ConfigError, DiskError
from ccella_fast.storage import read_json, write_json

NAME = "run_status.json"


class RunStatus:
    """Context manager that records how the block ends, also when an error or a signal ends it.

    A new run has no file before `begin`, so that a start that fails leaves nothing. In the folder of an earlier run an ending
    before `begin` is recorded too, unless a ConfigError refused the command: then the file still describes that run.

    Args:
        run: the run's folder.
        writes: False on all processes but rank 0.

    Attributes:
        step: of the newest checkpoint.
        total_steps: length of the run.
        exit_code: of the process, if no error ends the block.
        quarantined: ids of the studies that are left out, see `training.quarantine`.
        has_begun: whether endings are recorded.
    """

    def __init__(self, run: Path, *, writes: bool):
        self.run, self._writes, self.has_begun = run, writes, False
        self.step, self.total_steps, self.exit_code = 0, 0, 0
        self.quarantined: list[str] = []

    def __enter__(self) -> RunStatus:
        before = read_status(self.run)
        self._is_new = not before
        self.step, self.total_steps = before.get("step", 0), before.get("total_steps", 0)
        self.quarantined = before.get("quarantined", [])
        return self

    def begin(self) -> None:
        """Record that the run is running; from here on, every ending is recorded."""
        self.has_begun = True
        if self._writes:
            self._write("running", None, None)

    def saved(self, step: int) -> None:
        """Record that the checkpoint of a step has been published."""
        self.step = step
        with contextlib.suppress(DiskError):  # the checkpoint is complete; the next one reports a full disk
            if self._writes:
                self._write("running", None, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.has_begun and (error is None or isinstance(error, ConfigError) or self._is_new):
            return
        if error is not None:
            self.record(error, writes=self._writes)
        elif self._writes:
            self._write("finished" if self.exit_code == 0 else "terminated", self.exit_code, None)

    def record(self, error: BaseException, *, writes: bool = True) -> None:
        """Record the error or the signal that ends the run. writes: False on a process that leaves this to another one."""
        code, why = ending_of(error)
        with contextlib.suppress(DiskError):  # a full disk must not hide what ended the run
            if writes:
                self._write("terminated" if isinstance(error, KeyboardInterrupt) else "failed", code, why)

    def _write(self, state: str, exit_code: int | None, why: str | None) -> None:
        facts = {"state": state, "step": self.step, "total_steps": self.total_steps, "exit_code": exit_code, "why": why}
        facts["quarantined"] = self.quarantined
        write_json(self.run / NAME, facts)


def read_status(run: Path) -> dict[str, Any]:
    """The content of run_status.json; empty if there is none, or if it is damaged."""
    with contextlib.suppress(CcellaError):
        status = read_json(run / NAME)
        return status if isinstance(status, dict) else {}
    return {}
