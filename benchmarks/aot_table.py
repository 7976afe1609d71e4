"""Compiles ahead of time what the default model launches, and what the kernel modules list: the rows of kernels/aot.csv.

    python benchmarks/aot_table.py --table kernels/aot.csv

adds or replaces the column of the installed Triton. Another release is installed in an environment of its own, which takes
all other packages from an existing one:

    python -m venv other && other/bin/pip install --no-deps triton==3.6.0 numpy
    python -c "import site; print(site.getsitepackages()[0])" > $(echo other/lib/python3.*/site-packages)/existing.pth
    PYTHONPATH=$PWD other/bin/python benchmarks/aot_table.py --table kernels/aot.csv

The model is recorded in sampling (batch 1), in training (batch 8) and in a decode, with the default configurations for every
architecture, and with those measured on a chip for the chip's own. Each launch is compiled as Triton specializes it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

from ccella_fast.kernels.aot import CompileCase, all_cases, launched_case, main
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from kernel_launches import Launch
from model_launches import model_calls

CHIPS = {"NVIDIA H100 80GB HBM3": 90, "NVIDIA H200": 90}  # those with measured configurations, and their architecture


def cases() -> list[CompileCase]:
    """The cases of the kernel modules, then those of the model's launches that are not among them."""
    listed = all_cases()
    known = {specialization(case) for case in listed}
    groups: dict[str, list[CompileCase]] = defaultdict(list)
    for chip in (None, *CHIPS):
        for calls in model_calls(chip).values():
            for launch in (launch for call in calls for launch in call.launches):
                case = _as_expected(case_of(launch), launch, listed)
                if chip is not None:
                    case = case._replace(name=f"{case.name} measured", archs=(CHIPS[chip],))
                key = specialization(case)
                if key not in known:
                    known.add(key)
                    groups[case.name].append(case)
    return listed + [case for group in groups.values() for case in _named(group)]


def case_of(launch: Launch) -> CompileCase:
    """The case of a launch, named by its configuration."""
    config = launch.config._replace(num_warps=launch.arguments["num_warps"], num_stages=launch.arguments["num_stages"])
    return launched_case(f"{launch.kernel} {launch.key}", launch.function, launch.arguments, config)


def _as_expected(case: CompileCase, launch: Launch, listed: list[CompileCase]) -> CompileCase:
    """The case with the instructions and architectures that the module expects of its configuration."""
    default = DEFAULT_LAUNCH_CONFIGS[launch.kernel][launch.key]
    like = next(each for each in listed if each.config is default)
    short_runs = launch.key.startswith("whole") and case.constants["CPG"] < 8  # fewer than 16 adjacent bytes in a group
    return case._replace(
        wide_loads=like.wide_loads and not short_runs, async_loads=like.async_loads, tensor_cores=like.tensor_cores,
        archs=like.archs,
    )  # fmt: skip


def specialization(case: CompileCase) -> Any:
    """What Triton compiles, for comparison."""
    signature = [(name, kind) for name, kind in case.signature.items() if name not in case.constants]
    constants = {**case.constants, **case.config.constants}.items()
    used = set(case.kernel.arg_names)
    facts = [{(name, str(value)) for name, value in pairs if name in used} for pairs in (signature, constants)]
    return (
        case.kernel.__name__,
        *map(frozenset, facts),
        frozenset(case.specialized - case.constants.keys()),
        case.config[1:],
    )


def _named(group: list[CompileCase]) -> list[CompileCase]:
    """The cases with names that state in what they differ."""
    facts = [_facts(case) for case in group]
    names = [""] * len(group)
    for parameter in sorted(facts[0], key=lambda name: not name.isupper()):  # sizes first
        longer = [f"{name} {fact[parameter]}".rstrip() for name, fact in zip(names, facts, strict=True)]
        if len(set(longer)) > len(set(names)):
            names = longer
    assert len(set(names)) == len(names), f"equal cases of {group[0].name}"
    return [case._replace(name=case.name + name) for case, name in zip(group, names, strict=True)]


def _facts(case: CompileCase) -> dict[str, str]:
    """How the case specializes each parameter, such as "C=64", "no bias" or "16 | N"."""
    facts = {}
    for name in case.kernel.arg_names:
        short = name.removesuffix("_ptr").removesuffix("_desc")
        value = {**case.constants, **case.config.constants}.get(name, case)
        if value is None:
            facts[name] = f"no {short}"
        elif value is not case:
            facts[name] = f"{name}={value}"
        elif name in case.specialized:
            facts[name] = f"16|{name}"
        else:
            kind = case.signature[name]
            facts[name] = "" if kind in ("i32", "fp32") else f"{short}:{kind.strip('*')}"
    return facts


if __name__ == "__main__":
    sys.exit(main(cases()))
