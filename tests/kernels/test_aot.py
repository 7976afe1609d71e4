"""Ahead-of-time compilation of every launch of the default model, compared with kernels/aot.csv."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import triton

from ccella_fast.kernels.aot import (
    FIGURES,
    CompileResult,
    all_cases,
    read_table,
    regressions,
    write_table,
)
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "aot.csv"
REFRESH = "python benchmarks/aot_table.py --table kernels/aot.csv"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""  # the model is recorded on meta tensors, as on a machine without a GPU

# Releases of ptxas allocate registers differently: what spills, by release and architecture. Of the model's launches these are
# one to four registers, stored once and loaded once or twice; heads of width 128 spill up to ten.
KNOWN_SPILLS = {
    ("3.6.0", 100): {"conv3d descriptors wide"},
    ("3.7.1", 90): {"group_norm_silu whole 8192 C=512"},
    ("3.7.1", 100): {"upsample_trilinear forward first", "cross_attention heads c512 bf16 d128"},
    ("3.9.0", 90): {
        "group_norm_silu sums last", "group_norm_silu parameter gradients measured", "cross_attention heads c512 bf16 d128",
    },
    ("3.9.0", 100): {
        "group_norm_silu sums last", "cross_attention heads c512 bf16 d128", "conv3d descriptors wide",
    },
}  # fmt: skip


def results(column):
    return [CompileResult(*key, *figures, []) for key, figures in column.items()]


def column_of(release, table):
    if release not in table:
        pytest.fail(f"kernels/aot.csv has no column for Triton {release}; add it with: {REFRESH}", pytrace=False)
    return table[release]


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cases():
    """Name, launch configuration and architectures of each row."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import aot_table\n"
        "print(*((case.name, tuple(case.config), case.archs) for case in aot_table.cases()), sep='\\n')"
    )
    return [ast.literal_eval(line) for line in run("-c", code).stdout.splitlines()]


def compile_and_compare(file, *commands):
    """The problems that commands which write their figures to `file` print, other than spills, which the table has too."""
    committed = column_of(triton.__version__, read_table(TABLE))
    problems = []
    for command in commands:
        done = run(*command, "--table", str(file))
        assert file.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
        found = [line for line in done.stdout.splitlines()[1:] if not line.endswith("  -")]
        assert done.returncode == bool(found)
        problems += [line for line in found if "spills" not in line]
    current = results(read_table(file)[triton.__version__])
    assert not regressions(current, committed), f"if this is meant, renew kernels/aot.csv with: {REFRESH}"
    assert not problems
    return current


def test_launches_of_the_model_compile_no_worse_than_the_table(tmp_path):
    """With the instructions that they are expected to use: all for sm_90, those that the kernel modules list for others."""
    commands = ["benchmarks/aot_table.py", "--arch", "90"], ["-m", "ccella_fast.kernels.aot", "--arch", "80", "100"]
    compiled = compile_and_compare(tmp_path / "aot.csv", *commands)
    assert {row.arch for row in compiled} == {80, 90, 100}
    assert sum(row.arch == 90 for row in compiled) > 150


@pytest.mark.slow
def test_launches_of_the_model_compile_no_worse_for_other_architectures(tmp_path):
    compiled = compile_and_compare(tmp_path / "aot.csv", ["benchmarks/aot_table.py", "--arch", "80", "100"])
    assert len(compiled) > 300


def test_the_table_has_every_launch_of_the_model(cases):
    column = column_of(triton.__version__, read_table(TABLE))
    expected = [(name, arch) for name, _, archs in cases for arch in archs]
    assert list(column) == expected, f"the rows of kernels/aot.csv have changed; renew it with: {REFRESH}"


def test_no_launch_of_the_model_spills():
    """In the releases of the table, except for what is listed."""
    found = defaultdict(set)
    for release, column in read_table(TABLE).items():
        for row in results(column):
            if row.spilled_bytes:
                known = [name for name in KNOWN_SPILLS[release, row.arch] if row.name.startswith(name)]
                assert known and row.spilled_bytes <= 40, (release, row)
                found[release, row.arch].update(known)
    assert found == KNOWN_SPILLS


def test_columns_have_the_same_rows_and_instructions():
    columns = read_table(TABLE)
    assert {"3.6.0", "3.7.1"} < columns.keys() and len(columns) == 3
    first, *others = columns.values()
    for column in others:
        assert list(column) == list(first)
        for one, other in zip(results(first), results(column), strict=True):
            for count in ("tensor_cores", "wide_loads", "async_loads"):
                assert bool(getattr(one, count)) == bool(getattr(other, count)), one


def test_a_release_without_a_column_fails_with_the_command_that_adds_it():
    with pytest.raises(pytest.fail.Exception, match=r"no column for Triton 99\.0; add it with: .*aot_table"):
        column_of("99.0", read_table(TABLE))


def test_every_default_configuration_is_compiled():
    compiled = [case.config for case in all_cases()]
    missing = [
        f"{kernel} {key}"
        for kernel, table in DEFAULT_LAUNCH_CONFIGS.items()
        for key, default in table.items()
        if not any(default is config for config in compiled)
    ]
    assert not missing


