"""The list of all benchmark cases, and the selection of those to run."""

from __future__ import annotations

import torch

import cases.by_kernel
import cases.data
import cases.evaluation
import cases.kernels
import cases.memory
import cases.sampler
import cases.training
from benchmark_case import BenchmarkCase
from ccella_fast import hardware

# The cases that matter most to users, most important first: name -> title in the report.
HEADLINES = {
    "denoising_step": "denoising step", "training_step": "training step", "sampling": "text to volume",
    "decode": "decode",
}  # fmt: skip


def registry() -> list[BenchmarkCase]:
    """All cases, in the order in which they run."""
    models = [cases.sampler, cases.training, cases.by_kernel, cases.kernels]
    modules = [*models, cases.data, cases.evaluation, cases.memory]
    return sorted((case for module in modules for case in module.CASES), key=lambda case: case.last)


def select(suites: list[str], device: torch.device) -> list[BenchmarkCase]:
    """The cases of these suites, which may include "quick" and "all"."""
    every = registry()
    if "all" in suites:
        return every
    return [case for case in every if case.suite in suites or ("quick" in suites and device.type in case.quick)]


def emulated(chosen: list[BenchmarkCase], device: torch.device) -> dict[str, str]:
    """Name and reason of each chosen case that would spend its time in emulated bf16; empty on other machines."""
    if device.type != "cpu" or hardware.cpu_multiplies_bf16():
        return {}
    why = "this CPU emulates bf16, many times slower than fp32; --case {} measures it all the same"
    return {case.name: why.format(case.name) for case in chosen if case.bf16}
