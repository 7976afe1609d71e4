"""Mutation testing: change a copy of the code in one place at a time and report the changes that the tests do not notice.

    python tests/mutants/run.py [--minutes 60] [--seed 0] [FILE_OR_FOLDER ...]

The changes of changes.toml come first, then a random sample of generated changes from each file in turn. The same seed and
code give the same sample. All results are written to out/mutants/results.json. Surviving changes do not affect the exit code,
because a survivor has to be read: it is a gap in the tests, or does not change the behavior. The exit code is 1 if the tests
fail on the unchanged code or if changes.toml is stale.

Existing tools do not fit: mutmut leaves out decorated functions and does not support tests that call the code in another
process, as under `deepspeed`; cosmic-ray drops neither statements nor arguments, the changes that went unnoticed here. Neither
repeats given changes, selects tests by file and respects a time limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from copies import PROCESSES, Copies
from operators import Mutant, mutants
from table import ROOT, TABLE, Table

OUT = ROOT / "out" / "mutants"
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"


def sample(files: list[str], seed: int) -> list[Mutant]:
    """Generated changes in the order in which they are tried: one from each file, then a second from each, and so on."""
    generator = random.Random(seed)
    queues = [mutants(file, (ROOT / file).read_text()) for file in sorted(files)]
    for changes in queues:
        generator.shuffle(changes)
    generator.shuffle(queues)
    return [mutant for turn in itertools.zip_longest(*queues) for mutant in turn if mutant]


def baseline(copies: Copies, pool: ThreadPoolExecutor, tests: set[str], end: float) -> dict[str, float]:
    """Time every test file on the unchanged code, in seconds; ends the program if one does not pass."""

    def timed(test: str) -> tuple[str, bool | None, str, float]:
        start = time.monotonic()
        passed, output = copies.passes([test], end - time.monotonic())
        return test, passed, output, time.monotonic() - start

    seconds = {}
    for done in as_completed([pool.submit(timed, test) for test in sorted(tests)]):
        test, passed, output, seconds[test] = done.result()
        if passed is None:
            raise SystemExit(
                f"the time limit was reached before {test} had run on the unchanged code; increase --minutes"
            )
        if not passed:
            raise SystemExit(
                f"{output[-3000:]}\n{test} does not pass on the unchanged code, so it cannot judge a change"
            )
        print(f"  {seconds[test]:6.1f} s  {test}", flush=True)
    return seconds


def judge(copies: Copies, mutant: Mutant, tests: list[str], seconds: dict[str, float], end: float) -> str | None:
    """The outcome of a change; None if the time limit was reached first."""
    tests = sorted(tests, key=lambda test: seconds[test])
    allowed, left = 60 + 3 * sum(seconds[test] for test in tests), end - time.monotonic()
    if left <= 0 or copies.stopped.is_set():
        return None
    passed, _ = copies.passes(tests, min(allowed, left), mutant)
    if copies.stopped.is_set() or (passed is None and left < allowed):
        return None
    return {True: SURVIVED, False: KILLED, None: TIMED_OUT}[passed]


def run(copies: Copies, chosen: list[Mutant], table: Table, end: float, results: list[dict[str, Any]]) -> None:
    """Try the changes in their order until the time limit; each result is appended to `results`."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        try:
            print("the tests on the unchanged code:", flush=True)
            seconds = baseline(copies, pool, {test for mutant in chosen for test in table.tests_of(mutant)}, end)
            broken = chosen[0]._replace(text="raise ImportError\n")
            if copies.passes(table.tests_of(broken), end - time.monotonic(), broken)[0]:
                raise SystemExit(
                    f"the tests of {broken.file} pass although it cannot be imported: they import another copy of the code"
                )
            tries = {pool.submit(judge, copies, each, table.tests_of(each), seconds, end): each for each in chosen}
            for done in as_completed(tries):
                mutant, outcome = tries[done], done.result()
                if outcome:
                    result = {key: value for key, value in mutant._asdict().items() if key != "text"}
                    results.append(result | {"outcome": outcome, "tests": table.tests_of(mutant)})
                    print(f"  {outcome:9}  {mutant.file}:{mutant.line}  {mutant.name}", flush=True)
        except BaseException:
            copies.stop()
            pool.shutdown(cancel_futures=True)
            raise


def report(results: list[dict[str, Any]]) -> str:
    """A table by file, followed by every change that survived."""
    counts = Counter((result["file"], result["outcome"]) for result in results)
    outcomes = (KILLED, SURVIVED, TIMED_OUT)
    lines = ["", f"{'file':44}" + "".join(f"{outcome:>11}" for outcome in outcomes)]
    for file in sorted({result["file"] for result in results}):
        lines.append(f"{file:44}" + "".join(f"{counts[file, outcome]:11}" for outcome in outcomes))
    totals = Counter(result["outcome"] for result in results)
    lines += [f"{'all':44}" + "".join(f"{totals[outcome]:11}" for outcome in outcomes), ""]
    for result in sorted(results, key=lambda result: (result["file"], result["line"])):
        if result["outcome"] == SURVIVED:
            old, new = (" ".join(result[key].split()) for key in ("old", "new"))
            lines.append(f"{result['file']}:{result['line']}  {result['name']}\n    - {old}\n    + {new}")
    return "\n".join(lines)


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Report the small changes of the code that the tests do not notice.")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="time limit, which includes the tests on the unchanged code (default 60)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample of generated changes (default 0)")
    parser.add_argument(
        "only", nargs="*", metavar="FILE_OR_FOLDER", help="change only these, for example ccella_fast/data"
    )
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    table = Table(args.only)
    if table.stale:
        sys.exit("\n".join(f"{TABLE.name}: {why}" for why in table.stale) + "\nrewrite these rows for the current code")
    chosen = table.changes + sample(list(table.tests), args.seed)
    if not chosen:
        sys.exit(f"{TABLE.name} does not name a file in {' '.join(args.only)}")
    results: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            run(Copies(Path(folder)), chosen, table, end, results)
    except KeyboardInterrupt:
        print("interrupted; the results so far:")
        return 130
    finally:
        OUT.mkdir(parents=True, exist_ok=True)
        values = {"seed": args.seed, "minutes": args.minutes, "candidates": len(chosen), "results": results}
        (OUT / "results.json").write_text(json.dumps(values, indent=1))
        print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
