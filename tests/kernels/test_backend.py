"""The choice of a backend: which one, for which reason, and that a requested backend is never replaced by another."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from ccella_fast.kernels import backend
from ccella_fast.kernels.backend import BackendError, choose, explain, explain_choice

SUPPORT = {"triton": "the tensors are on cpu, not on a GPU", "sdpa": None, "reference": None}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)


def test_takes_the_first_supported_backend_and_gives_the_reason():
    choice = explain_choice("attention", SUPPORT)
    assert choice == ("attention", "sdpa", "triton: the tensors are on cpu, not on a GPU")
    assert explain_choice("attention", {"sdpa": None}).reason == "preferred here"


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    assert choose("attention", SUPPORT) == "reference"
    assert choose("attention", SUPPORT, "sdpa") == "sdpa"


def test_the_environment_names_one_kernel_or_all(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "geglu=triton, attention=reference")
    assert choose("attention", SUPPORT) == "reference"
    assert choose("cross_attention", SUPPORT) == "sdpa"
    with pytest.raises(BackendError, match="geglu: backend 'triton' was requested by CCELLA_FAST_BACKEND, but the ten"):
        choose("geglu", SUPPORT)
    monkeypatch.setenv(backend.ENVIRONMENT, "xformers")  # does not apply to kernels without it
    assert choose("attention", SUPPORT) == "sdpa"


@pytest.mark.parametrize(
    ("value", "message"),
    [("tritn", "unknown backend 'tritn'"), ("atention=sdpa", "unknown kernel 'atention'")],
    ids=["backend", "kernel"],
)
def test_a_misspelled_environment_variable_raises(monkeypatch, value, message):
    monkeypatch.setenv(backend.ENVIRONMENT, value)
    with pytest.raises(BackendError, match=message):
        choose("attention", SUPPORT)


def test_an_unsupported_or_unknown_backend_raises():
    with pytest.raises(BackendError, match="but the tensors are on cpu"):
        choose("attention", SUPPORT, "triton")
    with pytest.raises(
        BackendError, match="does not have the backend 'xformers'; choose one of triton, sdpa, reference"
    ):
        choose("attention", SUPPORT, "xformers")
    with pytest.raises(BackendError, match="no supported backend here: triton: no"):
        choose("attention", {"triton": "no"})


def test_explains_every_kernel_on_this_machine(monkeypatch):
    found = {choice.kernel: choice for choice in explain("cpu")}
    assert list(found) == list(backend.KERNELS) and not any(choice.backend == "triton" for choice in found.values())
    monkeypatch.setenv(backend.ENVIRONMENT, "group_norm_silu=triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="group_norm_silu: backend 'triton' was requested"):
        explain("cpu")


def test_triton_does_not_support_gpus_older_than_sm_80(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((7, 5), "the GPU is sm_75"), ((8, 0), "None"), ((12, 0), "None")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert reason in str(backend.triton_unsupported_reason(torch.device("cuda"), torch.float16))


def test_triton_supports_meta_tensors_but_not_float64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backend.triton_unsupported_reason(torch.device("meta"), torch.bfloat16) is None
    assert backend.triton_unsupported_reason(torch.device("cpu"), torch.bfloat16) is not None
    assert "float64" in str(backend.triton_unsupported_reason(torch.device("cuda"), torch.float64))
    monkeypatch.setattr(backend, "triton", None)
    assert backend.triton_unsupported_reason(torch.device("cuda"), torch.bfloat16) == "triton is not installed"


def test_torch_compile_evaluates_the_gpu_check_without_tracing_it(monkeypatch):
    def capability(device):
        torch._dynamo.graph_break()
        return 7, 5

    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=capability)
    monkeypatch.setattr(backend, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=None)))

    def function(x):
        return x + 1, backend._unsupported_gpu_reason(torch.device("cuda"))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert "sm_75" in compiled(torch.ones(1))[1]


def xformers_reason(monkeypatch, operators):
    """The reason on a GPU with this module as `xformers.ops.fmha`; None stands for one that raises ImportError."""
    monkeypatch.setattr(backend, "XFORMERS", True)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", operators)
    backend._missing_xformers_operator_reason.cache_clear()
    try:
        return backend.xformers_unsupported_reason(torch.device("cuda"), torch.bfloat16)
    finally:
        backend._missing_xformers_operator_reason.cache_clear()


@pytest.mark.parametrize(
    ("flash", "cutlass", "supported"),
    [(True, True, True), (False, True, True), (True, False, True), (False, False, False)],
)
def test_xformers_is_supported_if_one_of_its_operators_is(monkeypatch, flash, cutlass, supported):
    modules = {
        name: SimpleNamespace(FwOp=SimpleNamespace(is_available=lambda available=available: available))
        for name, available in (("flash", flash), ("cutlass", cutlass))
    }
    reason = xformers_reason(monkeypatch, SimpleNamespace(**modules))
    assert reason is None if supported else "its attention does not load with PyTorch" in reason


def test_xformers_that_does_not_know_this_pytorch_is_unsupported(monkeypatch):
    assert "its attention does not load with PyTorch" in xformers_reason(monkeypatch, None)


def test_attention_of_xformers_does_not_need_its_compiled_part(require):
    """It is built for CUDA 12 and does not load with PyTorch for CUDA 13 or for a CPU; PyTorch's own operators are called."""
    require("xformers")
    if importlib.import_module("xformers._cpp_lib")._cpp_library_load_exception is None:
        pytest.skip("the compiled part of xformers loads here")
    backend._missing_xformers_operator_reason.cache_clear()
    assert backend.xformers_unsupported_reason(torch.device("cuda"), torch.bfloat16) is None
