"""Random networks: the same weights everywhere, and the features of the network that they describe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ccella_fast.evaluation.features import random_networks
from ccella_fast.evaluation.features.random_networks import RandomNetworks
from feature_fixtures import make_volume


def test_weights_are_those_of_numpy_on_every_machine():
    torch.manual_seed(1)
    (weight, bias), *_, (last, _) = random_networks._draw(3)
    torch.manual_seed(2)
    again = random_networks._draw(3)
    assert torch.equal(weight, again[0][0]) and torch.equal(last, again[-1][0])
    # The first normal numbers of default_rng(3), times the square root of 2 / 27.
    assert (weight.flatten()[:2] / np.sqrt(2 / 27)).tolist() == pytest.approx([2.0409193, -2.5556650], rel=1e-6)
    assert bias.shape == (16,) and last.shape == (128, 32, 3, 3, 3)
    assert not torch.equal(weight, random_networks._draw(4)[0][0])


def test_features_equal_those_of_modules_in_float64():
    extractor = RandomNetworks()
    volume = make_volume((40, 36, 12), (2.0, 2.0, 3.0))
    found = extractor(volume)["random"]
    assert found.shape == (extractor.spaces["random"],) == (1280,) and found.dtype == np.float32
    window = torch.from_numpy(random_networks._WINDOW(volume))[None, None].double()
    for seed in (0, 4):
        layers: list[nn.Module] = []
        for (weight, bias), size in zip(random_networks._draw(seed), ((2, 2, 1), (2, 2, 1), (2, 2, 2)), strict=True):
            conv = nn.Conv3d(weight.shape[1], weight.shape[0], 3, padding=1, padding_mode="replicate").double()
            conv.weight.data, conv.bias.data = weight.double(), bias.double()
            layers += [conv, nn.ReLU(), nn.AvgPool3d(size)]
        with torch.no_grad():
            last = nn.Sequential(*layers)(window)[0].numpy()
        assert last.shape == (128, 12, 12, 8)
        expected = [last.mean((1, 2, 3)), last.std((1, 2, 3), ddof=1)]
        np.testing.assert_allclose(found[256 * seed : 256 * (seed + 1)], np.concatenate(expected), rtol=1e-3, atol=1e-5)


def test_networks_differ_and_see_the_image():
    extractor = RandomNetworks()
    first, second = (extractor(make_volume((40, 36, 12), seed=seed))["random"] for seed in (0, 1))
    assert np.abs(first[:256] - first[256:512]).max() > 0.1
    assert np.abs(first - second).max() > 0.01
