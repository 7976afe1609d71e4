"""A comparison that is stopped in any of its stages continues, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ccella_fast.storage import read_json
from soak import Trial, trials
from training_fixtures import ROOT, environment

STOPS = 4  # of a comparison
STAGES = 12  # that one starts until it is stopped, at most
# What is done -> the exit code of `compare`. The server is what commands are forks of.
STOPPED = {
    "kill all": -9, "kill compare": -9, "kill server": 1, "kill command": 1, "terminate compare": 143, "terminate all": 143,
}  # fmt: skip


@pytest.mark.soak
def test_a_comparison_that_is_stopped_anywhere_continues(tmp_path):
    """Signals to all of its processes or to one."""
    unbroken = Comparison(tmp_path / "unbroken")
    unbroken.wait(0)
    expected = found_in(unbroken.folder)
    for trial in trials("compare"):
        with trial, ExitStack() as ends:
            folder = tmp_path / str(trial.number)
            for _ in range(STOPS):
                comparison = Comparison(folder)
                ends.callback(comparison.end)
                stop(comparison, trial)
            comparison = Comparison(folder)
            ends.callback(comparison.end)
            comparison.wait(0)
            assert found_in(folder) == expected
            shutil.rmtree(folder)


class Comparison:
    """`compare --preset smoke`, which begins or continues in its folder."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder.with_suffix(".txt")
        command = [sys.executable, "-m", "ccella_fast.cli", "compare", "--preset", "smoke", "--jobs", "2"]
        command += ["--config", ROOT / "configs" / "demo.json", "--out", folder]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*map(str, command)], env=environment(), stdout=log, stderr=log, start_new_session=True
            )

    def stages(self) -> int:
        """How many stages have been started."""
        return len(re.findall(r"^\d\d:\d\d:\d\d \S+$", self.log.read_text(), flags=re.MULTILINE))

    def processes(self) -> list[psutil.Process]:
        """Those that work in the folder: the server, the commands, and what these have started."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        """Kill what is left of a trial that has failed."""
        self.process.kill()
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def wait(self, code: int) -> None:
        """Wait for the end, with this exit code; soon after it no process is left."""
        assert self.process.wait() == code, self.log.read_text()[-3000:]
        end = time.monotonic() + 70
        while left := self.processes():
            assert time.monotonic() < end, left
            time.sleep(0.1)


def stop(comparison: Comparison, trial: Trial) -> None:
    """Stop it at a random instant of a random stage."""
    number, delay = trial.random.randrange(1, STAGES), 3 * trial.random.random()
    way, place = trial.random.choice([*STOPPED]), trial.random.random()
    main = psutil.Process(comparison.process.pid)
    while comparison.stages() < number:
        assert comparison.process.poll() in (None, 0)
        if comparison.process.poll() == 0:  # fewer stages were left
            return None
        time.sleep(0.05)
    end = time.monotonic() + delay
    while time.monotonic() < end or not (
        commands := [each for server in main.children() for each in server.children()]
    ):
        if comparison.process.poll() is not None:
            return comparison.wait(0)
        time.sleep(0.05)
    what, target = way.split()
    victim = {
        "all": -comparison.process.pid, "compare": comparison.process.pid, "server": main.children()[0].pid,
        "command": commands[int(place * len(commands))].pid,
    }[target]  # fmt: skip
    os.kill(victim, signal.SIGKILL if what == "kill" else signal.SIGTERM)
    trial.counts[way.replace(" ", "_")] += 1
    comparison.wait(STOPPED[way])
    return None


def found_in(folder: Path) -> dict[str, Any]:
    """Protocol, results, hashes of volumes and weights, and the names of all files but those of logs."""
    record = read_json(folder / "comparison.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in ("logs", "tensorboard")]
    hashed = [path for path in files if path.name.endswith((".nii.gz", ".safetensors"))]
    hashed += [folder / name for name in ("protocol.json", "table.md", "table.csv", "table.tex")]
    return {
        "comparison": {name: value for name, value in record.items() if name not in ("seconds", "environment")},
        "hashes": {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in hashed},
        "names": sorted(str(path.relative_to(folder)) for path in files),
    }
