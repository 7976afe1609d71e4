"""Ahead-of-time compilation of every default launch configuration, compared with the committed table."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ccella_fast.kernels.aot import all_cases, regressions
from ccella_fast.kernels.backend import triton
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "aot.json"
ARCHITECTURES = [80, 90, 100]


# Register allocation differs between releases of Triton, so the numbers of the table hold for one release only. On other
# releases every kernel must still compile, with no problems except these known spills.
KNOWN_SPILLS = {
    "3.6.0": {
        "cross_attention output c256 bf16 d32 sm_100: spills 24 bytes",
        "conv3d descriptors wide c128 bf16 sm_100: spills 16 bytes",
    },
    "3.8.0": {"cross_attention heads c256 fp32 d32 sm_100: spills 32 bytes"},
    "3.9.0": {
        "cross_attention heads c256 fp32 d32 sm_100: spills 32 bytes",
        "conv3d descriptors wide c128 bf16 sm_100: spills 16 bytes",
    },
}


def committed():
    return json.loads(TABLE.read_text())["rows"]


def problems(rows):
    return {f"{row['name']} sm_{row['arch']}: {problem}" for row in rows for problem in row["problems"]}


@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_compiles_no_worse_than_the_committed_table(tmp_path, arch):
    file = tmp_path / "aot.json"
    command = [sys.executable, "-m", "ccella_fast.kernels.aot", "--arch", str(arch), "--json", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert file.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(file.read_text())
    rows = result["rows"]
    if result["triton"] == json.loads(TABLE.read_text())["triton"]:
        assert not regressions(rows, committed())
    allowed = KNOWN_SPILLS.get(result["triton"], set())
    assert problems(rows) <= allowed
    assert done.returncode == int(bool(problems(rows))), done.stdout
    assert {row["name"] for row in rows} == {case.name for case in all_cases() if arch >= case.first_arch}


def test_the_committed_table_is_complete_and_clean():
    rows = committed()
    assert {(row["name"], row["arch"]) for row in rows} == {
        (case.name, arch) for case in all_cases() for arch in ARCHITECTURES if arch >= case.first_arch
    }
    assert not [row for row in rows if row["problems"] or row["spilled_bytes"]]


def test_every_default_configuration_is_compiled():
    compiled = [case.config for case in all_cases()]
    missing = [
        f"{kernel} {key}"
        for kernel, table in DEFAULT_LAUNCH_CONFIGS.items()
        for key, default in table.items()
        if not any(default is config for config in compiled)
    ]
    assert not missing


# The file of measured configurations and the architecture of its GPU.
CHIPS = {"NVIDIA_H100_80GB_HBM3": 90, "NVIDIA_H200": 90}
COMPILE_MEASURED = """
import json, sys
from ccella_fast.kernels import aot
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig

file, arch = sys.argv[1], int(sys.argv[2])
cases, found = aot.all_cases(), {}
for kernel, table in json.load(open(file)).items():
    for key, measured in table.items():
        mine = [case for case in cases if case.config is DEFAULT_LAUNCH_CONFIGS[kernel][key]]
        results = [aot.compile_case(case._replace(config=LaunchConfig(**measured)), arch) for case in mine]
        found[f"{kernel} {key}"] = [problem for result in results for problem in result.problems]
print(json.dumps(found))
"""


def test_measured_configurations_compile_for_their_chip():
    """Without spills with the Triton of the table; registers are allocated differently by others."""
    files = list((ROOT / "kernels" / "tuned").glob("*.json"))
    assert {file.stem for file in files} == set(CHIPS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for file in files:
        tables = json.loads(file.read_text())
        for kernel, table in tables.items():
            for key, measured in table.items():
                assert set(measured["constants"]) == set(DEFAULT_LAUNCH_CONFIGS[kernel][key].constants)
        command = [sys.executable, "-c", COMPILE_MEASURED, str(file), str(CHIPS[file.stem])]
        found = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        assert list(found) == [f"{kernel} {key}" for kernel, table in tables.items() for key in table] != []
        if triton.__version__ == json.loads(TABLE.read_text())["triton"]:
            assert not any(found.values()), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 255}, "255 registers, before"),
        ({"shared_bytes": 10**6}, "1000000 bytes of shared memory, before"),
        ({"problems": ["spills 64 bytes"]}, "spills 64 bytes"),
        ({"name": "unheard of"}, "not in the committed table"),
        ({"tensor_core_instructions": 0}, "no tensor_core_instructions"),
        ({"wide_loads": 0}, "no wide_loads"),
    ],
    ids=["registers", "shared-memory", "spills", "unknown-name", "no-tensor-cores", "no-wide-loads"],
)
def test_regressions_are_found(change, message):
    row = next(row for row in committed() if row["tensor_core_instructions"] and row["wide_loads"])
    changed = {**copy.deepcopy(row), **change}
    assert not regressions([row], committed())
    assert [message in line for line in regressions([changed], committed())] == [True]
