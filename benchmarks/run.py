"""Measure ccella_fast on this machine in comparison with the reference: `python benchmarks/run.py`.

Prints a description of the machine and a table, and writes a JSON file, a page and a picture below out/benchmarks/. The last
line printed is the path of the JSON file.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ccella_fast import entrypoint

SUITE_CHOICES = ["quick", "kernels", "sampler", "training", "data", "evaluation", "memory", "all"]
QUICK_MINUTES = {"cpu": 5, "cuda": 8}
ROOT = Path(__file__).resolve().parents[1]
EPILOG = """The quick suite ends within 5 minutes on two CPU cores and within 8 on a GPU; on a slow machine
it measures less and reports what it reduced or left out.
Exit codes: 0 ok; 1 a wrong result, a failed case, nothing measured, or with --baseline a regression beyond the noise;
2 usage."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return entrypoint.run_command(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Run the selected cases, write the record and the report, and return the exit code."""
    import torch

    import results
    import runner
    from ccella_fast.errors import ConfigError, did_you_mean
    from registry import emulated, registry, select

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.list:
        for case in registry():
            print(f"{case.suite:9} {case.name:28} {'quick ' if device.type in case.quick else '      '}{case.about}")
        return 0
    known = {case.name: case for case in registry()}
    for name in arguments.case or []:
        if name not in known:
            raise ConfigError(f"there is no case '{name}'", field="--case", fix=did_you_mean(name, known))
    chosen = (
        [known[name] for name in arguments.case] if arguments.case else select(arguments.suite or ["quick"], device)
    )
    left_out = {} if arguments.case else emulated(chosen, device)
    chosen = [case for case in chosen if case.name not in left_out]
    baseline = results.read(arguments.baseline) if arguments.baseline else None  # checked before the long run
    quick = not arguments.case and (arguments.suite or ["quick"]) == ["quick"]
    minutes = arguments.minutes or (QUICK_MINUTES[device.type] if quick else None)
    benchmark_run = runner.BenchmarkRun(device, minutes=minutes, command=_command(arguments), debug=arguments.debug)
    if arguments.dry_run:
        print(benchmark_run.plan(chosen))
        return 0
    stem = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{results.commit()}"
    kept = results.ROOT / "results" / results.slug(benchmark_run.name)
    path = arguments.json or (kept if arguments.keep else ROOT / "out" / "benchmarks") / f"{stem}.json"
    record = benchmark_run.measure(
        chosen,
        traces=path.with_suffix("") if arguments.profile else None,
        left_out=left_out,
        save=lambda record: results.write(record, path),
    )
    results.write(record, path)

    import report

    print(report.table(record))
    report.write(record, path.with_suffix(".html"), path.with_suffix(".png"))
    if arguments.keep:
        results.write_markdown()
    print(f"page    {path.with_suffix('.html')}\npicture {path.with_suffix('.png')}")
    bad = [case["name"] for case in record["cases"] if case["status"] in ("wrong", "failed")]
    worse, remarks = results.regressions(record, baseline) if baseline else ([], [])
    for line in [*(f"note: {remark}" for remark in remarks), *(f"WORSE: {line}" for line in worse)]:
        print(line)
    if bad:
        print(f"NOT RIGHT: {', '.join(bad)}")
    measured = any(case["status"] == "ok" for case in record["cases"])
    if not measured:
        print(
            "NOTHING MEASURED: no case ended with a result, for the reasons above; give more --minutes, or one --case"
        )
    print(path)
    return 1 if bad or worse or not measured else 0


def _command(arguments: argparse.Namespace) -> str:
    """The command that repeats the run, without paths."""
    words = ["python benchmarks/run.py", *(f"--case {name}" for name in arguments.case or [])]
    words += ["--suite " + " ".join(arguments.suite)] if arguments.suite else []
    words += [f"--minutes {arguments.minutes:g}"] if arguments.minutes else []
    return " ".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = entrypoint.Parser(prog="benchmarks/run.py", description=__doc__, epilog=EPILOG)
    parser.add_argument("--suite", nargs="+", choices=SUITE_CHOICES, help="one or several suites (default: quick)")
    parser.add_argument("--case", action="append", metavar="NAME", help="run only this case; may be repeated")
    parser.add_argument("--list", action="store_true", help="print all cases and exit")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="an earlier JSON file to compare with")
    parser.add_argument("--profile", action="store_true", help="write torch.profiler traces for Perfetto")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the JSON file to write (default: below out/benchmarks/)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="write below benchmarks/results/<machine>/ and regenerate RESULTS.md"
    )
    parser.add_argument("--minutes", type=float, help="leave out cases that would end later than this")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
