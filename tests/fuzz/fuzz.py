"""Fuzz every reader: damaged images, tables, lists, prepared files, checkpoints and configurations.

    python tests/fuzz/fuzz.py [--seed 0] [--share 1.0] [--commands 0.01] [--minutes 120] [TARGET ...]

A whole run tries the counts of targets.py in this process's children and 1 % of them through the real commands, on all cores.
The same seed gives the same inputs. The table and every failure are written to out/fuzz/results.json, failed inputs to
out/fuzz/failed/; copy one to tests/fuzz/failed/TARGET/ once it is fixed. The exit code is 1 if an input failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "fixtures"), str(ROOT)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

from harness import FAILURES, VALID, Result, run_command, run_inputs, save, tally  # noqa: E402
from targets import TARGETS  # noqa: E402

OUT = ROOT / "out" / "fuzz"
CHUNK = 250


def main() -> int:
    """Fuzz, print the table, and return 1 if there were failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="part of the inputs of a whole run")
    parser.add_argument("--commands", type=float, default=0.01, help="part of them that also goes through the commands")
    parser.add_argument("--minutes", type=float, default=120, help="no new inputs are started after that")
    arguments = parser.parse_args()
    names = arguments.targets or list(TARGETS)
    end = time.monotonic() + 60 * arguments.minutes
    shutil.rmtree(OUT, ignore_errors=True)
    results: dict[str, list[Result]] = {name: [] for name in names}
    commands: dict[str, list[Result]] = {name: [] for name in names}

    def fuzz(name: str, start: int) -> None:
        if time.monotonic() < end:
            count = round(TARGETS[name].count * arguments.share)
            inputs = [(name, index) for index in range(start, min(start + CHUNK, count))]
            results[name] += run_inputs(inputs, seed=arguments.seed, keep=OUT / "failed")

    def command(name: str, index: int) -> None:
        if time.monotonic() < end:
            commands[name].append(run_command(TARGETS[name], arguments.seed, index))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [
            pool.submit(fuzz, name, start)
            for name in names
            for start in range(0, round(TARGETS[name].count * arguments.share), CHUNK)
        ]
        for name in names:
            count = round(TARGETS[name].count * arguments.share * arguments.commands)
            if TARGETS[name].command is not None:
                # Indices that no other part of the run has used.
                indices = [VALID, *(10**6 + index for index in range(count))] if count else []
                jobs += [pool.submit(command, name, index) for index in indices]
        for job in jobs:
            job.result()
    both = results | {f"{name}, command": each for name, each in commands.items() if each}
    save(OUT / "results.json", both, seed=arguments.seed)
    failures = 0
    for name, each in both.items():
        counts = tally(each)
        failures += sum(counts[outcome] for outcome in FAILURES)
        print(f"{name:34} {len(each):6}  " + ", ".join(f"{outcome} {n}" for outcome, n in sorted(counts.items())))
    print(f"{failures} failures; {OUT / 'results.json'}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
