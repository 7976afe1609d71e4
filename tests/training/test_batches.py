"""BatchStream: the distribution of its random numbers, the order of studies, and the factor of the class loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccella_fast.config import make_config
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.diffusion.objective import Objective
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.training.batches import BatchStream
from training_fixtures import CONFIG, write_prepared

VALUES = 4 * 8 * 8 * 4  # of one latent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    data = write_prepared(tmp_path_factory.mktemp("stream") / "prepared")
    return PreparedDataset(data, make_config({key: value for key, value in CONFIG.items() if key != "name"}))


def make_stream(dataset, *, batch_size=1, accumulation=1, rank=0, world_size=1, seed=3, num_timesteps=1000):
    objective = Objective(Schedule.scaled_linear(num_timesteps))
    sizes = {"batch_size": batch_size, "accumulation": accumulation, "rank": rank, "world_size": world_size}
    return BatchStream(dataset, seed=seed, **sizes, scale=torch.ones(4), objective=objective)


def posteriors(dataset, micro_batch):
    """The standard normal numbers from which the latents were computed; sigma is 0.1."""
    numbers = [dataset.ids.index(case) for case in micro_batch.batch.ids]
    mean = torch.stack([dataset[number].latent_mean for number in numbers])
    return (micro_batch.latents - mean) / 0.1


@pytest.mark.parametrize("count", [4, 7], ids=["T4", "T7"])
def test_timesteps_are_uniform(dataset, count):
    stream = make_stream(dataset, batch_size=100, num_timesteps=count)
    drawn = torch.cat([stream.micro_batch(step, 0).timesteps for step in range(4)])
    found = torch.bincount(drawn, minlength=count)
    expected, sigma = 400 / count, (400 / count * (1 - 1 / count)) ** 0.5
    assert len(found) == count and (found - expected).abs().max() < 5 * sigma


def test_posterior_noise_and_timestep_are_uncorrelated(dataset):
    """Within a sample, and between steps, micro-steps, processes and seeds."""
    places = [(rank, step, micro) for rank in (0, 1) for step in (0, 1, 2) for micro in (0, 1)]
    streams, times = [], []
    for seed in (3, 4):
        for rank, step, micro in places:
            samples = make_stream(dataset, accumulation=2, rank=rank, world_size=2, seed=seed).micro_batch(step, micro)
            streams += [posteriors(dataset, samples).flatten(), samples.noise.flatten()]
            times.append(int(samples.timesteps))
    streams = torch.stack(streams)
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 6 / VALUES**0.5
    assert (streams.mean(1).abs() < 6 / VALUES**0.5).all() and (streams.std(1) - 1).abs().max() < 6 / (
        2 * VALUES
    ) ** 0.5
    assert len(set(times)) > 20
    assert torch.corrcoef(torch.stack([streams[0], streams[0]]))[0, 1] > 0.99  # control: equal streams are correlated


def test_noise_is_independent_of_the_timestep(dataset):
    samples = make_stream(dataset, batch_size=400).micro_batch(0, 0)
    first = torch.stack([samples.noise.flatten(1)[:, 0], posteriors(dataset, samples).flatten(1)[:, 0]])
    joint = torch.cat([first, samples.timesteps[None].float()])
    assert (torch.corrcoef(joint) - torch.eye(3)).abs().max() < 5 / 400**0.5
    # If the generator were seeded again for the timestep, it would be a function of the first number.
    order = samples.timesteps.float().argsort()
    for row in first:
        halves = row[order].view(2, -1).mean(1)
        assert abs(halves[0] - halves[1]) < 5 * (2 / 200) ** 0.5


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"),
    [(1, 1, 1), (2, 1, 2), (1, 3, 2)],
    ids=["B1", "B2-ranks2", "B1-micro3-ranks2"],
)
def test_an_epoch_contains_every_study_once_for_any_batch(dataset, batch_size, accumulation, world_size):
    sizes = {"batch_size": batch_size, "accumulation": accumulation, "world_size": world_size}
    streams = [make_stream(dataset, rank=rank, **sizes) for rank in range(world_size)]
    whole = batch_size * accumulation * world_size
    seen = [
        case
        for step in range(20 // whole + 1)
        for micro in range(accumulation)
        for stream in streams
        for case in stream.micro_batch(step, micro).batch.ids
    ]
    epochs = [seen[first : first + 5] for first in range(0, 20, 5)]
    assert all(sorted(epoch) == sorted(dataset.ids) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [streams[0].epoch(step) for step in range(6)] == [step * whole // 5 for step in range(6)]


@pytest.mark.parametrize(
    ("accumulation", "world_size"),
    [(1, 1), (1, 2), (2, 1), (2, 2)],
    ids=["micro1-ranks1", "micro1-ranks2", "micro2-ranks1", "micro2-ranks2"],
)
def test_class_share_turns_local_means_into_the_global_mean(dataset, accumulation, world_size):
    """The mean over processes and micro-steps of local mean x share is the mean over all samples that have a class."""
    sizes = {"batch_size": 2, "accumulation": accumulation, "world_size": world_size}
    value = {case: float(number + 1) for number, case in enumerate(dataset.ids)}
    classless = dataset.ids[4]
    uneven = 0
    for step in range(5):
        every = [
            make_stream(dataset, rank=rank, **sizes).micro_batch(step, micro)
            for rank in range(world_size)
            for micro in range(accumulation)
        ]
        known = [[value[case] for case in part.batch.ids if case != classless] for part in every]
        expected = np.mean(sum(known, []))
        parts = [np.mean(local or [0.0]) * part.class_share for local, part in zip(known, every, strict=True)]
        assert np.mean(parts) == pytest.approx(expected, rel=1e-12)
        uneven += not np.isclose(np.mean([np.mean(local or [0.0]) for local in known]), expected)
    assert uneven or len(every) == 1  # negative control: without the factor, some step is wrong


def test_a_stream_that_starts_later_has_the_same_numbers(dataset):
    whole = [
        samples for batches in make_stream(dataset, batch_size=2).steps(0, 5, background=False) for samples in batches
    ]
    later = [
        samples for batches in make_stream(dataset, batch_size=2).steps(3, 5, background=False) for samples in batches
    ]
    for one, other in zip(whole[3:], later, strict=True):
        assert one.batch.ids == other.batch.ids and torch.equal(one.timesteps, other.timesteps)
        assert torch.equal(one.latents, other.latents) and torch.equal(one.noise, other.noise)
    assert not torch.equal(whole[2].noise, later[0].noise)
