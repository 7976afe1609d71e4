"""Feeds damaged inputs to a reader in a process of its own, watches that process, and judges what becomes of each input.

An input may be refused (a CcellaError of at most five lines and LETTERS characters, without the canary), or be read with the
same content. It may be read with another content only if no checksum covers what was changed. Everything else is a failure:
another exception, a crash, more than SECONDS of computing or BYTES of memory, a slice that is lost without a note.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from target import CANARY, Content, Target, valid_files, write_files

SECONDS, BYTES, HANGS = 10, 2**30, 60  # of the CPU; above the memory before; of the clock
LETTERS = 4000  # of a message
_WRITING = threading.Lock()  # libraries such as transformers cannot be imported by two threads at a time
FAILURES = (
    "internal",
    "crash",
    "hang",
    "slow",
    "memory",
    "silent change",
    "lost slices",
    "leak",
    "long message",
    "wrote",
    "valid refused",
)
VALID = -1  # the index of the input that is not damaged


class Result(NamedTuple):
    """What became of one input: `outcome` is "refused", "same", "changed" or one of FAILURES."""

    target: str
    index: int
    mutation: str
    outcome: str
    detail: str = ""


def mutate(target: Target, seed: int, index: int, files: dict[str, bytes]) -> tuple[dict[str, bytes], str, bool]:
    """Input number `index`: its files, the kind of mutation, and whether a checksum covers it. Depends on the seed alone."""
    rng = np.random.default_rng([seed, index, *target.name.encode()])
    kind = target.mutations[index % len(target.mutations)]
    return kind.apply(rng, files), kind.name, kind.guarded


def run_inputs(
    inputs: list[tuple[str, int]], *, seed: int, keep: Path | None = None, module: str = "targets", hangs: float = HANGS
) -> list[Result]:
    """Try inputs, (target, index), in a child process, which is started again after a crash.

    Args:
        inputs: The inputs.
        seed: Seed of the mutations.
        keep: Folder to which failed inputs are copied.
        module: The module whose TARGETS has the targets.
        hangs: Seconds without an answer after which the child is killed.
    """
    results: list[Result] = []
    waiting = list(inputs)
    context = multiprocessing.get_context("spawn")
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_serve, args=(module, seed, waiting, sender), daemon=True)
        child.start()
        sender.close()
        done = list(_receive(receiver, child, hangs))
        child.join()
        waiting = waiting[len(done) :]
        results += done
    targets = importlib.import_module(module).TARGETS
    for result in results:
        if keep is not None and result.outcome in FAILURES:
            with _WRITING:
                files = valid_files(targets[result.target])
            write_files(
                keep / result.target / str(result.index), mutate(targets[result.target], seed, result.index, files)[0]
            )
    return results


def judge(target: Target, folder: Path, base: Content, guarded: bool) -> tuple[str, str]:
    """Read the input in `folder`; returns the outcome and, for failures and refusals, the message."""
    from ccella_fast.errors import CcellaError

    before, start = _peak(reset=True), time.process_time()
    try:
        content = target.read(folder)
        outcome, detail = _compare(content, base, guarded), ""
    except CcellaError as error:
        outcome, detail = "refused", str(error)
    except MemoryError:
        outcome, detail = "memory", "MemoryError"
    except Exception as error:
        outcome, detail = "internal", f"{type(error).__name__}: {error}"
    if CANARY in detail:
        outcome = "leak"
    elif outcome == "refused" and (len(detail.splitlines()) > 5 or len(detail) > LETTERS):
        outcome = "long message"
    elif time.process_time() - start > SECONDS:
        outcome = "slow"
    elif _peak() - before > BYTES:
        outcome = "memory"
    return outcome, detail


def run_command(target: Target, seed: int, index: int) -> Result:
    """Try one input through the command that uses it: exit code, message, and nothing written if it is refused.

    The input VALID must be accepted: a command that refuses everything would say nothing about damage.
    """
    result = _run_command(target, seed, index)
    if index == VALID and result.outcome != "accepted":
        return result._replace(outcome="valid refused")
    return result


def _run_command(target: Target, seed: int, index: int) -> Result:
    assert target.command is not None
    with _WRITING:
        files = valid_files(target)
    changed, kind, _ = (files, "none", False) if index == VALID else mutate(target, seed, index, files)
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "input", Path(temporary) / "out"
        write_files(folder, changed)
        command = [sys.executable, "-m", *target.command(folder, out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10 * HANGS, errors="replace")
        except subprocess.TimeoutExpired:
            return Result(target.name, index, kind, "hang", "command")
        error = done.stderr[done.stderr.rfind("error: ") :] if "error: " in done.stderr else ""
        if "Traceback" in done.stderr or "internal" in done.stderr or done.returncode in (1, *range(-64, 0)):
            return Result(target.name, index, kind, "internal", done.stderr[-500:])
        if CANARY in done.stderr + done.stdout:
            return Result(target.name, index, kind, "leak", done.stderr[-500:])
        if done.returncode == 0:
            return Result(target.name, index, kind, "accepted")
        if not error or len(error.strip().splitlines()) > 5:
            return Result(target.name, index, kind, "long message", done.stderr[-500:])
        if out.exists() and any(path.is_file() and path.stat().st_size for path in out.rglob("*")):
            return Result(target.name, index, kind, "wrote", error)
        return Result(target.name, index, kind, "refused", error)


def tally(results: list[Result]) -> Counter[str]:
    """Number of results per outcome."""
    return Counter(result.outcome for result in results)


def _compare(content: Content, base: Content, guarded: bool) -> str:
    if content.digest == base.digest:
        return "same"
    if content.slices < base.slices and not content.noted:
        return "lost slices"
    return "silent change" if guarded else "changed"


def _serve(
    module: str, seed: int, inputs: list[tuple[str, int]], sender: multiprocessing.connection.Connection
) -> None:
    targets = importlib.import_module(module).TARGETS
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("ccella_fast").setLevel(logging.ERROR)
    valid: dict[str, tuple[dict[str, bytes], Content]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "input"
        for name, index in inputs:
            target = targets[name]
            if name not in valid:
                files = valid_files(target)
                write_files(folder, files)
                valid[name] = files, target.read(folder)
                shutil.rmtree(folder)
            files, base = valid[name]
            changed, kind, guarded = mutate(target, seed, index, files)
            write_files(folder, changed)
            sender.send((name, index, kind))
            sender.send(Result(name, index, kind, *judge(target, folder, base, guarded)))
            shutil.rmtree(folder)
    sender.send(None)


def _receive(receiver: Any, child: Any, hangs: float) -> Iterator[Result]:
    """The results of a child process until it ends; a crash or a hang is the result of the input that it was working on."""
    working: tuple[str, int, str] | None = None
    while True:
        if not receiver.poll(hangs):
            child.kill()
            assert working is not None, "the child process does not start"
            yield Result(*working, "hang", f"more than {hangs} s")
            return
        try:
            message = receiver.recv()
        except EOFError:
            child.join()
            assert working is not None, (
                "a valid input is refused, or a mutation cannot be made: see the traceback above"
            )
            yield Result(*working, "crash", f"exit code {child.exitcode}")
            return
        if message is None:
            return
        if isinstance(message, Result):
            working = None
            yield message
        else:
            working = message


def _peak(*, reset: bool = False) -> int:
    """Largest memory of this process since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def save(path: Path, results: dict[str, list[Result]], **facts: Any) -> None:
    """Write the outcomes as JSON: a table, and every failure."""
    table = {name: dict(sorted(tally(each).items())) for name, each in results.items()}
    failed = [result._asdict() for each in results.values() for result in each if result.outcome in FAILURES]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "outcomes": table, "failures": failed}, indent=1) + "\n")
