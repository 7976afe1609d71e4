"""The record of a run: a JSON file of a fixed form, its comparison with an earlier one, and RESULTS.md."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ccella_fast.errors import DataError
from ccella_fast.storage import atomic_path, read_json, write_json

SCHEMA = 1
ROOT = Path(__file__).resolve().parent
KEYS = {
    "schema": int, "date": str, "commit": str, "command": str, "device": str, "machine": str, "environment": dict,
    "warnings": list, "rates": dict, "noise_floor": dict, "overhead_seconds": float, "cases": list, "counts": dict,
    "left_out": dict, "seconds": float,
}  # fmt: skip
CASE_KEYS = {"name": str, "suite": str, "about": str, "status": str, "shapes": dict, "sides": dict, "speedups": dict}
STATUS = {"ok", "wrong", "skipped", "failed"}
LEAST_TOLERANCE = 0.05


def check(record: Any, path: object = None) -> dict[str, Any]:
    """Check a record against the schema.

    Args:
        record: The content of a JSON file.
        path: The file, for the error message.

    Returns:
        The record.

    Raises:
        DataError: It does not follow the schema; the error names the first key that is wrong.
    """
    fix = "pass a JSON file written by benchmarks/run.py"
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise DataError(f"the file is not a benchmark record of schema {SCHEMA}", path=path, field="schema", fix=fix)
    for key, kind in KEYS.items():
        if not isinstance(record.get(key), kind):
            raise DataError(_wrong_type(kind, record.get(key)), path=path, field=key, fix=fix)
    for index, case in enumerate(record["cases"]):
        for key, kind in CASE_KEYS.items():
            if not isinstance(case.get(key), kind):
                raise DataError(_wrong_type(kind, case.get(key)), path=path, field=f"cases.{index}.{key}", fix=fix)
        if case["status"] not in STATUS:
            why = f"status must be one of {', '.join(sorted(STATUS))}, got {case['status']!r:.20}"
            raise DataError(why, path=path, field=f"cases.{index}.status", fix=fix)
        if case["status"] != "ok" and case["speedups"]:
            why = f"a case with status {case['status']} must not have speedups"
            raise DataError(why, path=path, field=f"cases.{index}.speedups", fix=fix)
    return record


def _wrong_type(kind: type, value: Any) -> str:
    return f"the value must be of type {kind.__name__}, got {'nothing' if value is None else type(value).__name__}"


def read(path: str | Path) -> dict[str, Any]:
    """Read and check a record; raises DataError."""
    return check(read_json(path), path)


def write(record: dict[str, Any], path: Path) -> Path:
    """Check and write a record."""
    write_json(path, check(record))
    return path


def commit() -> str:
    """Short hash of the checked-out commit, with "-dirty" if tracked files differ from it; "unknown" without git."""
    try:
        run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug(text: str) -> str:
    """The text as a file name: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)", " ", text.lower())).strip("-") or "unknown"


def now() -> str:
    """The time in UTC, in ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def regressions(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare a record with an earlier one: (regressions beyond the noise, remarks).

    On the same machine our times are compared; between machines only the speedups over the reference, which was measured in the
    same run. A difference counts if it exceeds 5 %, twice the sum of both spreads, and both runs' noise. Counts are
    deterministic and must not grow at all.
    """
    worse, remarks = [], []
    same = new["machine"] == old["machine"] and new["device"] == old["device"]
    threads = [record["environment"].get("cpu", {}).get("torch_threads") for record in (new, old)]
    if same and new["device"] == "cpu" and threads[0] != threads[1]:
        same = False
        remarks.append(f"threads: {threads[0]} now, {threads[1]} then; only ratios are compared")
    elif not same:
        remarks.append(f"machines: {new['machine']} now, {old['machine']} then; only ratios are compared")
    before = {case["name"]: case for case in old["cases"] if case["status"] == "ok"}
    for case in new["cases"]:
        then = before.get(case["name"])
        if then is None or then["shapes"] != case["shapes"]:
            if case["status"] == "ok":
                remarks.append(f"{case['name']}: not in the earlier file at these shapes")
            continue
        if case["status"] in ("wrong", "failed"):
            worse.append(f"{case['name']}: was ok, is {case['status']}")
            continue
        worse += _slower(case, then, same, [new["noise_floor"]["noise"], old["noise_floor"]["noise"]])
    for step, counted in new["counts"].items():
        for key, value in counted.get("ours", {}).items():
            known = old["counts"].get(step, {}).get("ours", {}).get(key)
            if known is not None and value > known:
                worse.append(f"{step}: {key} {value:,}, was {known:,}")
    return worse, remarks


