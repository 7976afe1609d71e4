"""Compile every kernel ahead of time for given GPU architectures, and report the resources that it uses.

    python -m ccella_fast.kernels.aot [--arch 80 90 100] [--case geglu]

Triton is needed, but neither a GPU nor a driver. For each case and architecture the report lists registers, spilled bytes,
shared memory, tensor-core instructions, and 16-byte and asynchronous global loads. A case fails if it spills registers, needs
more shared memory than the GPU offers per block, or lacks the instructions that it is expected to use.

kernels/aot.csv has these figures for several releases of Triton, a column for each, also for every launch of the default model
(benchmarks/aot_table.py). tests/kernels/test_aot.py compares with the column of the installed release.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ccella_fast.kernels.backend import KERNELS, interpreted, triton
from ccella_fast.kernels.tuning import LaunchConfig
from ccella_fast.optional import install

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block, CUDA programming guide, table 27
# Instructions of PTX, which ptxas translates one by one.
TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"  # Ampere, Hopper, Blackwell
ASYNC_LOADS = (
    r"\bcp\.async\.bulk\.tensor\S*\.global\b|\bcp\.async\.c[ag]\S* [^,]+, [^,]+, (?:0x10|16)\b"  # TMA; 16 bytes
)
WIDE_LOADS = r"\bld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)\b"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # Triton's names


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
        async_loads: Whether asynchronous loads of 16 bytes or of tensor descriptors are expected.
        tensor_cores: Whether tensor-core instructions are expected.
        archs: The architectures for which the case is meant.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    config: LaunchConfig
    constants: dict[str, Any] = {}
    divisible: tuple[str, ...] = ()
    wide_loads: bool = False
    async_loads: bool = False
    tensor_cores: bool = False
    archs: tuple[int, ...] = tuple(SHARED_LIMIT)

    @property
    def specialized(self) -> set[str]:
        """The parameters of `divisible` that Triton knows as such: not those that the kernel says not to specialize."""
        return {each.name for each in self.kernel.params if each.name in self.divisible and not each.do_not_specialize}


class CompileResult(NamedTuple):
    """Resources of a compiled case, and its problems (empty if there are none).

    `spilled_bytes` is the stack frame of a thread, which holds its spilled registers; `wide_loads` includes `async_loads`.
    """

    name: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: int
    wide_loads: int
    async_loads: int
    problems: list[str]

    @property
    def figures(self) -> tuple[int, ...]:
        """The numbers of a cell of the table, in the order of `FIGURES`."""
        return tuple(self[2:-1])


FIGURES = CompileResult._fields[2:-1]
Column = dict[tuple[str, int], tuple[int, ...]]  # of the table: case and architecture -> figures


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
    aligned = [name for name in names if signature[name].startswith("*") or name in case.specialized]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _inspect(case, arch, built)


def launched_case(name: str, kernel: Any, arguments: Mapping[str, Any], config: LaunchConfig) -> CompileCase:
    """The case that Triton compiles for a launch.

    Pointers that are None and integers that are 1 become compile-time constants, and multiples of 16 are known as such.

    Args:
        name: Title of the case.
        kernel: The Triton function.
        arguments: All arguments by name; tensors may be on the meta device and count as aligned.
        config: The launch configuration, whose constants may differ from those of `arguments`, which count.
    """
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        integer = isinstance(value, int) and not parameter.is_constexpr
        if parameter.is_constexpr or value is None or (integer and value == 1 and not parameter.do_not_specialize):
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        elif integer:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            divisible += [parameter.name] * (value % 16 == 0 and not parameter.do_not_specialize)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:  # a tensor descriptor
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    blocks = {block: constants.pop(block) for block in config.constants}
    return CompileCase(name, kernel, signature, config._replace(constants=blocks), constants, tuple(divisible))


def _inspect(case: CompileCase, arch: int, built: Any) -> CompileResult:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        command = [str(cuobjdump), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"\bREG:(\d+)", usage), re.search(r"\bSTACK:(\d+)", usage)
    assert registers is not None and stack is not None, "the output format of cuobjdump has changed"
    tensor_cores, wide, asynchronous = (
        len(re.findall(pattern, built.asm["ptx"])) for pattern in (TENSOR_CORES, WIDE_LOADS, ASYNC_LOADS)
    )
    result = CompileResult(
        case.name, arch, int(registers.group(1)), int(stack.group(1)), built.metadata.shared, tensor_cores,
        wide + asynchronous, asynchronous, [],
    )  # fmt: skip
    return result._replace(problems=_problems(case, result))


def _problems(case: CompileCase, result: CompileResult) -> list[str]:
    limit = SHARED_LIMIT[result.arch]
    found = [f"spills {result.spilled_bytes} bytes"] if result.spilled_bytes else []
    found += [f"{result.shared_bytes} bytes of shared memory, limit {limit}"] * (result.shared_bytes > limit)
    found += ["no tensor-core instruction"] * (case.tensor_cores and not result.tensor_cores)
    found += ["no 16-byte global load"] * (case.wide_loads and not result.wide_loads)
    found += ["no asynchronous load"] * (case.async_loads and not result.async_loads)
    return found


def regressions(current: Iterable[CompileResult], committed: Column, register_slack: int = 8) -> list[str]:
    """One line for each respect in which results are worse than those of the table.

    Args:
        current: The results.
        committed: The column of the same release of Triton.
        register_slack: Additional registers that are accepted.
    """
    found = []
    for row in current:
        title = f"{row.name} sm_{row.arch}"
        if (row.name, row.arch) not in committed:
            found.append(f"{title}: not in the table")
            continue
        before = dict(zip(FIGURES, committed[row.name, row.arch], strict=True))
        if row.registers > before["registers"] + register_slack:
            found.append(f"{title}: {row.registers} registers, before {before['registers']}")
        if row.shared_bytes > before["shared_bytes"]:
            found.append(f"{title}: {row.shared_bytes} bytes of shared memory, before {before['shared_bytes']}")
        if row.spilled_bytes > before["spilled_bytes"]:
            found.append(f"{title}: {row.spilled_bytes} bytes spilled, before {before['spilled_bytes']}")
        for count in ("tensor_cores", "wide_loads", "async_loads"):
            if before[count] and not getattr(row, count):
                found.append(f"{title}: no {count}, before {before[count]}")
    return found


def read_table(file: Path) -> dict[str, Column]:
    """The columns of the table by release of Triton."""
    with open(file, encoding="utf-8", newline="") as lines:
        header, *rows = csv.reader(lines)
    return {
        release: {(row[0], int(row[1])): tuple(map(int, row[place].split())) for row in rows if row[place]}
        for place, release in enumerate(header[2:], 2)
    }


def write_table(file: Path, columns: Mapping[str, Column]) -> None:
    """Write the table: the name of a case, the architecture, and for each release the figures in the order of `FIGURES`."""
    releases = sorted(columns, key=lambda release: [int(number) for number in re.findall(r"\d+", release)])
    keys = list(dict.fromkeys(key for release in reversed(releases) for key in columns[release]))
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(["case", f"arch: {' '.join(FIGURES)}", *releases])
        for key in keys:
            table.writerow([*key, *(" ".join(map(str, columns[release].get(key, ()))) for release in releases)])
    os.replace(temporary, file)


def main(cases: Iterable[CompileCase] | None = None) -> int:
    """Compile the cases that the command line selects; exit code 1 if any has a problem, 2 if nothing can be compiled.

    Args:
        cases: All cases, by default those of the kernel modules.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    archs = sorted(SHARED_LIMIT)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=archs, choices=archs, help="architectures, such as 90 for sm_90"
    )
    parser.add_argument("--case", default="", help="compile only the cases whose name contains this text")
    parser.add_argument(
        "--table",
        type=Path,
        help="a file like kernels/aot.csv, in which the column of this Triton is added or replaced",
    )
    arguments = parser.parse_args()
    if triton is None or interpreted():
        reason, fix = "TRITON_INTERPRET is set, so that kernels are not compiled", "unset TRITON_INTERPRET"
        if triton is None:
            reason, fix = "Triton is not installed", install("triton")
        print(f"error: {reason}\n  fix:   {fix}", file=sys.stderr)
        return 2
    rows: list[CompileResult] = []
    line = "{:72} {:>6} {:>5} {:>7} {:>8} {:>6} {:>5} {:>6}  {}".format
    print(line("case", "arch", "regs", "spilled", "shared", "tensor", "wide", "async", "problems"))
    for case in all_cases() if cases is None else cases:
        if arguments.case not in case.name:
            continue
        for arch in (arch for arch in arguments.arch if arch in case.archs):
            row = compile_case(case, arch)
            rows.append(row)
            print(line(row.name, f"sm_{arch}", *row.figures, "; ".join(row.problems) or "-"), flush=True)
    if arguments.table is not None:
        columns = read_table(arguments.table) if arguments.table.is_file() else {}
        whole = not arguments.case and arguments.arch == archs  # then rows of former cases are dropped
        kept = {} if whole else columns.get(triton.__version__, {})
        columns[triton.__version__] = {**kept, **{(row.name, row.arch): row.figures for row in rows}}
        write_table(arguments.table, columns)
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
