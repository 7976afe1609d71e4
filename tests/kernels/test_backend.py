"""The choice of a backend: which one, for which reason, and that a requested backend is never replaced by another."""

from __future__ import annotations

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
    monkeypatch.setattr(backend, "load_triton", lambda: None)
    for capability, reason in (((7, 5), "the GPU is sm_75"), ((8, 0), "None"), ((12, 0), "None")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert reason in str(backend.triton_unsupported_reason(torch.device("cuda"), torch.float16))


def test_a_triton_that_cannot_be_imported_is_not_used_and_the_reason_is_given(monkeypatch):
    def load():
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(backend, "load_triton", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    reason = backend.triton_unsupported_reason(torch.device("cuda"), torch.bfloat16)
    assert reason == "triton cannot be imported: libtriton.so: undefined symbol"


def test_triton_supports_meta_tensors_but_not_float64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backend.triton_unsupported_reason(torch.device("meta"), torch.bfloat16) is None
    assert backend.triton_unsupported_reason(torch.device("cpu"), torch.bfloat16) is not None
    assert "float64" in str(backend.triton_unsupported_reason(torch.device("cuda"), torch.float64))
    monkeypatch.setattr(backend, "TRITON", False)
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


def test_xformers_whose_compiled_part_does_not_load_is_unsupported(monkeypatch):
    library = SimpleNamespace(_cpp_library_load_exception=None)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(_cpp_lib=library))
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", library)
    monkeypatch.setattr(backend, "XFORMERS", True)
    for failure, words in ((None, None), (OSError("libcudart.so.12"), "does not load with PyTorch")):
        library._cpp_library_load_exception = failure
        backend._unloadable_xformers_reason.cache_clear()
        reason = backend.xformers_unsupported_reason(torch.device("cuda"), torch.bfloat16)
        assert reason is None if words is None else words in reason
    backend._unloadable_xformers_reason.cache_clear()
