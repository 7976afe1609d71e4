"""Features that a request gives: recognized by their values, never by the tensor that holds them."""

from __future__ import annotations

import hashlib
from hashlib import sha256

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
