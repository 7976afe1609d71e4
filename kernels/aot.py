"""Compile every shipped kernel for GPUs that are not here, and report what ptxas makes of it.

    python -m ccella_fast.kernels.aot --arch 80 90 100 --json kernels/aot.json

Needs Triton, no GPU and no driver. For each case and architecture: registers, spilled bytes, shared memory, tensor-core
instructions, 16-byte global loads. A case fails when it spills, needs more shared memory than the chip gives a block, or lacks
the instructions that it was written for. tests/kernels/test_aot.py compares with the committed table.
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

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block, CUDA programming guide, table 27
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")  # Ampere, Hopper, Blackwell


class CompileCase(NamedTuple):
    """One kernel at one configuration.

    signature: Triton types by parameter ("*bf16", "fp32", "i32"); divisible: integer parameters that are multiples of 16 in
    practice (pointers always are); wide_loads, tensor_cores: what the kernel was written to use."""

    name: str
    kernel: Any
    signature: dict[str, str]
    config: LaunchConfig
    constants: dict[str, Any] = {}
    divisible: tuple[str, ...] = ()
    wide_loads: bool = False
    tensor_cores: bool = False


class Compiled(NamedTuple):
    """What came out, and what is wrong with it (empty: nothing)."""

    name: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    wide_loads: int
    problems: list[str]


def all_cases() -> list[CompileCase]:
    """The cases of every kernel module that has Triton kernels, in the order of `KERNELS`."""
    modules = [importlib.import_module(f"ccella_fast.kernels.{name}") for name in KERNELS]
    return [case for module in modules for case in module.aot_cases()]


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """Compile for compute capability `arch` (80, 90, 100). Raises what Triton raises where a case does not compile."""
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


def _inspect(case: CompileCase, arch: int, built: Any) -> Compiled:
    from triton.backends.nvidia.compiler import get_ptxas  # which of its two it compiled with differs between releases

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
    assert registers is not None and spills is not None, "the output of cuobjdump or ptxas has changed its form"
    result = Compiled(
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


def _problems(case: CompileCase, result: Compiled) -> list[str]:
    limit = SHARED_LIMIT[result.arch]
    found = [f"spills {result.spilled_bytes} bytes"] if result.spilled_bytes else []
    found += [f"{result.shared_bytes} bytes of shared memory, the chip has {limit}"] * (result.shared_bytes > limit)
    found += ["no tensor-core instruction"] * (case.tensor_cores and not result.tensor_core_instructions)
    found += ["no 16-byte global load"] * (case.wide_loads and not result.wide_loads)
    return found


def worse(now: Iterable[dict[str, Any]], before: Iterable[dict[str, Any]], slack: int = 8) -> list[str]:
    """How `now` is worse than the committed table `before`, a line each; empty if it is not. slack: registers that another
    release of ptxas may take more of without it being a change of ours."""
    old = {(row["name"], row["arch"]): row for row in before}
    found = []
    for row in now:
        reference = old.get((row["name"], row["arch"]))
        title = f"{row['name']} sm_{row['arch']}"
        if reference is None:
            found.append(f"{title}: not in the committed table")
            continue
        found += [f"{title}: {problem}" for problem in row["problems"]]
        if row["registers"] > reference["registers"] + slack:
            found.append(f"{title}: {row['registers']} registers, before {reference['registers']}")
        if row["shared_bytes"] > reference["shared_bytes"]:
            found.append(f"{title}: {row['shared_bytes']} bytes of shared memory, before {reference['shared_bytes']}")
        for what in ("tensor_core_instructions", "wide_loads"):
            if reference[what] and not row[what]:
                found.append(f"{title}: {what} gone, before {reference[what]}")
    return found


def _output(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ccella_fast.kernels.aot", description=str(__doc__).split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    if triton is None or interpreted():
        reason = "Triton is not installed" if triton is None else "TRITON_INTERPRET is set: kernels are not compiled"
        print(f"error: {reason}\n  fix:   pip install triton, and unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    rows: list[Compiled] = []
    line = "{:44} {:>6} {:>5} {:>7} {:>8} {:>6} {:>6}  {}".format
    print(line("case", "arch", "regs", "spilled", "shared", "tensor", "wide", "problems"))
    for case in all_cases():
        if arguments.case not in case.name:
            continue
        for arch in arguments.arch:
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
