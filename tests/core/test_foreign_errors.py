"""Errors of Python and of libraries: real ones where they can be provoked, else the texts that the libraries raise."""

from __future__ import annotations

import errno
import importlib
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from ccella_fast.foreign_errors import translate


def raised(work) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        work()
    return caught.value


def needs_sentencepiece() -> None:
    raise ImportError("T5Tokenizer requires the SentencePiece library but it was not found: canary")


def cuda_out_of_memory() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79 GiB of which 1.25 GiB is free."
    )


def shared_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        torch.distributed.TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True)


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [
        (lambda: np.empty(2**60, np.uint8), 2, ["memory does not suffice: 1.00 EiB more were requested", "remedy"]),
        (lambda: torch.empty(2**60, dtype=torch.uint8), 2, ["1048576 TiB more were requested", "free", "remedy"]),
        (cuda_out_of_memory, 2, ["2.50 GiB more were requested, 1.25 GiB are free", "remedy"]),
        (lambda: importlib.import_module("no_such_package.part"), 2, ["'no_such_package'", "pip install no_such_package"]),
        (needs_sentencepiece, 2, ["'sentencepiece'", 'pip install "ccella-fast[t5]"']),
        (lambda: socket.create_connection(("127.0.0.1", 9), timeout=1), 2, ["download failed", "text.encoder"]),
        (shared_port, 2, ["port", "in use", "--master_port"]),
        (lambda: b"\xff".decode(), 3, ["not UTF-8"]),
        (lambda: Path("/no/such/file").read_bytes(), 3, ["/no/such/file", "No such file"]),
        (lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full", "a/b")), 5, ["disk is full", "a/b"]),
        (lambda: (_ for _ in ()).throw(OSError(errno.EMFILE, "many")), 2, ["too many files", "ulimit -n"]),
    ],
    ids=[
        "numpy-memory", "torch-memory", "cuda-memory", "package", "sentencepiece", "connection", "port", "utf-8", "file",
        "disk-full", "open-files",
    ],
)  # fmt: skip
def test_what_a_user_can_correct_is_not_called_a_bug(work, code, words):
    message = translate(raised(work), remedies="remedy")
    assert message is not None and message.exit_code == code
    assert all(word in str(message) for word in words), str(message)
    assert "canary" not in str(message) and len(str(message).splitlines()) <= 5


@pytest.mark.parametrize(
    "work",
    [
        lambda: {}["missing"],
        lambda: torch.zeros(2) + torch.zeros(3),
        lambda: importlib.import_module("ccella_fast.no_such_module"),
        lambda: torch.absent,
    ],
    ids=["key", "shapes", "own-module", "attribute"],
)
def test_a_bug_stays_a_bug(work):
    assert translate(raised(work), remedies="remedy") is None
