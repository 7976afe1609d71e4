"""Results that are kept between calls must be those of the weights of the call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from ccella_fast.kernels.derived_weight import DerivedWeight


def double(weight):
    return 2 * weight


@pytest.fixture
def calls():
    return []


@pytest.fixture
def derived(calls):
    def compute(weight):
        calls.append(weight)
        return 2 * weight

    return DerivedWeight(compute)


@torch.no_grad()
def test_the_result_is_kept_and_follows_the_weight(derived, calls):
    weight = torch.nn.Parameter(torch.ones(3))
    assert derived.of(weight) is derived.of(weight) and len(calls) == 1
    weight.add_(1)
    assert torch.equal(derived.of(weight), torch.full((3,), 4.0)) and len(calls) == 2
    derived.clear()
    derived.of(weight)
    assert len(calls) == 3


@torch.no_grad()
def test_a_tensor_at_the_address_of_an_earlier_one_is_another_weight(derived):
    """The allocator reuses addresses: weights are replaced, computed by a parametrization, or copied by nn.DataParallel."""
    memory = torch.ones(3)
    first = torch.from_dlpack(memory)  # tensors with one address, each with a version of its own
    assert derived.of(first)[0] == 2
    memory.data.fill_(5)
    second = torch.from_dlpack(memory)
    assert second.data_ptr() == first.data_ptr() and second._version == first._version
    assert derived.of(second)[0] == 10
    del first, second
    memory.data.fill_(7)
    assert derived.of(torch.from_dlpack(memory))[0] == 14


@torch.no_grad()
def test_another_thread_does_not_replace_the_result_of_a_call():
    weights = [torch.ones(1), torch.zeros(1)]

    class Interrupted(DerivedWeight):
        """Another thread stores its result right after each of this one is stored."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_kept" and value is not None and value[-1] != 0:
                derived.of(weights[1])

    derived = Interrupted(double)
    assert derived.of(weights[0]) == 2


@torch.no_grad()
def test_copies_and_pickles_do_not_contain_the_result():
    derived, weight = DerivedWeight(double), torch.ones(1000)
    derived.of(weight)
    assert len(pickle.dumps(derived)) < weight.numel()
    other = copy.deepcopy(derived)
    assert not any(isinstance(part, torch.Tensor) for part in other._kept or ())
    assert torch.equal(other.of(weight), derived.of(weight))


@torch.no_grad()
def test_the_capture_of_a_cuda_graph_computes_nothing_to_keep(derived, calls, monkeypatch):
    weight = torch.ones(3)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert derived.of(weight) is None and not calls
    capturing[0] = False
    kept = derived.of(weight)
    capturing[0] = True
    assert derived.of(weight) is kept  # computed before
