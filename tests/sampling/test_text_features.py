"""Features that a request gives: recognized by their values, never by the tensor that holds them."""

from __future__ import annotations

import hashlib
import threading
from hashlib import sha256

import numpy as np
import pytest
import torch

from ccella_fast import FastSampler
from ccella_fast.errors import ConfigError
from ccella_fast.sampling import text_features
from sampling_fixtures import FakeEncoder, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step")


def make(checkpoint) -> FastSampler:
    return FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())


def text(*lengths: int) -> torch.Tensor:
    return torch.from_numpy(FakeEncoder().encode(["a" * length for length in lengths]).features)


@pytest.mark.parametrize("kept", [True, False])
def test_given_features_are_recognized_by_their_values(checkpoint, monkeypatch, kept):
    """Equal features of the next request are not hashed again; the caller's tensor may change in place."""
    features, hashed = text(3, 5), []
    rows = {row.numpy().tobytes() for row in features}
    monkeypatch.setattr(text_features, "_KEPT_BYTES", 1 << 20 if kept else 0)
    monkeypatch.setattr(hashlib, "sha256", lambda x=b"": hashed.extend({x} & rows) or sha256(x))
    mine, new = make(checkpoint), make(checkpoint)
    given = {"seeds": [1], "num_inference_steps": 2, "decode": False}
    first = mine(text=features, **given)
    assert len(hashed) == 2
    again = mine(text=features.clone(), **given)
    assert len(hashed) == (2 if kept else 4)
    torch.testing.assert_close(again.latents, first.latents, rtol=0, atol=0)
    assert [each.identity for each in again.outputs] == [each.identity for each in first.outputs]
    features[0] += 0.5  # in place: neither the latents nor the identity may be those of before
    changed, expected = mine(text=features, **given), new(text=features, **given)
    torch.testing.assert_close(changed.latents, expected.latents, rtol=0, atol=0)
    assert [each.identity for each in changed.outputs] == [each.identity for each in expected.outputs]
    assert changed.outputs[0].identity != first.outputs[0].identity
    assert not torch.equal(changed.latents[0], first.latents[0]) and torch.equal(changed.latents[1], first.latents[1])
    features[1, 0, 0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        mine(text=features, **given)


@pytest.mark.parametrize("changed", ["text", "null_text"])
def test_a_generator_keeps_the_features_it_was_given(checkpoint, monkeypatch, changed):
    """The caller changes its own in place before the last volume is generated."""
    monkeypatch.setattr(text_features, "_KEPT_BYTES", 0)
    inputs = {"text": text(3, 5), "null_text": text(1)}
    given = {"seeds": [1, 2], "num_inference_steps": 2, "decode": False, "guidance_scale": 2, "batch_size": 1}
    expected = make(checkpoint)(**inputs, **given).latents
    volumes = make(checkpoint).iter(**inputs, **given)
    latents = [next(volumes).latent]
    inputs[changed] += 1
    latents += [volume.latent for volume in volumes]
    torch.testing.assert_close(torch.stack(latents), expected, rtol=0, atol=0)


def test_features_may_require_a_gradient_and_come_from_inference_mode(checkpoint):
    features = text(3, 5)
    sampler, given = make(checkpoint), {"seeds": [1], "num_inference_steps": 2, "decode": False}
    with torch.inference_mode():
        first = sampler(text=features * 1, **given)
    again = sampler(text=features.clone().requires_grad_(), **given)
    torch.testing.assert_close(again.latents, first.latents, rtol=0, atol=0)
    changed = sampler(text=features + 1, **given)  # writes to the buffers of the first call
    assert not changed.latents.requires_grad and not torch.equal(changed.latents, first.latents)


def test_the_identity_of_equal_features_does_not_depend_on_the_call_before(checkpoint):
    zero = text(3)
    zero[0, 0, 0] = 0.0
    negative = zero.clone()
    negative[0, 0, 0] = -0.0
    mine, given = make(checkpoint), {"seeds": [1], "num_inference_steps": 2, "decode": False}
    mine(text=zero, **given)
    identities = [sampler(text=negative, **given).outputs[0].identity for sampler in (mine, make(checkpoint))]
    assert identities[0] == identities[1]


def test_threads_get_their_own_features(checkpoint, monkeypatch):
    """Another thread gives its features just after those of the first are kept."""
    inputs, found = {"first": text(3), "second": text(5)}, {}
    cache = make(checkpoint)._text_features
    kept = type(cache).__setattr__

    def keep(self, name, value):
        kept(self, name, value)
        if value is not None and threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: found.update(second=cache._given_features(inputs["second"])))
            other.start()
            other.join()

    monkeypatch.setattr(type(cache), "__setattr__", keep, raising=False)
    found["first"] = cache._given_features(inputs["first"])
    assert all(torch.equal(found[name].features, inputs[name]) for name in inputs)


@pytest.mark.parametrize(
    "wrong",
    [
        [text(3)[0], text(5)[0]],
        [text(3)[0], text(5)[0, :5]],  # reports of different lengths
        [text(3)[0].requires_grad_()],
        [[[1.0, 2.0]], [[1.0]]],
        text(3).to_sparse(),
        text(3).to(torch.complex64),
        np.ones((1, 6, 16))[:, ::-1],
        "x",
    ],
)
def test_what_is_no_array_of_numbers_is_an_error(checkpoint, wrong):
    with pytest.raises(ConfigError, match="dense tensor or array of real numbers"):
        make(checkpoint)(text=wrong, seeds=[1], decode=False)
