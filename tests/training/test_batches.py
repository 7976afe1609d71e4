"""What a feed draws: every timestep alike, three unrelated streams, every study once an epoch, shares of the class loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccella_fast.config import make_config
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.training.batches import BatchStream
from training_fixtures import CONFIG, write_prepared

VALUES = 4 * 8 * 8 * 4  # of one latent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    data = write_prepared(tmp_path_factory.mktemp("feed") / "prepared")
    return PreparedDataset(data, make_config({key: value for key, value in CONFIG.items() if key != "name"}))


def feed(dataset, *, batch_size=1, accumulation=1, rank=0, world_size=1, seed=3, num_timesteps=1000):
    sizes = {"batch_size": batch_size, "accumulation": accumulation, "rank": rank, "world_size": world_size}
    return BatchStream(dataset, seed=seed, **sizes, scale=torch.ones(4), num_timesteps=num_timesteps)


def posteriors(dataset, samples):
    """The standard normal draws behind the latents; sigma is 0.1."""
    numbers = [dataset.ids.index(case) for case in samples.batch.ids]
    mean = torch.stack([dataset[number].latent_mean for number in numbers])
    return (samples.latents - mean) / 0.1


@pytest.mark.parametrize("count", [4, 7])
def test_every_timestep_is_drawn_alike(dataset, count):
    stream = feed(dataset, batch_size=100, num_timesteps=count)
    drawn = torch.cat([stream.micro_batch(step, 0).timesteps for step in range(4)])
    found = torch.bincount(drawn, minlength=count)
    expected, sigma = 400 / count, (400 / count * (1 - 1 / count)) ** 0.5
    assert len(found) == count and (found - expected).abs().max() < 5 * sigma


def test_posterior_noise_and_timestep_are_unrelated(dataset):
    """Within a sample, and between steps, micro-steps, processes and seeds."""
    places = [(rank, step, micro) for rank in (0, 1) for step in (0, 1, 2) for micro in (0, 1)]
    streams, times = [], []
    for seed in (3, 4):
        for rank, step, micro in places:
            samples = feed(dataset, accumulation=2, rank=rank, world_size=2, seed=seed).micro_batch(step, micro)
            streams += [posteriors(dataset, samples).flatten(), samples.noise.flatten()]
            times.append(int(samples.timesteps))
    streams = torch.stack(streams)
    apart = torch.corrcoef(streams) - torch.eye(len(streams))
    assert apart.abs().max() < 6 / VALUES**0.5
    assert (streams.mean(1).abs() < 6 / VALUES**0.5).all() and (streams.std(1) - 1).abs().max() < 6 / (
        2 * VALUES
    ) ** 0.5
    assert len(set(times)) > 20
    assert torch.corrcoef(torch.stack([streams[0], streams[0]]))[0, 1] > 0.99  # the control


def test_noise_says_nothing_about_the_timestep(dataset):
    samples = feed(dataset, batch_size=400).micro_batch(0, 0)
    first = torch.stack([samples.noise.flatten(1)[:, 0], posteriors(dataset, samples).flatten(1)[:, 0]])
    joint = torch.cat([first, samples.timesteps[None].float()])
    assert (torch.corrcoef(joint) - torch.eye(3)).abs().max() < 5 / 400**0.5
    # A stream that starts anew for the timestep would make it a function of the first number.
    again = samples.timesteps.float().argsort()
    for row in first:
        halves = row[again].view(2, -1).mean(1)
        assert abs(halves[0] - halves[1]) < 5 * (2 / 200) ** 0.5


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(1, 1, 1), (2, 1, 2), (1, 3, 2)])
def test_an_epoch_shows_every_study_once_whatever_the_batch(dataset, batch_size, accumulation, world_size):
    sizes = {"batch_size": batch_size, "accumulation": accumulation, "world_size": world_size}
    feeds = [feed(dataset, rank=rank, **sizes) for rank in range(world_size)]
    whole = batch_size * accumulation * world_size
    seen = [
        case
        for step in range(20 // whole + 1)
        for micro in range(accumulation)
        for one in feeds
        for case in one.micro_batch(step, micro).batch.ids
    ]
    epochs = [seen[first : first + 5] for first in range(0, 20, 5)]
    assert all(sorted(epoch) == sorted(dataset.ids) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [feeds[0].epoch(step) for step in range(6)] == [step * whole // 5 for step in range(6)]


@pytest.mark.parametrize(("accumulation", "world_size"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_shares_make_local_means_the_global_mean(dataset, accumulation, world_size):
    """A mean over processes and micro-steps of (local mean x share) is the mean over all samples that have a class."""
    sizes = {"batch_size": 2, "accumulation": accumulation, "world_size": world_size}
    value = {case: float(number + 1) for number, case in enumerate(dataset.ids)}
    classless = dataset.ids[4]
    uneven = 0
    for step in range(5):
        every = [
            feed(dataset, rank=rank, **sizes).micro_batch(step, micro)
            for rank in range(world_size)
            for micro in range(accumulation)
        ]
        known = [[value[case] for case in part.batch.ids if case != classless] for part in every]
        expected = np.mean(sum(known, []))
        parts = [np.mean(local or [0.0]) * part.class_share for local, part in zip(known, every, strict=True)]
        assert np.mean(parts) == pytest.approx(expected, rel=1e-12)
        uneven += not np.isclose(np.mean([np.mean(local or [0.0]) for local in known]), expected)
    assert uneven or len(every) == 1  # the control: without shares some step is wrong


def test_a_feed_begun_later_goes_on_with_the_same_numbers(dataset):
    whole = [samples for batches in feed(dataset, batch_size=2).steps(0, 5, background=False) for samples in batches]
    later = [samples for batches in feed(dataset, batch_size=2).steps(3, 5, background=False) for samples in batches]
    for one, other in zip(whole[3:], later, strict=True):
        assert one.batch.ids == other.batch.ids and torch.equal(one.timesteps, other.timesteps)
        assert torch.equal(one.latents, other.latents) and torch.equal(one.noise, other.noise)
    assert not torch.equal(whole[2].noise, later[0].noise)
