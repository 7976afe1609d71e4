"""Commands of a comparison: each runs once and as if it had been started alone, and none goes on without the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from ccella_fast.comparison.stages import Stages
from ccella_fast.errors import CcellaError

PROGRAM = """
import sys
from pathlib import Path
from ccella_fast.comparison.stages import Stages
from ccella_fast.entrypoint import run_command
def work():
    with Stages(Path(sys.argv[1]), 2) as stages:
        stages.run({name: ["phantom", "--num_studies", 9999, "--out", name] for name in "abc"})
raise SystemExit(run_command(work, debug=False))
"""


def draw(out: str, *more: object) -> list[object]:
    return ["phantom", "--out", out, "--num_studies", 1, *more]


def test_commands_run_once_and_a_failure_is_named_and_repeated(tmp_path):
    with Stages(tmp_path, 2) as stages:
        stages.run({"first": draw("studies")})
        drawn = tmp_path / "studies/phantom-0000/t2w.nii.gz"
        drawn.unlink()
        stages.run({"first": draw("studies")})
        assert not drawn.exists()  # it had finished
        stages.run({"first": draw("studies", "--seed", 1)})
        assert drawn.exists()  # it is another command
        with pytest.raises(CcellaError, match="'second' has failed"):
            stages.run({"second": draw("other", "--seed", -1)})
        assert stages.seconds().keys() == {"first"}


def test_a_command_behaves_as_if_it_had_been_started_alone(tmp_path, monkeypatch):
    """Exit code, everything that is printed, and the number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = str(os.cpu_count())
    commands = {
        "value": ["phantom", "--out", "a", "--seed", "-1"],
        "option": ["phantom", "--ot", "a"],
        "data": ["prepare", "--data", "none", "--out", "b"],
        "machine": ["env", "--json"],
    }
    with Stages(tmp_path, 1) as stages:
        for name, words in commands.items():
            alone = subprocess.run(
                [sys.executable, "-m", "ccella_fast.cli", *words],
                cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": cores},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            stages._start(name, words)
            assert stages._wait() == (name, alone.returncode)
            assert (tmp_path / "logs" / f"{name}.txt").read_text() == alone.stdout
        assert json.loads(alone.stdout)["cpu"]["torch_threads"] == os.cpu_count()
        stages._start("debug", [*commands["data"], "--debug"])
        assert stages._wait() == ("debug", 1)
        assert (tmp_path / "logs/debug.txt").read_text().startswith("Traceback")


def test_processes_share_a_command(tmp_path):
    """Torchrun starts them, one command at a time; that one of them fails is not lost."""
    with Stages(tmp_path, 2) as stages:
        stages.run({name: ["env", "--json"] for name in ("first", "second")}, shared=True)
        for name in ("first", "second"):
            assert (tmp_path / f"logs/{name}.txt").read_text().count('"torch_threads"') == 2
        with pytest.raises(CcellaError, match="'third' has failed"):
            stages.run({"third": ["env", "--no_such_option"]}, shared=True)


def test_what_is_imported_before_the_forks_starts_nothing():
    """No thread, no process, no CUDA; and not what chooses a device when it is imported."""
    program = (
        "import os, sys, torch\n"
        "from ccella_fast.cli.forkserver import import_modules\n"
        "import_modules()\n"
        "def count(): return len(os.listdir('/proc/self/task'))\n"
        "children = open(f'/proc/self/task/{os.getpid()}/children').read()\n"
        "print(count(), children, torch.cuda.is_initialized(), 'deepspeed' in sys.modules, 'sympy' in sys.modules)\n"
        "torch.ones(1 << 20).exp()\n"
        "print(count())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    *_, imported, computed = found.stdout.splitlines()
    assert imported.split() == ["1", "False", "False", str(not torch.backends.cuda.is_built())]
    assert int(computed) > 1


@pytest.mark.parametrize(
    ("victim", "number", "code"),
    [("program", signal.SIGTERM, 143), ("program", signal.SIGKILL, -9), ("server", signal.SIGKILL, 1)],
)
def test_an_interrupted_run_leaves_no_command_behind(tmp_path: Path, victim, number, code):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: all((tmp_path / name / "phantom-0000").exists() for name in "ab"))
    (server,) = psutil.Process(process.pid).children()
    assert len(server.children()) == 2 and len(left_in(tmp_path)) == 3
    os.kill({"program": process.pid, "server": server.pid}[victim], number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert ("may have been killed for lack of memory" in said) == (victim == "server")
    wait_for(lambda: not left_in(tmp_path))
    assert not (tmp_path / "c").exists() and not list((tmp_path / "done").iterdir())


def left_in(folder: Path) -> list[psutil.Process]:
    """The processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(process)
    return found


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
