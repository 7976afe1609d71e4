"""Per-sample generators: independent of the batch, and unrelated for nearby seeds."""

from __future__ import annotations

import pytest
import torch

from ccella_fast.diffusion.noise import generator, randn_per_sample


def draw(*seeds: int) -> torch.Tensor:
    return randn_per_sample((4, 8, 8, 8), [generator(seed, "start") for seed in seeds])


def test_a_row_depends_only_on_its_seed():
    batch = draw(7, 8, 9)
    assert torch.equal(batch[1], draw(8)[0])
    assert torch.equal(batch[2], draw(9, 7)[0])
    assert not torch.equal(batch[0], batch[1])


def test_streams_of_nearby_seeds_and_keys_are_unrelated():
    streams = torch.stack(
        [torch.randn(4096, generator=generator(*key)) for key in [(0,), (1,), (0, 1), (0, "1"), (0, 1, 2), (0, 12)]]
    )
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 6 / 4096**0.5


def test_numbers_are_standard_normal():
    values = draw(*range(64)).flatten().double()
    assert abs(values.mean()) < 5 / values.numel() ** 0.5
    assert abs(values.std() - 1) < 5 / (2 * values.numel()) ** 0.5
    assert abs((values**4).mean() - 3) < 0.1


def test_the_stream_of_a_seed_is_fixed():
    """A change of the mixing would silently change the volume of every published seed."""
    assert generator(0, "start").initial_seed() == 6610029964088323159


@pytest.mark.parametrize("bad", [1.0, True, None, b"x"], ids=repr)
def test_keys_of_other_types_raise(bad):
    with pytest.raises(ValueError, match="integers and strings"):
        generator(0, bad)