# Cases as Triton itself specializes the launches of the model, which it can do without a GPU.
SPECIALIZE = """
import sys
sys.path.insert(0, "benchmarks")
import aot_table
import torch
from ccella_fast.kernels.attention import attention
from model_launches import calls_of, model_calls
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

q = torch.empty(1, 1, 40, 32, device="meta")
steps = [*model_calls().values(), calls_of(lambda: attention(q, q, q, backend="triton"))]  # with one head: M is 1
backend, compared = make_backend(GPUTarget("cuda", 90, 32)), 0
for launch in (launch for calls in steps for call in calls for launch in call.launches):
    function, case = launch.function, aot_table.case_of(launch)
    constants = {**case.constants, **case.config.constants}
    specialize = create_function_from_signature(function.signature, function.params, backend)
    for parameter, (kind, attribute) in zip(function.params, specialize(**launch.arguments)[1], strict=True):
        name = parameter.name
        if name in constants:
            assert kind == "constexpr", (function, name)
        else:
            assert kind == case.signature[name], (function, name)
            aligned = kind.startswith("*") or name in case.divisible
            assert kind.startswith("tensordesc") or (attribute == "D") == aligned, (function, name)
        compared += 1
print(compared, case.constants["M"])
"""


def test_launches_are_specialized_as_by_triton():
    done = run("-c", SPECIALIZE)
    assert done.returncode == 0, done.stderr[-2000:]
    compared, heads = map(int, done.stdout.split())
    assert compared > 5000 and heads == 1


def test_measured_configurations_are_compiled_for_their_chip(cases):
    files = list((ROOT / "kernels" / "tuned").glob("*.json"))
    assert files
    for file in files:
        for kernel, table in json.loads(file.read_text()).items():
            for key, measured in table.items():
                config = LaunchConfig(**measured)
                assert config.constants.keys() == DEFAULT_LAUNCH_CONFIGS[kernel][key].constants.keys()
                mine = [
                    archs for name, of, archs in cases if of == tuple(config) and name.startswith(f"{kernel} {key}")
                ]
                assert mine and all(90 in archs for archs in mine), (file, key)


# Each changes a case so that one thing is lost, and the case must then have exactly this problem.
LOSE = """
import sys
from ccella_fast.kernels import aot
from ccella_fast.kernels.tuning import LaunchConfig

cases = {case.name: case for case in aot.all_cases()}
norm, geglu = cases["group_norm_silu apply last c64 bf16"], cases["geglu forward bf16"]
product = cases["cross_attention output c256 bf16 d32"]
single = {name: kind.replace("bf16", "fp32") for name, kind in product.signature.items()}
changed = {
    "spills": cases["attention forward bf16 d128"]._replace(config=LaunchConfig({"BLOCK_N": 128, "BLOCK_L": 64}, 2, 1)),
    "no 16-byte global load": geglu._replace(divisible=()),
    "no asynchronous load": norm._replace(config=LaunchConfig({"TILE": 4096, "STAGES": 1}, 8)),
    "no tensor-core instruction": product._replace(signature=single, constants={**product.constants, "PRECISION": "ieee"}),
}
for lost, case in changed.items():
    print(lost, aot.compile_case(case._replace(async_loads=case.async_loads and lost != "spills"), 90).problems, sep="|")
print("unchanged", [problem for case in (norm, geglu, product) for problem in aot.compile_case(case, 90).problems], sep="|")
"""


def test_lost_instructions_and_spills_are_found():
    lines = [line.split("|") for line in run("-c", LOSE).stdout.splitlines()]
    found = {lost: ast.literal_eval(problems) for lost, problems in lines}
    assert found.pop("unchanged") == []
    assert len(found) == 4
    for lost, problems in found.items():
        assert [problem for problem in problems if problem.startswith(lost)] == problems != [], (lost, problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 255}, "255 registers, before"),
        ({"shared_bytes": 10**6}, "1000000 bytes of shared memory, before"),
        ({"spilled_bytes": 64}, "64 bytes spilled, before 0"),
        ({"name": "unheard of"}, "not in the table"),
        ({"tensor_cores": 0}, "no tensor_cores"),
        ({"wide_loads": 0}, "no wide_loads"),
        ({"async_loads": 0}, "no async_loads"),
    ],
    ids=["registers", "shared-memory", "spills", "unknown-name", "no-tensor-cores", "no-wide-loads", "no-async-loads"],
)
def test_regressions_are_found(change, message):
    column = read_table(TABLE)["3.7.1"]
    row = next(row for row in results(column) if row.tensor_cores and row.async_loads and row.registers < 200)
    assert not regressions([row], column)
    assert [message in line for line in regressions([row._replace(**change)], column)] == [True]


def test_the_table_keeps_the_other_columns_and_rows(tmp_path):
    file = tmp_path / "table.csv"
    numbers = tuple(range(len(FIGURES)))
    columns = {"3.10.0": {("a", 80): numbers, ("b, c", 90): numbers}, "3.9.0": {("a", 80): numbers}}
    write_table(file, columns)
    assert read_table(file) == columns
    assert file.read_text().splitlines()[0] == f"case,arch: {' '.join(FIGURES)},3.9.0,3.10.0"
