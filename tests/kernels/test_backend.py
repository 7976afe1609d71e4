"""The dispatcher: what it takes, why, and that what was asked for is never replaced by something else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ccella_fast.kernels import backend
from ccella_fast.kernels.backend import BackendError, choose, explain, explain_choice

WHERE = {"triton": "the tensors are on cpu, not on a GPU", "sdpa": None, "reference": None}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)


def test_takes_the_first_that_can_run_and_says_why():
    choice = explain_choice("attention", WHERE)
    assert choice == ("attention", "sdpa", "triton: the tensors are on cpu, not on a GPU")
    assert explain_choice("attention", {"sdpa": None}).reason == "preferred here"


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    assert choose("attention", WHERE) == "reference"
    assert choose("attention", WHERE, "sdpa") == "sdpa"


def test_the_environment_names_one_kernel_or_all(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "geglu=triton, attention=reference")
    assert choose("attention", WHERE) == "reference"
    assert choose("cross_attention", WHERE) == "sdpa"
    with pytest.raises(BackendError, match="geglu: backend 'triton' was asked for by CCELLA_FAST_BACKEND, but the ten"):
        choose("geglu", WHERE)
    monkeypatch.setenv(backend.ENVIRONMENT, "xformers")  # a kernel without it is left alone
    assert choose("attention", WHERE) == "sdpa"


@pytest.mark.parametrize(
    ("value", "message"),
    [("tritn", "there is no backend 'tritn'"), ("atention=sdpa", "there is no kernel 'atention'")],
)
def test_a_misspelt_environment_is_refused(monkeypatch, value, message):
    monkeypatch.setenv(backend.ENVIRONMENT, value)
    with pytest.raises(BackendError, match=message):
        choose("attention", WHERE)


def test_what_cannot_run_or_does_not_exist_raises():
    with pytest.raises(BackendError, match="but the tensors are on cpu"):
        choose("attention", WHERE, "triton")
    with pytest.raises(BackendError, match="it has: triton, sdpa, reference"):
        choose("attention", WHERE, "xformers")
    with pytest.raises(BackendError, match="cannot run here: triton: no"):
        choose("attention", {"triton": "no"})


def test_explains_every_kernel_on_this_machine(monkeypatch):
    found = {choice.kernel: choice for choice in explain("cpu")}
    assert list(found) == list(backend.KERNELS) and not any(choice.backend == "triton" for choice in found.values())
    monkeypatch.setenv(backend.ENVIRONMENT, "group_norm_silu=triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="group_norm_silu: backend 'triton' was asked for"):
        explain("cpu")


def test_triton_refuses_a_gpu_that_it_does_not_compile_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, why in (((7, 5), "the GPU is sm_75"), ((8, 0), "None"), ((12, 0), "None")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert why in str(backend.triton_refusal(torch.device("cuda"), torch.float16))


def test_triton_takes_meta_tensors_and_no_float64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backend.triton_refusal(torch.device("meta"), torch.bfloat16) is None
    assert backend.triton_refusal(torch.device("cpu"), torch.bfloat16) is not None
    assert "float64" in str(backend.triton_refusal(torch.device("cuda"), torch.float64))
    monkeypatch.setattr(backend, "triton", None)
    assert backend.triton_refusal(torch.device("cuda"), torch.bfloat16) == "triton is not installed"


def test_torch_compile_asks_for_the_gpu_and_does_not_trace_the_question(monkeypatch):
    def capability(device):
        torch._dynamo.graph_break()
        return 7, 5

    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=capability)
    monkeypatch.setattr(backend, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=None)))
    compiled = torch.compile(lambda x: (x + 1, backend._too_old(torch.device("cuda"))), backend="eager", fullgraph=True)
    assert "sm_75" in compiled(torch.ones(1))[1]
