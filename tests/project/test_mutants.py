"""tests/mutants/run.py on a package in which one function is tested by nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "mutants"
CODE = """def larger(a, b):
    return a if a > b else b


def untested(a):
    return a + a
"""
OTHER = "def half(a):\n    return a / 2\n"
TEST = """from toy.code import larger
from toy.other import half


def test_half():
    assert half(6) == 3


def test_larger():
    assert larger(1, 2) == 2 and larger(3, 2) == 3 and larger(2, 2) == 2
"""
TABLE = """
[[group]]
files = ["toy/*.py"]
tests = ["tests/test_code.py"]

[[change]]
name = "smaller"
file = "toy/code.py"
old = "if a > b"
new = "if a < b"
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    files = {
        "toy/__init__.py": "",
        "toy/code.py": CODE,
        "toy/other.py": OTHER,
        "tests/test_code.py": TEST,
        ".gitignore": "out\n__pycache__\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(HERE, tmp_path / "tests" / "mutants", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "mutants" / "changes.toml").write_text(TABLE)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    return tmp_path


def start(toy: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {
        "TMPDIR": str(toy.parent),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, str(toy / "tests" / "mutants" / "run.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "out" not in path.relative_to(folder).parts)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_no_test_covers_survives_and_what_one_covers_does_not(toy):
    before = tree(toy)
    process = start(toy, "--minutes", "2")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    results = json.loads((toy / "out" / "mutants" / "results.json").read_text())["results"]
    outcomes = {(result["old"], result["new"]): result["outcome"] for result in results}
    assert outcomes == {
        ("if a > b", "if a < b"): "killed",
        ("return a if a > b else b", "return a if a >= b else b"): "survived",  # no change of behaviour
        ("return a if a > b else b", "return a if not (a > b) else b"): "killed",
        ("return a + a", "return a - a"): "survived",
        ("return a / 2", "return a * 2"): "killed",
        ("return a / 2", "return a / 3"): "killed",
    }
    assert "toy/code.py:6" in said and "- return a + a\n    + return a - a" in said
    assert "- return a if a > b else b\n    + return a if not" not in said  # what was killed is not listed
    assert tree(toy) == before


def test_an_interrupted_run_leaves_the_tree_as_it_was_and_nothing_that_runs(toy):
    waits = "    assert larger(1, 2) == 2 or Path('pid').write_text(str(os.getpid())) and time.sleep(600)\n"
    (toy / "tests" / "test_code.py").write_text(
        f"import os, time\nfrom pathlib import Path\n{TEST[: TEST.index('    assert')]}{waits}"
    )
    before = tree(toy)
    process = start(toy, "--minutes", "5")
    while not (found := [file for file in toy.parent.glob("mutants-*/*/*/pid") if file.read_text()]):
        assert process.poll() is None
        time.sleep(0.05)
    pid = int(found[0].read_text())
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert tree(toy) == before
    assert not list(toy.parent.glob("mutants-*"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_row_that_no_longer_fits_the_code_is_named(toy):
    (toy / "toy" / "code.py").write_text(CODE.replace("a > b", "b < a"))
    process = start(toy)
    said, _ = process.communicate()
    assert process.returncode == 1
    assert "change smaller: its old text occurs 0 times in toy/code.py, expected: once" in said


def test_tests_that_fail_without_a_change_judge_nothing(toy):
    (toy / "tests" / "test_code.py").write_text(TEST.replace("== 2 and", "== 1 and"))
    process = start(toy)
    said, _ = process.communicate()
    assert process.returncode == 1
    assert "tests/test_code.py does not pass on the unchanged code" in said


def test_every_row_of_our_own_table_fits_the_code():
    code = "from table import Table; print(*Table([]).stale, sep='\\n', end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout == ""
