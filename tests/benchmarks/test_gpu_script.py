"""`make gpu`, rehearsed on a CPU: every phase runs, one that hangs is stopped with its workers, what was written is kept."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpu
import registry

ROOT = Path(__file__).resolve().parents[2]


def test_the_rehearsal_runs_every_phase(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--minutes", "5", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "measured.json").read_text())
    memory, kernel = record["cases"]
    assert (memory["name"], kernel["name"]) == gpu.REHEARSED and memory["status"] == kernel["status"] == "ok"
    assert {"eager", "ours"} <= {*kernel["sides"]} and {"apex", "Liger"} <= {*kernel["missing"]}
    assert "tests/gpu/test_model.py" in (tmp_path / "out" / "tests.log").read_text()
    assert "candidates" in (tmp_path / "out" / "tuning.log").read_text()


@pytest.mark.parametrize(
    "command", ["benchmarks/run.py --list", "-m pytest -q --collect-only -m gpu tests/gpu tests/kernels"]
)
def test_a_bare_machine_with_the_wheels_has_every_package_that_is_imported(tmp_path, command):
    """Of what other extras install, `make gpu` imports nothing, except in tests that are then skipped."""
    lacking = ["SimpleITK", "diffusers", "highdicom", "pydicom", "scipy", "skimage", "xformers"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({lacking}))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = functools.partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    done = run([sys.executable, *command.split()])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert run([sys.executable, "-c", "import SimpleITK"]).returncode == 1  # negative control


def test_a_phase_that_hangs_is_stopped_with_its_workers(tmp_path, capsys):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    ended = gpu.run_phase(gpu.Phase("hangs", 1.0, "", [str(worker)]), tmp_path, 3.0)
    assert ended == "stopped after 3 s"
    child = int((tmp_path / "hangs.log").read_text().split()[1])
    for _ in range(100):  # until the child that was killed has been reaped
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"process {child} still runs")
    assert f"child {child}" in capsys.readouterr().out


def test_a_failed_phase_gives_exit_code_1_and_the_others_run(tmp_path, monkeypatch, capsys):
    phases = [gpu.Phase("bad", 0.5, "-c", ["raise SystemExit(3)"]), gpu.Phase("good", 1.0, "-c", ["print('measured')"])]
    monkeypatch.setattr(gpu, "phases", lambda *_, **__: phases)
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)  # those of the checkout are for another version of Python
    assert gpu.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    out = capsys.readouterr().out
    assert "bad: exit code 3" in out and "good: exit code 0" in out and "not complete: bad" in out
    monkeypatch.setattr(gpu, "phases", lambda *_, **__: phases[1:])
    assert gpu.main(["--out", str(tmp_path), "--minutes", "1"]) == 0


def test_every_case_that_is_measured_exists():
    assert {*gpu.CASES} <= {case.name for case in registry.registry()}
