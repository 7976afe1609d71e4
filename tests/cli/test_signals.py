"""Signals end a command with one line and the code 128 + signal, without tracebacks of its workers, and nothing is lost."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ccella_fast import entrypoint
from ccella_fast.errors import Stopped
from study_fixtures import write_studies

# A shell reports 130 for both. `python -m` ends by the signal itself if it came while a string was executed (a namedtuple is).
INTERRUPTED = (130, -signal.SIGINT)
SETTINGS = ["model.variant=MAISI", "data.spacing=[0.5,0.5,0.6]", "data.dim=[96,96,64]"]


def start_prepare(studies: Path, out: Path) -> subprocess.Popen:
    """`ccella-fast prepare` with two workers, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "ccella_fast.cli",
        "prepare",
        "--data",
        str(studies),
        "--out",
        str(out),
        "--workers",
        "2",
    ]
    command += [part for value in SETTINGS for part in ("--set", value)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell that runs these tests in the background lets them, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, (143,))])
def test_prepare_ends_with_one_line(tmp_path: Path, number: int, codes: tuple[int, ...]):
    studies, out = write_studies(tmp_path / "studies", 40), tmp_path / "out"
    process = start_prepare(studies, out)
    while process.poll() is None and not (out / "cases").is_dir():
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode in codes, said
    assert not (out / "manifest.json").exists()  # control: it was not ready before the signal
    assert said.count("stopped; run the same command again to continue") == 1
    assert "Traceback" not in said and "Error" not in said
    assert not list(out.rglob(".lock")) and "\n" not in said.split("to continue\n")[1]


def test_ctrl_c_while_the_server_of_the_workers_starts_is_one_line(tmp_path: Path):
    """It imports for a second, in which Python would print a traceback of its own."""
    process = start_prepare(write_studies(tmp_path / "studies", 8), tmp_path / "out")
    while process.poll() is None and not any("forkserver" in line for line in children(process.pid)):
        time.sleep(0.005)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED and "Traceback" not in said and "KeyboardInterrupt" not in said, said
    assert said.count("stopped; run the same command again to continue") == 1


def children(parent: int) -> list[str]:
    """The command lines of the processes that a process has started."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [Path(f"/proc/{child}/cmdline").read_text() for child in found]


def test_sigterm_cleans_up_and_the_handler_is_restored(tmp_path: Path, capsys):
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)
        return 0

    assert entrypoint.run_command(work, debug=False) == 143
    assert cleaned and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "stopped; run the same command again to continue\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_says_how_it_was_stopped(number: int, capsys):
    def work() -> int:
        raise Stopped(number, "stopped after step 3")

    assert entrypoint.run_command(work, debug=False) == 128 + number
    assert capsys.readouterr().err == "stopped after step 3\n"


# Prints without a line break, then ends as a command does that has been sent SIGHUP; prints again when Python ends.
CLOSED_TERMINAL = """
import atexit, signal, sys, time
from ccella_fast import entrypoint
from ccella_fast.errors import Stopped

def hang_up(number, frame):
    raise Stopped(number)

def work():
    signal.signal(signal.SIGHUP, hang_up)
    atexit.register(print, "end")
    print("begin", flush=True)
    {during}
    while True:
        time.sleep(0.01)

sys.exit(entrypoint.run_command(work, debug=False))
"""


@pytest.mark.parametrize("during", ["sys.stdout.write('unfinished')", "pass"])
def test_a_closed_terminal_gives_the_exit_code_of_its_signal(during: str):
    """Python itself exits with 120 if it cannot write what is left in its buffers."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started with nohup
        os.execve(sys.executable, [sys.executable, "-c", CLOSED_TERMINAL.format(during=during)], buffered)
    assert os.read(terminal, 5) == b"begin"
    time.sleep(0.2)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
