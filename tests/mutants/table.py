"""Reads changes.toml: the tests that judge each file, and the changes that once went unnoticed."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path
from typing import Any

from operators import Mutant

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("changes.toml")


def _matches(file: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


class Table:
    """The content of changes.toml, limited to the files and folders in `only` if there are any.

    Attributes:
        tests: The tests of each file.
        changes: The hand-made changes.
        stale: Sentences about rows that no longer fit the code.
    """

    def __init__(self, only: list[str]):
        values = tomllib.loads(TABLE.read_text())
        self.tests: dict[str, list[str]] = {}
        self.stale: list[str] = []
        for row in values["group"]:
            files = [str(path.relative_to(ROOT)) for pattern in row["files"] for path in sorted(ROOT.glob(pattern))]
            if not files:
                self.stale.append(f"no file matches {row['files']}")
            self.tests = {
                file: row["tests"] for file in files
            } | self.tests  # the first row that matches a file applies
            self.stale += [f"{test} does not exist" for test in row["tests"] if not (ROOT / test).is_file()]
        self.changes = [change for row in values.get("change", []) if (change := self._change(row))]
        if only:
            within = [f"{name.rstrip('/')}*" for name in only]
            self.tests = {file: tests for file, tests in self.tests.items() if _matches(file, within)}
            self.changes = [change for change in self.changes if _matches(change.file, within)]

    def _change(self, row: dict[str, Any]) -> Mutant | None:
        path = ROOT / row["file"]
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(row["old"])) != 1:
            self.stale.append(
                f"change {row['name']}: its old text occurs {count} times in {row['file']}, expected: once"
            )
            return None
        start = text.index(row["old"])
        tests = tuple(row.get("tests", ()))
        if not tests and row["file"] not in self.tests:
            self.stale.append(
                f"change {row['name']}: no group matches {row['file']}, so the change must name its tests"
            )
        self.stale += [f"change {row['name']}: {test} does not exist" for test in tests if not (ROOT / test).is_file()]
        line, changed = text.count("\n", 0, start) + 1, text.replace(row["old"], row["new"])
        return Mutant(row["file"], line, row["old"], row["new"], changed, row["name"], tests)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that judge a change."""
        return list(mutant.tests) or self.tests[mutant.file]
