"""A fixture for the tests of commands: a command runs in this process."""

from __future__ import annotations

import logging
import shlex

import pytest

from ccella_fast import cli


@pytest.fixture
def call(capsys, monkeypatch, tmp_path, places):
    """Run a command in this process: (exit code, stderr). Names in braces are paths of the fixture `places`."""
    import torch

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CCELLA_FAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("ccella_fast")
    before = logger.handlers, logger.level

    def run(command: str) -> tuple[int, str]:
        try:
            code = cli.main(shlex.split(command.format(tmp=tmp_path, **places)))
        except SystemExit as left:
            code = int(left.code or 0)
        return code, capsys.readouterr().err

    yield run
    logger.handlers, level = before
    logger.setLevel(level)