def _slower(case: dict[str, Any], then: dict[str, Any], same: bool, noise: list[float]) -> list[str]:
    worse = []
    names = [name for name in case["sides"] if name.startswith("ours") and name in then["sides"]]
    for name in names:
        timed, before = case["sides"][name], then["sides"][name]
        tolerance = max(LEAST_TOLERANCE, *noise, 2 * (timed["spread"] + before["spread"]))
        if same:
            factor = timed["seconds"]["median"] / before["seconds"]["median"]
            text = f"{timed['seconds']['median']:.4g} s, was {before['seconds']['median']:.4g} s"
        elif name in case["speedups"] and name in then["speedups"]:
            factor = then["speedups"][name]["median"] / case["speedups"][name]["median"]
            text = f"{case['speedups'][name]['median']:.2f}x, was {then['speedups'][name]['median']:.2f}x"
        else:
            continue
        if factor > 1 + tolerance:
            worse.append(f"{case['name']}, {name}: {text} (noise {tolerance:.0%})")
    return worse


# RESULTS.md


def newest(folder: Path = ROOT / "results") -> list[tuple[Path, dict[str, Any]]]:
    """File and record of the newest run of each command on each machine."""
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*/*.json")):
        record = read(file)
        found[file.parent.name, record["command"]] = file, record
    return [found[key] for key in sorted(found)]


def write_markdown(path: Path = ROOT / "RESULTS.md", folder: Path = ROOT / "results") -> Path:
    """Write RESULTS.md from the committed records."""
    lines = [
        "# Results",
        "",
        "Generated by `python benchmarks/results.py` from `benchmarks/results/`; do not edit.",
        "",
    ]
    for file, record in newest(folder):
        lines += _machine(file.relative_to(folder), record)
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _machine(file: Path, record: dict[str, Any]) -> list[str]:
    environment, rates = record["environment"], record["rates"]
    peak = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in rates["matmul_flops"].items())
    cpu = environment["cpu"]
    lines = [
        f"## {record['machine']}: `{record['command']}`", "",
        f"`{file}`, commit {record['commit']}, {record['date'][:10]}, "
        f"torch {environment['packages']['torch']}, {cpu['torch_threads']} CPU threads. "
        f"Limits, measured in the run: copy {rates['copy_bytes_per_second'] / 1e9:.3g} GB/s, {peak}. "
        f"Noise (A against A) {record['noise_floor']['noise']:.1%}.", "",
    ]  # fmt: skip
    suites: dict[str, list[dict[str, Any]]] = {}
    for case in record["cases"]:
        suites.setdefault(case["suite"], []).append(case)
    for suite, cases in suites.items():
        timed = [case for case in cases if case["sides"]]
        if timed:
            heading = "| case | implementation | precision | median | times faster | roofline | % of roofline |"
            lines += [f"### {suite}", "", heading, "|---|---|---|---:|---:|---:|---:|"]
            lines += [line for case in timed for line in table_rows(case)] + [""]
        facts = [(case["name"], *fact) for case in cases for fact in case.get("facts", [])]
        if facts:
            lines += [f"| {suite} | | |", "|---|---|---:|"]
            lines += [f"| {name} | {what} | {value:.4g} {unit} |" for name, what, value, unit in facts] + [""]
    if any(case.get("curves") for case in record["cases"]):
        lines += [f"![How cost grows](results/{file.with_suffix('')}-scaling.png)", ""]
    remarks = [
        f"- {case['name']}: {case['status']}, {case['why']}" for case in record["cases"] if case["status"] != "ok"
    ]
    remarks += [f"- {name}: left out, {why}" for name, why in record["left_out"].items()]
    return [*lines, *remarks, ""]


def table_rows(case: dict[str, Any]) -> Iterable[str]:
    """A Markdown row per implementation."""
    for name, timed in case["sides"].items():
        roofline = timed.get("floor")
        cells = [case["name"], name, timed["precision"], seconds(timed["seconds"]["median"]), times_faster(case, name)]
        cells += [seconds(roofline["seconds"]), f"{timed['of_limit']:.0%}"] if roofline else ["", ""]
        yield f"| {' | '.join(cells)} |"


def times_faster(case: dict[str, Any], name: str) -> str:
    """The speedup of an implementation over the baseline, or "wrong" if its result is; empty where there is none."""
    if case["sides"][name].get("passed") is False:
        return "wrong"
    return f"{case['speedups'][name]['median']:.2f}x" if name in case["speedups"] else ""


def seconds(value: float) -> str:
    """A time in its unit: 1.23 s, 45.6 ms, 7.89 us."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


if __name__ == "__main__":
    print(write_markdown())
