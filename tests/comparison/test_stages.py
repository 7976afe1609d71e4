"""Commands of a comparison: each runs once, a failure is named, and none goes on without the others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ccella_fast.comparison.stages import Stages
from ccella_fast.errors import CcellaError


def draw(out: str, *more: object) -> list[object]:
    return ["phantom", "--out", out, "--num_studies", 1, *more]


def test_commands_run_once_and_a_failure_is_named_and_repeated(tmp_path):
    stages = Stages(tmp_path, 2)
    stages.run({"first": draw("studies")})
    drawn = tmp_path / "studies/phantom-0000/t2w.nii.gz"
    drawn.unlink()
    stages.run({"first": draw("studies")})
    assert not drawn.exists()  # it had finished
    stages.run({"first": draw("studies", "--seed", 1)})
    assert drawn.exists()  # it is another command
    with pytest.raises(CcellaError, match="'second' has failed"):
        stages.run({"second": draw("other", "--seed", -1)})
    assert "seed" in (tmp_path / "logs/second.txt").read_text()
    assert stages.seconds().keys() == {"first"}


def test_an_interrupted_run_leaves_no_command_behind(tmp_path: Path):
    program = (
        "from pathlib import Path\n"
        "from ccella_fast.comparison.stages import Stages\n"
        "from ccella_fast.entrypoint import run_command\n"
        f"stages = Stages(Path({str(tmp_path)!r}), 2)\n"
        "draw = ['phantom', '--num_studies', 9999, '--out']\n"
        "def work():\n"
        "    stages.run({name: [*draw, name] for name in ('a', 'b', 'c')})\n"
        "raise SystemExit(run_command(work, debug=False))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not all((tmp_path / name / "phantom-0000").exists() for name in "ab"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    running = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            running.append(path.read_bytes().split(b"\0"))
    assert not [words for words in running if b"9999" in words and b"phantom" in words]
    assert not (tmp_path / "c").exists() and not list((tmp_path / "done").iterdir())
