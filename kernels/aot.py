"""Compile every kernel ahead of time for given GPU architectures, and report the resources that it uses.

    python -m ccella_fast.kernels.aot --arch 80 90 100 --json kernels/aot.json

Triton is needed, but neither a GPU nor a driver. For each case and architecture the report lists registers, spilled bytes,
shared memory, tensor-core instructions and 16-byte global loads. A case fails if it spills registers, needs more shared memory
than the GPU offers per block, or lacks the instructions that it is expected to use. tests/kernels/test_aot.py compares with the
committed table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ccella_fast.kernels.backend import KERNELS, interpreted, triton
from ccella_fast.kernels.tuning import LaunchConfig

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block, CUDA programming guide, table 27
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")  # Ampere, Hopper, Blackwell


class CompileCase(NamedTuple):
    """One kernel with one launch configuration.

    Attributes:
        name: Title of the case, its key in the table.
        kernel: The Triton function.
        signature: Triton type of each parameter: "*bf16", "fp32", "i32".
        config: The launch configuration.
        constants: Compile-time constants besides those of the configuration.
        divisible: Integer parameters that are multiples of 16 in practice, as pointers always are.
        wide_loads: Whether 16-byte global loads are expected.
        tensor_cores: Whether tensor-core instructions are expected.
        first_arch: The oldest architecture for which the kernel is meant.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    config: LaunchConfig
    constants: dict[str, Any] = {}
    divisible: tuple[str, ...] = ()
    wide_loads: bool = False
    tensor_cores: bool = False
    first_arch: int = 80


class CompileResult(NamedTuple):
    """Resources of a compiled case, and its problems (empty if there are none)."""

    name: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    wide_loads: int
    problems: list[str]


def all_cases() -> list[CompileCase]:
    """The cases of all kernel modules, in the order of `KERNELS`."""
    modules = [importlib.import_module(f"ccella_fast.kernels.{name}") for name in KERNELS]
    return [case for module in modules for case in module.aot_cases()]


def compile_case(case: CompileCase, arch: int) -> CompileResult:
    """Compile a case for the compute capability `arch` (80, 90 or 100); errors of Triton are passed on."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, config = case.kernel, case.config
    constants = {**case.constants, **config.constants}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else case.signature[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in case.divisible]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _inspect(case, arch, built)


def _inspect(case: CompileCase, arch: int, built: Any) -> CompileResult:
    from triton.backends.nvidia.compiler import get_ptxas  # Triton ships two; which one it uses differs by release

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(built.asm["cubin"])
        ptx.write_text(built.asm["ptx"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _output(tools / "nvdisasm", "-c", cubin)
        target = re.search(r"\.target (\w+)", built.asm["ptx"])
        assert target is not None
        verbose = _output(
            get_ptxas(arch).path, "-v", f"--gpu-name={target.group(1)}", ptx, "-o", Path(folder, "again.cubin")
        )
    registers = re.search(r"\bREG:(\d+)", usage)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", verbose)
    assert registers is not None and spills is not None, "the output format of cuobjdump or ptxas has changed"
    result = CompileResult(
        case.name,
        arch,
        int(registers.group(1)),
        int(spills.group(1)) + int(spills.group(2)),
        built.metadata.shared,
        sum(len(re.findall(rf"\b{name}\b", code)) for name in TENSOR_CORES),
        len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128|\bLDGSTS\.E(?:\.\w+)*\.128|\bUTMALDG", code)),
        [],
    )
    return result._replace(problems=_problems(case, result))


def _problems(case: CompileCase, result: CompileResult) -> list[str]:
    limit = SHARED_LIMIT[result.arch]
    found = [f"spills {result.spilled_bytes} bytes"] if result.spilled_bytes else []
    found += [f"{result.shared_bytes} bytes of shared memory, limit {limit}"] * (result.shared_bytes > limit)
    found += ["no tensor-core instruction"] * (case.tensor_cores and not result.tensor_core_instructions)
    found += ["no 16-byte global load"] * (case.wide_loads and not result.wide_loads)
    return found


def regressions(
    current: Iterable[dict[str, Any]], committed: Iterable[dict[str, Any]], register_slack: int = 8
) -> list[str]:
    """One line for each respect in which the rows of `current` are worse than those of the committed table.

    Args:
        current: Rows of the table, as `CompileResult` has them.
        committed: Rows of the committed table.
        register_slack: Additional registers that are accepted, since the allocation differs between releases of ptxas.
    """
    old = {(row["name"], row["arch"]): row for row in committed}
    found = []
    for row in current:
        before = old.get((row["name"], row["arch"]))
        title = f"{row['name']} sm_{row['arch']}"
        if before is None:
            found.append(f"{title}: not in the committed table")
            continue
        found += [f"{title}: {problem}" for problem in row["problems"]]
        if row["registers"] > before["registers"] + register_slack:
            found.append(f"{title}: {row['registers']} registers, before {before['registers']}")
        if row["shared_bytes"] > before["shared_bytes"]:
            found.append(f"{title}: {row['shared_bytes']} bytes of shared memory, before {before['shared_bytes']}")
        for count in ("tensor_core_instructions", "wide_loads"):
            if before[count] and not row[count]:
                found.append(f"{title}: no {count}, before {before[count]}")
    return found


def _output(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def main() -> int:
    """Compile the cases that the arguments select; exit code 1 if any has a problem, 2 if nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m ccella_fast.kernels.aot", description=str(__doc__).split("\n")[0])
    archs = sorted(SHARED_LIMIT)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=archs, choices=archs, help="architectures, such as 90 for sm_90"
    )
    parser.add_argument("--case", default="", help="compile only the cases whose name contains this text")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if triton is None or interpreted():
        reason, fix = "TRITON_INTERPRET is set, so that kernels are not compiled", "unset TRITON_INTERPRET"
        if triton is None:
            reason, fix = "Triton is not installed", "pip install triton"
        print(f"error: {reason}\n  fix:   {fix}", file=sys.stderr)
        return 2
    rows: list[CompileResult] = []
    line = "{:44} {:>6} {:>5} {:>7} {:>8} {:>6} {:>6}  {}".format
    print(line("case", "arch", "regs", "spilled", "shared", "tensor", "wide", "problems"))
    for case in all_cases():
        if arguments.case not in case.name:
            continue
        for arch in (arch for arch in arguments.arch if arch >= case.first_arch):
            row = compile_case(case, arch)
            rows.append(row)
            print(line(row.name, f"sm_{arch}", *row[2:7], "; ".join(row.problems) or "-"), flush=True)
    if arguments.json is not None:
        table = {"triton": triton.__version__, "rows": [row._asdict() for row in rows]}
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, arguments.json)
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
