"""The backend of every kernel, with the reason, on a CPU, on each generation of GPUs and with each release of Triton."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from ccella_fast.kernels import backend
from ccella_fast.kernels.backend import KERNELS, choose, explain_choice

MODULES = {name: import_module(f"ccella_fast.kernels.{name}") for name in KERNELS}
GPU, CPU = torch.device("cuda"), torch.device("cpu")
# With bf16 tensors at the sizes of the default model, in inference.
ON_A_GPU = dict.fromkeys(KERNELS, "triton") | {"attention": "sdpa", "conv3d": "cudnn"}
WITH_DESCRIPTORS = {"conv3d": "triton"}
WITHOUT_CHAINED_PRODUCTS = {"cross_attention": "sdpa"}
PLAIN = dict.fromkeys(KERNELS, "reference") | {
    "attention": "sdpa", "cross_attention": "sdpa", "upsample_conv3d": "phase", "conv3d": "cudnn",
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """`machine(capability, release)`: a GPU of this generation and this release of Triton; None: absent."""
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backend, "XFORMERS", False)

    def pretend(capability, release):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(backend, "TRITON", release is not None)
        monkeypatch.setattr(backend, "triton", SimpleNamespace(__version__=release))

    return pretend


def support(device, dtype=torch.bfloat16):
    return {name: module.backend_support(device, dtype) for name, module in MODULES.items()}


def choices(device, dtype=torch.bfloat16):
    return {name: choose(name, each) for name, each in support(device, dtype).items()}


@pytest.mark.parametrize(
    ("capability", "release", "changes"),
    [
        ((8, 0), "3.6.0", {}), ((8, 0), "3.7.1", {}), ((8, 0), "3.8.0", {}), ((8, 9), "3.9.0", {}), ((12, 0), "3.7.1", {}),
        *(((9, 0), release, WITH_DESCRIPTORS) for release in ("3.6.0", "3.7.1", "3.8.0", "3.9.0")),
        *(((10, 0), release, WITH_DESCRIPTORS | WITHOUT_CHAINED_PRODUCTS) for release in ("3.6.0", "3.7.1", "3.8.0")),
        ((10, 3), "3.8.0", WITH_DESCRIPTORS | WITHOUT_CHAINED_PRODUCTS), ((10, 0), "3.9.0", WITH_DESCRIPTORS),
        ((10, 0), "3.10.0", WITH_DESCRIPTORS),
    ],
    ids=str,
)  # fmt: skip
def test_choices_on_a_gpu(machine, capability, release, changes):
    machine(capability, release)
    assert choices(GPU) == ON_A_GPU | changes
    # Kernels that do not multiply matrices are the same in every dtype.
    fp32 = choices(GPU, torch.float32)
    assert fp32["conv3d"] == "cudnn" and all(fp32[name] == "triton" for name in ("group_norm_silu", "geglu"))
    assert not any(choice == "triton" for choice in choices(GPU, torch.float64).values())


@pytest.mark.parametrize(
    ("capability", "release", "reason"),
    [
        ((7, 5), "3.7.1", "the GPU is sm_75, and Triton compiles for sm_80 and newer"),
        ((9, 0), None, "triton is not installed"),
    ],
    ids=["old-gpu", "no-triton"],
)
def test_without_triton_for_the_gpu_every_kernel_says_why(machine, capability, release, reason):
    machine(capability, release)
    found = support(GPU)
    assert {name: each["triton"] for name, each in found.items()} == dict.fromkeys(KERNELS, reason)
    assert {name: choose(name, each) for name, each in found.items()} == PLAIN
    assert reason in explain_choice("geglu", found["geglu"]).reason


def test_on_a_cpu_every_kernel_says_why(machine):
    machine(None, "3.7.1")
    found = support(CPU, torch.float32)
    assert {each["triton"] for each in found.values()} == {"the tensors are on cpu, not on a GPU"}
    assert {name: choose(name, each) for name, each in found.items()} == PLAIN | {"conv3d": "reference"}
    machine(None, None)
    assert {each["triton"] for each in support(CPU, torch.float32).values()} == {"triton is not installed"}


def test_the_reason_against_chained_products_names_the_release_that_is_right(machine):
    machine((10, 0), "3.8.0")
    reason = support(GPU)["cross_attention"]["triton"]
    assert reason == "Triton 3.8.0 may miscompile it for this GPU; Triton 3.9 does not"
    assert [name for name, each in support(GPU).items() if each["triton"] == reason] == ["cross_attention"]


# Integers from whose values the code gains nothing; Triton would compile a binary for each of 1, multiples of 16 and others.
UNSPECIALIZED = {
    "group_norm_silu_forward": ["programs_per_sample", "parts"],
    "group_norm_silu_backward": ["programs_per_sample", "parts", "B"],
    "residual_shift": ["programs_per_sample"],
    "cross_attention": ["heads_per_program"],
}


@pytest.mark.parametrize("file", UNSPECIALIZED)
def test_numbers_of_parts_have_one_binary(file):
    module = import_module(f"ccella_fast.kernels.{file}")
    functions = [
        f for name, f in vars(module).items() if name.endswith("_kernel") and f.fn.__module__ == module.__name__
    ]
    found = {
        (function.fn.__name__, name): name in function.kwargs.get("do_not_specialize", ())
        for function in functions for name in function.arg_names if name in UNSPECIALIZED[file]
    }  # fmt: skip
    assert found and all(found.values()), found
