"""Changes the code one place at a time, in a copy, and reports which changes the tests do not notice.

A list of our own with a runner: mutmut leaves out decorated functions and sees no test that calls the code in another process,
as under `deepspeed`; cosmic-ray drops neither statements nor arguments, which is what went unnoticed here. Neither of them also
repeats given changes, chooses the tests by file and keeps to a number of minutes.

python tests/mutants/run.py [--minutes 60] [--seed 0] [FILE_OR_FOLDER ...]

First the changes of changes.toml, then generated ones: a sample drawn by the seed, from each file in turn. The same seed over
the same code draws the same. All are kept in out/mutants/results.json. Exit code 0 whatever survives: a survivor is to be read,
as it is a hole in the tests or no change of behaviour at all. 1: the tests fail on the unchanged code or changes.toml is stale.
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
    """Generated changes in the order in which they are tried: one of each file, then a second of each, and so on."""
    chance = random.Random(seed)
    queues = [mutants(file, (ROOT / file).read_text()) for file in sorted(files)]
    for changes in queues:
        chance.shuffle(changes)
    chance.shuffle(queues)
    return [mutant for turn in itertools.zip_longest(*queues) for mutant in turn if mutant]


def baseline(copies: Copies, pool: ThreadPoolExecutor, tests: set[str], end: float) -> dict[str, float]:
    """Seconds of each test file on the unchanged code. Ends the program when one does not pass."""

    def timed(test: str) -> tuple[str, bool | None, str, float]:
        start = time.monotonic()
        passed, said = copies.passes([test], end - time.monotonic())
        return test, passed, said, time.monotonic() - start

    seconds = {}
    for done in as_completed([pool.submit(timed, test) for test in sorted(tests)]):
        test, passed, said, seconds[test] = done.result()
        if passed is None:
            raise SystemExit(f"the minutes were over before {test} had run on the unchanged code: give more")
        if not passed:
            raise SystemExit(f"{said[-3000:]}\n{test} does not pass on the unchanged code, so it can judge no change")
        print(f"  {seconds[test]:6.1f} s  {test}", flush=True)
    return seconds


def judge(copies: Copies, mutant: Mutant, tests: list[str], seconds: dict[str, float], end: float) -> str | None:
    """What became of the change; None when the budget ended first."""
    tests = sorted(tests, key=lambda test: seconds[test])
    allowed, left = 60 + 3 * sum(seconds[test] for test in tests), end - time.monotonic()
    if left <= 0 or copies.stopped.is_set():
        return None
    passed, _ = copies.passes(tests, min(allowed, left), mutant)
    if copies.stopped.is_set() or (passed is None and left < allowed):
        return None
    return {True: SURVIVED, False: KILLED, None: TIMED_OUT}[passed]


def run(copies: Copies, chosen: list[Mutant], table: Table, end: float, results: list[dict[str, Any]]) -> None:
    """Try the changes in their order until the budget ends; each result is appended to `results`."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        try:
            print("the tests on the unchanged code:", flush=True)
            seconds = baseline(copies, pool, {test for it in chosen for test in table.tests_of(it)}, end)
            broken = chosen[0]._replace(text="raise ImportError\n")
            if copies.passes(table.tests_of(broken), end - time.monotonic(), broken)[0]:
                raise SystemExit(f"the tests of {broken.file} pass without it: they import another copy of the code")
            tries = {pool.submit(judge, copies, it, table.tests_of(it), seconds, end): it for it in chosen}
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
    """A table by file, then every change that survived, to be read."""
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
    parser = argparse.ArgumentParser(description="Report which small changes of the code the tests do not notice.")
    parser.add_argument(
        "--minutes", type=float, default=60, help="for all of it, the tests on the unchanged code included"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the sample of generated changes")
    parser.add_argument(
        "only", nargs="*", metavar="FILE_OR_FOLDER", help="change these alone, ccella_fast/data for one"
    )
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    table = Table(args.only)
    if table.stale:
        sys.exit("\n".join(f"{TABLE.name}: {why}" for why in table.stale) + "\nwrite them for the code as it is now")
    chosen = table.changes + sample(list(table.tests), args.seed)
    if not chosen:
        sys.exit(f"{TABLE.name} names no file within {' '.join(args.only)}")
    results: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            run(Copies(Path(folder)), chosen, table, end, results)
    except KeyboardInterrupt:
        print("interrupted: what follows is as far as it went")
        return 130
    finally:
        OUT.mkdir(parents=True, exist_ok=True)
        values = {"seed": args.seed, "minutes": args.minutes, "candidates": len(chosen), "results": results}
        (OUT / "results.json").write_text(json.dumps(values, indent=1))
        print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
